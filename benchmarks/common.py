"""Time variants in turns, with an A/A band beside every ratio, within a budget of time.

Every round runs each variant once, in an order drawn anew, since rotating would let each one find
the cache as the same other left it. The base runs twice; what its second run differs by is noise.
The order of things is: check, then warm up, then time.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import machine, results
from benchmarks.results import AGAIN, Case, Row, Section

WARM_UP = 20
MOST_ROUNDS = 200
TIME_WAS_UP = "not measured: the time was up"
REPLAYED = 1e-2  # relative error of a graph's replay
REPLAYS, TIMED_AT_ONCE = 5, 1e-3  # of a short graph between two events, or so many seconds


class Variant(NamedTuple):
    """Hold what is timed: ``call`` does ``share`` of the work of the case."""

    call: Callable[[], object]
    share: float = 1.0


class Budget:
    """Keep the wall-clock time left for what is still to do."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def part(self, parts: int) -> float:
        """Return an equal part of what is left, for one of so many."""
        return self.left() / max(1, parts)


def least_rounds() -> int:
    """Return the least rounds of a ratio: 50 on a GPU, 7 where a call takes long."""
    return 50 if torch.cuda.is_available() else 7


def measure(
    variants: dict[str, Variant | str],
    base: str,
    seconds: float,
    *,
    work: int = 1,
    least: int | None = None,
) -> Case:
    """Time variants against ``base`` for about so many seconds.

    Args:
        variants: by name; a string is the reason why that one is not measured.
        base: the variant that the others are compared with.
        seconds: how long; there are ``least`` rounds however long they take.
        work: how many calls of the operation one call of a variant is; the times are of one.
        least: rounds at least; :func:`least_rounds` when ``None``.
    """
    timed = {name: v for name, v in variants.items() if isinstance(v, Variant)}
    if base not in timed:
        return results.case(base, {name: results.empty(str(v)) for name, v in variants.items()})
    timed = {base: timed[base], base + AGAIN: timed[base], **timed}
    times = interleave({n: v.call for n, v in timed.items()}, seconds, least or least_rounds())
    rows: dict[str, Row] = {}
    seconds_of = {n: [t / (v.share * work) for t in times[n]] for n, v in timed.items()}
    for name, found in seconds_of.items():
        rows[name] = _row(found, seconds_of[base])
    for name, variant in variants.items():
        if isinstance(variant, str):
            rows[name] = results.empty(variant)
    return results.case(base, rows)


def interleave(
    calls: dict[str, Callable[[], object]], seconds: float, least: int
) -> dict[str, list[float]]:
    """Time calls in turns and return seconds per call and round."""
    names = list(calls)
    one_round = 0.0
    for name in names:
        start, spent = time.perf_counter(), 0.0
        for _ in range(WARM_UP):
            spent = timed(calls[name])
            if time.perf_counter() - start > 0.1 * seconds / len(names):
                break
        one_round += spent
    rounds = min(MOST_ROUNDS, max(least, int(0.9 * seconds / max(one_round, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            found[name].append(timed(calls[name]))
    return found


def timed(call: Callable[[], object]) -> float:
    """Time one call in seconds, on a GPU between two events, so that waiting costs nothing."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def graph_of(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Capture ``call``, which returns its last output, and return the replay of its CUDA graph.

    Raises:
        RuntimeError: it cannot be captured; a variant that waits for the device cannot.
        AssertionError: the replay gives another output than the call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = call().double()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.fill_(float("nan") if output.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize()
    error = float((output.double() - expected).norm() / expected.norm())
    if not error <= REPLAYED:
        raise AssertionError(f"the graph's replay differs from the call by {error:.1e}")
    return graph.replay


def captured(variant: Variant) -> Variant | str:
    """Return the variant as replays of a CUDA graph, or why there is none.

    Those of a short graph are several, which hide the launch of the first.
    """
    try:
        replay = graph_of(variant.call)
        replays = max(1, min(REPLAYS, math.ceil(TIMED_AT_ONCE / max(timed(replay), 1e-9))))

        def call() -> None:
            for _ in range(replays):
                replay()

        return Variant(call, variant.share * replays)
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # a failed capture must not end the run
        return f"not captured: {str(error).strip().splitlines()[0]}"


def mean_case(cases: Iterable[Case]) -> Case:
    """Take geometric means over cases of one base; a variant empty in any is empty."""
    cases = list(cases)
    rows: dict[str, Row] = {}
    for name, first in cases[0]["rows"].items():
        row = [case["rows"].get(name, results.empty("not in every case")) for case in cases]
        missing = next((r for r in row if "empty" in r), None)
        rows[name] = missing or {
            key: math.exp(statistics.fmean(math.log(r[key]) for r in row))
            for key in first
            if key != "rounds"
        }
    return results.case(cases[0]["base"], rows)


def section(cases: dict[str, Case], before: dict[str, object], **more: object) -> Section:
    """Make a section of a result file, with the clocks ``before`` and now."""
    clocks = {"before": before, "after": machine.clocks()}
    return {"machine": machine.facts(), "clocks": clocks, "cases": cases, **more}


def show(title: str, case: Case) -> None:
    """Print one case as soon as it is there."""
    print(title, *results.lines(case), sep="\n", flush=True)


def failures(section: Section) -> list[str]:
    """List every variant that its check found wrong."""
    return [
        f"{title}: {variant}: {row['empty']}"
        for title, case in section["cases"].items()
        for variant, row in case["rows"].items()
        if str(row.get("empty", "")).startswith("wrong: ")
    ]


def command(
    name: str,
    run: Callable[..., Section | dict[str, Section]],
    description: str | None,
    seconds: float,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Run a benchmark from the command line and save it; exit with 1 if a variant is wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--seconds", type=float, default=seconds, help="about how long")
    if options is not None:
        options(parser)
    arguments = vars(parser.parse_args())
    path = arguments.pop("out") / f"{machine.name()}.json"
    sys.exit("\n".join(keep(path, name, run(**arguments))) or None)


def keep(path: Path, name: str, found: Section | dict[str, Section]) -> list[str]:
    """Save one section, or several by name, and return what failed its check."""
    sections = {name: found} if "cases" in found else found
    wrong = []
    for title, part in sections.items():
        results.save(path, title, part)
        wrong += failures(part)
    print(path)
    return wrong


def _row(times: list[float], base: list[float]) -> Row:
    quotients = [t / b for t, b in zip(times, base, strict=True)]
    row: Row = {}
    for key, values in (("seconds", times), ("ratio", quotients)):
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row |= {key: median, f"{key}_q1": low, f"{key}_q3": high}
    return row | {"rounds": len(times)}

"""Time on a GPU: its limits, each kernel alone, the layers of a block, and the host.

A kernel alone is the slope between graphs of few and of many calls, over inputs that exceed the
cache: what a launch and two events cost is in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import vps
from benchmarks import checks, common, machine, results, shapes, variants
from benchmarks.common import Budget
from benchmarks.gpu.watching import HARNESS
from benchmarks.models import layer as layers
from benchmarks.ops import __main__ as ops
from benchmarks.ops import roofline
from benchmarks.ops.problem import Call, OpCase, Problem
from vps import VPSLinear

MODEL = "Qwen2.5-7B"
MANY, FEW = 200, 20  # calls of a short and of a long kernel in the larger graph
CALLS = 200  # of a layer, without waiting
REPEATS = 9


def median(call: Callable[[], object]) -> float:
    """Return seconds of a call, warmed up."""
    for _ in range(3):
        common.timed(call)
    return statistics.median(common.timed(call) for _ in range(REPEATS))


def limits(out: Path) -> dict[str, float]:
    """Measure what bounds every kernel; microseconds of a node and of a barrier of the grid."""
    found = roofline.measure_peaks(machine.device(), 1.0 if machine.device() == "cuda" else 1e-3)
    if (out / HARNESS).exists() and torch.cuda.is_available():
        run = subprocess.run([out / HARNESS, "time"], capture_output=True, text=True, timeout=30)
        found |= json.loads(run.stdout)
    return found


def problems(device: str) -> Iterator[Problem]:
    """Yield the layers of which each kernel is timed."""
    if device == "cpu":
        yield Problem(64, 112, 16, 300, 4, torch.float32, device)
        return
    for d_in, d_out in ((3584, 3584), (3584, 18944), (18944, 3584)):
        yield Problem(d_in, d_out, 2048, 152064, 4, torch.bfloat16, device)


def slope(call: Call, inputs: list[tuple[torch.Tensor, ...]], many: int) -> float:
    """Return seconds of one call among many in one graph."""

    def repeated(count: int) -> Callable[[], object]:
        run = partial(ops.run_all, call, [inputs[number % len(inputs)] for number in range(count)])
        return common.graph_of(run) if torch.cuda.is_available() else run

    one, more = (median(repeated(count)) for count in (1, 1 + many))
    return (more - one) / many


def alone(case: OpCase, peaks: dict[str, float], device: str) -> str:
    """Return a line with microseconds of each implementation beside the least possible."""
    inputs = ops.many_inputs(case, device)
    least, bound = roofline.least_seconds(case.cost, peaks, inputs[0][0].dtype)
    cells = []
    for name, call in case.calls.items():
        if isinstance(call, str) or device == "cuda" and name == "torch":
            continue
        try:
            many = 2 if device == "cpu" else FEW if least > 5e-5 else MANY
            cells.append(f"{name} {1e6 * slope(call, inputs, many):.1f}")
        except Exception as error:  # one that cannot be captured must not end the visit
            cells.append(f"{name}: {str(error).strip().splitlines()[0][:60]}")
    return f"{case.name}: least {1e6 * least:.1f} ({bound}), {', '.join(cells)} µs"


def block(groups: int, tokens: int, seconds: float, device: str) -> list[str]:
    """Return lines of the seven linear layers of a block, as graphs, in turns."""
    name = MODEL if device == "cuda" else "SmolLM2-135M"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    seven = tuple(shapes.MODELS[name].projections().values())
    work = variants.random_workload(
        seven, groups, tokens, dtype, device, shapes.WEIGHT_BYTES["cuda"] if device == "cuda" else 1
    )
    found = variants.usual(work, variants.CONFIG)
    found[variants.GEMV] = variants.our_gemv(work)
    if tokens == 1 and device == "cuda":
        found["vps triton, PDL"] = variants.launched_early(found["vps triton"])
    blocks = len(work.linears) // work.period
    both = variants.in_graphs(found) if device == "cuda" else found
    case = common.measure(both, variants.BASE, seconds, work=blocks, least=7)
    title = f"7 linears of {name}, {layers.title(groups, tokens, dtype)}"
    return [title, *results.lines(case)]


def host(device: str) -> list[str]:
    """Return lines of microseconds a layer that the host needs, without waiting for the device."""
    d = 3584 if device == "cuda" else 64
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    linear = checks.linear(d, d, dtype, device)
    sharp, x = (
        VPSLinear.from_linear(linear, variants.CONFIG),
        checks.activations(1, 1, d, dtype, device),
    )
    lines = []
    for name, call in {"nn.Linear": linear, **dict.fromkeys(_backends(device), sharp)}.items():
        with vps.backend(name) if name != "nn.Linear" else torch.no_grad():
            inputs = [x.clone() for _ in range(CALLS)]
            call(x)
            _wait()
            begin = time.perf_counter()
            for z in inputs:
                call(z)
            lines.append(
                f"host, {name}: {1e6 * (time.perf_counter() - begin) / CALLS:.1f} µs a layer"
            )
            _wait()
    return lines


def launches(device: str) -> list[str]:
    """Return lines of the kernels that the profiler sees in seven layers, eager and captured."""
    if device != "cuda":
        return ["launches: not here: no CUDA device"]
    seven = tuple(shapes.MODELS[MODEL].projections().values())
    work = variants.random_workload(seven, 1, 1, torch.bfloat16, device, 1)
    lines = []
    for name in _backends(device):
        variant = variants.of_backend(name, work, variants.CONFIG)
        if isinstance(variant, str):
            lines.append(f"launches, {name}: {variant}")
            continue
        graph = common.graph_of(variant.call)  # type: ignore[arg-type]
        for form, call in (("eager", variant.call), ("captured", graph)):
            call()
            _wait()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                call()
                _wait()
            kernels = [e for e in seen.events() if e.device_type.name == "CUDA"]
            lines.append(f"launches, {name}, {form}: {len(kernels)} in seven layers")
    return lines


def _backends(device: str) -> list[str]:
    names = ("triton", "cuda") if device == "cuda" else ("torch",)
    return [name for name in names if vps.backends()[name] is None]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(out: Path, seconds: float) -> None:
    """Measure all, each part for its share of the time, saved as soon as it is known."""
    device, budget = machine.device(), Budget(seconds)
    before = machine.clocks()

    def save(name: str, lines: list[str], **numbers: object) -> None:
        clocks = {"before": before, "after": machine.clocks()}
        section = {"machine": machine.facts(), "clocks": clocks, "lines": lines, **numbers}
        results.save(out / "gpu.json", name, section, results.VISIT)
        print(name, *lines, sep="\n", flush=True)

    torch.manual_seed(0)
    with torch.no_grad():
        peaks = limits(out)
        save("limits", [f"{name}: {value:.4g}" for name, value in peaks.items()], peaks=peaks)
        lines: list[str] = []
        for groups, tokens in ((1, 1), (16, 1), (1, 2048)) if device == "cuda" else ((1, 1),):
            lines += block(groups, tokens, seconds / 12, device)
            save("block", lines)
        save("host", host(device) + launches(device))
        lines = []
        for problem in problems(device):
            for case in (op(problem) for op in (*ops.OPS[-2:], *ops.OPS[:-2])):
                if budget.left() < 5:
                    lines.append(f"{case.name}: {common.TIME_WAS_UP}")
                    continue
                lines.append(alone(case, peaks, device))
                save("each kernel alone", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=55)
    arguments = parser.parse_args()
    run(arguments.out, arguments.seconds)

"""Measure overhead over tokens, width, rank and sequences, beside a modelled limit.

The limit is that of separate passes, ``1 + N·size·(d_in + 3·d_out) / bandwidth / t(base)``: x is
read for its scores, H for its own, and H and y pass once more for the update;
``t(base)`` is the longer of moving W, x and H and of multiplying them, at peaks measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import common, machine, results, shapes, variants
from benchmarks.common import Budget
from benchmarks.ops import roofline
from benchmarks.ops.roofline import Cost
from benchmarks.results import Case, Section
from vps import VPSConfig

LIMIT = "modelled, separate passes"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
RANKS = tuple(range(1, 9))
BATCHES = (1, 4, 16, 64)
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
CENTRE = {"cpu": 2048, "cuda": 4096}
MOST_WORK = {"cpu": 2**33, "cuda": 2**50}  # multiplications of one product


class Point(NamedTuple):
    """Describe one case: ``curve`` varies ``over`` one of the sizes of a square layer."""

    curve: str
    over: str
    d: int
    groups: int
    tokens: int
    rank: int | None  # None: the default, adaptive one

    def title(self) -> str:
        """Name the point, such as ``"over N at d = 2048: N = 16"``."""
        names = {"N": self.tokens, "d": self.d, "rank": self.rank, "sequences": self.groups}
        return f"{self.curve}: {self.over} = {names[self.over]}"

    def value(self) -> int:
        """Return its place on its curve."""
        value = {"N": self.tokens, "d": self.d, "rank": self.rank, "sequences": self.groups}[
            self.over
        ]
        assert value is not None
        return value


def points(device: str) -> Iterator[Point]:
    """Yield every point of every curve, those too large for this device among them."""
    centre = CENTRE[device]
    many = 256 if device == "cpu" else 2048
    for d in (512, centre):
        for tokens in TOKENS:
            yield Point(f"over N at d = {d}", "N", d, 1, tokens, None)
    for tokens in (1, many):
        for d in WIDTHS:
            yield Point(f"over d at N = {tokens}", "d", d, 1, tokens, None)
    for tokens in (1, many):
        for rank in RANKS:
            yield Point(f"over rank at d = {centre}, N = {tokens}", "rank", centre, 1, tokens, rank)
    for groups in BATCHES:
        curve = f"over sequences of 16 tokens at d = {centre}"
        yield Point(curve, "sequences", centre, groups, 16, None)


def why_not(point: Point, device: str) -> str | None:
    """Say why a point is not measured on this device, or ``None``."""
    if point.d**2 * point.groups * point.tokens > MOST_WORK[device]:
        return "not measured: too large for the time on a CPU"
    return None


def measure(
    point: Point, dtype: torch.dtype, device: str, seconds: float, peaks: dict[str, float]
) -> Case:
    """Time nn.Linear, LoRA and the backends at one point, and add the limit there."""
    config = variants.CONFIG
    if point.rank is not None:
        config = VPSConfig(rank=point.rank, adaptive_rank=False)
    torch.manual_seed(0)
    budget = Budget(seconds)
    work = variants.random_workload(
        ((point.d, point.d),),
        point.groups,
        point.tokens,
        dtype,
        device,
        shapes.WEIGHT_BYTES[device],
    )
    found = variants.usual(work, config)
    if device == "cuda":
        found = variants.in_graphs(found)
    case = common.measure(found, variants.BASE, budget.left(), work=len(work.linears))
    case["rows"][LIMIT] = {"ratio": limit(point, dtype, peaks), "modelled": True}
    return case


def limit(point: Point, dtype: torch.dtype, peaks: dict[str, float]) -> float:
    """Return the modelled ratio."""
    rows, d = point.groups * point.tokens, point.d
    base = Cost((d * d + 2 * rows * d) * dtype.itemsize, 2 * rows * d * d)
    extra = 4 * rows * d * dtype.itemsize / peaks["copy"]
    return 1 + extra / roofline.least_seconds(base, peaks, dtype)[0]


def run(seconds: float) -> Section:
    """Measure the section ``scaling``."""
    device = machine.device()
    before = machine.clocks()
    budget = Budget(seconds)
    dtype = DTYPE[device]
    peaks = roofline.measure_peaks(device)
    todo = list(points(device))
    left = sum(why_not(point, device) is None for point in todo)
    found: dict[str, Case] = {}
    with torch.no_grad():
        for point in todo:
            reason = why_not(point, device)
            if reason is None:
                part, left = budget.part(left), left - 1
                reason = None if part > 0 else common.TIME_WAS_UP
            if reason is None:
                case = measure(point, dtype, device, part, peaks)
            else:
                case = results.unmeasured(variants.BASE, reason)
            title = f"{point.title()}, {shapes.title(dtype)}"
            found[title] = case | {"at": point._asdict() | {"value": point.value()}}
            common.show(title, case)
    return common.section(found, before, peaks=peaks)


if __name__ == "__main__":
    common.command("scaling", run, __doc__, seconds=150)

"""Compare what an op must move and compute with what this machine can.

``share = max(bytes / bandwidth, operations / rate) / seconds``, both peaks measured in the same
run. A copy of n bytes counts 2n, those read and those written. What an op finds in a cache, such
as H just written, lets it exceed 1.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from benchmarks import common, results, shapes
from benchmarks.results import Case

COPIED = {"cpu": 256 * 2**20, "cuda": 2**30}
GEMM = {"cpu": 2048, "cuda": 8192}
SECTOR = {"cpu": 64, "cuda": 32}  # bytes that come for one element of a column
REPEATS = 9


class Cost(NamedTuple):
    """Hold the bytes and floating-point operations that any implementation must spend."""

    bytes: float
    operations: float


def measure_peaks(device: str, scale: float = 1.0) -> dict[str, float]:
    """Measure bytes a second of a copy, and operations a second of a GEMM in every dtype.

    Float32 is among them everywhere: it is the dtype of scores.
    """
    source = torch.randn(int(COPIED[device] * scale) // 4, device=device)
    target = torch.empty_like(source)
    peaks = {"copy": 2 * source.numel() * 4 / _median(lambda: target.copy_(source))}
    size = int(GEMM[device] * scale**0.5)
    for dtype in dict.fromkeys((*shapes.DTYPES[device], torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _median(lambda a=a, b=b: a @ b.T)
        peaks[f"gemm {shapes.title(dtype)}"] = 2 * size**3 / seconds
    return peaks


def least_seconds(cost: Cost, peaks: dict[str, float], dtype: torch.dtype) -> tuple[float, str]:
    """Return the time that the machine needs at least, and what bounds it."""
    moving = cost.bytes / peaks["copy"]
    computing = cost.operations / peaks[f"gemm {shapes.title(dtype)}"]
    return max((moving, "bytes"), (computing, "operations"))


def shares(
    case: Case, cost: Cost, peaks: dict[str, float], dtype: torch.dtype
) -> dict[str, object]:
    """Return bytes, operations, the bound, and each variant's share of it."""
    least, bound = least_seconds(cost, peaks, dtype)
    return {
        "bytes": cost.bytes,
        "operations": cost.operations,
        "bound": bound,
        "share": {
            name: least / row["seconds"]
            for name, row in case["rows"].items()
            if "seconds" in row and not name.endswith(results.AGAIN)
        },
    }


def table(cases: dict[str, Case], peaks: dict[str, float]) -> str:
    """Write Markdown, an op a row."""
    names = ", ".join(
        f"{name} {value / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in peaks.items()
    )
    rows = [
        f"Measured in the same run: {names}.",
        "",
        "| op | MB to move | MFLOP | bound by | share of it |",
        "|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        if "roofline" not in case:
            rows.append(f"| {name} | | | | not measured |")
            continue
        roof = case["roofline"]
        share = ", ".join(f"{variant} {value:.0%}" for variant, value in roof["share"].items())
        numbers = f"{roof['bytes'] / 1e6:.3g} | {roof['operations'] / 1e6:.3g}"
        rows.append(f"| {name} | {numbers} | {roof['bound']} | {share or 'not measured'} |")
    return "\n".join(rows)


def _median(call: object) -> float:
    for _ in range(3):
        common.timed(call)  # type: ignore[arg-type]
    return statistics.median(common.timed(call) for _ in range(REPEATS))  # type: ignore[arg-type]

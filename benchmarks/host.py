"""Time what the host does for a step of decoding before the GPU is asked, without a GPU.

Kernels are compiled for sm_90, and a function that does nothing stands for the driver's launch. So
this is the time of Python, Triton and torch, without the launches themselves and without CUDA's
allocator: ``python -m benchmarks.host``. Beside it stands the time of a step of an empty loop,
which tells how fast this machine runs Python.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import vps
from benchmarks import aot
from vps.backends import dispatch, sharing, triton
from vps.masking import STATE, TokenLayout

WIDTH, ROUNDS, CALLS = 3584, 7, 300


class Row(NamedTuple):
    """Hold the cost of one call: thread time in µs, launches, and tensors allocated."""

    name: str
    microseconds: float
    launches: int
    allocations: int


def loop_step() -> float:
    """Return the nanoseconds of one step of ``while i < n: i += 1``, the least of five."""

    def once() -> float:
        begin, at = time.thread_time(), 0
        while at < 1_000_000:
            at += 1
        return (time.thread_time() - begin) * 1e3

    return min(once() for _ in range(5))


class _Counts:
    """Stand for the driver, and count launches and allocations."""

    def __init__(self) -> None:
        self.launches = self.allocations = 0

    def launch(self, *arguments: Any) -> None:
        self.launches += 1

    def counted(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count(*args: Any, **kwargs: Any) -> Tensor:
            self.allocations += 1
            return allocate(*args, **kwargs)

        return count

    def measure(self, name: str, call: Callable[[], Any]) -> Row:
        for _ in range(20):
            call()
        times = []
        for _ in range(ROUNDS):
            begin = time.thread_time()
            for _ in range(CALLS):
                call()
            times.append((time.thread_time() - begin) / CALLS * 1e6)
        self.launches = self.allocations = 0
        empty, new_empty = self.counted(torch.empty), self.counted(Tensor.new_empty)
        with mock.patch.object(torch, "empty", empty):
            with mock.patch.object(Tensor, "new_empty", new_empty):
                call()
        return Row(name, min(times), self.launches, self.allocations)


def _layer(config: vps.VPSConfig, state: Any) -> vps.VPSLinear:
    linear = nn.Linear(WIDTH, WIDTH, False, dtype=torch.bfloat16).requires_grad_(False)
    return vps.VPSLinear.from_linear(linear, config, state)


@torch.no_grad()
def rows() -> list[Row]:
    """Measure one layer, and two layers of one x in the forward of a model."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    counts = _Counts()
    driver.set_active(aot.Device(aot.TARGETS["sm_90"]))
    with (
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "run", counts.launch),
        mock.patch.object(dispatch, "fastest", lambda kind: triton),
    ):
        config, state = vps.VPSConfig(), vps.PolicyState()
        gate, up = (_layer(config, state) for _ in range(2))
        xs = [torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16) for _ in range(2)]

        def selecting() -> None:
            sharing.forget()
            gate(xs[0])

        def both() -> None:
            xs.reverse()
            gate(xs[0])
            up(xs[0])

        found = [
            counts.measure("a layer", lambda: gate(xs[0])),
            counts.measure("a layer that selects features of x", selecting),
        ]
        STATE.layouts.append(TokenLayout((1, 1), None, owner=gate, rows=(1,)))
        try:
            found.append(counts.measure("gate and up, in a model", both))
        finally:
            STATE.layouts.pop()
            STATE.readings.clear()
    return found


def main() -> None:
    """Print the costs of a call."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("benchmarks.host: TRITON_INTERPRET is set, so nothing would be compiled")
    print(f"a step of an empty loop: {loop_step():.1f} ns")
    print(f"{'':38s}{'µs':>7s}{'launches':>10s}{'allocations':>13s}")
    for row in rows():
        print(f"{row.name:38s}{row.microseconds:7.1f}{row.launches:10d}{row.allocations:13d}")


if __name__ == "__main__":
    main()

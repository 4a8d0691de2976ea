"""CUDA graphs of a variant: what the GPU takes for it, without the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-2


def captured(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``call``, which returns its last output.

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
    if not error <= TOLERANCE:
        raise AssertionError(f"the graph's replay differs from the call by {error:.1e}")
    return graph.replay

"""Compile the Triton kernels of the models by running them: ``... compiling PART PARTS``.

Many processes share the work, because compiling takes one core each; the cache is on the disk.
"""

from __future__ import annotations

import sys

import torch

import vps
from benchmarks import checks, machine, shapes
from benchmarks.variants import CONFIG
from vps import VPSLinear

MODEL = "Qwen2.5-7B"
TOKENS = ((1, 1), (16, 1), (1, 64), (1, 512), (1, 2048))


def work(device: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """List ``(d_in, d_out)`` with sequences and tokens, those that compile most first."""
    if device == "cpu":  # in Triton's interpreter
        return [((64, 96), (1, 1)), ((64, 96), (1, 20))]
    pairs = sorted(set(shapes.MODELS[MODEL].projections().values()))
    return [(pair, tokens) for tokens in reversed(TOKENS) for pair in pairs]


def run(part: int, parts: int) -> None:
    """Run this process's share."""
    device = machine.device()
    with torch.no_grad(), vps.backend("triton"):
        for (d_in, d_out), (groups, tokens) in work(device)[part::parts]:
            linear = checks.linear(d_in, d_out, torch.bfloat16, device)
            x = checks.activations(groups, tokens, d_in, torch.bfloat16, device)
            layer = VPSLinear.from_linear(linear, CONFIG)
            print((d_in, d_out), (groups, tokens), float(layer(x).float().norm()))


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))

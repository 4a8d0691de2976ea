"""One linear layer: ``nn.Linear``, the eager reference and ``VPSLinear``, checked, then timed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import interleave, ratios, write
from vps import VPSConfig, VPSLinear, reference

SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (896, 4864))
TOKENS = (1, 32, 256)
CALLS = 20


def main() -> None:
    """Write ``<out>/layer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    with torch.inference_mode():
        for d_in, d_out in SHAPES:
            for tokens in TOKENS:
                name = f"{d_in} to {d_out}, N = {tokens}, float32"
                rows[name] = _measure(d_in, d_out, tokens, device, arguments.rounds)
    write(arguments.out, "layer", rows)


def _measure(
    d_in: int, d_out: int, tokens: int, device: str, rounds: int
) -> dict[str, dict[str, float]]:
    config = VPSConfig()
    linear = nn.Linear(d_in, d_out, bias=False, device=device)
    layer = VPSLinear.from_linear(linear, config)
    x = torch.randn(1, tokens, d_in, device=device)
    expected = reference.vps_linear(x, linear.weight, config=config).y
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)

    def repeated(function):
        def call():
            for _ in range(CALLS):
                function(x)

        return call

    seconds = interleave(
        {
            "nn.Linear": repeated(linear),
            "nn.Linear again": repeated(linear),
            "vps torch": repeated(layer),
            "eager reference": repeated(
                lambda x: reference.vps_linear(x, linear.weight, config=config)
            ),
        },
        rounds,
    )
    return ratios({name: [t / CALLS for t in ts] for name, ts in seconds.items()}, "nn.Linear")


if __name__ == "__main__":
    main()

"""Linear layers as a decoder meets them, each with its own weight and input: ``nn.Linear``, the
backends of ``VPSLinear``, PEFT LoRA and the eager reference; checked, then timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vps
from benchmarks.common import interleave, ratios, write
from vps import VPSConfig, VPSLinear, reference

SHAPES = {
    "cpu": ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (896, 4864)),
    "cuda": ((1536, 8960), (3584, 3584), (3584, 18944), (18944, 3584), (8192, 28672)),
}
TOKENS = {"cpu": (1, 32, 256), "cuda": (1, 16, 2048)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
WEIGHT_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}  # several times the last-level cache
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
CONFIG = VPSConfig()


def main() -> None:
    """Write ``<out>/layer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    with torch.no_grad():
        for dtype in DTYPES[device]:
            for tokens in TOKENS[device]:
                cells = []
                for d_in, d_out in SHAPES[device]:
                    row = _measure(d_in, d_out, tokens, dtype, device, arguments.rounds)
                    rows[f"{d_in} to {d_out}, N = {tokens}, {str(dtype)[6:]}"] = row
                    cells.append(row)
                rows[f"geometric mean, N = {tokens}, {str(dtype)[6:]}"] = _mean(cells)
    write(arguments.out, "layer", rows)


def _measure(
    d_in: int, d_out: int, tokens: int, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    count = max(1, WEIGHT_BYTES[device] // (d_in * d_out * dtype.itemsize))
    options = {"device": device, "dtype": dtype}
    linears = [nn.Linear(d_in, d_out, bias=False, **options) for _ in range(count)]
    inputs = [torch.randn(1, tokens, d_in, **options) for _ in range(count)]
    layers = [VPSLinear.from_linear(linear, CONFIG) for linear in linears]
    adapted = _with_lora(linears)
    variants: dict[str, Callable[[], object]] = {
        "nn.Linear": lambda: _run(linears, inputs),
        "nn.Linear again": lambda: _run(linears, inputs),
        "peft lora r=2": lambda: _run(adapted, inputs),
    }
    for name, reason in vps.backends().items():
        if reason is None and name != "reference" and (name != "triton" or device == "cuda"):
            _check(name, layers[0], inputs[0])
            variants[f"vps {name}"] = lambda name=name: _run(layers, inputs, name)
    few = range(max(1, count // 8))  # it is slow, and the same at every layer
    variants["eager reference"] = lambda: [_reference(linears[i], inputs[i]) for i in few]
    seconds = interleave(variants, rounds)
    seconds["eager reference"] = [t * count / len(few) for t in seconds["eager reference"]]
    per_layer = {name: [t / count for t in times] for name, times in seconds.items()}
    return ratios(per_layer, "nn.Linear")


def _run(layers: list[nn.Module], inputs: list[Tensor], backend: str | None = None) -> None:
    if backend is None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
    else:
        with vps.backend(backend):
            _run(layers, inputs)


def _reference(linear: nn.Linear, x: Tensor) -> Tensor:
    return reference.vps_linear(x, linear.weight, config=CONFIG).y


def _check(name: str, layer: VPSLinear, x: Tensor) -> None:
    with vps.backend(name):
        y = layer(x).double()
    expected = _reference(layer, x).double()
    error = (y - expected).norm() / expected.norm()
    assert error <= TOLERANCE[x.dtype], f"{name} is wrong: relative error {error:.1e}"


def _with_lora(linears: list[nn.Linear]) -> list[nn.Module]:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    return [
        Linear(linear, "default", LoraConfig(r=2, init_lora_weights=False), r=2).eval()
        for linear in linears
    ]


def _mean(cells: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        variant: {
            key: math.exp(sum(math.log(cell[variant][key]) for cell in cells) / len(cells))
            for key in cells[0][variant]
        }
        for variant in cells[0]
    }


if __name__ == "__main__":
    main()

"""Every Triton kernel beside the same op in plain torch, checked in float64, then timed on a GPU.

Calls are replayed from CUDA graphs over inputs that together exceed the cache several times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import interleave, ratios, write
from vps.kernels import decode, delta, entropy, factors, scores, select

POLICY = (1.0, 0.3, 0.8, 1, 4, 32, 32, 1, 1)
BYTES = 256 * 2**20  # four times the largest second-level cache


class Case(NamedTuple):
    """An op: new random inputs, the kernel, and torch to time beside it.

    Right is what ``oracle`` says of the inputs, or torch of the inputs in float64.
    """

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    kernel: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    oracle: Callable[..., Tensor] | None = None


def cases(
    d_in: int, d_out: int, tokens: int, vocabulary: int, r: int, dtype: torch.dtype, device: str
) -> Iterator[Case]:
    """One case of every op for a layer of this shape."""
    policy = torch.tensor(POLICY, dtype=torch.float64, device=device)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def chosen(size: int) -> Tensor:
        return torch.randperm(size, device=device)[None, :r]

    def update(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        return H + 0.5 * (H[..., I_out[0]] @ W[:, I_in[0]].T)

    def kernel_update(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        core = torch.eye(r, device=device)[None]
        gamma = torch.full((1,), 0.5, device=device)
        return delta.launch(H, None, W, I_in, I_out, core, gamma, None, None)

    def decoded(x: Tensor, W: Tensor, I_in: Tensor) -> tuple[Tensor, ...]:
        return decode.launch(x, W, None, None, I_in, None, policy, None, r, True, 0.8, None)

    def decode_oracle(x: Tensor, W: Tensor, I_in: Tensor) -> Tensor:
        """By the kernel's own selection, core and γ, which its tests compare."""
        _, features, core, gamma, _ = decoded(x, W, I_in)
        H = x.double() @ W.double().T
        u = H[..., features[0, 1]] @ core[0].double()
        return H + gamma.double() * (u @ W[:, features[0, 0]].double().T)

    yield Case(
        "column scores", lambda: (new(1, tokens, d_out),),
        lambda v: scores.launch(v, None, True)[0], lambda v: v.abs().sum(1, dtype=_wide(v)),
    )  # fmt: skip
    yield Case(
        "select", lambda: (torch.rand(1, d_out, device=device),),
        lambda s: select.launch(s, r), lambda s: s.topk(r).indices,
    )  # fmt: skip
    yield Case(
        "norms", lambda: (new(d_out, d_in), chosen(d_in), chosen(d_out)),
        lambda *a: torch.stack(factors.launch_norms(*a)),
        lambda W, i, o: torch.stack(
            [W[o].norm(dim=-1, dtype=_wide(W)), W.T[i].norm(dim=-1, dtype=_wide(W))]
        ),
    )  # fmt: skip
    yield Case(
        "delta", lambda: (new(1, tokens, d_out), new(d_out, d_in) / d_in**0.5,
                          chosen(d_in), chosen(d_out)),
        kernel_update, update,
    )  # fmt: skip
    yield Case(
        "token entropy", lambda: (new(1, vocabulary),), entropy.launch,
        lambda z: torch.special.entr(z.softmax(-1, dtype=_wide(z))).sum(-1),
    )  # fmt: skip
    if decode.refusal(new(1, 1, d_in), new(d_out, d_in), r) is None:
        yield Case(
            "decode, beside the product alone",
            lambda: (new(1, 1, d_in), new(d_out, d_in) / d_in**0.5, chosen(d_in)),
            lambda *a: decoded(*a)[0], lambda x, W, i: x @ W.T, decode_oracle,
        )  # fmt: skip


def check(case: Case) -> None:
    """Raise unless the kernel is near torch in float64; exact for indices."""
    arguments = case.inputs()
    result = case.kernel(*arguments)
    if case.oracle is not None:
        expected = case.oracle(*arguments)
    else:
        expected = case.plain(*(a.double() if a.is_floating_point() else a for a in arguments))
    if not result.is_floating_point():
        torch.testing.assert_close(result, expected)
        return
    bound = 1e-6 if result.dtype == torch.float32 else 4e-3
    error = (result.double() - expected).norm() / expected.norm()
    if not error <= bound:
        raise AssertionError(f"{case.name}: relative error {float(error):.1e}")


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _graph(function: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]]) -> Callable[[], None]:
    for arguments in inputs[:3]:
        function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            function(*arguments)
    return graph.replay


def main() -> None:
    """Write ``<out>/kernels.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: no CUDA device; the interpreter's time says nothing")
    rows = {}
    for d_in, d_out in ((3584, 3584), (3584, 18944), (8192, 28672)):
        for case in cases(d_in, d_out, 2048, 151936, 4, torch.bfloat16, "cuda"):
            check(case)
            first = case.inputs()
            size = sum(a.numel() * a.element_size() for a in first)
            count = min(32, max(4, BYTES // size))
            inputs = [first, *(case.inputs() for _ in range(count - 1))]
            plain = _graph(case.plain, inputs)
            variants = {
                "torch": plain,
                "torch again": plain,
                "kernel": _graph(case.kernel, inputs),
            }
            seconds = interleave(variants, arguments.rounds)
            per_call = {name: [s / count for s in times] for name, times in seconds.items()}
            rows[f"{case.name}, {d_in} to {d_out}, bfloat16"] = ratios(per_call, "torch")
    write(arguments.out, "kernels", rows)


if __name__ == "__main__":
    main()

"""Make a case of every Triton kernel beside the same in plain torch (SPEC §2–§5, §7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import vps
from benchmarks import shapes
from benchmarks.ops.problem import OpCase, Problem, of_kernel
from benchmarks.ops.roofline import SECTOR, Cost
from vps import reference
from vps.algorithm import coupling, fixed, gradient, selection
from vps.algorithm.weight import gather

GAMMA, TAU = 0.5, 0.8
KEYS, SHARING = 4, 7  # seven query heads share a key head, as in Qwen2.5-7B


def scores(problem: Problem) -> OpCase:
    """Sum ``Σ|H|`` of each output feature of a layer."""

    def triton(H: Tensor) -> Tensor:
        from vps.kernels import scores

        return scores.launch(H, None, True)[0]

    shape = (1, problem.tokens, problem.d_out)
    elements = problem.tokens * problem.d_out
    return of_kernel(
        f"scores of H, {problem.title(problem.tokens)}",
        lambda: (problem.normal(*shape),),
        lambda H: selection.statistics(H, None, None, True)[0],
        triton,
        lambda H: H.double().abs().sum(1),
        Cost(elements * problem.dtype.itemsize, 3 * elements),
    )


def select(problem: Problem) -> OpCase:
    """Select the r output features of largest score, from scores that hold ties."""

    def triton(scores: Tensor) -> Tensor:
        from vps.kernels import select

        return select.launch(scores, problem.r)

    return of_kernel(
        f"select, {problem.title(problem.tokens)}",
        lambda: (_tied(problem, problem.d_out),),
        lambda scores: selection.top_k(scores, problem.r),
        triton,
        lambda scores: reference.top_k(scores[0], problem.r)[None],
        Cost(4 * problem.d_out, problem.d_out),
    )


def features(problem: Problem) -> OpCase:
    """Select output features from small integers, whose sums are exact and hold ties."""

    def plain(H: Tensor) -> Tensor:
        return selection.top_k(selection.statistics(H, None, None, True)[0], problem.r)

    def triton(H: Tensor) -> Tensor:
        from vps.kernels.prefill import features

        return features.launch(H, None, problem.r, True)[0]

    shape = (1, problem.tokens, problem.d_out)
    elements = problem.tokens * problem.d_out
    return of_kernel(
        f"features of H, {problem.title(problem.tokens)}",
        lambda: (torch.randint(-9, 10, shape, device=problem.device).to(problem.dtype),),
        plain,
        triton,
        lambda H: reference.top_k(H[0].double().abs().sum(0), problem.r)[None],
        Cost(elements * problem.dtype.itemsize, 3 * elements),
    )


def couple(problem: Problem) -> OpCase:
    """Select for query and key together; a key has a seventh of the layer's features."""
    size = max(1, problem.d_out // (KEYS * SHARING))
    heads = KEYS * SHARING
    d_q, d_k = heads * size, KEYS * size

    def plain(s_q: Tensor, s_k: Tensor, I_in: Tensor) -> Tensor:
        return torch.stack(coupling.select(s_q, s_k, problem.r, heads, KEYS), 1)

    def triton(s_q: Tensor, s_k: Tensor, I_in: Tensor) -> Tensor:
        from vps.kernels.decode import couple

        energies = [s_q[:, 0], s_k[:, 0]]
        return couple.launch(s_q, s_k, energies, None, I_in, heads, KEYS)[1][:, 1:]

    def oracle(*scores: Tensor) -> Tensor:
        return plain(*(z.cpu() for z in scores)).to(scores[0].device)

    return of_kernel(
        f"couple, {heads} heads and {KEYS} of {size}",
        lambda: (_tied(problem, d_q), _tied(problem, d_k), problem.features(problem.d_in)),
        plain,
        triton,
        oracle,
        Cost(4 * (d_q + d_k), d_q + d_k),
    )


def factors(problem: Problem) -> OpCase:
    """Clip the selected rows and columns of W: ``C = diag(1/s_c)`` of a fixed policy."""
    d_in, d_out, r = problem.d_in, problem.d_out, problem.r
    policy = torch.tensor([1, GAMMA, GAMMA, r, r, r, r, 1, 1], dtype=torch.float64)
    policy = policy.to(problem.device)

    def core(W: Tensor, I_in: Tensor, I_out: Tensor, dtype: torch.dtype) -> Tensor:
        A = torch.linalg.vector_norm(W.index_select(0, I_out[0]), dim=1, dtype=dtype)
        B = torch.linalg.vector_norm(W.index_select(1, I_in[0]), dim=0, dtype=dtype)
        return torch.diag((A * B / TAU).clamp_min(1).reciprocal())[None]

    def triton(W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        from vps.kernels import columns
        from vps.kernels.prefill import factors

        found = columns.launch(W, I_in)
        return factors.launch(W, found, I_out, None, policy, None, None, TAU, None)[1]

    return of_kernel(
        f"factors, {problem.title(problem.tokens)}",
        lambda: (problem.normal(d_out, d_in), problem.features(d_in), problem.features(d_out)),
        lambda *arguments: core(*arguments, torch.float32),
        triton,
        lambda *arguments: core(*arguments, torch.float64),
        Cost(
            r * (d_in * problem.dtype.itemsize + d_out * SECTOR[problem.device]),
            2 * r * (d_in + d_out),
        ),
    )


def delta(problem: Problem) -> OpCase:
    """Update a whole layer, ``H + γ·H[:, I_out] Bᵀ`` with ``B = W[:, I_in]``."""
    d_in, d_out, tokens, r = problem.d_in, problem.d_out, problem.tokens, problem.r
    core = torch.eye(r, device=problem.device)[None]
    gamma = torch.full((1,), GAMMA, device=problem.device)

    def plain(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        u = gather(H, I_out) * GAMMA
        return torch.baddbmm(H, u, gradient.columns(W, I_in).permute(1, 2, 0))

    def triton(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        from vps.kernels import columns
        from vps.kernels.prefill import delta

        return delta.launch(H, None, columns.launch(W, I_in), I_out, core, gamma, None, None)[0]

    elements = tokens * d_out
    bytes_moved = 2 * elements * problem.dtype.itemsize + r * d_out * SECTOR[problem.device]
    return of_kernel(
        f"delta, {problem.title(tokens)}",
        lambda: (
            problem.normal(1, tokens, d_out),
            problem.normal(d_out, d_in) * d_in**-0.5,
            problem.features(d_in),
            problem.features(d_out),
        ),
        plain,
        triton,
        lambda H, W, I_in, I_out: plain(H.double(), W.double(), I_in, I_out),
        Cost(bytes_moved, 2 * r * elements),
    )


def edited(problem: Problem) -> OpCase:
    """Decode a token after its prompt has decided, ``W(x + Σ_c e_c u(I_in[c]))``."""
    d_in, d_out, r = problem.d_in, problem.d_out, problem.r

    def plain(x: Tensor, W: Tensor, I_in: Tensor, through: Tensor) -> Tensor:
        return F.linear(fixed.edited(x, I_in.unsqueeze(1), through.mT), W)

    def triton(x: Tensor, W: Tensor, I_in: Tensor, through: Tensor) -> Tensor:
        from vps.kernels.decode import edited

        return edited.launch(x, W, None, I_in, through)

    def cpp(x: Tensor, W: Tensor, I_in: Tensor, through: Tensor) -> Tensor:
        return torch.ops.vps.edited(x, W, None, I_in, through)

    missing = "not in C++" if problem.device == "cuda" else vps.backends()["cpp"]
    elements = d_in * (d_out + r + 1) + d_out
    return of_kernel(
        f"edited, {problem.title(1)}",
        lambda: (
            problem.normal(1, 1, d_in),
            problem.normal(d_out, d_in) * d_in**-0.5,
            problem.features(d_in),
            problem.normal(1, r, d_in) * d_in**-0.5,
        ),
        plain,
        triton,
        lambda x, W, I_in, through: plain(x.double(), W.double(), I_in, through.double()),
        Cost(elements * problem.dtype.itemsize, 2 * d_in * (d_out + r)),
        cpp=missing or cpp,
    )


def entropy(problem: Problem) -> OpCase:
    """Compute the entropy of the next-token softmax of one position."""
    vocabulary = problem.vocabulary

    def plain(logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.special.entr(logits.softmax(-1, dtype=dtype)).sum(-1)

    def triton(logits: Tensor) -> Tensor:
        from vps.kernels import entropy

        return entropy.launch(logits)

    return of_kernel(
        f"entropy, vocabulary {vocabulary}, N = 1, {shapes.title(problem.dtype)}",
        lambda: (problem.normal(1, vocabulary),),
        plain,
        triton,
        lambda logits: plain(logits, torch.float64),
        Cost(vocabulary * problem.dtype.itemsize, 5 * vocabulary),
        cpp="not in C++",
    )


def _tied(problem: Problem, width: int) -> Tensor:
    """Draw scores ``[1, width]`` that hold ties."""
    return torch.rand(1, width, device=problem.device).mul_(512).floor_()

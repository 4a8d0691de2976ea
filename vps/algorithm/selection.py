"""Score and select features, with ties to the lower index, and couple them (SPEC §2 and §3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor

from vps.algorithm import tracing
from vps.constants import constant, tie_breakers

CACHED_ELEMENTS = 2**17


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def clean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set non-finite elements and uncounted tokens of ``values`` [G, T, d] to 0, in a copy."""
    finite = values.nan_to_num(0.0, 0.0, 0.0)
    return finite if mask is None else finite.masked_fill_(~mask.unsqueeze(-1), 0.0)


def statistics(
    values: Tensor, mask: Tensor | None, count: Tensor | None, energy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return scores and energy over the counted tokens (SPEC §2).

    Args:
        values: x or H, ``[G, T, d]``.
        mask: bool ``[G, T]``, or ``None`` when all count.
        count: counted tokens of each group, ``[G]``, at least 1; ``None`` with no mask.
        energy: whether to take the energy too.

    Returns:
        The sum of |values| ``[G, d]``, which orders features as the mean does, and the mean of
        values² ``[G]`` or ``None``, in the accumulation dtype. Non-finite elements count as 0.
    """
    dtype = accumulation_dtype(values.dtype)
    if energy and mask is None and values.shape[0] == 1 and is_read_freely(values):
        total = sum_of_squares(values[0])
        if math.isfinite(total):  # then so is every element
            size = values.abs()
            sums = size.squeeze(1).to(dtype) if values.shape[1] == 1 else size.sum(1, dtype=dtype)
            return sums, sums.new_tensor([total / values.numel()])
    scores, squares = [], []
    for block, counted in _blocks(values, mask):
        size = block.abs().to(dtype).nan_to_num_(0.0, 0.0, 0.0)
        if counted is not None:
            size.masked_fill_(~counted.unsqueeze(-1), 0.0)
        alone = size.shape[1] == 1
        scores.append(size.squeeze(1) if alone else size.sum(1))
        if energy:
            squares.append((size * size if alone else size.mul_(size)).sum((1, 2)))
    sums = scores[0] if len(scores) == 1 else torch.cat(scores)
    if values.shape[1] > 1:
        sums.clamp_(max=torch.finfo(dtype).max)  # sums that overflow stay in order
    if not energy:
        return sums, None
    mean = squares[0] if len(squares) == 1 else torch.cat(squares)
    if torch.jit.is_tracing():  # a trace must hold for any number
        mean = mean / values.shape[2] / (values.shape[1] if count is None else count)
        return sums, mean
    mean.div_(constant(values.shape[2] * (values.shape[1] if count is None else 1), mean))
    return sums, mean if count is None else mean.div_(count)


def counted_statistics(
    values: Tensor, mask: Tensor | None, energy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`statistics` with the tokens of ``mask`` counted."""
    count = None if mask is None else mask.sum(1).clamp_(min=1)
    return statistics(values, mask, count, energy)


def sum_of_squares(values: Tensor) -> float:
    """Return the sum of squares of values ``[d]`` or ``[T, d]`` on a CPU, perhaps inf or NaN.

    Rows are summed in float64, because float32 sums in torch lose 1e-4 over a long prompt.
    """
    dtype = accumulation_dtype(values.dtype)
    if values.dim() == 1 and values.dtype == dtype:
        return torch.dot(values, values).item()
    rows = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)
    norm: float = torch.linalg.vector_norm(rows, dtype=torch.float64).tolist()
    return norm * norm


def is_read_freely(values: Tensor) -> bool:
    """Return whether Python may read a number from ``values`` now.

    It may on a CPU, where nothing waits, unless a compiler, tracer, mode or functional transform
    looks on.
    """
    return (
        values.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _blocks(values: Tensor, mask: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Split values and mask into blocks of groups, on a CPU to fit the second-level cache.

    A group is summed in the same order whatever the other groups.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return [(values, mask)]
    groups = max(1, CACHED_ELEMENTS // (values.shape[1] * values.shape[2]))
    blocks = values.split(groups)
    return zip(blocks, repeat(None) if mask is None else mask.split(groups), strict=False)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return indices of the k largest scores, best first, ties to the lower index.

    torch.topk promises no order among ties, so they are broken before it.

    Args:
        scores: ``[G, d]``, at least 0.
        k: how many indices.
    """
    if scores.dim() == 2 and is_read_freely(scores):
        best, index = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
        settled = (best[:, :-1] > best[:, 1:]).all(1)  # neither tied nor NaN
        if not settled.all():
            index[~settled, :k] = _stable_top_k(scores[~settled], k)
        return index[:, :k].contiguous()
    return _stable_top_k(scores, k)


def _stable_top_k(scores: Tensor, k: int) -> Tensor:
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    offsets, factors = tie_breakers(scores.shape[-1], scores.device)
    return torch.addcmul(offsets, factors, scores).topk(k, dim=-1).indices


def random_features(seed: int, d_in: int, d_out: int, r: int) -> tuple[tuple[int, ...], ...]:
    """Return the first r input and output features that ``builder="random"`` draws."""
    generator = torch.Generator().manual_seed(seed)
    I_in = torch.randperm(d_in, generator=generator)[:r].tolist()
    I_out = torch.randperm(d_out, generator=generator)[:r].tolist()
    return tuple(I_in), tuple(I_out)


# torch.compiler.assume_constant_result sets this too, but imports torch._dynamo (1 s).
random_features._dynamo_marked_constant = True  # type: ignore[attr-defined]


def coupling(X_A: Tensor, Y: Tensor, inactive: Tensor | None, alpha: float) -> Tensor:
    """Return the columns ``m_c`` of the SC core, each of norm 1 or 0: ``Ṽ = V · coupling``.

    ``Ṽ = V Tᵀ`` with ``T = (X_AᵀX_A + αI)⁻¹ X_AᵀY``. V is one-hot, so a column of Ṽ has the norm of
    its row of T.

    Args:
        X_A: cleaned selected inputs, ``[G, T, r]``.
        Y: cleaned selected outputs, ``[G, T, r]``.
        inactive: bool ``[G, r]``, columns that take no part, or ``None``.
        alpha: the ridge, positive.

    Returns:
        float64 ``[G, r, r]``, because float32 loses α beside the square of an outlier feature.
    """
    X, Y = X_A.double(), Y.double()
    if inactive is not None:
        X, Y = (z.masked_fill(inactive.unsqueeze(1), 0.0) for z in (X, Y))
    # With fewer tokens than columns XᵀX + αI is nearly singular. An export holds for any number.
    few = not tracing.is_exporting() and X.shape[1] < X.shape[2]
    gram = X @ X.mT if few else X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).add_(alpha)
    solution = torch.linalg.solve_ex(gram, Y if few else X.mT @ Y)[0]
    T = X.mT @ solution if few else solution
    norm = torch.linalg.vector_norm(T, dim=-1, keepdim=True)
    return (T / norm).masked_fill(norm == 0, 0.0).mT

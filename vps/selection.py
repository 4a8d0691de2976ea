"""Scores, top-k with ties to the lower index, and the SC coupling (SPEC §2 and §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from vps.constants import constant, tie_breakers

SERIAL_ELEMENTS = 2**15 - 1  # torch splits an elementwise operation over threads from 2**15
CACHED_ELEMENTS = 2**16  # for each of many threads


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def clean(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` [G, T, d] with non-finite elements and uncounted tokens (mask [G, T]) at 0."""
    finite = values.nan_to_num(0.0, 0.0, 0.0)
    return finite if mask is None else finite.masked_fill_(~mask.unsqueeze(-1), 0.0)


def statistics(
    values: Tensor, mask: Tensor | None, count: Tensor | None, energy: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores and energy of SPEC §2 over the counted tokens.

    Args:
        values: x or H, ``[G, T, d]``.
        mask: bool ``[G, T]``, or ``None`` when all count.
        count: counted tokens of each group, ``[G]``, at least 1; ``None`` with no mask.
        energy: whether to take the energy too.

    Returns:
        Sum of |values| ``[G, d]``, which orders features as the mean does, and mean of values²
        ``[G]`` or ``None``, in the accumulation dtype. Non-finite elements count as 0.
    """
    length, width = values.shape[1:]
    dtype = accumulation_dtype(values.dtype)
    scores: Tensor | None = None
    squares: Tensor | None = None
    for start in range(0, length, rows := _block_rows(values)):
        block = values[:, start : start + rows] if rows < length else values
        size = block.abs().to(dtype).nan_to_num_(0.0, 0.0, 0.0)
        if mask is not None:
            size.masked_fill_(~mask[:, start : start + rows].unsqueeze(-1), 0.0)
        part = size.squeeze(1) if length == 1 else size.sum(1)
        scores = part if scores is None else scores.add_(part)
        if energy:
            part = (size.square() if length == 1 else size.square_()).sum((1, 2))
            squares = part if squares is None else squares.add_(part)
    assert scores is not None
    if length > 1:
        scores.clamp_(max=torch.finfo(dtype).max)  # sums that overflow stay in order
    if squares is not None:
        squares.div_(constant(width * (length if count is None else 1), squares))
        if count is not None:
            squares.div_(count)
    return scores, squares


def _block_rows(values: Tensor) -> int:
    """Tokens to take at once: on a CPU few enough for the second-level cache.

    Few threads lose more by waiting for each other than they gain. Never depends on the batch,
    so sums come in the same order for every batch size.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.shape[1]
    threads = torch.get_num_threads()
    elements = SERIAL_ELEMENTS if threads <= 4 else threads * CACHED_ELEMENTS
    return max(4, elements // values.shape[2])


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of scores ``[G, d]`` ≥ 0, best first, ties to the lower index.

    torch.topk promises no order among ties, so they are broken for it.
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    offsets, factors = tie_breakers(scores.shape[-1], scores.device)
    return torch.addcmul(offsets, factors, scores).topk(k, dim=-1).indices


def random_features(seed: int, d_in: int, d_out: int, r: int) -> tuple[tuple[int, ...], ...]:
    """The first r input and output features that ``builder="random"`` draws."""
    generator = torch.Generator().manual_seed(seed)
    I_in = torch.randperm(d_in, generator=generator)[:r].tolist()
    I_out = torch.randperm(d_out, generator=generator)[:r].tolist()
    return tuple(I_in), tuple(I_out)


# As torch.compiler.assume_constant_result does, which would import torch._dynamo with vps (1 s).
random_features._dynamo_marked_constant = True  # type: ignore[attr-defined]


def coupling(X_A: Tensor, Y: Tensor, inactive: Tensor | None, alpha: float) -> Tensor:
    """Columns ``m_c`` of the SC core: ``Ṽ = V · coupling``, each of norm 1 or 0.

    ``Ṽ = V Tᵀ`` with ``T = (X_AᵀX_A + αI)⁻¹ X_AᵀY``; a column's norm is that of its row of T,
    since V is one-hot.

    Args:
        X_A: cleaned selected inputs, ``[G, T, r]``.
        Y: cleaned selected outputs, ``[G, T, r]``.
        inactive: bool ``[G, r]``, columns that take no part, or ``None``.
        alpha: the ridge, positive.

    Returns:
        float64 ``[G, r, r]``: beside the square of an outlier feature float32 loses α altogether.
    """
    X, Y = X_A.double(), Y.double()
    if inactive is not None:
        X, Y = (z.masked_fill(inactive.unsqueeze(1), 0.0) for z in (X, Y))
    few = X.shape[1] < X.shape[2]  # fewer tokens than columns: only α keeps XᵀX from singular
    gram = X @ X.mT if few else X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).add_(alpha)
    T = (
        X.mT @ torch.linalg.solve_ex(gram, Y)[0]
        if few
        else (torch.linalg.solve_ex(gram, X.mT @ Y)[0])
    )
    norm = torch.linalg.vector_norm(T, dim=-1, keepdim=True)
    return (T / norm).masked_fill(norm == 0, 0.0).mT

"""Sum inner products of the selected vectors in part: of tokens, rows and columns (SPEC §3, §4).

``X_AᵀX_A`` and ``X_AᵀY`` over the counted tokens of a group in float64, with ``X_A = x[:, I_in]``
and ``Y = H[:, I_out]``; ``W_O W_Oᵀ`` of the rows I_out of W; ``BᵀB`` of the columns I_in. Programs
sum stretches in a fixed order, which ``core`` adds.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.columns import Columns
from vps.kernels.device import accumulation, on_its_device
from vps.kernels.scores import mask_strides


@triton.jit
def cross(a, b):
    """Return ``a bᵀ`` [RANKS, RANKS] of two blocks [RANKS, BLOCK]."""
    return tl.sum(a[:, None, :] * b[None, :, :], axis=2)


@triton.jit
def store_matrix(matrix_ptr, at, matrix, ranks, R: tl.constexpr):
    """Store a matrix [RANKS, RANKS] as number ``at`` of matrices [R, R]."""
    address = matrix_ptr + at * (R * R) + ranks[:, None] * R + ranks[None, :]
    tl.store(address, matrix, mask=(ranks < R)[:, None] & (ranks < R)[None, :])


@triton.jit
def load_selected(
    values_ptr,  # [T, d] of the group
    index_ptr,  # int64 [R] of the group
    rows,  # int64 [BLOCK]
    counted,  # bool [BLOCK]
    ranks,  # [RANKS]
    stride_t,
    stride_d,
    R: tl.constexpr,
):
    """Load selected features of some tokens [RANKS, BLOCK] in float64, 0 if not finite."""
    index = tl.load(index_ptr + ranks, mask=ranks < R, other=0)
    address = values_ptr + index[:, None] * stride_d + rows[None, :] * stride_t
    inside = (ranks < R)[:, None] & counted[None, :]
    values = tl.load(address, mask=inside, other=0.0).to(tl.float64)
    return tl.where(tl.abs(values) < float("inf"), values, 0.0)


@triton.jit
def gram_vectors(
    vectors_ptr,
    index,  # int64 [RANKS]
    length,
    begin,
    ranks,  # [RANKS]
    stride_index,
    stride_along,
    ACC: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the inner products of the listed vectors over one stretch, [RANKS, RANKS]."""
    total = tl.zeros([RANKS, RANKS], dtype=ACC)
    for step in range(STEPS):
        at = begin + step * BLOCK + tl.arange(0, BLOCK)
        offsets = index[:, None] * stride_index + at.to(tl.int64)[None, :] * stride_along
        inside = (ranks < R)[:, None] & (at < length)[None, :]
        part = tl.load(vectors_ptr + offsets, mask=inside, other=0.0).to(ACC)
        total += cross(part, part)
    return total


@triton.jit(do_not_specialize=["tokens", "stride_mask_g"])
def gram_kernel(
    x_ptr,  # [G, T, d_in]
    H_ptr,  # [G, T, d_out]
    mask_ptr,  # bool [G, T] or None
    weight_ptr,  # [d_out, d_in]
    columns_ptr,  # [G·R, d_out], or [d_in, d_out] with EVERY
    I_in_ptr,  # int64 [G, R]
    I_out_ptr,  # int64 [G, R]
    tokens_ptr,  # float64 [G, splits of T, 2, R, R] or None
    rows_ptr,  # [G, splits of d_in, R, R] or None
    column_grams_ptr,  # [G, splits of d_out, R, R] or None
    tokens,
    d_in,
    d_out,
    stride_x_g,
    stride_x_t,
    stride_x_d,
    stride_H_g,
    stride_H_t,
    stride_H_d,
    stride_mask_g,
    stride_mask_t,
    stride_out,
    stride_in,
    stride_I_in,
    stride_I_out,
    ACC: tl.constexpr,
    EVERY: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kind = tl.program_id(2)
    begin = split * (BLOCK * STEPS)
    ranks = tl.arange(0, RANKS)
    I_in_group = I_in_ptr + group * stride_I_in
    I_out_group = I_out_ptr + group * stride_I_out
    if tokens_ptr is not None:
        if (kind == 0) & (begin < tokens):
            gram = tl.zeros([RANKS, RANKS], dtype=tl.float64)
            mixed = tl.zeros([RANKS, RANKS], dtype=tl.float64)
            for step in range(STEPS):
                token = begin + step * BLOCK + tl.arange(0, BLOCK)
                row = token.to(tl.int64)
                counted = token < tokens
                if mask_ptr is not None:
                    mask_rows = mask_ptr + group * stride_mask_g + row * stride_mask_t
                    counted = counted & (tl.load(mask_rows, mask=counted, other=0) != 0)
                X = load_selected(x_ptr + group * stride_x_g, I_in_group, row, counted, ranks,
                                  stride_x_t, stride_x_d, R)  # fmt: skip
                Y = load_selected(H_ptr + group * stride_H_g, I_out_group, row, counted, ranks,
                                  stride_H_t, stride_H_d, R)  # fmt: skip
                gram += cross(X, X)
                mixed += cross(X, Y)
            slot = (group * tl.cdiv(tokens, BLOCK * STEPS) + split) * 2
            store_matrix(tokens_ptr, slot, gram, ranks, R)
            store_matrix(tokens_ptr, slot + 1, mixed, ranks, R)
    if rows_ptr is not None:
        if (kind == 1) & (begin < d_in):
            index = tl.load(I_out_group + ranks, mask=ranks < R, other=0)
            of_rows = gram_vectors(weight_ptr, index, d_in, begin, ranks, stride_out, stride_in,
                                   ACC, R, RANKS, BLOCK, STEPS)  # fmt: skip
            at = group * tl.cdiv(d_in, BLOCK * STEPS) + split
            store_matrix(rows_ptr, at, of_rows, ranks, R)
    if column_grams_ptr is not None:
        if (kind == 2) & (begin < d_out):
            slots = group * R + ranks
            if EVERY:
                slots = tl.load(I_in_group + ranks, mask=ranks < R, other=0)
            of_columns = gram_vectors(columns_ptr, slots, d_out, begin, ranks, d_out, 1, ACC, R,
                                      RANKS, BLOCK, STEPS)  # fmt: skip
            to = group * tl.cdiv(d_out, BLOCK * STEPS) + split
            store_matrix(column_grams_ptr, to, of_columns, ranks, R)


class Grams(NamedTuple):
    """Hold the sums in part, ``None`` where they were not asked for."""

    tokens: Tensor | None  # float64 [G, splits, 2, r, r]: X_AᵀX_A and X_AᵀY
    rows: Tensor | None  # [G, splits, r, r]
    columns: Tensor | None  # [G, splits, r, r]


@on_its_device
def launch(
    x: Tensor,
    H: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    columns: Columns,
    I_out: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Grams:
    """Sum inner products of what every group selects.

    Args:
        x: ``[G, T, d_in]``, any strides.
        H: ``[G, T, d_out]``, any strides.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        weight: ``[d_out, d_in]``, any strides.
        columns: its columns I_in ``[G, r]``, filled; r at most 8.
        I_out: int64 ``[G, r]``, rows contiguous.
        wanted: whether products of tokens, rows and columns are asked for.
    """
    (groups, r), tokens = columns.I_in.shape, x.shape[1]
    dtype, acc = accumulation(weight.dtype)
    d_out, d_in = weight.shape
    tile = tuning.gram(r)
    splits = [tuning.steps(n, tile["BLOCK"] * tile["STEPS"]) for n in (tokens, d_in, d_out)]

    def new(kind: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        if not wanted[kind]:
            return None
        return torch.empty(groups, splits[kind], *shape, r, r, dtype=dtype, device=x.device)

    grams = Grams(new(0, 2, dtype=torch.float64), new(1), new(2))
    most = max((n for n, asked in zip(splits, wanted, strict=True) if asked), default=0)
    if groups > 0 and most > 0:
        gram_kernel[groups, most, 3](
            x, H, mask, weight, columns.values, columns.I_in, I_out, *grams, tokens, d_in, d_out,
            *x.stride(), *H.stride(), *mask_strides(mask), *weight.stride(),
            columns.I_in.stride(0), I_out.stride(0), ACC=acc, EVERY=columns.every, R=r,
            RANKS=tuning.power_of_2(r), **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return grams

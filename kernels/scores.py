"""Compute column scores and energy of a group of tokens in one pass (SPEC §2).

``s[j] = Σ_n |v[n, j]|`` and ``E = mean_{n, j} v[n, j]²`` over the counted tokens n; a non-finite
element counts 0. Sums are taken in two phases of fixed order, without atomics.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.columns import Columns, gather
from vps.kernels.device import accumulation, on_its_device


@triton.jit
def magnitude(values, ACC: tl.constexpr):
    """Return |values| in ACC with every non-finite element 0."""
    size = tl.abs(values.to(ACC))
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def sum_tokens(
    values_ptr,  # [G, T, D]
    mask_ptr,  # bool [G, T] or None
    scores_ptr,  # [G, splits, D]
    squares_ptr,  # [G, splits, tiles of D] or None
    group,
    split,
    tile,
    splits,
    tokens,
    width,
    stride_g,
    stride_t,
    stride_d,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum |values| and values² of one stretch of tokens and one tile of columns."""
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = columns < width
    base = values_ptr + group * stride_g + columns.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
    squares = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
    for start in range(0, TOKENS, BLOCK_T):
        rows = split * TOKENS + start + tl.arange(0, BLOCK_T)
        rows_64 = rows.to(tl.int64)
        counted = rows < tokens
        if mask_ptr is not None:
            mask_rows = mask_ptr + group * stride_mask_g + rows_64 * stride_mask_t
            counted = counted & (tl.load(mask_rows, mask=counted, other=0) != 0)
        inside = counted[:, None] & in_width[None, :]
        values = tl.load(base + rows_64[:, None] * stride_t, mask=inside, other=0.0)
        size = magnitude(values, ACC)
        total += size
        if squares_ptr is not None:
            squares += size * size
    slot = group * splits + split
    tl.store(scores_ptr + slot * width + columns, tl.sum(total, axis=0), mask=in_width)
    if squares_ptr is not None:
        tiles = tl.cdiv(width, BLOCK_D)
        tl.store(squares_ptr + slot * tiles + tile, tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["slots", "splits", "tokens", "stride_mask_g"])
def partial_kernel(
    values_ptr,  # [G, T, D]
    mask_ptr,  # bool [G, T] or None
    scores_ptr,  # [G, splits, D]
    squares_ptr,  # [G, splits, tiles of D] or None
    weight_ptr,  # [D, d_in] or None
    I_in_ptr,  # int64 [G, R] or None
    columns_ptr,  # [G·R, D] or None
    column_squares_ptr,  # [tiles of D, G·R] or None
    slots,
    splits,
    tokens,
    width,
    stride_g,
    stride_t,
    stride_d,
    stride_mask_g,
    stride_mask_t,
    stride_out,
    stride_in,
    stride_I_in,
    ACC: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    if split < splits:
        sum_tokens(values_ptr, mask_ptr, scores_ptr, squares_ptr, group, split, tile, splits,
                   tokens, width, stride_g, stride_t, stride_d, stride_mask_g, stride_mask_t, ACC,
                   TOKENS, BLOCK_T, BLOCK_D)  # fmt: skip
    if columns_ptr is not None:
        if split == splits:
            gather(weight_ptr, I_in_ptr, columns_ptr, column_squares_ptr, group, tile, slots,
                   width, stride_out, stride_in, stride_I_in, ACC, R, BLOCK_D)  # fmt: skip


@triton.jit
def add_splits(
    partial_ptr,  # [splits, D]
    columns,  # [BLOCK_D]
    splits,
    width,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of the listed columns."""
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC)
    for start in range(0, SPLITS, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        inside = (rows < splits)[:, None] & (columns < width)[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def store_energy(
    squares_ptr,  # [G, entries]
    mask_ptr,  # bool [G, T] or None
    energy_ptr,  # [G]
    group,
    entries,
    tokens,
    width,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the mean square of a group from the partial sums of its squares."""
    squares = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, ENTRIES, BLOCK):
        at = start + tl.arange(0, BLOCK)
        squares += tl.load(squares_ptr + group * entries + at, mask=at < entries, other=0.0)
    count = tokens
    if mask_ptr is not None:
        mask_row = mask_ptr + group * stride_mask_g
        count = tl.maximum(count_tokens(mask_row, tokens, stride_mask_t, TOKENS, BLOCK), 1)
    elements = tl.cast(count, ACC) * tl.cast(width, ACC)
    tl.store(energy_ptr + group, tl.sum(squares, axis=0) / elements)


@triton.jit
def count_tokens(
    mask_ptr,  # bool [T]
    tokens,
    stride_t,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the tokens of a group that take part."""
    counted = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, TOKENS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = mask_ptr + at.to(tl.int64) * stride_t
        counted += (tl.load(row, mask=at < tokens, other=0) != 0).to(tl.int32)
    return tl.sum(counted, axis=0)


@triton.jit(do_not_specialize=["splits", "entries", "tokens", "stride_mask_g"])
def combine_kernel(
    partial_ptr,  # [G, splits, D] or None
    squares_ptr,  # [G, entries] or None
    mask_ptr,  # bool [G, T] or None
    scores_ptr,  # [G, D]
    energy_ptr,  # [G]
    splits,
    entries,
    tokens,
    width,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    if partial_ptr is not None:
        if tile * BLOCK_D < width:
            first = partial_ptr + group * splits * width
            scores = add_splits(first, columns, splits, width, ACC, SPLITS, BLOCK_S, BLOCK_D)
            tl.store(scores_ptr + group * width + columns, scores, mask=columns < width)
    if squares_ptr is not None:
        if tile == tl.num_programs(1) - 1:
            store_energy(squares_ptr, mask_ptr, energy_ptr, group, entries, tokens, width,
                         stride_mask_g, stride_mask_t, ACC, ENTRIES, TOKENS, BLOCK)  # fmt: skip


class Partial(NamedTuple):
    """Hold what the first phase leaves to the second."""

    sums: Tensor  # [G, splits, d]
    squares: Tensor | None  # [G, entries], where the energy was asked for

    def constants(self, tile: dict[str, int], masked: bool) -> dict[str, int]:
        """Return the lengths of the loops that read it, of which there are few.

        ``tile`` is that of the first phase.
        """
        splits = tuning.bucket(self.sums.shape[1])
        entries = 0
        if self.squares is not None:
            entries = splits * (self.squares.shape[1] // self.sums.shape[1])
        tokens = splits * max(64, tile["TOKENS"]) if masked and entries else 1
        return {"SPLITS": splits, "ENTRIES": entries, "TOKENS": tokens}


def sum_up(
    op: str, values: Tensor, mask: Tensor | None, energy: bool, columns: Columns | None = None
) -> tuple[Partial, dict[str, int]]:
    """Run the first phase of ``op``, which is named in errors, and return its tile too.

    ``columns``, of the weight that made the values, are filled in the same launch.

    Raises:
        TypeError, ValueError: as of :func:`launch`.
    """
    check(op, values, mask)
    dtype, acc = accumulation(values.dtype)
    groups, tokens, width = values.shape
    tile = tuning.scores(tokens, width)
    splits = max(1, tuning.steps(tokens, tile["TOKENS"]))
    tiles = tuning.steps(width, tile["BLOCK_D"])
    sums = torch.empty(groups, splits, width, dtype=dtype, device=values.device)
    squares = None
    if energy:
        squares = torch.empty(groups, splits * tiles, dtype=dtype, device=values.device)
    weight = I_in = copy = column_squares = None
    slots, r, strides = 0, 1, [0, 0, 0]
    if columns is not None:
        weight, I_in, copy, column_squares, _ = columns
        slots, r, strides = len(copy), I_in.shape[1], [*weight.stride(), I_in.stride(0)]
    if sums.numel() > 0:
        partial_kernel[groups, splits + (columns is not None), tiles](
            values, mask, sums, squares, weight, I_in, copy, column_squares, slots, splits, tokens,
            width, *values.stride(), *mask_strides(mask), *strides, ACC=acc, R=r, **tile,
            enable_fp_fusion=True,
        )  # fmt: skip
    return Partial(sums, squares), tile


def check(op: str, values: Tensor, mask: Tensor | None) -> None:
    """Raise unless values are ``[G, T, d]`` of floats and the mask is bool ``[G, T]``."""
    accumulation(values.dtype)
    if values.dim() != 3:
        raise ValueError(f"{op}: values must be [G, T, d], got {tuple(values.shape)}")
    if mask is not None and (mask.shape != values.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{op}: mask must be bool {tuple(values.shape[:2])}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Return the strides of a mask ``[G, T]``, 0 of a missing one."""
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


@on_its_device
def launch(
    values: Tensor, mask: Tensor | None, energy: bool, columns: Columns | None = None
) -> tuple[Tensor, Tensor]:
    """Return Σ|values| of each column, which orders features as the mean does, and the energy.

    Args:
        values: x or H, ``[G, T, d]``, any strides.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        energy: whether to take the mean of values² too.
        columns: those of the weight that made H, to be filled besides; not every column.

    Returns:
        Scores ``[G, d]`` and energy ``[G]``, or ``[0]`` if not asked for, in the accumulation
        dtype; 0 for a group without a counted token.

    Raises:
        TypeError: a dtype that is no float of 16 to 64 bits.
        ValueError: values that are not ``[G, T, d]`` or a mask that is not bool ``[G, T]``.
    """
    partial, tile = sum_up("column_scores", values, mask, energy, columns)
    sums, squares = partial
    groups, tokens, width = values.shape
    mean = torch.empty(groups if energy else 0, dtype=sums.dtype, device=values.device)
    if values.numel() == 0:
        return sums.new_zeros(groups, width), mean.zero_()
    splits = sums.shape[1]
    if splits > 1:
        scores = torch.empty(groups, width, dtype=sums.dtype, device=values.device)
    else:
        scores = sums.view(groups, width)
        if squares is None:
            return scores, mean
    constants = partial.constants(tile, mask is not None)
    tile = tuning.combine(width)
    tiles = tuning.steps(width, tile["BLOCK_D"]) if splits > 1 else 0
    combine_kernel[groups, tiles + energy](
        sums if splits > 1 else None, squares, mask, scores, mean, splits,
        0 if squares is None else squares.shape[1], tokens, width, *mask_strides(mask),
        ACC=accumulation(values.dtype)[1], **constants, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return scores, mean

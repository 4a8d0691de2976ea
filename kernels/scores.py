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
from vps.kernels.device import on_its_device


@triton.jit
def magnitude(values, ACC: tl.constexpr):
    """Return |values| in ACC with every non-finite element 0."""
    size = tl.abs(values.to(ACC))
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def partial_kernel(
    values_ptr,  # [G, T, D]
    mask_ptr,  # bool [G, T] or None
    scores_ptr,  # [G, SPLITS, D]
    squares_ptr,  # [G, SPLITS, tiles of D] or None
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
    group = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tile = tl.program_id(2)
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
    slot = group * tl.num_programs(1) + split
    tl.store(scores_ptr + slot * width + columns, tl.sum(total, axis=0), mask=in_width)
    if squares_ptr is not None:
        tl.store(squares_ptr + slot * tl.num_programs(2) + tile, tl.sum(tl.sum(squares, 1), 0))


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


@triton.jit
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
    if partial_ptr is not None:
        columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        first = partial_ptr + group * splits * width
        scores = add_splits(first, columns, splits, width, ACC, SPLITS, BLOCK_S, BLOCK_D)
        tl.store(scores_ptr + group * width + columns, scores, mask=columns < width)
    if squares_ptr is not None and tile == 0:
        store_energy(squares_ptr, mask_ptr, energy_ptr, group, entries, tokens, width,
                     stride_mask_g, stride_mask_t, ACC, ENTRIES, TOKENS, BLOCK)  # fmt: skip


def accumulation(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Return the dtype of sums of ``dtype``, for torch and for Triton."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.float32, tl.float32
    raise TypeError(f"vps kernels take float16, bfloat16, float32 and float64, got {dtype}")


class Partial(NamedTuple):
    """Hold what the first phase leaves to the second."""

    sums: Tensor  # [G, splits, d]
    squares: Tensor | None  # [G, entries], where the energy was asked for

    def constants(self, tokens: int) -> dict[str, int]:
        """Return the lengths of the loops that read it."""
        entries = 0 if self.squares is None else self.squares.shape[1]
        lengths = {"SPLITS": self.sums.shape[1], "ENTRIES": entries, "TOKENS": tokens}
        return {name: tuning.power_of_2(length) for name, length in lengths.items()}


def sum_up(op: str, values: Tensor, mask: Tensor | None, energy: bool) -> Partial:
    """Run the first phase of ``op``, which is named in errors.

    Raises:
        TypeError, ValueError: as of :func:`launch`.
    """
    dtype, acc = accumulation(values.dtype)
    if values.dim() != 3:
        raise ValueError(f"{op}: values must be [G, T, d], got {tuple(values.shape)}")
    if mask is not None and (mask.shape != values.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{op}: mask must be bool {tuple(values.shape[:2])}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    groups, tokens, width = values.shape
    tile = tuning.scores(tokens, width)
    splits = max(1, tuning.steps(tokens, tile["TOKENS"]))
    tiles = tuning.steps(width, tile["BLOCK_D"])
    sums = torch.empty(groups, splits, width, dtype=dtype, device=values.device)
    squares = None
    if energy:
        squares = torch.empty(groups, splits * tiles, dtype=dtype, device=values.device)
    if sums.numel() > 0:
        partial_kernel[groups, splits, tiles](
            values, mask, sums, squares, tokens, width, *values.stride(), *mask_strides(mask),
            ACC=acc, **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return Partial(sums, squares)


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Return the strides of a mask ``[G, T]``, 0 of a missing one."""
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


@on_its_device
def launch(values: Tensor, mask: Tensor | None, energy: bool) -> tuple[Tensor, Tensor]:
    """Return Σ|values| of each column, which orders features as the mean does, and the energy.

    Args:
        values: x or H, ``[G, T, d]``, any strides.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        energy: whether to take the mean of values² too.

    Returns:
        Scores ``[G, d]`` and energy ``[G]``, or ``[0]`` if not asked for, in the accumulation
        dtype; 0 for a group without a counted token.

    Raises:
        TypeError: a dtype that is no float of 16 to 64 bits.
        ValueError: values that are not ``[G, T, d]`` or a mask that is not bool ``[G, T]``.
    """
    partial = sum_up("column_scores", values, mask, energy)
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
    tile = tuning.combine(width, splits)
    combine_kernel[groups, tuning.steps(width, tile["BLOCK_D"]) if splits > 1 else 1](
        sums if splits > 1 else None, squares, mask, scores, mean, splits,
        0 if squares is None else squares.shape[1], tokens, width, *mask_strides(mask),
        ACC=accumulation(values.dtype)[1], **partial.constants(tokens), **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    return scores, mean

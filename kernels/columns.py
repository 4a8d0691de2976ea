"""Gather the selected columns of W once, as rows: ``B[c] = W[:, I_in[c]]`` (SPEC §4).

An element of a column takes a sector of 32 bytes, so whoever needs B more than once reads this
copy, where columns are contiguous. Their squared norms come along. Once the groups ask for more
columns than W has, B is W transposed, of which only the columns in use are written.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import accumulation, on_its_device


@triton.jit
def gather(
    weight_ptr,  # [d_out, d_in]
    I_in_ptr,  # int64 [G, R]
    columns_ptr,  # [G·R, d_out]
    squares_ptr,  # [tiles, G·R]
    group,
    tile,
    slots,
    width,
    stride_out,
    stride_in,
    stride_I_in,
    ACC: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the columns of one group over one tile of the outputs, and sum their squares."""
    rows = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    rows_64 = rows.to(tl.int64)
    for c in range(R):
        feature = tl.load(I_in_ptr + group * stride_I_in + c)
        address = weight_ptr + rows_64 * stride_out + feature * stride_in
        column = tl.load(address, mask=rows < width, other=0.0)
        slot = group * R + c
        tl.store(columns_ptr + slot * width + rows, column, mask=rows < width)
        wide = column.to(ACC)
        tl.store(squares_ptr + tile.to(tl.int64) * slots + slot, tl.sum(wide * wide, axis=0))


@triton.jit(do_not_specialize=["slots"])
def gather_kernel(
    weight_ptr,  # [d_out, d_in]
    I_in_ptr,  # int64 [G, R]
    columns_ptr,  # [G·R, d_out]
    squares_ptr,  # [tiles, G·R]
    slots,
    width,
    stride_out,
    stride_in,
    stride_I_in,
    ACC: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    gather(weight_ptr, I_in_ptr, columns_ptr, squares_ptr, tl.program_id(0).to(tl.int64),
           tl.program_id(1), slots, width, stride_out, stride_in, stride_I_in, ACC, R,
           BLOCK_D)  # fmt: skip


@triton.jit
def transpose_kernel(
    weight_ptr,  # [d_out, d_in]
    used_ptr,  # bool [d_in]
    columns_ptr,  # [d_in, d_out]
    squares_ptr,  # [tiles, d_in]
    d_out,
    d_in,
    stride_out,
    stride_in,
    ACC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    features = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    tile = tl.program_id(1)
    used = tl.load(used_ptr + features, mask=features < d_in, other=0) != 0
    if tl.max(used.to(tl.int32), axis=0) > 0:
        rows = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (rows < d_out)[:, None] & used[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_out
        offsets += features.to(tl.int64)[None, :] * stride_in
        part = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        wide = part.to(ACC)
        address = squares_ptr + tile.to(tl.int64) * d_in + features
        tl.store(address, tl.sum(wide * wide, axis=0), mask=used)
        to = columns_ptr + features.to(tl.int64)[:, None] * d_out + rows[None, :]
        tl.store(to, tl.trans(part), mask=used[:, None] & (rows < d_out)[None, :])


class Columns(NamedTuple):
    """Hold the columns of W that the groups select; empty until a launch fills it.

    Column c of group g lies at row ``g·r + c``; with ``every``, at row ``I_in[g, c]``.
    """

    weight: Tensor  # [d_out, d_in]
    I_in: Tensor  # int64 [G, r], rows contiguous
    values: Tensor  # [G·r, d_out], or [d_in, d_out]
    squares: Tensor  # [tiles, G·r], or [tiles, d_in], sums of squares in part
    every: bool


def new(weight: Tensor, I_in: Tensor) -> Columns:
    """Allocate the columns ``I_in`` int64 ``[G, r]`` of weight ``[d_out, d_in]``.

    Raises:
        TypeError: a weight that is no float of 16 to 64 bits.
        ValueError: a weight that is no matrix, or a selection that is not int64 ``[G, r]``.
    """
    dtype = accumulation(weight.dtype)[0]
    if weight.dim() != 2:
        raise ValueError(f"columns: weight must be [d_out, d_in], got {tuple(weight.shape)}")
    if I_in.dtype != torch.int64 or I_in.dim() != 2:
        raise ValueError(
            f"columns: I_in must be int64 [G, r], got {I_in.dtype} {tuple(I_in.shape)}"
        )
    d_out, d_in = weight.shape
    every = I_in.numel() > d_in
    slots = d_in if every else I_in.numel()
    tiles = tuning.steps(d_out, tuning.columns(d_out, every)["BLOCK_D"])
    values = torch.empty(slots, d_out, dtype=weight.dtype, device=weight.device)
    squares = torch.empty(tiles, slots, dtype=dtype, device=weight.device)
    I_in = I_in if I_in.stride(1) == 1 else I_in.contiguous()
    return Columns(weight, I_in, values, squares, every)


def launch(weight: Tensor, I_in: Tensor) -> Columns:
    """Return the columns ``I_in`` int64 ``[G, r]`` of weight ``[d_out, d_in]``, any strides.

    Raises:
        TypeError, ValueError: as :func:`new`.
    """
    columns = new(weight, I_in)
    fill(weight, columns)
    return columns


@on_its_device
def fill(weight: Tensor, columns: Columns) -> None:
    """Fill what :func:`new` allocated for ``weight``."""
    if columns.values.numel() == 0:
        return
    d_out, d_in = weight.shape
    I_in, acc = columns.I_in, accumulation(weight.dtype)[1]
    tile = tuning.columns(d_out, columns.every)
    tiles = columns.squares.shape[0]
    if columns.every:
        used = torch.zeros(d_in, dtype=torch.bool, device=weight.device)
        used.scatter_(0, I_in.reshape(-1), True)
        transpose_kernel[tuning.steps(d_in, tile["BLOCK_I"]), tiles](
            weight, used, columns.values, columns.squares, d_out, d_in, *weight.stride(), ACC=acc,
            **tile, enable_fp_fusion=True,
        )  # fmt: skip
        return
    groups, r = I_in.shape
    gather_kernel[groups, tiles](
        weight, I_in, columns.values, columns.squares, groups * r, d_out, *weight.stride(),
        I_in.stride(0), ACC=acc, R=r, **tile, enable_fp_fusion=True,
    )  # fmt: skip

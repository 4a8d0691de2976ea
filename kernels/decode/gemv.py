"""Multiply up to 16 tokens by W of one or several layers, and find the best outputs of each tile.

``H = x Wᵀ``. The first of the two kernels that decode (README.md, "Decoding"): it streams each W
once and leaves for :mod:`vps.kernels.decode.apply` what that needs of a tile: r keys of the largest
|H|, the sum of H², squared norms of rows of W, and the columns ``W[:, I_in]`` side by side.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import begin, on_its_device, wait_for_last_kernel
from vps.kernels.scores import magnitude
from vps.kernels.select import key_dtype, next_key, score_key

LARGEST_N = 16


@triton.jit
def slots(group, groups, R: tl.constexpr, RANKS: tl.constexpr):
    """Return token and rank of each of r columns of 8 tokens from ``group`` on, and which exist."""
    slot = tl.arange(0, 8 * RANKS)
    token, rank = group + slot // RANKS, slot % RANKS
    return token, rank, (rank < R) & (token < groups)


@triton.jit
def load_columns(
    rows_ptr,  # [ROWS, 1] of W
    in_width,
    I_in_ptr,
    group,
    groups,
    stride_I_in,
    stride_in,
    R: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Gather the selected columns of 8 tokens [ROWS, 8 · RANKS]."""
    token, rank, held = slots(group, groups, R, RANKS)
    I_in = tl.load(I_in_ptr + token * stride_I_in + rank, mask=held, other=0)
    wanted = in_width[:, None] & held[None, :]
    return tl.load(rows_ptr + I_in[None, :] * stride_in, mask=wanted, other=0.0)


@triton.jit
def store_columns(
    columns,  # [ROWS, 8 · RANKS]
    in_width,
    columns_ptr,  # [ROWS, 1] of the first column
    sums_ptr,  # sum of H² of the first token, or None
    group,
    groups,
    width,
    tiles,
    R: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Store the columns of 8 tokens, and the sums of their squares."""
    token, rank, held = slots(group, groups, R, RANKS)
    column = (token * R + rank).to(tl.int64) * width
    tl.store(columns_ptr + column[None, :], columns, mask=in_width[:, None] & held[None, :])
    if sums_ptr is not None:
        wide = columns.to(tl.float32)
        sums_at = sums_ptr + (token * (1 + R) + 1 + rank) * tiles
        tl.store(sums_at, tl.sum(wide * wide, axis=0), mask=held)


@triton.jit(do_not_specialize=["groups"])
def gemv_kernel(
    x_ptr,  # [N, d_in]
    weight_ptrs,  # of each layer [d_out, d_in]
    counted_ptr,  # bool [N] or None
    I_in_ptr,  # int64 [N, R] or None
    H_ptr,  # of each layer [N, d_out], one behind the other
    columns_ptr,  # of each layer [N, R, d_out]; or None
    record_ptr,  # [N, tiles, R] keys, -1 where a tile has fewer; or None
    sums_ptr,  # [N, 1 + R, tiles]: of H², and of the squares of each column; or None
    row_squares_ptr,  # of each layer [d_out]; or None
    groups,
    widths,  # of each layer d_out
    stride_x_n,
    stride_x_d,
    strides_out,  # of each layer
    strides_in,  # of each layer
    stride_counted,
    stride_I_in,
    LAYERS: tl.constexpr,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_O: tl.constexpr,  # of 16 rows
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    ROWS: tl.constexpr = 16 * BLOCKS_O
    PARTS: tl.constexpr = SLICES * BLOCKS_O
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    weight_ptr, width = weight_ptrs[0], widths[0]
    stride_out, stride_in = strides_out[0], strides_in[0]
    first = tile * 0  # tile and feature where the layer begins
    before = first.to(tl.int64)
    end, features = first, before
    for layer in tl.static_range(1, LAYERS):
        end += tl.cdiv(widths[layer - 1], ROWS)
        features += widths[layer - 1]
        mine = tile >= end
        weight_ptr = tl.where(mine, weight_ptrs[layer], weight_ptr)
        width = tl.where(mine, widths[layer], width)
        stride_out = tl.where(mine, strides_out[layer], stride_out)
        stride_in = tl.where(mine, strides_in[layer], stride_in)
        first = tl.where(mine, end, first)
        before = tl.where(mine, features, before)

    token = tl.arange(0, BLOCK_N)
    here = token < groups
    row = (tile - first) * ROWS + tl.arange(0, ROWS)
    in_width = row < width
    columns_at = weight_ptr + row.to(tl.int64)[:, None] * stride_out
    wait_for_last_kernel(PDL, True)
    if columns_ptr is not None:  # in flight while W streams
        columns = load_columns(columns_at, in_width, I_in_ptr, 0, groups, stride_I_in, stride_in,
                               R, RANKS)  # fmt: skip
        if BLOCK_N == 16:
            others = load_columns(columns_at, in_width, I_in_ptr, 8, groups, stride_I_in,
                                  stride_in, R, RANKS)  # fmt: skip

    part = tl.arange(0, PARTS)
    part_row = (tile - first) * ROWS + part[:, None] // SLICES * 16 + tl.arange(0, 16)[None, :]
    weight_rows = weight_ptr + part_row.to(tl.int64)[:, :, None] * stride_out
    row_exists = (part_row < width)[:, :, None]
    x_rows = x_ptr + token.to(tl.int64)[None, None, :] * stride_x_n
    along = part[:, None, None] % SLICES * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    product = tl.zeros([PARTS, 16, BLOCK_N], dtype=tl.float32)
    squares = tl.zeros([PARTS, 16, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, D_IN, SLICES * BLOCK_K, num_stages=STAGES):
        at = start + along
        down = tl.permute(at, (0, 2, 1))
        x_mask = here[None, None, :] & (down < D_IN)
        x = tl.load(x_rows + down.to(tl.int64) * stride_x_d, mask=x_mask, other=0.0)
        weight_at = weight_rows + at.to(tl.int64) * stride_in
        weight = tl.load(weight_at, mask=row_exists & (at < D_IN), other=0.0)
        product = tl.dot(weight, x, product, input_precision="ieee")
        if row_squares_ptr is not None:
            wide = weight.to(tl.float32)
            squares += wide * wide

    H = tl.sum(tl.reshape(product, [BLOCKS_O, SLICES, 16, BLOCK_N]), axis=1)
    H = tl.reshape(H, [ROWS, BLOCK_N]).to(H_ptr.dtype.element_ty)
    inside = in_width[:, None] & here[None, :]
    H_at = H_ptr + before * groups + token.to(tl.int64)[None, :] * width + row[:, None]
    tl.store(H_at, H, mask=inside)
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + token * stride_counted, mask=here, other=0) != 0
        H = tl.where(counted[None, :], H, 0.0)
    if record_ptr is not None:
        key = score_key(H, row[:, None], record_ptr.dtype.element_ty)
        key = tl.where(in_width[:, None], key, -1)
        ranks = tl.arange(0, RANKS)[None, :]
        record = tl.full([BLOCK_N, RANKS], -1, dtype=record_ptr.dtype.element_ty)
        for number in tl.static_range(R):
            largest, key = next_key(key, 0)
            record = tl.where(ranks == number, largest[:, None], record)
        record_at = record_ptr + (token[:, None] * tiles + tile) * R + ranks
        tl.store(record_at, record, mask=here[:, None] & (ranks < R))
    if sums_ptr is not None:
        sums = sums_ptr + tile
        size = tl.where(in_width[:, None], magnitude(H, tl.float32), 0.0)
        energy = tl.sum(size * size, axis=0)
        tl.store(sums + token * ((1 + R) * tiles), energy, mask=here)
    if row_squares_ptr is not None:
        of_rows = tl.reshape(tl.sum(squares, axis=2), [BLOCKS_O, SLICES, 16])
        of_rows = tl.reshape(tl.sum(of_rows, axis=1), [ROWS])
        tl.store(row_squares_ptr + before + row, of_rows, mask=in_width)
    if columns_ptr is not None:
        columns_ptr += before * (groups * R) + row.to(tl.int64)[:, None]
        sums_ptr = sums_ptr + tile if row_squares_ptr is not None else None
        store_columns(columns, in_width, columns_ptr, sums_ptr, 0, groups, width, tiles, R, RANKS)
        if BLOCK_N == 16:
            store_columns(others, in_width, columns_ptr, sums_ptr, 8, groups, width, tiles,
                          R, RANKS)  # fmt: skip


class Product(NamedTuple):
    """Hold the products of several layers with one x; ``None`` where it was not asked for.

    Args:
        H: ``[N·Σ d_out]``: of each layer ``[N, d_out]``.
        columns: ``[N·r·Σ d_out]``: of each layer ``W[:, I_in]`` ``[N, r, d_out]``.
        record: int32 or int64 ``[N, tiles, r]``: the best r outputs of each tile.
        sums: float32 ``[N, 1 + r, tiles]``: of H², and of the squares of each column.
        row_squares: float32 ``[Σ d_out]``.
        widths: d_out of each layer.
        tiles: how many tiles each layer has.
    """

    H: Tensor
    columns: Tensor | None
    record: Tensor | None
    sums: Tensor | None
    row_squares: Tensor | None
    widths: tuple[int, ...]
    tiles: tuple[int, ...]

    def of(self, layer: int) -> Tensor:
        """Return H of a layer, ``[N, d_out]``."""
        groups, before = self.H.numel() // sum(self.widths), sum(self.widths[:layer])
        first, width = before * groups, self.widths[layer]
        return self.H[first : first + width * groups].view(groups, width)


@on_its_device
def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    selects: bool,
    measures: bool,
    clips: bool,
    follows: bool = False,
) -> Product:
    """Multiply, and take what the update of each layer needs.

    Args:
        x: ``[N, 1, d_in]``, N from 1 to 16, any strides.
        weights: ``[d_out, d_in]`` of each layer, any strides, in the dtype of x; their tiles have
            one height (:func:`vps.kernels.tuning.gemv_rows`).
        mask: bool ``[N, 1]``, whether a token counts, or ``None``.
        I_in: int64 ``[N, r]`` with contiguous rows, or ``None`` for the product alone.
        r: columns of the update.
        selects: whether to find outputs.
        measures: whether to sum squares of H.
        clips: whether to sum squares of rows and columns of W.
        follows: whether the last kernel on the stream is one of this step.

    Returns:
        The products, of which each row has the bits it has when its token and layer come alone.
    """
    (groups, _, d_in), device = x.shape, x.device
    widths = tuple(weight.shape[0] for weight in weights)
    total_width = sum(widths)
    architecture = tuning.architecture(device)
    tile = tuning.gemv(widths[0], groups, x.element_size(), architecture)
    pdl = tuning.has_pdl(architecture)
    tiles = tuple(tuning.steps(width, 16 * tile["BLOCKS_O"]) for width in widths)
    count = sum(tiles)
    columns = record = sums = row_squares = None
    H = torch.empty(groups * total_width, dtype=x.dtype, device=device)
    if I_in is not None:
        columns = torch.empty(groups * r * total_width, dtype=x.dtype, device=device)
    if selects:
        key = key_dtype(x.dtype, max(widths))
        record = torch.empty(groups, count, r, dtype=key, device=device)
    if measures or clips:
        sums = torch.empty(groups, 1 + r, count, dtype=torch.float32, device=device)
    if clips:
        row_squares = torch.empty(total_width, dtype=torch.float32, device=device)
    pointers = x, tuple(weights), mask, I_in, H, columns, record, sums, row_squares
    rest = (
        groups, widths, x.stride(0), x.stride(2), tuple(weight.stride(0) for weight in weights),
        tuple(weight.stride(1) for weight in weights), 0 if mask is None else mask.stride(0),
        0 if I_in is None else I_in.stride(0), len(weights), d_in, r, tuning.power_of_2(r),
        *(tile[name] for name in ("BLOCK_N", "BLOCKS_O", "SLICES", "BLOCK_K", "STAGES")), pdl,
    )  # fmt: skip
    begin(gemv_kernel, (count,), pointers, rest, tile, pdl and follows)
    return Product(H, columns, record, sums, row_squares, widths, tiles)

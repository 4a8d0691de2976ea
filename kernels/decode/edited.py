"""Change r entries of x before an untouched product, in one launch (SPEC §11).

``y = W(x + Σ_c e_c u(I_in[c])) + b``, ``e = x Eᵀ``. For a few rows the first kernel streams W and E
together and adds ``Σ_c e_c W[:, I_in[c]]`` to its tile, so the change of x is never rounded: each
program takes all r dot products, and none waits. For more rows the second kernel writes ``x + e``,
and cuBLAS multiplies.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import on_its_device
from vps.kernels.scores import accumulation

LARGEST_N = 16
SLOTS = 16  # rows of E a program reads beside 16 or 32 of W; with more, a second launch costs less


@triton.jit
def total(parts, SLICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over 2, 4 or 8 slices, in one order for every number of rows and columns."""
    parts = tl.permute(parts, (1, 2, 0))
    for halving in tl.static_range(1, 4):
        if 2**halving < SLICES:
            parts = tl.reshape(parts, [ROWS, COLUMNS, SLICES // 2**halving, 2])
        if 2**halving <= SLICES:
            left, right = tl.split(parts)
            parts = left + right
    return parts


@triton.jit(do_not_specialize=["rows", "tokens", "groups"])
def edited_gemv_kernel(
    x_ptr,  # [N, d_in], N = G·T
    weight_ptr,  # [d_out, d_in]
    bias_ptr,  # [d_out] or None
    I_in_ptr,  # int64 [G, R]
    through_ptr,  # [G, R, d_in]
    y_ptr,  # [N, d_out]
    rows,
    tokens,
    groups,
    width,
    stride_x_n,
    stride_x_d,
    stride_out,
    stride_in,
    stride_bias,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.arange(0, BLOCK_N)
    here = row < rows
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_width = out < width
    slot = tl.arange(0, SLOTS)
    group, rank = slot // RANKS, slot % RANKS
    held = (rank < R) & (group < groups)
    entry = (group * R + rank).to(tl.int64)
    x_rows = x_ptr + row.to(tl.int64)[None, None, :] * stride_x_n
    weight_rows = weight_ptr + out.to(tl.int64) * stride_out
    through_rows = through_ptr + entry[None, :, None] * D_IN
    I_in = tl.load(I_in_ptr + entry, mask=held, other=0)

    product = tl.zeros([SLICES, BLOCK_O, BLOCK_N], dtype=tl.float32)
    dots = tl.zeros([SLICES, SLOTS, BLOCK_N], dtype=tl.float32)
    slices = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    for start in tl.range(0, D_IN, SLICES * BLOCK_K, num_stages=STAGES):
        at = start + slices
        down = tl.permute(at, (0, 2, 1))
        x_at = x_rows + down.to(tl.int64) * stride_x_d
        x = tl.load(x_at, mask=here[None, None, :] & (down < D_IN), other=0.0)
        inside = at < D_IN
        weight_at = weight_rows[None, :, None] + at.to(tl.int64) * stride_in
        weight = tl.load(weight_at, mask=in_width[None, :, None] & inside, other=0.0)
        through = tl.load(through_rows + at, mask=held[None, :, None] & inside, other=0.0)
        product = tl.dot(weight, x, product, input_precision="ieee")
        dots = tl.dot(through, x, dots, input_precision="ieee")

    columns_at = weight_rows[:, None] + I_in[None, :] * stride_in
    columns = tl.load(columns_at, mask=in_width[:, None] & held[None, :], other=0.0)
    bias = tl.zeros([BLOCK_O], dtype=tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + out.to(tl.int64) * stride_bias, mask=in_width, other=0.0)
    first = group * tokens
    own = (row[None, :] >= first[:, None]) & (row[None, :] < (first + tokens)[:, None])
    e = tl.where(own & held[:, None], total(dots, SLICES, SLOTS, BLOCK_N), 0.0)
    y = total(product, SLICES, BLOCK_O, BLOCK_N)
    y = tl.dot(columns.to(tl.float32), e, y, input_precision="ieee")
    y += bias[:, None]
    y_at = y_ptr + row.to(tl.int64)[None, :] * width + out[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_width[:, None] & here[None, :])


@triton.jit(do_not_specialize=["tokens", "blocks", "rows"])
def edit_kernel(
    x_ptr,  # [G, T, d_in]
    I_in_ptrs,  # of each layer int64 [G, R]
    through_ptrs,  # of each layer [G, R, d_in]
    out_ptr,  # [layers, N, d_in], N = G·T
    tokens,
    blocks,
    rows,
    stride_x_g,
    stride_x_t,
    stride_x_d,
    LAYERS: tl.constexpr,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    layer = tl.program_id(1)
    I_in_ptr, through_ptr = I_in_ptrs[0], through_ptrs[0]
    for other in tl.static_range(1, LAYERS):
        I_in_ptr = tl.where(layer == other, I_in_ptrs[other], I_in_ptr)
        through_ptr = tl.where(layer == other, through_ptrs[other], through_ptr)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    rank = tl.arange(0, RANKS)[None, :, None]
    here, held = row < tokens, rank < R
    x_rows = x_ptr + group * stride_x_g + row.to(tl.int64) * stride_x_t
    out_rows = out_ptr + (layer.to(tl.int64) * rows + group * tokens + row) * D_IN
    entry = group * R + rank
    I_in = tl.load(I_in_ptr + entry, mask=held, other=-1)

    dots = tl.zeros([BLOCK_T, RANKS, BLOCK_D], dtype=ACC)
    for start in tl.range(0, D_IN, BLOCK_D, num_stages=STAGES):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]
        x = tl.load(x_rows + at * stride_x_d, mask=here & (at < D_IN), other=0.0)
        wanted = held & (at < D_IN)
        through = tl.load(through_ptr + entry * D_IN + at, mask=wanted, other=0.0)
        dots += x.to(ACC) * through.to(ACC)
    e = tl.sum(dots, axis=2, keep_dims=True)
    for start in tl.range(0, D_IN, BLOCK_D, num_stages=STAGES):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]
        inside = here & (at < D_IN)
        x = tl.load(x_rows + at * stride_x_d, mask=inside, other=0.0)
        change = tl.sum(tl.where(at == I_in, e, 0.0), axis=1, keep_dims=True)
        tl.store(out_rows + at, (x.to(ACC) + change).to(x.dtype), mask=inside)


def is_one_launch(x: Tensor, through: Tensor) -> bool:
    """Return whether one launch computes a layer from x ``[G, T, d_in]`` and ``E``."""
    rows, slots = x.shape[0] * x.shape[1], x.shape[0] * tuning.power_of_2(through.shape[1])
    is_wide = accumulation(x.dtype)[1] == tl.float64
    return 0 < rows <= LARGEST_N and slots <= SLOTS and not is_wide


@on_its_device
def launch(x: Tensor, weight: Tensor, bias: Tensor | None, I_in: Tensor, through: Tensor) -> Tensor:
    """Compute ``W(x + Σ_c e_c u(I_in[c])) + b`` for every group.

    Args:
        x: ``[G, T, d_in]``, any strides.
        weight: ``[d_out, d_in]``, any strides.
        bias: ``[d_out]`` or ``None``.
        I_in: int64 ``[G, r]``, distinct in a group.
        through: ``E`` ``[G, r, d_in]``, in the dtype of x; a row of 0 changes nothing.

    Returns:
        y ``[G, T, d_out]``, contiguous. Of up to 16 rows, if one launch takes them, each has the
        bits it has alone.

    Raises:
        TypeError: x of a dtype that is no float of 16 to 64 bits.
        ValueError: shapes that do not fit.
    """
    groups, tokens, d_in = x.shape
    width, rows, r = weight.shape[0], groups * tokens, I_in.shape[1]
    ranks = tuning.power_of_2(r)
    if not is_one_launch(x, through):
        return F.linear(edit(x, [(I_in, through)])[0], weight, bias)
    _check(x, I_in, through)
    if weight.shape[1] != d_in or weight.dtype != x.dtype:
        raise ValueError(
            f"edited: weight must be [d_out, {d_in}] {x.dtype} to fit x, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    y = torch.empty(groups, tokens, width, dtype=x.dtype, device=x.device)
    tile = tuning.edited_gemv(width, rows, x.element_size(), tuning.architecture(x.device))
    flat = x.reshape(rows, d_in)
    edited_gemv_kernel[tuning.steps(width, tile["BLOCK_O"]),](
        flat, weight, bias, I_in.contiguous(), through.contiguous(), y, rows, tokens, groups, width,
        *flat.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        D_IN=d_in, R=r, RANKS=ranks, SLOTS=SLOTS, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return y


@on_its_device
def edit(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Write ``x + Σ_c e_c u(I_in[c])`` for each of the layers that read one x, in one launch.

    Args:
        x: ``[G, T, d_in]``, any strides.
        layers: ``(I_in, through)`` of each, as :func:`launch` takes them, of one r.

    Returns:
        The changed x of each layer ``[G, T, d_in]``, contiguous, rounded once.
    """
    groups, tokens, d_in = x.shape
    r = layers[0][0].shape[1]
    for layer in layers:
        _check(x, *layer)
    out = torch.empty(len(layers), groups, tokens, d_in, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        tile = tuning.edit(tokens, r, x.element_size(), tuning.architecture(x.device))
        blocks = tuning.steps(tokens, tile["BLOCK_T"])
        edit_kernel[groups * blocks, len(layers)](
            x, tuple(I_in.contiguous() for I_in, _ in layers),
            tuple(through.contiguous() for _, through in layers), out, tokens, blocks,
            groups * tokens, *x.stride(), LAYERS=len(layers), D_IN=d_in, R=r,
            ACC=accumulation(x.dtype)[1], **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return out.unbind()


def _check(x: Tensor, I_in: Tensor, through: Tensor) -> None:
    wanted = (x.shape[0], I_in.shape[1], x.shape[2])
    if I_in.shape[0] != x.shape[0] or through.shape != wanted or through.dtype != x.dtype:
        raise ValueError(
            f"edited: I_in must be {list(wanted[:2])} and through {list(wanted)} {x.dtype} to fit "
            f"x, got {tuple(I_in.shape)}, {tuple(through.shape)} {through.dtype}"
        )

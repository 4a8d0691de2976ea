"""Decode one step in two kernels: up to 16 tokens, each its own group (PERFORMANCE §2).

``y = H + b + γ·clamp(H[:, I_out] C W[:, I_in]ᵀ)``, ``H = x Wᵀ``, SK of order 1. The first kernel
streams W once: it writes H, the best r outputs of its tile, and what energy and clip need of that
tile; the second brings the tiles together in every program and applies the update.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import select as selection
from vps.kernels import tuning
from vps.kernels.delta import finish
from vps.kernels.device import on_its_device
from vps.kernels.policy import column_factors, decide, inverse_scale
from vps.kernels.scores import magnitude
from vps.kernels.select import best

LARGEST_N = 16
LARGEST_R = 8
LARGEST_RECORDS = 8192


@triton.jit
def gemv_kernel(
    x_ptr,  # [N, d_in]
    weight_ptr,  # [d_out, d_in]
    counted_ptr,  # bool [N] or None
    I_in_ptr,  # int64 [N, R]
    H_ptr,  # [N, d_out]
    record_ptr,  # [N, tiles, R] scores, -1 where a tile has fewer; or None
    index_ptr,  # int32 [N, tiles, R] or None
    energy_ptr,  # [N, tiles] or None
    row_squares_ptr,  # [d_out] or None
    column_squares_ptr,  # [N, tiles, R] or None
    groups,
    width,
    stride_x_n,
    stride_x_d,
    stride_out,
    stride_in,
    stride_counted,
    stride_I_in,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    token = tl.arange(0, BLOCK_N)
    rows = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_64 = rows.to(tl.int64)
    here = token < groups
    in_width = rows < width
    x_rows = x_ptr + token.to(tl.int64)[:, None] * stride_x_n
    weight_rows = weight_ptr + rows_64[:, None] * stride_out

    product = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
    squares = tl.zeros([BLOCK_O, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, D_IN, BLOCK_K, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_K)
        at_64 = at.to(tl.int64)[None, :]
        x_mask = here[:, None] & (at < D_IN)[None, :]
        weight_mask = in_width[:, None] & (at < D_IN)[None, :]
        x = tl.load(x_rows + at_64 * stride_x_d, mask=x_mask, other=0.0)
        weight = tl.load(weight_rows + at_64 * stride_in, mask=weight_mask, other=0.0)
        product = tl.dot(x, tl.trans(weight), product, input_precision="ieee")
        if row_squares_ptr is not None:
            wide = weight.to(tl.float32)
            squares += wide * wide
    if row_squares_ptr is not None:
        tl.store(row_squares_ptr + rows, tl.sum(squares, axis=1), mask=in_width)

    H = product.to(H_ptr.dtype.element_ty)
    inside = here[:, None] & in_width[None, :]
    tl.store(H_ptr + token.to(tl.int64)[:, None] * width + rows[None, :], H, mask=inside)
    counted = here
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + token * stride_counted, mask=here, other=0) != 0
    size = tl.where(counted[:, None] & in_width[None, :], magnitude(H, tl.float32), 0.0)
    if energy_ptr is not None:
        tl.store(energy_ptr + token * tiles + tile, tl.sum(size * size, axis=1), mask=here)
    if record_ptr is not None:
        slot = (token[:, None] * tiles + tile) * R
        size = tl.where(in_width[None, :], size, -1.0)
        for rank in range(R):
            largest, at = best(size, rows[None, :], 1)
            size = tl.where(rows[None, :] == at, -1.0, size)
            tl.store(record_ptr + slot + rank, largest, mask=here[:, None])
            tl.store(index_ptr + slot + rank, at, mask=here[:, None])
    if column_squares_ptr is not None:
        ranks = tl.arange(0, RANKS)
        for group in range(GROUPS):
            wanted = ranks < tl.where(group < groups, R, 0)
            columns = tl.load(I_in_ptr + group * stride_I_in + ranks, mask=wanted, other=0)
            part = wanted[None, :] & in_width[:, None]
            column = tl.load(weight_rows + columns[None, :] * stride_in, mask=part, other=0.0)
            column = column.to(tl.float32)
            address = column_squares_ptr + (group * tiles + tile) * R + ranks
            tl.store(address, tl.sum(column * column, axis=0), mask=wanted)


@triton.jit
def apply_kernel(
    H_ptr,  # [N, d_out]
    bias_ptr,  # [d_out] or None
    weight_ptr,  # [d_out, d_in]
    counted_ptr,  # bool [N] or None
    I_in_ptr,  # int64 [N, R]
    I_out_ptr,  # int64 [N, R], or None to take the records
    record_ptr,  # [N, tiles, R] or None
    index_ptr,  # int32 [N, tiles, R] or None
    energy_ptr,  # [N, tiles], [N] if POOLED, or None
    row_squares_ptr,  # [d_out] or None
    column_squares_ptr,  # [N, tiles, R] or None
    policy_ptr,  # float64 [9], or [9 + R] with a factor of each column
    entropy_ptr,  # float64 [2] or None
    y_ptr,  # [N, d_out]
    features_ptr,  # int64 [N, 2, R]
    core_ptr,  # [N, R, R]
    gamma_ptr,  # [N]
    t_ptr,  # [N, R] or None
    tiles,
    width,
    stride_bias,
    stride_out,
    stride_in,
    stride_counted,
    stride_I_in,
    stride_I_out,
    TAU: tl.constexpr,
    CLAMP: tl.constexpr,
    POOLED: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    RECORDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, RANKS)
    inside = ranks < R
    I_in = tl.load(I_in_ptr + group * stride_I_in + ranks, mask=inside, other=0)
    if I_out_ptr is not None:
        I_out = tl.load(I_out_ptr + group * stride_I_out + ranks, mask=inside, other=0)
    else:
        entry = tl.arange(0, RECORDS)
        exists = entry < tiles * R
        first = group * tiles * R
        scores = tl.load(record_ptr + first + entry, mask=exists, other=-1.0)
        index = tl.load(index_ptr + first + entry, mask=exists, other=0x7FFFFFFF)
        I_out = tl.zeros([RANKS], dtype=tl.int64)
        for rank in range(R):
            at = best(scores, index, 0)[1]
            scores = tl.where(index == at, -1.0, scores)
            I_out = tl.where(ranks == rank, at, I_out)

    tile = tl.arange(0, TILES)
    if POOLED:
        gamma, active = decide(policy_ptr, tl.load(energy_ptr + group), entropy_ptr, R)
    elif energy_ptr is not None:
        parts = tl.load(energy_ptr + group * tiles + tile, mask=tile < tiles, other=0.0)
        energy = tl.sum(parts, axis=0) / tl.cast(width, tl.float32)
        gamma, active = decide(policy_ptr, energy, entropy_ptr, R)
    else:
        gamma, active = decide(policy_ptr, None, entropy_ptr, R)
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + group * stride_counted) != 0
        gamma = tl.where(counted, gamma, 0.0)
        active = tl.where(counted, active, 0)
    gamma = tl.cast(gamma, tl.float32)
    inverse = tl.full([RANKS], 1.0, dtype=tl.float32)
    if TAU is not None:
        rows_A = tl.load(row_squares_ptr + I_out, mask=inside, other=0.0)
        address = column_squares_ptr + (group * tiles + tile)[:, None] * R + ranks[None, :]
        part = (tile < tiles)[:, None] & inside[None, :]
        columns_B = tl.sum(tl.load(address, mask=part, other=0.0), axis=0)
        inverse = inverse_scale(rows_A, columns_B, TAU)
    if BY_COLUMN:
        inverse = inverse * column_factors(policy_ptr, ranks, inside, tl.float32)
    wanted = ranks < active
    inverse = tl.where(wanted, inverse, 0.0)
    t = tl.load(H_ptr + group * width + I_out, mask=wanted, other=0.0)

    if tl.program_id(0) == 0:
        tl.store(features_ptr + group * 2 * R + ranks, I_in, mask=inside)
        tl.store(features_ptr + (group * 2 + 1) * R + ranks, I_out, mask=inside)
        core = tl.where(ranks[:, None] == ranks[None, :], inverse[:, None], 0.0)
        core_at = core_ptr + group * R * R + ranks[:, None] * R + ranks[None, :]
        tl.store(core_at, core, mask=inside[:, None] & inside[None, :])
        tl.store(gamma_ptr + group, gamma)
        if t_ptr is not None:
            tl.store(t_ptr + group * R + ranks, t, mask=inside)

    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = columns < width
    offsets = columns.to(tl.int64)[:, None] * stride_out + I_in[None, :] * stride_in
    part = in_width[:, None] & wanted[None, :]
    B = tl.load(weight_ptr + offsets, mask=part, other=0.0).to(tl.float32)
    update = tl.sum(B * (t.to(tl.float32) * inverse)[None, :], axis=1)
    base = tl.load(H_ptr + group * width + columns, mask=in_width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=in_width, other=0.0)
        base += bias.to(tl.float32)
    y = finish(base, update, gamma, CLAMP).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + group * width + columns, y, mask=in_width)


def refusal(x: Tensor, weight: Tensor, r: int) -> str | None:
    """Say why :func:`launch` does not take this call, or ``None`` when it does."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x and weight must be of one dtype of 16 or 32 bits, got {x.dtype}, {weight.dtype}"
    if x.dim() != 3 or x.shape[1] != 1 or not 1 <= x.shape[0] <= LARGEST_N:
        return f"x must be [1 to {LARGEST_N}, 1, d_in], got {tuple(x.shape)}"
    if x.shape[2] != weight.shape[1] or x.shape[2] == 0:
        return f"weight must be [d_out, {x.shape[2]}] to fit x, got {tuple(weight.shape)}"
    if not 1 <= r <= min(LARGEST_R, *weight.shape):
        return f"r must be from 1 to {min(LARGEST_R, *weight.shape)}, got {r}"
    tiles = tuning.steps(weight.shape[0], tuning.gemv_rows(weight.shape[0]))
    if tiles * r > LARGEST_RECORDS:
        return f"d_out = {weight.shape[0]} has too many tiles for r = {r}"
    return None


@on_its_device
def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor | None,
    I_out: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    r: int,
    adaptive: bool,
    tau: float | None,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute a sharpened linear layer for a few tokens, each its own group (SK, order 1).

    Args:
        x: ``[N, 1, d_in]``, N from 1 to 16, any strides.
        weight: ``[d_out, d_in]``, any strides.
        bias: ``[d_out]`` or ``None``.
        mask: bool ``[N, 1]``, whether a token counts, or ``None``.
        I_in: int64 ``[N, r]``, or ``None`` to select here.
        I_out: int64 ``[N, r]``, or ``None`` to select here.
        policy: float64 ``[9]``: factor, then the bounds of γ, rank, topk and order; ``[9 + r]``
            with a factor of each column.
        entropy: float64 ``[2]``, ℋ in nats or −1, and the factor of the history; or ``None``.
        r: columns, from 1 to 8.
        adaptive: whether the policy needs the energy.
        tau: bound of the component clip, a constant of the kernel, or ``None``.
        clamp: bound of each element of the update, a constant of the kernel, or ``None``.

    Returns:
        y ``[N, 1, d_out]``, features int64 ``[N, 2, r]``, core float32 ``[N, r, r]`` without γ, γ
        float32 ``[N]``, and the selected outputs ``[N, 1, r]`` if there is a clamp, else ``[0]``.
        Every row of y has the bits it has when its token comes alone.

    Raises:
        ValueError: what :func:`refusal` says.
    """
    if (reason := refusal(x, weight, r)) is not None:
        raise ValueError(f"decode: {reason}")
    if I_in is None:
        I_in = selection.launch(x[:, 0], r, True)
    I_in = selection.with_rows(I_in)
    I_out = None if I_out is None else selection.with_rows(I_out)
    product = multiply(x, weight, mask, I_in, I_out is None, adaptive, tau is not None)
    return update(weight, product, bias, mask, I_in, I_out, None, policy, entropy, tau, clamp)


class Product(NamedTuple):
    """Hold the results of the first kernel; ``None`` where they were not asked for."""

    H: Tensor  # [N, d_out]
    record: Tensor | None
    positions: Tensor | None
    energy: Tensor | None
    row_squares: Tensor | None
    column_squares: Tensor | None
    tiles: int


@on_its_device
def multiply(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    selecting: bool,
    adaptive: bool,
    clipped: bool,
) -> Product:
    """Run the first kernel: H, and the sums a tile gives to selection, policy and clip."""
    groups, _, d_in = x.shape
    width, r = weight.shape[0], 1 if I_in is None else I_in.shape[1]
    tile = tuning.gemv(width, x.element_size(), tuning.architecture(x.device))
    tiles = tuning.steps(width, tile["BLOCK_O"])
    new = partial(torch.empty, device=x.device)
    product = Product(
        new(groups, width, dtype=x.dtype),
        new(groups, tiles, r, dtype=torch.float32) if selecting else None,
        new(groups, tiles, r, dtype=torch.int32) if selecting else None,
        new(groups, tiles, dtype=torch.float32) if adaptive else None,
        new(width, dtype=torch.float32) if clipped else None,
        new(groups, tiles, r, dtype=torch.float32) if clipped else None,
        tiles,
    )
    gemv_kernel[tiles,](
        x, weight, mask, I_in, *product[:6], groups, width, x.stride(0), x.stride(2),
        *weight.stride(), _stride(mask), _stride(I_in), D_IN=d_in, R=r,
        RANKS=tuning.power_of_2(r), GROUPS=tuning.power_of_2(groups), BLOCK_N=LARGEST_N, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    return product


@on_its_device
def update(
    weight: Tensor,
    product: Product,
    bias: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor,
    I_out: Tensor | None,
    energy: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    tau: float | None,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the second kernel and return the results of :func:`launch`.

    Rows of I_in and I_out are contiguous. ``energy`` float32 ``[N]``, pooled over a query and a
    key, replaces the energy of the product.
    """
    H, *scratch, tiles = product
    if energy is not None:
        scratch[2] = energy
    (groups, width), r = H.shape, I_in.shape[1]
    new = partial(torch.empty, device=H.device)
    y = new(groups, 1, width, dtype=H.dtype)
    features = new(groups, 2, r, dtype=torch.int64)
    core, gamma = new(groups, r, r, dtype=torch.float32), new(groups, dtype=torch.float32)
    t = new((groups, 1, r) if clamp is not None else 0, dtype=H.dtype)
    tile = tuning.decode_apply(width, tiles * r)
    apply_kernel[tuning.steps(width, tile["BLOCK_D"]), groups](
        H, bias, weight, mask, I_in, I_out, *scratch, policy, entropy, y, features, core, gamma,
        None if clamp is None else t, tiles, width, _stride(bias), *weight.stride(), _stride(mask),
        _stride(I_in), _stride(I_out), TAU=tau, CLAMP=clamp, POOLED=energy is not None,
        BY_COLUMN=policy.numel() == 9 + r, R=r, RANKS=tuning.power_of_2(r),
        TILES=tuning.power_of_2(tiles), **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return y, features, core, gamma, t


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)

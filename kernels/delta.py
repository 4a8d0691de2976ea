"""Add the clipped rank-r update to the base product: ``y = H + b + γ·clamp(H[:, I_out] C Bᵀ)``.

B = W[:, I_in]: nothing of W is read but its r selected columns (SPEC §4). Out of place, since every
program of a row reads the r selected elements of H.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import on_its_device
from vps.kernels.scores import accumulation
from vps.kernels.select import with_rows

LARGEST_R = 64
UNROLLED_R = 8


@triton.jit
def finish(base, delta, gamma, CLAMP: tl.constexpr):
    """Return ``base + γ·clamp(delta)``, and base itself where γ is 0, whatever delta is."""
    if CLAMP is not None:
        delta = tl.where(delta > CLAMP, CLAMP, tl.where(delta < -CLAMP, -CLAMP, delta))
    return tl.where(gamma == 0.0, base, base + gamma * delta)


@triton.jit
def delta_kernel(
    H_ptr,  # [G, T, d_out]
    bias_ptr,  # [d_out] or None
    weight_ptr,  # [d_out, d_in]
    I_in_ptr,  # int64 [G, R]
    I_out_ptr,  # int64 [G, R]
    core_ptr,  # [G, R, R]
    gamma_ptr,  # [G]
    active_ptr,  # int32 [G] or None
    y_ptr,  # [G, T, d_out], contiguous
    t_ptr,  # H[:, I_out], 0 where inactive, [G, T, R], or None
    tokens,
    width,
    stride_H_g,
    stride_H_t,
    stride_H_d,
    stride_bias,
    stride_out,
    stride_in,
    stride_I_in,
    stride_I_out,
    ACC: tl.constexpr,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK_D)
    row_blocks = tl.cdiv(tokens, BLOCK_T)
    program = tl.program_id(0)
    group = (program // (tiles * row_blocks)).to(tl.int64)
    rows = (program // tiles % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns = (program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    rank = tl.arange(0, RANKS)
    in_tokens = rows < tokens
    in_width = columns < width
    gamma = tl.load(gamma_ptr + group).to(ACC)
    active = tl.cast(R, tl.int32)
    if active_ptr is not None:
        active = tl.load(active_ptr + group)
    H_rows = H_ptr + group * stride_H_g + rows * stride_H_t

    mixed = tl.zeros([BLOCK_T, RANKS], dtype=ACC)
    for k in tl.range(0, R, loop_unroll_factor=UNROLL):
        feature = tl.load(I_out_ptr + group * stride_I_out + k)
        wanted = rows < tl.where(k < active, tokens, 0)
        selected = tl.load(H_rows + feature * stride_H_d, mask=wanted, other=0.0)
        if t_ptr is not None:
            own = rows < tl.where(program % tiles == 0, tokens, 0)
            tl.store(t_ptr + (group * tokens + rows) * R + k, selected, mask=own)
        core = tl.load(core_ptr + (group * R + k) * R + rank, mask=rank < R, other=0.0)
        mixed += selected.to(ACC)[:, None] * core.to(ACC)[None, :]

    delta = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
    for c in tl.range(0, R, loop_unroll_factor=UNROLL):
        feature = tl.load(I_in_ptr + group * stride_I_in + c)
        wanted = columns < tl.where(c < active, width, 0)
        address = weight_ptr + columns * stride_out + feature * stride_in
        column = tl.load(address, mask=wanted, other=0.0)
        factor = tl.sum(tl.where(rank[None, :] == c, mixed, 0.0), axis=1)
        delta += factor[:, None] * column.to(ACC)[None, :]

    inside = in_tokens[:, None] & in_width[None, :]
    base = tl.load(H_rows[:, None] + columns[None, :] * stride_H_d, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=in_width, other=0.0)
        base += bias.to(ACC)[None, :]
    y = finish(base, delta, gamma, CLAMP)
    y_rows = y_ptr + (group * tokens + rows)[:, None] * width
    tl.store(y_rows + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@on_its_device
def launch(
    H: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    core: Tensor,
    gamma: Tensor,
    active: Tensor | None,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``H + b + γ·clamp(H[:, I_out] C W[:, I_in]ᵀ)`` for every group.

    Args:
        H: base product without bias, ``[G, T, d_out]``, any strides.
        bias: ``[d_out]`` or ``None``.
        weight: ``[d_out, d_in]``, any strides.
        I_in: int64 ``[G, r]``.
        I_out: int64 ``[G, r]``.
        core: ``C``, ``[G, r, r]``.
        gamma: ``[G]``; a group of γ = 0 gets exactly H + b.
        active: int32 ``[G]``, how many of the first columns take part; ``None`` for all.
        clamp: bound of each element of the update, a constant of the kernel, or ``None``.

    Returns:
        y ``[G, T, d_out]``, contiguous, in the dtype of H; and of it, if there is a clamp,
        ``H[:, I_out]`` as ``[G, T, r]``, 0 in columns that take no part, else ``[0]``.

    Raises:
        TypeError: H of a dtype that is no float of 16 to 64 bits.
        ValueError: shapes that do not fit, or r above 64.
    """
    acc = accumulation(H.dtype)[1]
    groups, r = I_in.shape
    if H.dim() != 3 or H.shape[0] != groups or H.shape[2] != weight.shape[0]:
        raise ValueError(
            f"delta: H must be [{groups}, T, {weight.shape[0]}] to fit I_in and weight, "
            f"got {tuple(H.shape)}"
        )
    if not 1 <= r <= LARGEST_R or core.shape != (groups, r, r):
        raise ValueError(
            f"delta: core must be [G, r, r] with r from 1 to {LARGEST_R} like I_in "
            f"{tuple(I_in.shape)}, got {tuple(core.shape)}"
        )
    tokens, width = H.shape[1:]
    y = torch.empty(groups, tokens, width, dtype=H.dtype, device=H.device)
    t = torch.empty((groups, tokens, r) if clamp is not None else 0, dtype=H.dtype, device=H.device)
    if y.numel() == 0:
        return y, t
    I_in, I_out = with_rows(I_in), with_rows(I_out)
    tile = tuning.delta(tokens, width)
    programs = tuning.steps(tokens, tile["BLOCK_T"]) * tuning.steps(width, tile["BLOCK_D"])
    delta_kernel[groups * programs,](
        H, bias, weight, I_in, I_out, core.contiguous(), gamma.contiguous(), active, y,
        None if clamp is None else t, tokens, width, *H.stride(),
        0 if bias is None else bias.stride(0), *weight.stride(), I_in.stride(0), I_out.stride(0),
        ACC=acc, CLAMP=clamp, R=r,
        RANKS=tuning.power_of_2(r), UNROLL=r if r <= UNROLLED_R else 1, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y, t

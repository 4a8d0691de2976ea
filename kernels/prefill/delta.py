"""Add the clipped rank-r update to the base product: ``y = H + b + γ·clamp(H[:, I_out] C Bᵀ)``.

B = W[:, I_in] was gathered before (``columns``), and a program folds C into it once for all its
rows: ``H[:, I_out] (C Bᵀ)``. Out of place, since every program of a row reads the r selected
elements of H (SPEC §4).
"""
# mypy: disallow-untyped-defs=False, disable-error-code="assignment,index"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.columns import Columns
from vps.kernels.device import accumulation, on_its_device
from vps.kernels.select import with_rows

LARGEST_R = 64
HELD_R = 8  # columns that fit the registers of a program


@triton.jit
def finish(base, delta, gamma, CLAMP: tl.constexpr):
    """Return ``base + γ·clamp(delta)``, and base itself where γ is 0, whatever delta is."""
    if CLAMP is not None:
        delta = tl.where(delta > CLAMP, CLAMP, tl.where(delta < -CLAMP, -CLAMP, delta))
    return tl.where(gamma == 0.0, base, base + gamma * delta)


@triton.jit
def load_selected(
    H_rows,  # [BLOCK_T], pointers
    t_rows,  # [BLOCK_T], pointers, or None
    k,
    offset,
    rows,  # [BLOCK_T]
    active,
    tokens,
    kept_tokens,
    ACC: tl.constexpr,
):
    """Load one selected output of each row, 0 where inactive, and keep it for the first rows."""
    wanted = rows < tl.where(k < active, tokens, 0)
    selected = tl.load(H_rows + offset, mask=wanted, other=0.0)
    if t_rows is not None:
        tl.store(t_rows + k, selected, mask=rows < kept_tokens)
    return selected.to(ACC)


@triton.jit
def add_rolled(
    delta,  # [BLOCK_T, BLOCK_D]
    H_rows,  # [BLOCK_T], pointers
    t_rows,  # [BLOCK_T], pointers, or None
    columns_ptr,  # [slots, d_out]
    I_in_ptr,  # int64 [R] of the group, or None to take slots in order
    I_out_ptr,  # int64 [R] of the group
    core_ptr,  # [R, R] of the group
    rows,  # [BLOCK_T]
    columns,  # [BLOCK_D]
    first,
    active,
    tokens,
    kept_tokens,
    width,
    stride_H_d,
    ACC: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add the update of one step with more columns than registers hold."""
    rank = tl.arange(0, RANKS)
    mixed = tl.zeros([BLOCK_T, RANKS], dtype=ACC)
    for k in range(R):
        offset = tl.load(I_out_ptr + k) * stride_H_d
        selected = load_selected(H_rows, t_rows, k, offset, rows, active, tokens, kept_tokens, ACC)
        core = tl.load(core_ptr + k * R + rank, mask=rank < R, other=0.0)
        mixed += selected[:, None] * core.to(ACC)[None, :]
    for c in range(R):
        slot = first + c
        if I_in_ptr is not None:
            slot = tl.load(I_in_ptr + c)
        taking_part = columns < tl.where(c < active, width, 0)
        column = tl.load(columns_ptr + slot * width + columns, mask=taking_part, other=0.0)
        factor = tl.sum(tl.where(rank[None, :] == c, mixed, 0.0), axis=1)
        delta += factor[:, None] * column.to(ACC)[None, :]
    return delta


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    H_ptr,  # [G, T, d_out]
    bias_ptr,  # [d_out] or None
    columns_ptr,  # [G·R, d_out], or [d_in, d_out] with I_in
    I_in_ptr,  # int64 [G, R] or None
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
    stride_I_in,
    stride_I_out,
    ACC: tl.constexpr,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK_D)
    row_blocks = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    group = (program // (tiles * row_blocks)).to(tl.int64)
    first_row = program // tiles % row_blocks * ROWS
    columns = (program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    in_width = columns < width
    gamma = tl.load(gamma_ptr + group).to(ACC)
    active = tl.cast(R, tl.int32)
    if active_ptr is not None:
        active = tl.load(active_ptr + group)
    I_in_group = I_in_ptr
    if I_in_ptr is not None:
        I_in_group = I_in_ptr + group * stride_I_in
    I_out_group = I_out_ptr + group * stride_I_out
    core_group = core_ptr + group * R * R

    # C folded into B: row k of C Bᵀ for this tile.
    mixed = ()
    offsets = ()
    if HELD:
        held = ()
        for c in tl.static_range(R):
            slot = group * R + c
            if I_in_ptr is not None:
                slot = tl.load(I_in_group + c)
            taking_part = columns < tl.where(c < active, width, 0)
            column = tl.load(columns_ptr + slot * width + columns, mask=taking_part, other=0.0)
            held = held + (column.to(ACC),)
        for k in tl.static_range(R):
            total = tl.zeros([BLOCK_D], dtype=ACC)
            for c in tl.static_range(R):
                core = tl.load(core_group + k * R + c).to(ACC)
                total += tl.where(core == 0.0, 0.0, core * held[c])
            mixed = mixed + (total,)
            offsets = offsets + (tl.load(I_out_group + k) * stride_H_d,)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=in_width, other=0.0).to(ACC)

    kept_tokens = tl.where(program % tiles == 0, tokens, 0)
    for start in tl.range(0, ROWS, BLOCK_T):
        rows = (first_row + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (rows < tokens)[:, None] & in_width[None, :]
        H_rows = H_ptr + group * stride_H_g + rows * stride_H_t
        t_rows = None
        if t_ptr is not None:
            t_rows = t_ptr + (group * tokens + rows) * R
        base = tl.load(H_rows[:, None] + columns[None, :] * stride_H_d, mask=inside, other=0.0)
        base = base.to(ACC)
        if bias_ptr is not None:
            base += bias[None, :]
        delta = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
        if HELD:
            for k in tl.static_range(R):
                selected = load_selected(H_rows, t_rows, k, offsets[k], rows, active, tokens,
                                         kept_tokens, ACC)  # fmt: skip
                delta += selected[:, None] * mixed[k][None, :]
        else:
            delta = add_rolled(delta, H_rows, t_rows, columns_ptr, I_in_group, I_out_group,
                               core_group, rows, columns, group * R, active, tokens, kept_tokens,
                               width, stride_H_d, ACC, R, RANKS, BLOCK_T)  # fmt: skip
        y = finish(base, delta, gamma, CLAMP)
        y_rows = y_ptr + (group * tokens + rows)[:, None] * width
        tl.store(y_rows + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@on_its_device
def launch(
    H: Tensor,
    bias: Tensor | None,
    columns: Columns,
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
        columns: the columns I_in ``[G, r]`` of the weight, filled.
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
    (groups, r), d_out = columns.I_in.shape, columns.values.shape[1]
    if H.dim() != 3 or H.shape[0] != groups or H.shape[2] != d_out:
        raise ValueError(
            f"delta: H must be [{groups}, T, {d_out}] to fit the columns, got {tuple(H.shape)}"
        )
    if not 1 <= r <= LARGEST_R or core.shape != (groups, r, r):
        raise ValueError(
            f"delta: core must be [G, r, r] with r from 1 to {LARGEST_R} like I_in "
            f"{tuple(columns.I_in.shape)}, got {tuple(core.shape)}"
        )
    tokens, width = H.shape[1:]
    y = torch.empty(groups, tokens, width, dtype=H.dtype, device=H.device)
    t = torch.empty((groups, tokens, r) if clamp is not None else 0, dtype=H.dtype, device=H.device)
    if y.numel() == 0:
        return y, t
    I_out = with_rows(I_out)
    tile = tuning.delta(tokens, width, r, H.element_size())
    programs = tuning.steps(tokens, tile["ROWS"]) * tuning.steps(width, tile["BLOCK_D"])
    delta_kernel[groups * programs,](
        H, bias, columns.values, columns.I_in if columns.every else None, I_out,
        core.contiguous(), gamma.contiguous(), active, y, None if clamp is None else t, tokens,
        width, *H.stride(), 0 if bias is None else bias.stride(0), columns.I_in.stride(0),
        I_out.stride(0), ACC=acc, CLAMP=clamp, R=r, RANKS=tuning.power_of_2(r), HELD=r <= HELD_R,
        **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return y, t

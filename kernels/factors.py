"""Fold policy, column norms and clip into the r × r core of SK, order 1 (SPEC §4, §5).

``C = diag(1/s_c)`` over the active columns, ``s_c = max(1, ‖A_c‖‖B_c‖/τ)``; A_c is row I_out[c] of
W and B_c column I_in[c], so only r rows and r columns are read.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import on_its_device
from vps.kernels.policy import column_factors, decide, inverse_scale
from vps.kernels.scores import accumulation, count_tokens, mask_strides
from vps.kernels.select import with_rows


@triton.jit
def sum_squares(
    weight_ptr,  # [d_out, d_in]
    index_ptr,  # int64 [entries / per_group, per_group], rows or columns of W
    partial_ptr,  # [splits, entries]
    entries,
    per_group,
    length,
    stride_group,
    stride_index,
    stride_along,
    ACC: tl.constexpr,
    ENTRIES: tl.constexpr,
    ALONG: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sum the squares of the listed rows (or columns) over one stretch of their length."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    begin = tl.program_id(1) * (ALONG * STEPS)
    if begin < length:
        address = index_ptr + entry // per_group * stride_group + entry % per_group
        index = tl.load(address, mask=entry < entries, other=0)
        total = tl.zeros([ENTRIES, ALONG], dtype=ACC)
        for step in range(STEPS):
            at = begin + step * ALONG + tl.arange(0, ALONG)
            offsets = index[:, None] * stride_index + at.to(tl.int64)[None, :] * stride_along
            inside = (entry < entries)[:, None] & (at < length)[None, :]
            values = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(ACC)
            total += values * values
        address = partial_ptr + tl.program_id(1) * entries + entry
        tl.store(address, tl.sum(total, axis=1), mask=entry < entries)


@triton.jit
def squares_kernel(
    weight_ptr,  # [d_out, d_in]
    rows_ptr,  # int64 [rows / rows_group, rows_group]
    columns_ptr,  # int64 [columns / columns_group, columns_group]
    partial_rows_ptr,  # [splits of d_in, rows]
    partial_columns_ptr,  # [splits of d_out, columns]
    rows,
    columns,
    rows_group,
    columns_group,
    d_out,
    d_in,
    stride_rows,
    stride_columns,
    stride_out,
    stride_in,
    ACC: tl.constexpr,
    ENTRIES: tl.constexpr,
    ALONG: tl.constexpr,
    STEPS: tl.constexpr,
):
    if tl.program_id(2) == 0:
        sum_squares(weight_ptr, rows_ptr, partial_rows_ptr, rows, rows_group, d_in, stride_rows,
                    stride_out, stride_in, ACC, ENTRIES, ALONG, STEPS)  # fmt: skip
    else:
        sum_squares(weight_ptr, columns_ptr, partial_columns_ptr, columns, columns_group, d_out,
                    stride_columns, stride_in, stride_out, ACC, ENTRIES, ALONG, STEPS)  # fmt: skip


@triton.jit
def add_partials(partial_ptr, entry, inside, splits, entries, SPLITS: tl.constexpr):
    """Add the splits of ``partial`` [splits, entries] at ``entry`` [R]."""
    split = tl.arange(0, SPLITS)
    address = partial_ptr + split[:, None] * entries + entry[None, :]
    partial = tl.load(address, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    return tl.sum(partial, axis=0)


@triton.jit
def factors_kernel(
    partial_rows_ptr,  # [splits_rows, rows], None without a clip
    partial_columns_ptr,  # [splits_columns, columns], None without a clip
    I_in_ptr,  # int64 [G, R]
    I_out_ptr,  # int64 [G, R]
    policy_ptr,  # float64 [9], or [9 + R] with a factor of each column
    energy_ptr,  # [G] or None
    entropy_ptr,  # float64 [2] or None
    mask_ptr,  # bool [G, T] or None
    features_ptr,  # int64 [G, 2, R]: I_in, I_out
    core_ptr,  # [G, R, R]
    gamma_ptr,  # [G]
    active_ptr,  # int32 [G]
    rows,
    columns,
    splits_rows,
    splits_columns,
    tokens,
    stride_I_in,
    stride_I_out,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    TAU: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    EVERY_COLUMN: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS_ROWS: tl.constexpr,
    SPLITS_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, RANKS)
    inside = rank < R
    energy = None
    if energy_ptr is not None:
        energy = tl.load(energy_ptr + group)
    gamma, active = decide(policy_ptr, energy, entropy_ptr, R)
    if mask_ptr is not None:
        mask_row = mask_ptr + group * stride_mask_g
        counted = count_tokens(mask_row, tokens, stride_mask_t, TOKENS, BLOCK_T) > 0
        gamma = tl.where(counted, gamma, 0.0)
        active = tl.where(counted, active, 0)
    I_in = tl.load(I_in_ptr + group * stride_I_in + rank, mask=inside, other=0)
    I_out = tl.load(I_out_ptr + group * stride_I_out + rank, mask=inside, other=0)
    tl.store(features_ptr + group * 2 * R + rank, I_in, mask=inside)
    tl.store(features_ptr + (group * 2 + 1) * R + rank, I_out, mask=inside)
    inverse = tl.full([RANKS], 1.0, dtype=ACC)
    if TAU is not None:
        row = I_out if EVERY_ROW else group * R + rank
        column = I_in if EVERY_COLUMN else group * R + rank
        inverse = inverse_scale(
            add_partials(partial_rows_ptr, row, inside, splits_rows, rows, SPLITS_ROWS),
            add_partials(partial_columns_ptr, column, inside, splits_columns, columns,
                         SPLITS_COLUMNS),
            TAU,
        )  # fmt: skip
    if BY_COLUMN:
        inverse = inverse * column_factors(policy_ptr, rank, inside, ACC)
    inverse = tl.where(rank < active, inverse, 0.0)
    core = tl.where(rank[:, None] == rank[None, :], inverse[:, None], 0.0)
    address = core_ptr + group * R * R + rank[:, None] * R + rank[None, :]
    tl.store(address, core, mask=inside[:, None] & inside[None, :])
    tl.store(gamma_ptr + group, tl.cast(gamma, ACC))
    tl.store(active_ptr + group, active)


def squares(weight: Tensor, I_in: Tensor, I_out: Tensor) -> tuple[Tensor, Tensor, bool, bool]:
    """Sum squares of rows ``[splits, rows]`` and columns ``[splits, columns]`` of W in part.

    Of the selected ones, in the order of I_out and I_in; or of all of them, flagged by the last
    two results, once more are selected than there are. Either way every sum is the same.
    """
    dtype, acc = accumulation(weight.dtype)
    d_out, d_in = weight.shape
    every_row, every_column = I_out.numel() > d_out, I_in.numel() > d_in
    rows = torch.arange(d_out, device=weight.device)[None] if every_row else I_out
    columns = torch.arange(d_in, device=weight.device)[None] if every_column else I_in
    tile = tuning.squares(max(rows.numel(), columns.numel()))
    stretch = tile["ALONG"] * tile["STEPS"]
    splits_rows, splits_columns = (tuning.steps(length, stretch) for length in (d_in, d_out))
    partial_rows = torch.empty(splits_rows, rows.numel(), dtype=dtype, device=weight.device)
    partial_columns = torch.empty(
        splits_columns, columns.numel(), dtype=dtype, device=weight.device
    )
    blocks = tuning.steps(max(rows.numel(), columns.numel()), tile["ENTRIES"])
    squares_kernel[blocks, max(splits_rows, splits_columns), 2](
        weight, rows, columns, partial_rows, partial_columns, rows.numel(), columns.numel(),
        rows.shape[1], columns.shape[1], d_out, d_in, rows.stride(0), columns.stride(0),
        *weight.stride(), ACC=acc, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return partial_rows, partial_columns, every_row, every_column


@on_its_device
def launch(
    weight: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    policy: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    tau: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return selection, core, γ and active rank of every group (SK, order 1, component clip).

    Args:
        weight: ``[d_out, d_in]``, any strides.
        I_in: int64 ``[G, r]``.
        I_out: int64 ``[G, r]``.
        policy: float64 ``[9]``: factor, then the bounds of γ, rank, topk and order; ``[9 + r]``
            with a factor of each column.
        energy: ``[G]`` in the accumulation dtype; ``None`` when nothing is adaptive.
        entropy: float64 ``[2]``, ℋ in nats or −1, and the factor of the history; or ``None``.
        tau: bound of ``‖A_c‖‖B_c‖``, a constant of the kernel; ``None`` for no clip.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.

    Returns:
        I_in and I_out ``[G, 2, r]``; core ``[G, r, r]`` without γ, 0 in rows and columns of
        inactive ranks, and γ ``[G]``, both in the accumulation dtype; active columns int32
        ``[G]``. The last three are 0 where no token counts.

    Raises:
        TypeError: a weight that is no float of 16 to 64 bits, or a policy that is not float64.
        ValueError: a weight that is no matrix, or selections or a mask of another shape or dtype.
    """
    I_in, I_out = _checked(weight, I_in, I_out)
    by_column = policy.numel() == 9 + I_in.shape[1]
    if policy.dtype != torch.float64 or not (by_column or policy.numel() == 9):
        raise TypeError(
            f"factors: policy must be float64 [9], got {policy.dtype} {tuple(policy.shape)}"
        )
    dtype, acc = accumulation(weight.dtype)
    groups, r = I_in.shape
    if mask is not None and (mask.shape[:-1] != (groups,) or mask.dtype != torch.bool):
        raise ValueError(
            f"factors: mask must be bool [{groups}, T], got {mask.dtype} {tuple(mask.shape)}"
        )
    features = torch.empty(groups, 2, r, dtype=torch.int64, device=weight.device)
    core = torch.empty(groups, r, r, dtype=dtype, device=weight.device)
    gamma = torch.empty(groups, dtype=dtype, device=weight.device)
    active = torch.empty(groups, dtype=torch.int32, device=weight.device)
    rows = columns = None
    every_row = every_column = False
    sizes = (0, 0, 0, 0)
    if groups == 0:
        return features, core, gamma, active
    if tau is not None:
        rows, columns, every_row, every_column = squares(weight, I_in, I_out)
        sizes = (rows.shape[1], columns.shape[1], rows.shape[0], columns.shape[0])
    power = tuning.power_of_2
    tokens = 0 if mask is None else mask.shape[1]
    tile = tuning.factors(power(r) * power(max(sizes[2:])), tokens)
    factors_kernel[groups,](
        rows, columns, I_in, I_out, policy, energy, entropy, mask, features, core, gamma, active,
        *sizes, tokens, I_in.stride(0), I_out.stride(0), *mask_strides(mask), ACC=acc, TAU=tau,
        EVERY_ROW=every_row, EVERY_COLUMN=every_column, BY_COLUMN=by_column, R=r, RANKS=power(r),
        SPLITS_ROWS=power(sizes[2]), SPLITS_COLUMNS=power(sizes[3]), TOKENS=power(tokens), **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    return features, core, gamma, active


def _checked(weight: Tensor, I_in: Tensor, I_out: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments and return the selections with contiguous rows."""
    if weight.dim() != 2:
        raise ValueError(f"factors: weight must be [d_out, d_in], got {tuple(weight.shape)}")
    for name, index in (("I_in", I_in), ("I_out", I_out)):
        if index.dtype != torch.int64 or index.dim() != 2 or index.shape != I_in.shape:
            raise ValueError(
                f"factors: {name} must be int64 [G, r] like I_in {tuple(I_in.shape)}, "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    return with_rows(I_in), with_rows(I_out)

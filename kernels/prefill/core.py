"""Build the r × r core of SC, second order and spectral clip, r ≤ 8, as SPEC §3 to §5 say.

``C = V D (I + γ/2 w Mᵀ) D w`` with ``M = D Vᵀ W[I_out, I_in] D`` and ``D = diag(1/√s)``: the same
as :mod:`vps.algorithm.core`, by one warp for each group, from the sums that ``gram`` took.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.columns import Columns
from vps.kernels.device import accumulation, on_its_device
from vps.kernels.policy import column_factors, decide, is_second_order
from vps.kernels.prefill import gram as grams
from vps.kernels.prefill.factors import square_columns
from vps.kernels.prefill.gram import Grams, cross, load_selected, store_matrix
from vps.kernels.scores import count_tokens, mask_strides
from vps.kernels.select import with_rows

LARGEST_R = 8


@triton.jit
def times(a, b):
    """Return the product of two matrices [N, N]."""
    return tl.sum(a[:, :, None] * b[None, :, :], axis=1)


@triton.jit
def solve(matrix, right, row, column, N: tl.constexpr):
    """Return ``matrix⁻¹ right`` for a positive definite matrix [N, N], by elimination."""
    for k in tl.static_range(N):
        pivot_row = tl.sum(tl.where(row == k, matrix, 0.0), axis=0)[None, :]
        pivot_right = tl.sum(tl.where(row == k, right, 0.0), axis=0)[None, :]
        below = tl.sum(tl.where(column == k, matrix, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where((row == k) & (column == k), matrix, 0.0))
        factor = tl.where(row == k, 0.0, below / pivot)
        matrix -= factor * pivot_row
        right -= factor * pivot_right
    return right / tl.sum(tl.where(row == column, matrix, 0.0), axis=1)[:, None]


@triton.jit
def add_splits(
    partial_ptr,  # [splits, PARTS, R, R] of the group
    splits,
    part,
    ranks,  # [RANKS]
    PARTS: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add a part of all splits, [RANKS, RANKS]."""
    total = tl.zeros([8, RANKS, RANKS], dtype=DTYPE)
    entry = ranks[:, None] * R + ranks[None, :]
    inside = (ranks < R)[:, None] & (ranks < R)[None, :]
    for start in range(0, SPLITS, 8):
        split = start + tl.arange(0, 8)
        address = partial_ptr + (split[:, None, None] * PARTS + part) * (R * R) + entry[None, :, :]
        exists = (split < splits)[:, None, None] & inside[None, :, :]
        total += tl.load(address, mask=exists, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def largest_eigenvalue(product, row, column):
    """Return ``λ_max`` of a product of two positive semidefinite matrices, 0 for NaN.

    By a ratio of traces of powers, after as many squarings as in ``vps.algorithm.core``.
    """
    power = product
    for _ in range(30):
        largest = tl.max(tl.max(tl.abs(power), axis=1), axis=0)
        power = power / tl.where(largest > 0.0, largest, 1.0)
        power = times(power, power)
    trace = tl.sum(tl.where(row == column, power, 0.0))
    found = tl.sum(product * tl.trans(power)) / trace
    return tl.where(found > 0.0, found, 0.0)


@triton.jit(do_not_specialize=["slots", "splits_tokens", "tokens", "stride_mask_g"])
def core_kernel(
    x_ptr,  # [G, T, d_in]
    H_ptr,  # [G, T, d_out]
    weight_ptr,  # [d_out, d_in]
    squares_ptr,  # [tiles, slots]
    I_in_ptr,  # int64 [G, R]
    I_out_ptr,  # int64 [G, R]
    tokens_ptr,  # float64 [G, splits, 2, R, R] or None
    rows_ptr,  # [G, splits, R, R] or None
    columns_ptr,  # [G, splits, R, R] or None
    policy_ptr,  # float64 [9], or [9 + R] with a factor of each column
    energy_ptr,  # [G] or None
    entropy_ptr,  # float64 [2] or None
    mask_ptr,  # bool [G, T] or None
    features_ptr,  # int64 [G, 2, R]: I_in, I_out
    core_ptr,  # [G, R, R]
    gamma_ptr,  # [G]
    active_ptr,  # int32 [G]
    tiles,
    slots,
    splits_tokens,
    splits_rows,
    splits_columns,
    tokens,
    stride_x_g,
    stride_x_t,
    stride_x_d,
    stride_H_g,
    stride_H_t,
    stride_H_d,
    stride_out,
    stride_in,
    stride_I_in,
    stride_I_out,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    ALPHA: tl.constexpr,
    TAU: tl.constexpr,
    COUPLED: tl.constexpr,
    SECOND: tl.constexpr,
    SPECTRAL: tl.constexpr,
    EVERY: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    FEW: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS_TOKENS: tl.constexpr,
    SPLITS_ROWS: tl.constexpr,
    SPLITS_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, RANKS)
    inside = ranks < R
    row, column = ranks[:, None], ranks[None, :]
    identity = tl.where(row == column, 1.0, 0.0).to(ACC)
    energy = None
    if energy_ptr is not None:
        energy = tl.load(energy_ptr + group)
    gamma, active = decide(policy_ptr, energy, entropy_ptr, R)
    taking_part = ranks < active
    both = taking_part[:, None] & taking_part[None, :]
    I_in_group = I_in_ptr + group * stride_I_in
    I_out_group = I_out_ptr + group * stride_I_out
    I_in = tl.load(I_in_group + ranks, mask=inside, other=0)
    I_out = tl.load(I_out_group + ranks, mask=inside, other=0)
    tl.store(features_ptr + group * 2 * R + ranks, I_in, mask=inside)
    tl.store(features_ptr + (group * 2 + 1) * R + ranks, I_out, mask=inside)

    V = identity
    if COUPLED:
        if FEW > 0:  # with fewer tokens than columns XᵀX + αI is nearly singular
            few = tl.arange(0, FEW)
            counted = few < tokens
            if mask_ptr is not None:
                mask_few = mask_ptr + group * stride_mask_g + few * stride_mask_t
                counted = counted & (tl.load(mask_few, mask=counted, other=0) != 0)
            X = load_selected(x_ptr + group * stride_x_g, I_in_group, few.to(tl.int64), counted,
                              ranks, stride_x_t, stride_x_d, R)  # fmt: skip
            Y = load_selected(H_ptr + group * stride_H_g, I_out_group, few.to(tl.int64), counted,
                              ranks, stride_H_t, stride_H_d, R)  # fmt: skip
            X = tl.trans(tl.where(taking_part[:, None], X, 0.0))  # [FEW, RANKS]
            Y = tl.trans(tl.where(taking_part[:, None], Y, 0.0))
            small = cross(X, X)
            small += tl.where(few[:, None] == few[None, :], ALPHA, 0.0)
            solution = solve(small, Y, few[:, None], few[None, :], FEW)
            T = tl.sum(X[:, :, None] * solution[:, None, :], axis=0)
        else:
            first = tokens_ptr + group * splits_tokens * (2 * R * R)
            gram = add_splits(first, splits_tokens, 0, ranks, 2, R, RANKS, SPLITS_TOKENS,
                              tl.float64)  # fmt: skip
            mixed = add_splits(first, splits_tokens, 1, ranks, 2, R, RANKS, SPLITS_TOKENS,
                               tl.float64)  # fmt: skip
            ridge = tl.where(both, gram, 0.0) + tl.where(row == column, ALPHA, 0.0)
            T = solve(ridge, tl.where(both, mixed, 0.0), row, column, RANKS)
        norm = tl.sqrt(tl.sum(T * T, axis=1))[:, None]
        V = tl.trans(tl.where(norm == 0.0, 0.0, T / norm)).to(ACC)

    scale = tl.full([RANKS], 1.0, dtype=ACC)
    if TAU is not None:
        gram_A = add_splits(rows_ptr + group * splits_rows * (R * R), splits_rows, 0, ranks, 1, R,
                            RANKS, SPLITS_ROWS, ACC)  # fmt: skip
        if COUPLED:
            gram_A = times(times(tl.trans(V), gram_A), V)
        if SPECTRAL:
            gram_B = add_splits(columns_ptr + group * splits_columns * (R * R), splits_columns, 0,
                                ranks, 1, R, RANKS, SPLITS_COLUMNS, ACC)  # fmt: skip
            product = times(tl.where(both, gram_A, 0.0), tl.where(both, gram_B, 0.0))
            scale *= tl.sqrt(largest_eigenvalue(product, row, column)) / TAU
        else:
            squares_A = tl.sum(tl.where(row == column, gram_A, 0.0), axis=1)
            slot = I_in if EVERY else group * R + ranks
            squares_B = square_columns(squares_ptr, slot, inside, tiles, slots, TILES)
            squares_A = tl.where(squares_A < 0.0, 0.0, squares_A)
            scale = tl.sqrt(squares_A) * tl.sqrt(squares_B) / TAU
        scale = tl.where(scale <= 1.0, 1.0, scale)
    factor = tl.full([RANKS], 1.0, dtype=ACC)
    if BY_COLUMN:
        factor = column_factors(policy_ptr, ranks, inside, ACC)
    if SECOND:
        D = 1.0 / tl.sqrt(scale)
        part = inside[:, None] & inside[None, :]
        address = weight_ptr + I_out[:, None] * stride_out + I_in[None, :] * stride_in
        crossing = tl.load(address, mask=part, other=0.0).to(ACC)
        M = D[:, None] * times(tl.trans(V), crossing) * D[None, :]
        half = tl.trans(tl.where(both, M, 0.0)) * (tl.cast(gamma, ACC) * 0.5) * factor[:, None]
        half = tl.where(is_second_order(policy_ptr, energy, entropy_ptr), half, 0.0)
        core = times(V * D[None, :], identity + half) * (D * factor)[None, :]
    else:
        core = V * (factor / scale)[None, :]
    core = tl.where(taking_part[None, :], core, 0.0)
    if mask_ptr is not None:
        mask_row = mask_ptr + group * stride_mask_g
        any_counted = count_tokens(mask_row, tokens, stride_mask_t, TOKENS, BLOCK_T) > 0
        gamma = tl.where(any_counted, gamma, 0.0)
        active = tl.where(any_counted, active, 0)
        core = tl.where(any_counted, core, 0.0)
    store_matrix(core_ptr, group, core, ranks, R)
    tl.store(gamma_ptr + group, tl.cast(gamma, ACC))
    tl.store(active_ptr + group, active)


@on_its_device
def launch(
    x: Tensor,
    H: Tensor,
    weight: Tensor,
    columns: Columns,
    I_out: Tensor,
    policy: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    alpha: float | None,
    second_order: bool,
    tau: float | None,
    spectral: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return selection, core, γ and active rank of every group.

    Args:
        x: ``[G, T, d_in]``, any strides.
        H: ``[G, T, d_out]``, any strides.
        weight: ``[d_out, d_in]``, any strides.
        columns: its columns I_in ``[G, r]``, filled.
        I_out: int64 ``[G, r]``.
        policy: float64 ``[9]``: factor, then the bounds of γ, rank, topk and order; ``[9 + r]``
            with a factor of each column.
        energy: ``[G]`` in the accumulation dtype; ``None`` when nothing is adaptive.
        entropy: float64 ``[2]``, ℋ in nats or −1, and the factor of the history; or ``None``.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        alpha: the ridge of SC, or ``None`` for SK.
        second_order: whether the order may be 2.
        tau: bound of the clip, or ``None``.
        spectral: whether it bounds ``‖ABᵀ‖₂`` instead of each ``‖A_c‖‖B_c‖``.

    Returns:
        I_in and I_out ``[G, 2, r]``; core ``[G, r, r]`` without γ, 0 in columns of inactive ranks,
        and γ ``[G]``, both in the accumulation dtype; active columns int32 ``[G]``. The last three
        are 0 where no token counts.

    Raises:
        ValueError: r above 8.
    """
    (groups, r), tokens = columns.I_in.shape, x.shape[1]
    if not 1 <= r <= LARGEST_R:
        raise ValueError(f"core: r must be from 1 to {LARGEST_R}, got {r}")
    I_out = with_rows(I_out)
    dtype, acc = accumulation(weight.dtype)
    power, few = tuning.power_of_2, alpha is not None and tokens < r
    wanted = alpha is not None and not few, tau is not None, tau is not None and spectral
    none = Grams(None, None, None)
    found = grams.launch(x, H, mask, weight, columns, I_out, wanted) if any(wanted) else none
    features = torch.empty(groups, 2, r, dtype=torch.int64, device=x.device)
    core = torch.empty(groups, r, r, dtype=dtype, device=x.device)
    gamma = torch.empty(groups, dtype=dtype, device=x.device)
    active = torch.empty(groups, dtype=torch.int32, device=x.device)
    if groups == 0:
        return features, core, gamma, active
    splits = [0 if one is None else one.shape[1] for one in found]
    tiles, slots = columns.squares.shape
    core_kernel[groups,](
        x, H, weight, columns.squares, columns.I_in, I_out, *found, policy, energy, entropy, mask,
        features, core, gamma, active, tiles, slots, *splits, tokens, *x.stride(), *H.stride(),
        *weight.stride(), columns.I_in.stride(0), I_out.stride(0), *mask_strides(mask), ACC=acc,
        ALPHA=alpha, TAU=tau, COUPLED=alpha is not None, SECOND=second_order, SPECTRAL=spectral,
        EVERY=columns.every, BY_COLUMN=policy.numel() > 9, R=r, RANKS=power(r),
        FEW=power(tokens) if few else 0, TILES=power(tiles), SPLITS_TOKENS=tuning.bucket(splits[0]),
        SPLITS_ROWS=tuning.bucket(splits[1]), SPLITS_COLUMNS=tuning.bucket(splits[2]),
        TOKENS=1 if mask is None else max(512, tuning.bucket(tokens)), BLOCK_T=512,
        num_warps=tuning.core_warps(r, weight.element_size()), enable_fp_fusion=True,
    )  # fmt: skip
    return features, core, gamma, active

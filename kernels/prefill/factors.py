"""Fold policy, column norms and clip into the r × r core of SK, order 1 (SPEC §4, §5).

``C = diag(1/s_c)`` over the active columns, ``s_c = max(1, ‖A_c‖‖B_c‖/τ)``; A_c is row I_out[c] of
W and B_c column I_in[c]. The program of a group also brings together the parts that ``features``
ranked, reads its r rows of W, and takes the norms of the columns from where they were gathered.
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
from vps.kernels.policy import column_factors, decide, inverse_scale
from vps.kernels.scores import count_tokens, mask_strides
from vps.kernels.select import best, with_rows

LARGEST_RECORDS = 4096


@triton.jit
def best_of_parts(
    record_ptr,  # [G, records] scores; -1 marks none
    index_ptr,  # int32 [G, records]
    group,
    records,
    ranks,  # [RANKS]
    R: tl.constexpr,
    RANKS: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Return the best R of all parts of a group, int64 [RANKS]."""
    entry = tl.arange(0, RECORDS)
    exists = entry < records
    scores = tl.load(record_ptr + group * records + entry, mask=exists, other=-1.0)
    index = tl.load(index_ptr + group * records + entry, mask=exists, other=0x7FFFFFFF)
    selected = tl.zeros([RANKS], dtype=tl.int64)
    for rank in range(R):
        at = best(scores, index, 0)[1]
        scores = tl.where(index == at, -1.0, scores)
        selected = tl.where(ranks == rank, at.to(tl.int64), selected)
    return selected


@triton.jit
def square_rows(
    weight_ptr,  # [d_out, d_in]
    rows,  # int64 [RANKS]
    inside,  # [RANKS]
    stride_out,
    stride_in,
    ACC: tl.constexpr,
    RANKS: tl.constexpr,
    D_IN: tl.constexpr,
    ALONG: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Return the squared norms of the listed rows of W, [RANKS]."""
    total = tl.zeros([RANKS, ALONG], dtype=ACC)
    for start in tl.range(0, D_IN, ALONG, loop_unroll_factor=UNROLL):
        at = start + tl.arange(0, ALONG)
        offsets = rows[:, None] * stride_out + at.to(tl.int64)[None, :] * stride_in
        part = inside[:, None] & (at < D_IN)[None, :]
        values = tl.load(weight_ptr + offsets, mask=part, other=0.0).to(ACC)
        total += values * values
    return tl.sum(total, axis=1)


@triton.jit
def square_columns(
    squares_ptr,  # [tiles, slots]
    slot,  # int64 [RANKS]
    inside,  # [RANKS]
    tiles,
    slots,
    TILES: tl.constexpr,
):
    """Return the squared norms of the columns at these slots, [RANKS]."""
    tile = tl.arange(0, TILES)
    address = squares_ptr + tile.to(tl.int64)[:, None] * slots + slot[None, :]
    partial = tl.load(address, mask=(tile < tiles)[:, None] & inside[None, :], other=0.0)
    return tl.sum(partial, axis=0)


@triton.jit(do_not_specialize=["records", "slots", "tokens", "stride_mask_g"])
def factors_kernel(
    weight_ptr,  # [d_out, d_in]
    squares_ptr,  # [tiles, slots]
    I_in_ptr,  # int64 [G, R]
    I_out_ptr,  # int64 [G, R], or int32 [G, records] with the scores
    record_ptr,  # [G, records] or None
    policy_ptr,  # float64 [9], or [9 + R] with a factor of each column
    energy_ptr,  # [G] or None
    entropy_ptr,  # float64 [2] or None
    mask_ptr,  # bool [G, T] or None
    features_ptr,  # int64 [G, 2, R]: I_in, I_out
    core_ptr,  # [G, R, R]
    gamma_ptr,  # [G]
    active_ptr,  # int32 [G]
    records,
    tiles,
    slots,
    tokens,
    stride_out,
    stride_in,
    stride_I_in,
    stride_I_out,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    TAU: tl.constexpr,
    EVERY: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    D_IN: tl.constexpr,
    ALONG: tl.constexpr,
    UNROLL: tl.constexpr,
    RECORDS: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, RANKS)
    inside = ranks < R
    energy = None
    if energy_ptr is not None:
        energy = tl.load(energy_ptr + group)
    gamma, active = decide(policy_ptr, energy, entropy_ptr, R)
    if mask_ptr is not None:
        mask_row = mask_ptr + group * stride_mask_g
        counted = count_tokens(mask_row, tokens, stride_mask_t, TOKENS, BLOCK_T) > 0
        gamma = tl.where(counted, gamma, 0.0)
        active = tl.where(counted, active, 0)
    I_in = tl.load(I_in_ptr + group * stride_I_in + ranks, mask=inside, other=0)
    if record_ptr is not None:
        I_out = best_of_parts(record_ptr, I_out_ptr, group, records, ranks, R, RANKS, RECORDS)
    else:
        I_out = tl.load(I_out_ptr + group * stride_I_out + ranks, mask=inside, other=0)
    tl.store(features_ptr + group * 2 * R + ranks, I_in, mask=inside)
    tl.store(features_ptr + (group * 2 + 1) * R + ranks, I_out, mask=inside)
    inverse = tl.full([RANKS], 1.0, dtype=ACC)
    if TAU is not None:
        slot = I_in if EVERY else group * R + ranks
        inverse = inverse_scale(
            square_rows(weight_ptr, I_out, inside, stride_out, stride_in, ACC, RANKS, D_IN, ALONG,
                        UNROLL),
            square_columns(squares_ptr, slot, inside, tiles, slots, TILES),
            TAU,
        )  # fmt: skip
    if BY_COLUMN:
        inverse = inverse * column_factors(policy_ptr, ranks, inside, ACC)
    inverse = tl.where(ranks < active, inverse, 0.0)
    core = tl.where(ranks[:, None] == ranks[None, :], inverse[:, None], 0.0)
    address = core_ptr + group * R * R + ranks[:, None] * R + ranks[None, :]
    tl.store(address, core, mask=inside[:, None] & inside[None, :])
    tl.store(gamma_ptr + group, tl.cast(gamma, ACC))
    tl.store(active_ptr + group, active)


@on_its_device
def launch(
    weight: Tensor,
    columns: Columns,
    I_out: Tensor,
    record: Tensor | None,
    policy: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    tau: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return selection, core, γ and active rank of every group (SK, order 1, component clip).

    Args:
        weight: ``[d_out, d_in]``, any strides.
        columns: its columns I_in ``[G, r]``, filled.
        I_out: int64 ``[G, r]``; or with ``record``, the best r of each part, int32
            ``[G, parts, r]``.
        record: scores of these, -1 where a part has fewer, in the accumulation dtype.
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
        TypeError: a policy that is not float64.
        ValueError: selections or a mask of another shape or dtype.
    """
    groups, r = columns.I_in.shape
    _check(columns, I_out, record, policy, mask)
    dtype, acc = accumulation(weight.dtype)
    features = torch.empty(groups, 2, r, dtype=torch.int64, device=weight.device)
    core = torch.empty(groups, r, r, dtype=dtype, device=weight.device)
    gamma = torch.empty(groups, dtype=dtype, device=weight.device)
    active = torch.empty(groups, dtype=torch.int32, device=weight.device)
    if groups == 0:
        return features, core, gamma, active
    power, d_in = tuning.power_of_2, weight.shape[1]
    records = 0 if record is None else I_out[0].numel()
    tokens = 0 if mask is None else mask.shape[1]
    I_out = with_rows(I_out) if record is None else I_out
    tiles, slots = columns.squares.shape
    tile = tuning.factors(r, records, d_in, tuning.architecture(weight.device))
    factors_kernel[groups,](
        weight, columns.squares, columns.I_in, I_out, record, policy, energy, entropy, mask,
        features, core, gamma, active, records, tiles, slots, tokens, *weight.stride(),
        columns.I_in.stride(0), I_out.stride(0), *mask_strides(mask), ACC=acc, TAU=tau,
        EVERY=columns.every, BY_COLUMN=policy.numel() > 9, R=r, RANKS=power(r), D_IN=d_in,
        TILES=power(tiles), TOKENS=max(512, tuning.bucket(tokens)) if tokens else 1, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    return features, core, gamma, active


def _check(
    columns: Columns, I_out: Tensor, record: Tensor | None, policy: Tensor, mask: Tensor | None
) -> None:
    groups, r = columns.I_in.shape
    if policy.dtype != torch.float64 or policy.shape not in ((9,), (9 + r,)):
        raise TypeError(
            f"factors: policy must be float64 [9], got {policy.dtype} {tuple(policy.shape)}"
        )
    if record is None:
        fits = I_out.dtype == torch.int64 and I_out.shape == (groups, r)
    else:
        fits = I_out.dtype == torch.int32 and I_out.shape == record.shape
        fits = fits and I_out.is_contiguous() and record.is_contiguous()
        fits = fits and I_out.dim() == 3 and (I_out.shape[0], I_out.shape[2]) == (groups, r)
        fits = fits and I_out[0].numel() <= LARGEST_RECORDS
    if not fits:
        raise ValueError(
            f"factors: I_out must be int64 [{groups}, {r}], or int32 [{groups}, parts, {r}] beside "
            f"a record, got {I_out.dtype} {tuple(I_out.shape)}"
        )
    if mask is not None and (mask.shape[:-1] != (groups,) or mask.dtype != torch.bool):
        raise ValueError(
            f"factors: mask must be bool [{groups}, T], got {mask.dtype} {tuple(mask.shape)}"
        )

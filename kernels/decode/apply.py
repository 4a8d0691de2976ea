"""Choose the outputs of a token from the records of all tiles, and add the update (SPEC §4, §5).

``y = H + b + γ·clamp(H[:, I_out] C Bᵀ)``. The second of the two kernels that decode: every program
brings the tiles of :mod:`vps.kernels.decode.gemv` together by itself, while what it adds to is on
its way.
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
from vps.kernels.decode.gemv import Product
from vps.kernels.device import begin, on_its_device, wait_for_last_kernel
from vps.kernels.policy import column_factors, decide_by, inverse_scale, load_policy
from vps.kernels.prefill.delta import finish
from vps.kernels.select import next_key, position


@triton.jit
def apply_kernel(
    H_ptr,  # of each layer [N, d_out], one behind the other
    bias_ptrs,  # of each layer [d_out] or None
    columns_ptr,  # of each layer [N, R, d_out]
    counted_ptr,  # bool [N] or None
    I_in_ptr,  # int64 [N, R]
    I_out_ptrs,  # of each layer int64 [N, R], or None to take the records
    record_ptr,  # [N, tiles, R] keys, or None if no layer takes them
    energy_ptr,  # [N] of the layers with I_out, or None: all take the sums
    sums_ptr,  # [N, 1 + R, tiles] or None
    row_squares_ptr,  # of each layer [d_out], or None
    policy_ptrs,  # of each layer float64 [9], or [9 + R] with a factor of each column
    entropy_ptr,  # float64 [2] or None
    y_ptrs,  # of each layer [N, d_out]
    features_ptr,  # int64 [layers, N, 2, R]
    core_ptr,  # [layers, N, R, R]
    gamma_ptr,  # [layers, N]
    t_ptr,  # [layers, N, R] or None
    widths,  # of each layer d_out
    tiles,  # of each layer in the records
    strides_bias,
    stride_counted,
    stride_I_in,
    stride_I_out,
    LAYERS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    GIVEN: tl.constexpr,  # whether a layer has an I_out
    TAU: tl.constexpr,
    CLAMP: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    RECORDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    layer, first, tile_first = program * 0, program * 0, program * 0
    before = first.to(tl.int64)
    own_tiles, width = tiles[0], widths[0]
    policy_ptr, y_ptr = policy_ptrs[0], y_ptrs[0]
    end, tile_end, features = first, tile_first, before
    for other in tl.static_range(1, LAYERS):
        end += tl.cdiv(widths[other - 1], BLOCK_D)
        tile_end += tiles[other - 1]
        features += widths[other - 1]
        mine = program >= end
        layer = tl.where(mine, other, layer)
        first = tl.where(mine, end, first)
        tile_first = tl.where(mine, tile_end, tile_first)
        before = tl.where(mine, features, before)
        own_tiles = tl.where(mine, tiles[other], own_tiles)
        width = tl.where(mine, widths[other], width)
        policy_ptr = tl.where(mine, policy_ptrs[other], policy_ptr)
        y_ptr = tl.where(mine, y_ptrs[other], y_ptr)
    all_tiles = tile_end + tiles[LAYERS - 1]

    ranks = tl.arange(0, RANKS)
    inside = ranks < R
    column = (program - first) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    I_in = tl.load(I_in_ptr + group * stride_I_in + ranks, mask=inside, other=0)
    wait_for_last_kernel(PDL, False)
    H_row = H_ptr + before * groups + group * width
    base = tl.load(H_row + column, mask=in_width, other=0.0).to(tl.float32)
    rows_B = columns_ptr + before * (groups * R) + group * R * width
    B_at = rows_B + ranks.to(tl.int64)[:, None] * width + column[None, :]
    B = tl.load(B_at, mask=inside[:, None] & in_width[None, :], other=0.0)
    for other in tl.static_range(LAYERS):
        if bias_ptrs[other] is not None:
            own = in_width if LAYERS == 1 else column < tl.where(layer == other, width, 0)
            bias_at = bias_ptrs[other] + column.to(tl.int64) * strides_bias[other]
            bias = tl.load(bias_at, mask=own, other=0.0).to(tl.float32)
            base = base + bias if LAYERS == 1 else tl.where(own, base + bias, base)
    tile = tl.arange(0, TILES)
    if record_ptr is not None:
        entry = tl.arange(0, RECORDS)
        record = record_ptr + (group * all_tiles + tile_first) * R
        key = tl.load(record + entry, mask=entry < own_tiles * R, other=-1)
    sums = sums_ptr
    if sums_ptr is not None:
        sums = sums_ptr + group * (1 + R) * all_tiles + tile_first + tile
    if ADAPTIVE and (energy_ptr is None or record_ptr is not None):
        parts = tl.load(sums, mask=tile < own_tiles, other=0.0)
    if TAU is not None:
        sums_at = sums[None, :] + (1 + ranks[:, None]) * all_tiles
        wanted = inside[:, None] & (tile < own_tiles)[None, :]
        columns_B = tl.load(sums_at, mask=wanted, other=0.0)
    is_given, I_out_ptr = layer < 0, I_in_ptr
    for other in tl.static_range(LAYERS):
        if I_out_ptrs[other] is not None:
            mine = layer == other
            is_given = is_given | mine
            I_out_ptr = tl.where(mine, I_out_ptrs[other], I_out_ptr)
    I_out = tl.zeros([RANKS], dtype=tl.int64)
    if GIVEN:
        wanted = ranks < tl.where(is_given, R, 0)
        I_out = tl.load(I_out_ptr + group * stride_I_out + ranks, mask=wanted, other=0)
    if ADAPTIVE and energy_ptr is not None:
        pooled = tl.load(energy_ptr + group)
    policy = load_policy(policy_ptr, entropy_ptr)
    tl.debug_barrier()  # or the compiler puts these loads off to where they are used

    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    if ADAPTIVE:
        if energy_ptr is None:
            energy = tl.sum(parts, axis=0) / tl.cast(width, tl.float32)
        elif record_ptr is None:
            energy = pooled
        else:
            energy = tl.sum(parts, axis=0) / tl.cast(width, tl.float32)
            energy = tl.where(is_given, pooled, energy)
        gamma, active = decide_by(policy, energy, HAS_ENTROPY, R)
    else:
        gamma, active = decide_by(policy, None, HAS_ENTROPY, R)
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + group * stride_counted) != 0
        gamma = tl.where(counted, gamma, 0.0)
        active = tl.where(counted, active, 0)
    gamma = tl.cast(gamma, tl.float32)
    wanted = ranks < active

    if record_ptr is not None:
        for rank in tl.static_range(R):
            largest, key = next_key(key, 0)
            found = (ranks == rank) & (is_given == 0)
            I_out = tl.where(found, position(largest), I_out)
    t = tl.load(H_row + I_out, mask=wanted, other=0.0)
    inverse = tl.full([RANKS], 1.0, dtype=tl.float32)
    if TAU is not None:
        rows_A = tl.load(row_squares_ptr + before + I_out, mask=inside, other=0.0)
        inverse = inverse_scale(rows_A, tl.sum(columns_B, axis=1), TAU)
    if BY_COLUMN:
        inverse = inverse * column_factors(policy_ptr, ranks, inside, tl.float32)
    inverse = tl.where(wanted, inverse, 0.0)
    factor = t.to(tl.float32) * inverse
    update = tl.sum(tl.where(wanted[:, None], B.to(tl.float32), 0.0) * factor[:, None], axis=0)
    y = finish(base, update, gamma, CLAMP).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + group * width + column, y, mask=in_width)

    if program == first:
        at = layer * groups + group
        tl.store(features_ptr + at * 2 * R + ranks, I_in, mask=inside)
        tl.store(features_ptr + (at * 2 + 1) * R + ranks, I_out, mask=inside)
        core = tl.where(ranks[:, None] == ranks[None, :], inverse[:, None], 0.0)
        core_at = core_ptr + at * R * R + ranks[:, None] * R + ranks[None, :]
        tl.store(core_at, core, mask=inside[:, None] & inside[None, :])
        tl.store(gamma_ptr + at, gamma)
        if t_ptr is not None:
            tl.store(t_ptr + at * R + ranks, t, mask=inside)


class Applied(NamedTuple):
    """Hold the results of one layer.

    Args:
        y: ``[N, 1, d_out]``.
        features: int64 ``[N, 2, r]``, I_in and I_out.
        core: float32 ``[N, r, r]`` without γ.
        gamma: float32 ``[N]``.
        t: ``H[:, I_out]`` ``[N, 1, r]``, 0 in columns left out, if there is a clamp, else ``[0]``.
    """

    y: Tensor
    features: Tensor
    core: Tensor
    gamma: Tensor
    t: Tensor


@on_its_device
def launch(
    I_in: Tensor,
    product: Product,
    biases: Sequence[Tensor | None],
    mask: Tensor | None,
    I_out: Sequence[Tensor | None],
    energy: Tensor | None,
    policies: Sequence[Tensor],
    entropy: Tensor | None,
    adaptive: bool,
    tau: float | None,
    clamp: float | None,
) -> list[Applied]:
    """Add the updates of the layers of a product.

    Args:
        I_in: int64 ``[N, r]`` with contiguous rows, as the product took it.
        product: of :func:`vps.kernels.decode.gemv.launch`.
        biases: ``[d_out]`` or ``None`` of each layer.
        mask: bool ``[N, 1]``, whether a token counts, or ``None``.
        I_out: int64 ``[N, r]`` of each layer, all of the same strides, rows contiguous; or ``None``
            to take what the product found.
        energy: float32 ``[N]``, pooled over the layers with I_out, or ``None`` for that of each.
        policies: of each layer, as :class:`vps.kernels.decode.decode.Layer` has it; of one length.
        entropy: float64 ``[2]``, ℋ in nats or −1, and the factor of the history; or ``None``.
        adaptive: whether the policies need an energy.
        tau: bound of the component clip, a constant of the kernel, or ``None``.
        clamp: bound of each element of the update, a constant of the kernel, or ``None``.

    Returns:
        What each layer has, in the storage of one tensor but for y.
    """
    (groups, r), layers, widths = I_in.shape, len(product.widths), product.widths
    device, dtype = I_in.device, product.H.dtype
    ys = [torch.empty(groups, 1, width, dtype=dtype, device=device) for width in widths]
    features = torch.empty(layers, groups, 2, r, dtype=torch.int64, device=device)
    core = torch.empty(layers, groups, r, r, dtype=torch.float32, device=device)
    gamma = torch.empty(layers, groups, dtype=torch.float32, device=device)
    shape = (layers, 0) if clamp is None else (layers, groups, 1, r)
    t = torch.empty(shape, dtype=dtype, device=device)
    given = [index for index in I_out if index is not None]
    most = max(product.tiles)
    key_size = 4 if product.record is None else product.record.element_size()
    tile = tuning.decode_apply(max(widths), most * r, key_size)
    pdl = tuning.has_pdl(tuning.architecture(device))
    programs = sum(tuning.steps(width, tile["BLOCK_D"]) for width in widths)
    pointers = (
        product.H, tuple(biases), product.columns, mask, I_in, tuple(I_out),
        None if len(given) == layers else product.record, energy, product.sums,
        product.row_squares, tuple(policies), entropy, tuple(ys), features, core, gamma,
        None if clamp is None else t,
    )  # fmt: skip
    rest = (
        widths, product.tiles, tuple(0 if b is None else b.stride(0) for b in biases),
        0 if mask is None else mask.stride(0), I_in.stride(0), given[0].stride(0) if given else 0,
        layers, adaptive, len(given) > 0, tau, clamp, policies[0].numel() == 9 + r, r,
        tuning.power_of_2(r), tuning.power_of_2(most), tile["RECORDS"], tile["BLOCK_D"], pdl,
    )  # fmt: skip
    begin(apply_kernel, (programs, groups), pointers, rest, tile, pdl)
    return [Applied(*own) for own in zip(ys, features, core, gamma, t, strict=True)]

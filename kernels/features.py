"""Select the k features of values with the largest scores, which are never stored (SPEC §2, §3).

As ``column_scores`` and ``select`` after each other, in one launch less: whoever brings the partial
sums of a tile together ranks them at once. The energy of the values comes with them.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import on_its_device
from vps.kernels.scores import accumulation, add_splits, mask_strides, store_energy, sum_up
from vps.kernels.select import check_k, merge, new_records, store_best


@triton.jit
def rank_kernel(
    partial_ptr,  # [G, splits, D]
    squares_ptr,  # [G, entries] or None
    mask_ptr,  # bool [G, T] or None
    record_ptr,  # [G, tiles, K] scores, or None with one tile
    index_ptr,  # [G, tiles, K] int32, or int64 [G, K] with one tile
    energy_ptr,  # [G]
    splits,
    entries,
    tokens,
    width,
    stride_mask_g,
    stride_mask_t,
    ACC: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    first = partial_ptr + group * splits * width
    scores = add_splits(first, columns, splits, width, ACC, SPLITS, BLOCK_S, BLOCK_D)
    slot = (group * tl.num_programs(1) + tile) * K
    store_best(scores, columns, width, record_ptr, index_ptr, slot, K)
    if squares_ptr is not None and tile == 0:
        store_energy(squares_ptr, mask_ptr, energy_ptr, group, entries, tokens, width,
                     stride_mask_g, stride_mask_t, ACC, ENTRIES, TOKENS, BLOCK)  # fmt: skip


@on_its_device
def launch(values: Tensor, mask: Tensor | None, k: int, energy: bool) -> tuple[Tensor, Tensor]:
    """Return the k features of each group with the largest mean |values|, and the energy.

    Args:
        values: x or H, ``[G, T, d]``, any strides; a non-finite element counts 0.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        k: from 1 to 64, at most d.
        energy: whether to take the mean of values² too.

    Returns:
        int64 ``[G, k]``, best first, ties to the lower index; and the energy ``[G]``, or ``[0]`` if
        not asked for, in the accumulation dtype, 0 for a group without a counted token.

    Raises:
        TypeError: a dtype that is no float of 16 to 64 bits.
        ValueError: shapes that do not fit, or a k out of range.
    """
    partial = sum_up("features", values, mask, energy)
    sums, squares = partial
    groups, tokens, width = values.shape
    check_k("features", k, width)
    selected = torch.empty(groups, k, dtype=torch.int64, device=values.device)
    mean = torch.empty(groups if energy else 0, dtype=sums.dtype, device=values.device)
    if groups == 0:
        return selected, mean
    if tokens == 0:
        return selected.copy_(torch.arange(k, device=values.device)), mean.zero_()
    splits = sums.shape[1]
    tile = tuning.rank(width, splits, k)
    tiles = tuning.steps(width, tile["BLOCK_D"])
    record, index = new_records(selected, tiles, sums.dtype)
    rank_kernel[groups, tiles](
        sums, squares, mask, record, index, mean, splits,
        0 if squares is None else squares.shape[1], tokens, width, *mask_strides(mask),
        ACC=accumulation(values.dtype)[1], K=k, **partial.constants(tokens), **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    merge(record, index, selected)
    return selected, mean

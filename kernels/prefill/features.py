"""Select the k features of values with the largest scores, which are never stored (SPEC §2, §3).

As ``column_scores`` and ``select`` after each other, in one launch less: whoever brings the partial
sums of a tile together ranks them at once. The energy of the values comes with them.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.columns import Columns, fill
from vps.kernels.device import accumulation, on_its_device
from vps.kernels.scores import (
    add_splits,
    check,
    magnitude,
    mask_strides,
    store_energy,
    sum_up,
)
from vps.kernels.select import check_k, merge, new_records, store_best


@triton.jit
def load_token(
    token_ptr,
    mask_ptr,  # of the token, or None
    columns,  # [BLOCK]
    width,
    stride_d,
    ACC: tl.constexpr,
):
    """Load |values| of a single token, 0 where it does not count."""
    limit = width
    if mask_ptr is not None:
        limit = tl.where(tl.load(mask_ptr) != 0, width, 0)
    address = token_ptr + columns.to(tl.int64) * stride_d
    return magnitude(tl.load(address, mask=columns < limit, other=0.0), ACC)


@triton.jit(do_not_specialize=["splits", "entries", "tokens", "stride_mask_g"])
def rank_kernel(
    partial_ptr,  # [G, splits, D], or values [G, D] of single tokens
    squares_ptr,  # [G, entries], the same values, or None
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
    stride_g,
    stride_d,
    ACC: tl.constexpr,
    SINGLE: tl.constexpr,
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
    tiles = tl.cdiv(width, BLOCK_D)
    mask_row = mask_ptr
    if mask_ptr is not None:
        mask_row = mask_ptr + group * stride_mask_g
    if tile < tiles:
        columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        if SINGLE:
            token = partial_ptr + group * stride_g
            scores = load_token(token, mask_row, columns, width, stride_d, ACC)
        else:
            first = partial_ptr + group * splits * width
            scores = add_splits(first, columns, splits, width, ACC, SPLITS, BLOCK_S, BLOCK_D)
        slot = (group * tiles + tile) * K
        store_best(scores, columns, width, record_ptr, index_ptr, slot, K)
    if squares_ptr is not None:
        if tile == tiles:
            if SINGLE:
                squares = tl.zeros([BLOCK], dtype=ACC)
                for start in range(0, ENTRIES, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    size = load_token(squares_ptr + group * stride_g, mask_row, at, width, stride_d,
                                      ACC)  # fmt: skip
                    squares += size * size
                tl.store(energy_ptr + group, tl.sum(squares, axis=0) / tl.cast(width, ACC))
            else:
                store_energy(squares_ptr, mask_ptr, energy_ptr, group, entries, tokens, width,
                             stride_mask_g, stride_mask_t, ACC, ENTRIES, TOKENS,
                             BLOCK)  # fmt: skip


class Ranked(NamedTuple):
    """Hold the best features of each group, or several parts of which the best are the best."""

    best: Tensor  # int64 [G, k], or int32 [G, parts, k] with the scores
    scores: Tensor | None  # [G, parts, k], -1 where a part has fewer
    energy: Tensor  # [G], or [0] if not asked for


@on_its_device
def rank(
    values: Tensor, mask: Tensor | None, k: int, energy: bool, columns: Columns | None = None
) -> Ranked:
    """Return what :func:`launch` does, before the parts of a group are brought together.

    ``columns``, of the weight that made the values, are filled besides, in the same launch if it
    sums several tokens; not every column. A single token is ranked by its values.
    """
    check("features", values, mask)
    dtype, acc = accumulation(values.dtype)
    groups, tokens, width = values.shape
    check_k("features", k, width)
    selected = torch.empty(groups, k, dtype=torch.int64, device=values.device)
    mean = torch.empty(groups if energy else 0, dtype=dtype, device=values.device)
    if tokens == 1:
        if columns is not None:
            fill(columns.weight, columns)
        sums, squares = values, values if energy else None
        constants = {"SPLITS": 1, "ENTRIES": tuning.power_of_2(width), "TOKENS": 1}
        splits = entries = 0
    else:
        partial, tile = sum_up("features", values, mask, energy, columns)
        sums, squares = partial
        constants = partial.constants(tile, mask is not None)
        splits, entries = sums.shape[1], 0 if squares is None else squares.shape[1]
    if groups == 0:
        return Ranked(selected, None, mean)
    if tokens == 0:
        return Ranked(selected.copy_(torch.arange(k, device=values.device)), None, mean.zero_())
    tile = tuning.rank(width, k)
    tiles = tuning.steps(width, tile["BLOCK_D"])
    scores, index = new_records(selected, tiles, dtype)
    rank_kernel[groups, tiles + energy](
        sums, squares, mask, scores, index, mean, splits, entries, tokens, width,
        *mask_strides(mask), *(values.stride()[::2] if tokens == 1 else (0, 0)), ACC=acc,
        SINGLE=tokens == 1, K=k, **constants, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return Ranked(index, scores, mean)


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
    index, record, mean = rank(values, mask, k, energy)
    return index if record is None else merged(index, record), mean


@on_its_device
def merged(index: Tensor, record: Tensor) -> Tensor:
    """Return the best of several parts, int64 ``[G, k]``, from what :func:`rank` returns."""
    groups, _, k = index.shape
    selected = torch.empty(groups, k, dtype=torch.int64, device=index.device)
    merge(record, index, selected)
    return selected

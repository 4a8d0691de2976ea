"""Select the top k scores of each group, sorted, ties to the lower index (SPEC §3).

Rounds of max: each takes the leftmost largest score and strikes it out. Beyond one chunk there are
two levels: the best k of every chunk, then the best k of those.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import on_its_device
from vps.kernels.scores import accumulation, magnitude

LARGEST_K = 64


@triton.jit
def best(scores, positions, AXIS: tl.constexpr):
    """Return the largest score along AXIS and the lowest position that holds it."""
    largest = tl.max(scores, axis=AXIS, keep_dims=True)
    at = tl.where(scores == largest, positions, 0x7FFFFFFF)
    return largest, tl.min(at, axis=AXIS, keep_dims=True)


@triton.jit
def store_best(
    scores,  # [columns] at least 0, or NaN
    columns,  # [columns], ascending
    width,
    record_ptr,  # scores, or None
    index_ptr,
    slot,
    K: tl.constexpr,
):
    """Store the best K of a stretch of the scores at ``slot``; beyond the width there are none."""
    scores = tl.where(scores > 0, scores, 0.0)
    scores = tl.where(columns < width, scores, -1.0)
    one = tl.arange(0, 1)
    for rank in range(K):
        largest, at = best(scores, columns, 0)
        scores = tl.where(columns == at, -1.0, scores)
        if record_ptr is not None:
            tl.store(record_ptr + slot + rank + one, largest)
        tl.store(index_ptr + slot + rank + one, at)


@triton.jit
def chunk_kernel(
    scores_ptr,  # [G, D]
    record_ptr,  # [G, chunks, K] scores, or None with one chunk
    index_ptr,  # [G, chunks, K] int32, or int64 [G, K] with one chunk
    width,
    stride_g,
    stride_d,
    ACC: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    address = scores_ptr + group * stride_g + columns.to(tl.int64) * stride_d
    scores = tl.load(address, mask=columns < width, other=0.0)
    if ABSOLUTE:
        scores = magnitude(scores, ACC)
    slot = (group * tl.num_programs(1) + chunk) * K
    store_best(scores, columns, width, record_ptr, index_ptr, slot, K)


@triton.jit
def merge_kernel(
    record_ptr,  # [G, records] scores; -1 marks none
    index_ptr,  # [G, records] int32
    out_ptr,  # int64 [G, K]
    records,
    K: tl.constexpr,
    RECORDS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, RECORDS)
    inside = entries < records
    scores = tl.load(record_ptr + group * records + entries, mask=inside, other=-1.0)
    index = tl.load(index_ptr + group * records + entries, mask=inside, other=0x7FFFFFFF)
    for rank in range(K):
        at = best(scores, index, 0)[1]
        scores = tl.where(index == at, -1.0, scores)
        tl.store(out_ptr + group * K + rank + tl.arange(0, 1), at)


def new_records(selected: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Allocate scores and indices of the best of each part for ``selected`` ``[G, k]``.

    With one part its indices are ``selected`` itself.
    """
    if parts == 1:
        return None, selected
    groups, k = selected.shape
    scores = torch.empty(groups, parts, k, dtype=dtype, device=selected.device)
    return scores, torch.empty(groups, parts, k, dtype=torch.int32, device=selected.device)


def merge(scores: Tensor | None, index: Tensor, selected: Tensor) -> None:
    """Fill ``selected`` from the records of several parts."""
    if scores is None:
        return
    groups, parts, k = scores.shape
    merge_kernel[groups,](
        scores, index, selected, parts * k, K=k, **tuning.merge(parts * k), enable_fp_fusion=True
    )


def with_rows(index: Tensor) -> Tensor:
    """Return a selection ``[G, k]`` with contiguous rows, at any distance."""
    return index if index.stride(1) == 1 else index.contiguous()


def check_k(op: str, k: int, width: int) -> None:
    """Raise unless so many of ``width`` features can be selected."""
    if not 1 <= k <= min(LARGEST_K, width):
        raise ValueError(f"{op}: k must be from 1 to {min(LARGEST_K, width)}, got {k}")


@on_its_device
def launch(scores: Tensor, k: int, absolute: bool = False) -> Tensor:
    """Return the k largest scores of each group by index, best first, ties to the lower index.

    Args:
        scores: ``[G, d]``, any strides, at least 0; NaN counts 0. float32 or float64.
        k: from 1 to 64, at most d.
        absolute: ``scores`` are values of a single token instead, of any floating dtype: they
            are taken absolute, the non-finite as 0.

    Returns:
        int64 ``[G, k]``.

    Raises:
        TypeError: scores of another dtype.
        ValueError: scores that are not a matrix, or a k out of range.
    """
    acc = accumulation(scores.dtype)[1]
    if not absolute and scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"select: scores must be float32 or float64, got {scores.dtype}")
    if scores.dim() != 2:
        raise ValueError(f"select: scores must be [G, d], got {tuple(scores.shape)}")
    groups, width = scores.shape
    check_k("select", k, width)
    selected = torch.empty(groups, k, dtype=torch.int64, device=scores.device)
    if groups == 0:
        return selected
    tile = tuning.select(width)
    chunks = tuning.steps(width, tile["CHUNK"])
    record, index = new_records(selected, chunks, accumulation(scores.dtype)[0])
    chunk_kernel[groups, chunks](
        scores, record, index, width, *scores.stride(), ACC=acc, ABSOLUTE=absolute, K=k, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    merge(record, index, selected)
    return selected

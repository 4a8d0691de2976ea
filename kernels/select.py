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
from triton.language.extra.cuda import gdc_launch_dependents

from vps.kernels import tuning
from vps.kernels.device import begin, on_its_device
from vps.kernels.scores import accumulation, magnitude

LARGEST_K = 64
LARGEST_CHUNK = 4096  # scores of more than 16 bits a program


def key_dtype(dtype: torch.dtype, width: int) -> torch.dtype:
    """Return the integer that holds a score of ``dtype`` and a position below ``width``."""
    return torch.int32 if dtype.itemsize == 2 and width <= 65536 else torch.int64


@triton.jit
def best(scores, positions, AXIS: tl.constexpr):
    """Return the largest score along AXIS, of those from 0 and −1, and its lowest position."""
    order = scores
    if scores.dtype == tl.float32:  # one instruction finds the largest integer of a warp
        order = scores.to(tl.int32, bitcast=True)
    largest = tl.max(order, axis=AXIS, keep_dims=True)
    at = tl.where(order == largest, positions, 0x7FFFFFFF)
    return largest.to(scores.dtype, bitcast=True), tl.min(at, axis=AXIS, keep_dims=True)


@triton.jit
def score_key(values, positions, KEY: tl.constexpr):
    """Return |values|, 0 where not finite, above inverted positions as one integer.

    The largest key is the largest score, and of equal ones that of the lowest position. KEY is the
    type that :func:`key_dtype` names.
    """
    if KEY == tl.int32:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        infinity: tl.constexpr = 0x7F80 if values.dtype == tl.bfloat16 else 0x7C00
        key = (tl.where(bits < infinity, bits, 0) << 16) | (0xFFFF - positions)
    else:
        bits = magnitude(values, tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
        key = (bits << 32) | (0x7FFFFFFF - positions)
    return key


@triton.jit
def next_key(key, AXIS: tl.constexpr):
    """Return the largest key along AXIS and the keys without it."""
    largest = tl.max(key, axis=AXIS)
    return largest, tl.where(key == tl.expand_dims(largest, AXIS), -1, key)


@triton.jit
def position(key):
    """Return the position that a key holds, int64."""
    if key.dtype == tl.int32:
        at = (0xFFFF - (key & 0xFFFF)).to(tl.int64)
    else:
        at = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    return at


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
def token_kernel(
    values_ptr,  # [G, D] of 16 bits
    out_ptr,  # int64 [G, K]
    width,
    stride_g,
    stride_d,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:  # the product, which follows, waits by itself
        gdc_launch_dependents()
    group = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    address = values_ptr + group * stride_g + columns.to(tl.int64) * stride_d
    values = tl.load(address, mask=columns < width, other=0.0)
    key = tl.where(columns < width, score_key(values, columns, tl.int32), -1)
    for rank in tl.range(0, K, loop_unroll_factor=UNROLL):
        largest, key = next_key(key, 0)
        tl.store(out_ptr + group * K + rank, position(largest))


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
    architecture = tuning.architecture(scores.device)
    if absolute and scores.element_size() == 2 and width <= tuning.LARGEST_TOKEN:
        tile = tuning.select(width, architecture)
        unroll, pdl = k if k <= 8 else 1, tuning.has_pdl(architecture)
        rest = width, *scores.stride(), k, unroll, tile["CHUNK"], pdl
        begin(token_kernel, (groups,), (scores, selected), rest, tile)
        return selected
    tile = tuning.select(min(width, LARGEST_CHUNK), architecture)
    chunks = tuning.steps(width, tile["CHUNK"])
    record, index = new_records(selected, chunks, accumulation(scores.dtype)[0])
    chunk_kernel[groups, chunks](
        scores, record, index, width, *scores.stride(), ACC=acc, ABSOLUTE=absolute, K=k, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    merge(record, index, selected)
    return selected

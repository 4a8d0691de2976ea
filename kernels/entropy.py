"""Compute the entropy of the next-token softmax in one pass over the logits (SPEC §5).

``ℋ = log S − P/S`` nats with ``m = max z``, ``S = Σ exp(z − m)``, ``P = Σ exp(z − m)(z − m)``. A
program reads a stretch of a row once; a second kernel brings the stretches to a common maximum.
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


@triton.jit
def stretch_kernel(
    logits_ptr,  # [N, V]
    partial_ptr,  # [N, splits, 3]: m, S, P of a stretch
    vocabulary,
    stride_n,
    stride_v,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    at = split * BLOCK + tl.arange(0, BLOCK)
    address = logits_ptr + row * stride_n + at.to(tl.int64) * stride_v
    logits = tl.load(address, mask=at < vocabulary, other=float("-inf")).to(ACC)
    largest = tl.max(logits, axis=0)
    distance = logits - tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(distance)
    moment = weight * tl.where(distance == float("-inf"), 0.0, distance)
    slot = partial_ptr + (row * tl.num_programs(1) + split) * 3
    tl.store(slot, largest)
    tl.store(slot + 1, tl.sum(weight, axis=0))
    tl.store(slot + 2, tl.sum(moment, axis=0))


@triton.jit
def combine_kernel(
    partial_ptr,  # [N, splits, 3]
    entropy_ptr,  # float32 [N]
    splits,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    slot = partial_ptr + (row * splits + split) * 3
    inside = split < splits
    maximum = tl.load(slot, mask=inside, other=float("-inf"))
    weight = tl.load(slot + 1, mask=inside, other=0.0)
    moment = tl.load(slot + 2, mask=inside, other=0.0)
    distance = maximum - tl.max(maximum, axis=0)
    factor = tl.exp(distance)
    total = tl.sum(weight * factor, axis=0)
    shift = tl.where(distance == float("-inf"), 0.0, distance)
    moments = tl.sum(factor * (moment + shift * weight), axis=0)
    tl.store(entropy_ptr + row, (tl.log(total) - moments / total).to(tl.float32))


@on_its_device
def launch(logits: Tensor) -> Tensor:
    """Compute the entropy of the softmax of each row, in nats.

    Args:
        logits: ``[N, vocabulary]``, any strides; −inf excludes a token.

    Returns:
        float32 ``[N]``; NaN for a row with NaN or +inf or with nothing but −inf, as in torch.

    Raises:
        TypeError: logits of a dtype that is no float of 16 to 64 bits.
        ValueError: logits that are not ``[N, vocabulary]`` with a vocabulary of 1 or more.
    """
    dtype, acc = accumulation(logits.dtype)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"token_entropy: logits must be [N, V], V > 0, got {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return entropy
    tile = tuning.entropy(vocabulary)
    splits = tuning.steps(vocabulary, tile["BLOCK"])
    partial = torch.empty(rows, splits, 3, dtype=dtype, device=logits.device)
    stretch_kernel[rows, splits](
        logits, partial, vocabulary, *logits.stride(), ACC=acc, **tile, enable_fp_fusion=True
    )
    combine_kernel[rows,](
        partial, entropy, splits, SPLITS=tuning.power_of_2(splits), num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return entropy


token_entropy = torch.library.custom_op("vps::token_entropy", launch, mutates_args=())


@token_entropy.register_fake
def fake(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)

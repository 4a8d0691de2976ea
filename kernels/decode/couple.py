"""Select for a query and a key projection together, from their scores (SPEC §7).

``c[g, j] = (Σ_{h in group g} s_q[h, j]) · s_k[g, j]``; the key takes the best ``(g, j)``, the query
the same channel of the head of the group that scores highest there. One program a group of tokens
holds all d_k contributions in float64, where no two that differ round together.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vps.kernels import tuning
from vps.kernels.device import begin, on_its_device, wait_for_last_kernel
from vps.kernels.scores import accumulation, magnitude
from vps.kernels.select import LARGEST_K, with_rows

LARGEST_WIDTH = 8192


@triton.jit
def first_of_largest(bits, places):
    """Return the lowest place [1] of the largest of some float64 from 0 on, given by their bits.

    Three steps of 32 bits, each an instruction of a warp, cost less than one of 64 and one of 32.
    """
    high = (bits >> 32).to(tl.int32)
    low = bits.to(tl.int32) ^ -0x80000000  # in the order of unsigned integers
    found = high == tl.max(high, axis=0, keep_dims=True)
    low = tl.where(found, low, -0x80000000)
    found = found & (low == tl.max(low, axis=0, keep_dims=True))
    return tl.min(tl.where(found, places, 0x7FFFFFFF), axis=0, keep_dims=True)


@triton.jit
def couple_kernel(
    query_ptr,  # [G, d_q] scores, or values of a single token
    key_ptr,  # [G, d_k] likewise
    energy_q_ptr,  # [G], None with values
    energy_k_ptr,  # [G], None with values
    counted_ptr,  # bool [G] or None, with values
    I_in_ptr,  # int64 [G, R]
    energy_ptr,  # [G]
    features_ptr,  # int64 [G, 3, R]: I_in, then the outputs of query and key
    d_q,
    d_k,
    size,
    stride_q_g,
    stride_q_d,
    stride_k_g,
    stride_k_d,
    stride_counted,
    stride_I_in,
    ACC: tl.constexpr,
    VALUES: tl.constexpr,
    SHARING: tl.constexpr,  # query heads of one key head
    UNROLL: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_last_kernel(PDL, True)
    group = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < d_k
    keys = key_ptr + group * stride_k_g + channel.to(tl.int64) * stride_k_d
    key = magnitude(tl.load(keys, mask=inside, other=0.0), ACC)
    first = channel // size * (SHARING * size) + channel % size
    total = tl.zeros([WIDTH], dtype=tl.float64)
    squares = key.to(tl.float64) * key.to(tl.float64)
    highest = tl.full([WIDTH], -1.0, dtype=ACC)
    head = tl.zeros([WIDTH], dtype=tl.int32)
    for number in tl.range(0, SHARING, loop_unroll_factor=UNROLL):
        of_head = (first + number * size).to(tl.int64) * stride_q_d
        query = tl.load(query_ptr + group * stride_q_g + of_head, mask=inside, other=0.0)
        query = magnitude(query, ACC)
        total += query.to(tl.float64)
        squares += query.to(tl.float64) * query.to(tl.float64)
        head = tl.where(query > highest, number, head)
        highest = tl.maximum(query, highest)

    counted = tl.full([1], 1, dtype=tl.int1)
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + group * stride_counted + tl.arange(0, 1)) != 0
    if VALUES:
        energy = tl.where(counted, tl.sum(squares, axis=0, keep_dims=True), 0.0) / (d_q + d_k)
    else:
        energy = tl.load(energy_q_ptr + group + tl.arange(0, 1)).to(tl.float64) * d_q
        energy = (energy + tl.load(energy_k_ptr + group).to(tl.float64) * d_k) / (d_q + d_k)
    tl.store(energy_ptr + group + tl.arange(0, 1), energy.to(ACC))

    rank = tl.arange(0, RANKS)
    features = features_ptr + group * (3 * R)
    I_in = tl.load(I_in_ptr + group * stride_I_in + rank, mask=rank < R, other=0)
    tl.store(features + rank, I_in, mask=rank < R)
    contribution = (total * key.to(tl.float64)).to(tl.int64, bitcast=True)
    contribution = tl.where(inside, contribution, -1)
    place = channel * SHARING + head
    chosen = tl.zeros([RANKS], dtype=tl.int32)
    for number in tl.range(0, R, loop_unroll_factor=RANKS if RANKS <= 8 else 1):
        at = first_of_largest(contribution, place)
        contribution = tl.where(place == at, -1, contribution)
        chosen = tl.where(rank == number, at, chosen)
    at, own = chosen // SHARING, chosen % SHARING
    of_query = (at // size * SHARING + own) * size + at % size
    tl.store(features + R + rank, of_query.to(tl.int64), mask=rank < R)
    tl.store(features + 2 * R + rank, at.to(tl.int64), mask=rank < R)


def refusal(d_k: int, r: int) -> str | None:
    """Say why :func:`launch` does not take a key projection of this width, or ``None``."""
    if not 1 <= r <= min(LARGEST_K, d_k):
        return f"r must be from 1 to {min(LARGEST_K, d_k)}, got {r}"
    if d_k > LARGEST_WIDTH:
        return f"key must have at most {LARGEST_WIDTH} features, got {d_k}"
    return None


@on_its_device
def launch(
    query: Tensor,
    key: Tensor,
    energies: list[Tensor],
    counted: Tensor | None,
    I_in: Tensor,
    heads: int,
    kv_heads: int,
    follows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return pooled energy and features of both projections for every group of tokens.

    Args:
        query: scores ``[G, d_q]``, at least 0, any strides; without ``energies`` the outputs of a
            single token instead, of which the non-finite count 0.
        key: ``[G, d_k]`` likewise, in the dtype of ``query``.
        energies: mean squares ``[G]`` of the outputs of query and key; none with outputs.
        counted: bool ``[G]``, whether a token counts: else its energy is 0. With outputs alone.
        I_in: int64 ``[G, r]``, carried into the result.
        heads: query heads.
        kv_heads: key-value heads, a divisor of ``heads``.
        follows: whether the last kernel on the stream is one of the same step of decoding.

    Returns:
        Energy ``[G]`` in the accumulation dtype, mean square over both; and int64 ``[G, 3, r]``:
        I_in, then I_out of the query and of the key, best first, ties to the lower feature of the
        key and to the lower head.

    Raises:
        ValueError: what :func:`refusal` says, or shapes that do not fit.
    """
    groups, r = I_in.shape
    d_q, d_k = query.shape[-1], key.shape[-1]
    if (reason := refusal(d_k, r)) is not None:
        raise ValueError(f"couple: {reason}")
    if query.shape != (groups, d_q) or key.shape != (groups, d_k):
        raise ValueError(
            f"couple: query and key must be [{groups}, d] like I_in, got {tuple(query.shape)} and "
            f"{tuple(key.shape)}"
        )
    if heads % kv_heads or d_k % kv_heads or d_q * kv_heads != d_k * heads:
        raise ValueError(
            f"couple: {d_q} and {d_k} features are none of {heads} and {kv_heads} heads of one size"
        )
    if len(energies) not in (0, 2) or (energies and counted is not None):
        raise ValueError("couple: expected two energies, or none and perhaps counted")
    dtype, acc = accumulation(query.dtype)
    energy = torch.empty(groups, dtype=dtype, device=query.device)
    features = torch.empty(groups, 3, r, dtype=torch.int64, device=query.device)
    if groups == 0:
        return energy, features
    energy_q, energy_k = energies or (None, None)
    I_in = with_rows(I_in)
    pointers = query, key, energy_q, energy_k, counted, I_in, energy, features
    architecture = tuning.architecture(query.device)
    tile, pdl = tuning.couple(d_k, architecture), follows and tuning.has_pdl(architecture)
    rest = (
        d_q, d_k, d_k // kv_heads, *query.stride(), *key.stride(),
        0 if counted is None else counted.stride(0), I_in.stride(0), acc, not energies,
        heads // kv_heads, min(heads // kv_heads, 8), r, tuning.power_of_2(r), tile["WIDTH"],
        pdl,
    )  # fmt: skip
    begin(couple_kernel, (groups,), pointers, rest, tile, pdl)
    return energy, features

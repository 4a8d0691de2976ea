"""Choose tile sizes and warps by shape and architecture, never by timing.

A tile depends on the layer and on the tokens of one group, never on the number of groups: sums
come in the same order for every batch size. The reason stands beside each choice.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch


class Stream(NamedTuple):
    """Describe how the decode GEMV streams W: bytes of one row per step, and steps in flight."""

    row_bytes: int
    stages: int
    warps: int


# Bytes in flight per multiprocessor decide the rate: more where memory is faster. gfx942 has
# 64 KB of shared memory and 64 lanes a warp.
STREAM = {
    "sm_80": Stream(row_bytes=256, stages=4, warps=4),
    "sm_90": Stream(row_bytes=512, stages=4, warps=4),
    "sm_100": Stream(row_bytes=512, stages=4, warps=4),
    "gfx942": Stream(row_bytes=256, stages=2, warps=2),
}


# Whether a kernel of a step of decoding may start while the one before it ends (programmatic
# dependent launch). Off until a GPU has measured it; README.md, Decoding.
PDL = os.environ.get("VPS_PDL") == "1"
LARGEST_TOKEN = 32768  # features of 16 bits that one program of 32 warps selects from


def power_of_2(number: int) -> int:
    """Return the least power of 2 not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def steps(number: int, size: int) -> int:
    """Count the blocks of ``size`` that cover ``number``."""
    return -(-number // size)


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Return the key of ``STREAM`` for the device, the nearest older one, or sm_90 off a GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


def has_pdl(architecture: str) -> bool:
    """Return whether kernels of a step are to overlap, and this architecture lets them."""
    return PDL and architecture in ("sm_90", "sm_100")


def registers(most: int, architecture: str) -> dict[str, int]:
    """Let a thread have so many registers, where fitting one more program would cost a spill.

    The ptxas of Triton 3.6 spills one register for that, also where programs are few.
    """
    return {} if architecture == "gfx942" else {"maxnreg": most}


def bucket(number: int) -> int:
    """Return the least of 8, 64, 512 … not below ``number``: few lengths, so few kernels."""
    size = 8
    while size < number:
        size *= 8
    return size


def scores(tokens: int, width: int) -> dict[str, int]:
    """Take 16 × 512 elements a step: 16 KB of bfloat16 in flight a program, two sums in registers.

    Up to 1024 tokens a single step, so that a short prompt makes enough programs. Partial sums add
    12 % to the bytes read of a short prompt, 3 % and less to those of a long one.
    """
    stretch = 1 if tokens == 1 else 16 if tokens <= 1024 else 64 if tokens <= 4096 else 256
    block = min(16, stretch), min(512, power_of_2(width))
    return {
        "TOKENS": stretch,
        "BLOCK_T": block[0],
        "BLOCK_D": block[1],
        "num_warps": 4 if block[0] * block[1] < 2048 else 16 if stretch == 256 else 8,
    }


def combine(width: int) -> dict[str, int]:
    """Take small tiles and many programs: partial sums lie in L2."""
    return {"BLOCK_S": 8, "BLOCK": 1024, "BLOCK_D": min(256, power_of_2(width)), "num_warps": 4}


def rank(width: int, k: int) -> dict[str, int]:
    """Take 8 KB of partial sums a step, in tiles whose best k all fit one program.

    Tiles are the same for every number of tokens, and so is what brings them together.
    """
    block = 256
    while steps(width, block) * k > 4096:
        block *= 2
    block = max(16, min(block, power_of_2(width)))
    return {"BLOCK_S": max(1, 2048 // max(256, block)), "BLOCK": 1024, "BLOCK_D": block,
            "num_warps": 4}  # fmt: skip


def select(width: int, architecture: str) -> dict[str, int]:
    """Take all of one token in one program of up to 32 warps: no second launch merges.

    Scores of 32 and 64 bits come in chunks of 4096, beyond which their rounds of max spill.
    """
    chunk = max(16, power_of_2(width))
    most = 16 if architecture == "gfx942" else 32
    return {"CHUNK": chunk, "num_warps": max(1, min(most, chunk // 128))}


def merge(records: int) -> dict[str, int]:
    """Take all records of a group in one program."""
    block = max(16, power_of_2(records))
    return {"RECORDS": block, "num_warps": 8 if block >= 4096 else 4 if block >= 1024 else 1}


def couple(width: int, architecture: str) -> dict[str, int]:
    """Take all channels of a key projection in one program, of 8 warps from 512 on."""
    block = max(16, power_of_2(width))
    warps = max(1, min(8, block // 64))
    return {"WIDTH": block, "num_warps": warps, **registers(255, architecture)}


def columns(width: int, every: bool) -> dict[str, int]:
    """Take the tiles of ``scores``, whose launch fills them; a square to transpose W."""
    if every:
        return {"BLOCK_I": 64, "BLOCK_D": 64, "num_warps": 4}
    block = min(512, power_of_2(width))
    return {"BLOCK_D": block, "num_warps": 8 if block == 512 else 4}


def factors(r: int, records: int, d_in: int, architecture: str) -> dict[str, int]:
    """Take one program a group, with 16 KB of its r rows of W in flight, 32 KB of many rows.

    Of rows beyond 28,672 features half as much, or the ptxas of Triton 3.9 spills; of few rows in
    one step instead of two, or it does for sm_100.
    """
    ranks, warps = power_of_2(r), 8 if r <= 8 else 16
    is_long, is_one_step = d_in > 28672, r <= 8
    along = 1024 if is_one_step and not is_long else 512
    return {
        "ALONG": max(16, min(along * warps // ranks, power_of_2(d_in))),
        "UNROLL": 1 if is_one_step or is_long else 2,
        "RECORDS": max(16, power_of_2(records)),
        "BLOCK_T": 1024,
        "num_warps": warps,
        **registers(128, architecture),
    }


def gram(r: int) -> dict[str, int]:
    """Take 512 elements of r vectors a program, in steps whose products fit the registers."""
    return {"BLOCK": 64 if r <= 4 else 32, "STEPS": 8 if r <= 4 else 16, "num_warps": 4}


def core_warps(r: int, element_size: int) -> int:
    """Take one warp, which needs no barrier; more for what would spill, 8 × 8."""
    return 1 if r <= 4 else 4 if element_size == 8 else 2


def delta(tokens: int, width: int, r: int, element_size: int) -> dict[str, int]:
    """Take 8 × 512 outputs a step and up to 64 rows a program, which share the columns of W.

    The r gathered elements of a row cost 6 % of its bytes, the columns 3 % of those of 64 rows.
    Fewer rows where programs would be few, smaller steps where columns fill the registers.
    """
    block = min(512, power_of_2(width))
    programs = steps(width, block) * steps(tokens, 64)
    if tokens == 1:  # of many groups
        return {"ROWS": 1, "BLOCK_T": 1, "BLOCK_D": block, "num_warps": 4 if block >= 512 else 1}
    return {
        "ROWS": next((64 // n for n in (1, 2, 4) if n * programs >= 192), 8),
        "BLOCK_T": 64 // (max(4, min(8, power_of_2(r))) * element_size),
        "BLOCK_D": block,
        "num_warps": 4,
    }


def entropy(vocabulary: int) -> dict[str, int]:
    """Take 8192 logits a program, all loads in flight at once."""
    return {"BLOCK": max(16, min(8192, power_of_2(vocabulary))), "num_warps": 8}


def gemv_rows(width: int) -> int:
    """Return the rows of W of one program of the decode GEMV.

    Few while programs are few, more where the records of all programs would not fit one.
    """
    return 16 if width <= 8192 else 32 if width <= 32768 else 128


def gemv(width: int, groups: int, element_size: int, architecture: str) -> dict[str, int]:
    """Split K over the warps: each multiplies a slice of every step by itself, in no chain.

    A step is 16 KB of W, 8 of tiles of 32 rows: their registers are the limit. 8 more columns
    of a product by tensor cores change nothing for the others, so N takes no part otherwise.
    """
    blocks = gemv_rows(width) // 16
    is_wide = element_size == 4  # which no tensor core takes: the least slice, or it spills
    few = groups <= 8 and not is_wide and architecture != "gfx942"  # has no product with 8
    step = 8192 if blocks == 2 or architecture in ("sm_80", "gfx942") else 16384
    stages, warps = (2, 4) if architecture == "gfx942" else (2 if is_wide else 4, 8)
    slices = max(2, warps // blocks) if blocks > 2 or is_wide else warps
    along = 16 if is_wide else step // (16 * blocks * slices * element_size)
    own = {}  # of float32 two programs fit then; the ptxas for sm_100 would spill more by it
    if is_wide and blocks <= 2 and architecture != "sm_100":
        own = registers(128, architecture)
    elif not is_wide and blocks > 2:
        own = registers(168, architecture)
    return {
        "BLOCK_N": 8 if few else 16,
        "BLOCKS_O": blocks,
        "SLICES": slices,
        "BLOCK_K": along,
        "STAGES": stages,
        "num_warps": warps,
        **own,
    }


def edited_gemv(width: int, rows: int, element_size: int, architecture: str) -> dict[str, int]:
    """Take 32 rows of W, since every program reads x and E besides.

    Each warp multiplies a slice of every step by itself: their products are no chain. A narrow
    layer makes few programs, of 16 rows and twice the warps. Of float32, which no tensor core
    takes, a slice fits the registers. gfx942 has no product with 8 columns.
    """
    stream, narrow = STREAM[architecture], width <= 2048
    block = stream.row_bytes // element_size // stream.warps
    warps = stream.warps * (2 if narrow else 1)
    return {
        "BLOCK_N": 8 if rows <= 8 and architecture != "gfx942" else 16,
        "BLOCK_O": 16 if narrow else 32,
        "SLICES": warps,
        "BLOCK_K": block if element_size == 2 else min(16, block),
        "STAGES": stream.stages,
        "num_warps": warps,
    }


def edit(tokens: int, r: int, element_size: int, architecture: str) -> dict[str, int]:
    """Take 16 bytes of a row a thread; of a long prompt 2 rows, which share E; less of many r."""
    ranks = power_of_2(r)
    rows, row_bytes, warps = 1, 8192, 16
    if ranks > 4:
        row_bytes, warps = 4096 if ranks == 8 else 8192 // ranks, 8
    elif tokens >= 256:
        rows, row_bytes, warps = 2, 4096, 8
    return {
        "RANKS": ranks,
        "BLOCK_T": rows,
        "BLOCK_D": row_bytes // element_size,
        "STAGES": min(3, STREAM[architecture].stages),
        "num_warps": warps,
    }


def decode_apply(width: int, records: int, key_size: int) -> dict[str, int]:
    """Let one warp of each program bring 4 KB of records together, which needs no barrier.

    More take several warps, of fewer programs: in one warp, 8 KB of several layers spill.
    """
    block = max(16, power_of_2(records))
    size = block * key_size
    warps = 1 if size <= 4096 else 2 if size <= 8192 else 4 if size <= 32768 else 8
    return {
        "RECORDS": block,
        "BLOCK_D": max(16, min(128 * warps, power_of_2(width))),
        "num_warps": warps,
    }

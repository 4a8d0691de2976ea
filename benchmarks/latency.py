"""Estimate how long one warp of a compiled kernel takes, from its SASS for sm_90, without a GPU.

The instructions issue in order, one a cycle, each as soon as its operands are there; a barrier, a
reduction over a warp and a load that hits L2 take a fixed time. No other warp competes and memory
is never full, so this is the length of the chain of dependent steps. It was compared with no GPU:
read a figure as ±40 %, and a change of a figure as a change of the code. ``python -m
benchmarks.latency`` prints those of decoding.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import aot
from vps.kernels import select
from vps.kernels.decode import decode

CLOCK = 1755e6  # cycles a second of an H100 or H200
CYCLES = {  # from the issue of an instruction to its result, by the start of its opcode
    "SHFL": 24, "REDUX": 24, "LDSM": 33, "LDS": 29, "LDG": 270, "LD": 270, "LDC": 36, "ULDC": 12,
    "HMMA": 33, "MUFU": 22, "S2R": 22, "S2UR": 22, "R2UR": 12, "ISETP": 8, "FSETP": 8, "HSETP2": 8,
    "DADD": 16, "DFMA": 16, "DMUL": 16, "DSETP": 16, "F2F": 18, "F2I": 18, "I2F": 18, "FRND": 18,
}  # fmt: skip
BARRIER, WIDE_BARRIER = 26, 40  # of up to 8 warps, and of more
_NO_RESULT = {
    "STS", "STG", "STSM", "ST", "BAR", "BRA", "EXIT", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BSYNC",
    "BSSY", "WARPSYNC", "NOP", "RED", "CCTL", "MEMBAR", "ERRBAR",
}  # fmt: skip
_TO_PREDICATES = {"ISETP", "FSETP", "DSETP", "UISETP", "HSETP2", "PLOP3", "UPLOP3", "LOP3", "R2P"}
_WITH_CARRY = {"IADD3", "LEA", "UIADD3", "ULEA", "IMAD", "DSETP", "VIADD"}
_WIDE = ("DADD", "DFMA", "DMUL", "CS2R", "IMAD.WIDE", "F2F.F64", "UIMAD.WIDE", "ULDC.64")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P(?:\d|T))\s+)?([^\s;]+)\s*(.*?);")
_REGISTER = re.compile(r"(?<![A-Za-z0-9_])(UR\d+|R\d+|UP\d|P\d)(?![A-Za-z0-9_])")
_PREDICATE = re.compile(r"^U?P(?:\d|T)$")


class Instruction(NamedTuple):
    """Hold one instruction: its address, the predicate it runs under, opcode and operands."""

    address: int
    predicate: str | None
    opcode: str
    operands: list[str]

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address a branch goes to."""
        found = re.search(r"0x[0-9a-f]+", self.operands[-1]) if self.base == "BRA" else None
        return int(found[0], 16) if found else None

    def registers(self) -> tuple[list[str], list[str]]:
        """Return the registers that it writes and those that it waits for."""
        base, operands = self.base, self.operands
        if base == "HMMA":
            product, *factors = operands
            widths = zip(factors, (4, 2, 4), strict=False)
            return _span(product, 4), [
                name for text, width in widths for name in _span(text, width)
            ]
        written: list[str] = []
        start = 0
        if base in _TO_PREDICATES:
            while start < len(operands) and _PREDICATE.match(operands[start]):
                written += _names(operands[start])
                start += 1
            if base == "LOP3" and start < len(operands):
                written += _names(operands[start])
                start += 1
        elif base not in _NO_RESULT:
            start = 1 if base == "SHFL" else 0  # whose first is a predicate
            written += _span(operands[start], _width(self.opcode)) if operands else []
            start += 1
            while (
                base in _WITH_CARRY and start < len(operands) and _PREDICATE.match(operands[start])
            ):
                written += _names(operands[start])
                start += 1
        read = [name for text in operands[start:] for name in _names(text)]
        if base in ("STS", "STG") and operands:
            read += _span(operands[-1], _width(self.opcode))
        if self.predicate is not None:
            read += _names(self.predicate) + ([] if base in _NO_RESULT else written)
        is_wide = ".64" in self.opcode or any(".64]" in text for text in operands)
        if is_wide or base[0] == "D" and base != "DEPBAR":
            read += [name for text in list(read) for name in _span(text, 2)]
        return written, read


def parse(sass: str) -> list[Instruction]:
    """Read the listing of ``cuobjdump -sass``."""
    found = (_LINE.match(line) for line in sass.splitlines())
    return [
        Instruction(
            int(match[1], 16), match[2], match[3], [part.strip() for part in match[4].split(",")]
        )
        for match in found
        if match
    ]


def loop(instructions: list[Instruction]) -> tuple[int, int] | None:
    """Return where the longest loop starts and where the code after it does, or ``None``."""
    found = [
        (one.target, one.address + 16)
        for one in instructions
        if one.target is not None and one.target < one.address
    ]
    return max(found, key=lambda span: span[1] - span[0], default=None)


def count(instructions: list[Instruction], base: str) -> int:
    """Count the instructions whose opcode begins with ``base``."""
    return sum(one.base == base for one in instructions)


def cycles(
    instructions: list[Instruction],
    warps: int,
    start: int = 0,
    stop: int | None = None,
    trips: int = 1,
) -> int:
    """Return the cycles that a warp needs from address ``start`` up to ``stop``.

    Args:
        instructions: the whole kernel.
        warps: warps of a program, which meet at its barriers.
        start, stop: first address, and the one behind the last.
        trips: how often each loop runs.
    """
    barrier = BARRIER if warps <= 8 else WIDE_BARRIER
    ready: defaultdict[str, int] = defaultdict(int)
    now = 0
    for one in _path(instructions, start, stop, trips):
        written, read = one.registers()
        now = max([now, *(ready[name] for name in read)])
        if one.base == "BAR":
            now += barrier
        latency = CYCLES.get(one.base, 8 if one.base[0] == "U" else 5)
        for name in written:
            ready[name] = now + latency
        now += 1
    return now


def _path(
    instructions: list[Instruction], start: int, stop: int | None, trips: int
) -> Iterator[Instruction]:
    """Yield what runs where no branch forward under a predicate is taken."""
    at = {one.address: number for number, one in enumerate(instructions)}
    number = next(i for i, one in enumerate(instructions) if one.address >= start)
    left: dict[int, int] = {}
    while number < len(instructions):
        one = instructions[number]
        if stop is not None and one.address >= stop:
            return
        number += 1
        if one.predicate in ("PT", "!PT"):
            continue
        yield one
        if one.base == "EXIT" and one.predicate is None:
            return
        if one.target is None:
            continue
        if one.target <= one.address:
            left[one.address] = left.get(one.address, trips) - 1
            if left[one.address] > 0:
                number = at[one.target]
            else:
                del left[one.address]
        elif one.predicate is None and one.target in at:
            number = at[one.target]


def _names(text: str) -> list[str]:
    return _REGISTER.findall(text)


def _span(text: str, width: int) -> list[str]:
    """Return the ``width`` registers from the one that ``text`` names; a predicate is one."""
    names = []
    for name in _names(text):
        kind, number = re.match(r"(U?[RP])(\d+)", name).groups()  # type: ignore[union-attr]
        wide = range(width if kind[-1] == "R" else 1)
        names += [f"{kind}{int(number) + offset}" for offset in wide]
    return names


def _width(opcode: str) -> int:
    if ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or opcode.startswith(_WIDE) else 1


class Estimate(NamedTuple):
    """Hold the cycles of one kernel: of a step of its loop, if it has one, and of the rest."""

    kernel: str
    step: int  # 0 without a loop
    tail: int  # behind the loop, or all
    barriers: int


def estimate(kernel: Any, name: str) -> Estimate:
    """Estimate a kernel compiled for sm_90."""
    instructions = parse(aot.disassemble(kernel))
    warps, barriers = kernel.metadata.num_warps, count(instructions, "BAR")
    span = loop(instructions)
    if span is None:
        return Estimate(name, 0, cycles(instructions, warps), barriers)
    step = cycles(instructions, warps, *span)
    return Estimate(name, step, cycles(instructions, warps, span[1]), barriers)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of one token of a 7B model, and of 16, in bfloat16."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for width in (3584, 18944):
        yield f"select {width}", lambda w=width: select.launch(new(1, w), 4, True)
    policy = new(9, dtype=torch.float64)
    for width in (3584, 18944):
        layer = decode.Layer(new(width, 3584), None, policy)
        for tokens in (1, 16):
            x, I_in = new(tokens, 1, 3584), new(tokens, 4, dtype=torch.int64)
            arguments = x, [layer], None, I_in, None, None, 4, True, 0.8, None
            yield f"decode {width} N={tokens}", lambda a=arguments: decode.launch(*a)
    I_in, policies = new(1, 4, dtype=torch.int64), [new(9, dtype=torch.float64) for _ in range(3)]
    several = ("q, k, v", (3584, 512, 512), (28, 4)), ("gate, up", (18944, 18944), None)
    for name, widths, heads in several:
        layers = [
            decode.Layer(new(width, 3584), None, own)
            for width, own in zip(widths, policies, strict=False)
        ]
        rest = None, I_in, None, None, 4, True, 0.8, None, heads
        together = new(1, 1, 3584), layers, *rest
        yield f"decode {name}", lambda a=together: decode.launch(*a)


def main() -> None:
    """Print the estimates."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("benchmarks.latency: TRITON_INTERPRET is set, so nothing would be compiled")
    if (reason := aot.why_missing("sm_90")) is not None:
        sys.exit(f"benchmarks.latency: {reason}")
    print(f"{'sm_90':<42}   step    tail  barriers")
    for name, kernel in aot.compiled("sm_90", lambda _: launches()):
        row = estimate(kernel, name)
        print(f"{name:<42} {row.step:6} {row.tail:7} {row.barriers:9}")


if __name__ == "__main__":
    main()

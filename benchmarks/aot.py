"""Compile every Triton kernel ahead of time, as its launcher would, without a GPU.

``python -m benchmarks.aot`` prints registers, shared memory and spills per architecture and fails
on any spill; on sm_90 also unless the decode GEMV moves W in loads of 16 bytes. The shapes are
those of every model of ``benchmarks.shapes``, with and without mask, bias, entropy, clamp and γ by
column.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import shapes
from vps.kernels import columns, entropy, scores, select, tuning
from vps.kernels.decode import couple, decode, edited
from vps.kernels.prefill import core, delta, factors, features

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
STREAMED = re.compile(r"\bLDGSTS\.E(?:\.\w+)*?(?:\.(64|128))?(?=[\s;])")


class Device:
    """Name a target to Triton as the driver of a GPU that is not there.

    Each target is a device of its own, since Triton keeps compiled kernels per device.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class Core(NamedTuple):
    """Describe the core of SC, order 2 or a spectral clip."""

    coupled: bool
    second_order: bool
    spectral: bool
    tokens: int = 2048
    r: int = 4
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False

    def launch(self) -> None:
        """Launch as the backend does."""
        coupled, second_order, spectral, tokens, r, dtype, masked = self
        x, H = new(2, tokens, 3584, dtype=dtype), new(2, tokens, 18944, dtype=dtype)
        W, I_out = new(18944, 3584, dtype=dtype), new(2, r, dtype=torch.int64)
        energy = new(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        policy = new(9 + r if masked else 9, dtype=torch.float64)
        mask = new(2, tokens, dtype=torch.bool) if masked else None
        core.launch(x, H, W, columns.new(W, I_out), I_out, policy, energy, None, mask,
                    1e-3 if coupled else None, second_order, 0.8, spectral)  # fmt: skip


CORES = (
    *(Core(*kind) for kind in itertools.product((False, True), repeat=3) if any(kind)),
    *(Core(True, True, True, tokens, 8, masked=True) for tokens in (1, 7, 8192)),
    *(Core(True, True, spectral, 512, 8, torch.float64) for spectral in (False, True)),
    Core(True, True, True, 2048, 8, torch.float32),
)


class Prefill(NamedTuple):
    """Describe the launches of one layer for a prompt, all but the products."""

    d_in: int
    d_out: int
    tokens: int
    r: int = 4
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    has_entropy: bool = False
    clamp: float | None = None
    by_column: bool = False

    def launch(self) -> None:
        """Launch as the backend does, with a bias where there is a mask."""
        d_in, d_out, tokens, r, groups, dtype, masked, has_entropy, clamp, by_column = self
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, H = new(groups, tokens, d_in, dtype=dtype), new(groups, tokens, d_out, dtype=dtype)
        W, bias = new(d_out, d_in, dtype=dtype), new(d_out, dtype=dtype) if masked else None
        mask = new(groups, tokens, dtype=torch.bool) if masked else None
        entropy = new(2, dtype=torch.float64) if has_entropy else None
        policy = new(9 + r if by_column else 9, dtype=torch.float64)
        found = columns.new(W, features.launch(x, mask, r, False)[0])
        if found.every:
            columns.fill(W, found)
        ranked = features.rank(H, mask, r, True, None if found.every else found)
        decided = factors.launch(W, found, *ranked[:2], policy, new(groups, dtype=wide), entropy,
                                 0.8, mask)  # fmt: skip
        selected, core, gamma, active = decided
        delta.launch(H, bias, found, selected[:, 1], core, gamma, active, clamp)


LENGTHS = 512, 2048, 8192
NOTHING: dict[str, Any] = {}
EVERYTHING: dict[str, Any] = {
    "masked": True, "has_entropy": True, "clamp": 0.5, "by_column": True,
}  # fmt: skip


def prefills() -> Iterator[Prefill]:
    """Yield the prompts of all layers, every choice of one model, and corners."""
    models = {name: model.projections().values() for name, model in shapes.MODELS.items()}
    layers = {shape for projections in models.values() for shape in projections}
    layers |= set(shapes.SINGLE["cuda"])
    for (d_in, d_out), tokens in itertools.product(sorted(layers), LENGTHS):
        yield Prefill(d_in, d_out, tokens)
        yield Prefill(d_in, d_out, tokens, **EVERYTHING)
    every = itertools.product((False, True), (False, True), (None, 0.5), (False, True))
    for choice, (d_in, d_out) in itertools.product(every, sorted(set(models["Qwen2.5-7B"]))):
        yield Prefill(d_in, d_out, 2048, **dict(zip(EVERYTHING, choice, strict=True)))
    for choice in (NOTHING, EVERYTHING):
        yield Prefill(3584, 18944, 2048, 8, **choice)
        yield Prefill(18944, 3584, 8192, 8, dtype=torch.float32, **choice)
        yield Prefill(3584, 18944, 512, 64, **choice)
    yield Prefill(3584, 3584, 2048, dtype=torch.float32)
    yield Prefill(3584, 512, 20, 8, groups=600)  # more columns than W has
    yield Prefill(512, 8192, 512, 8, 2, torch.float64)


class Decode(NamedTuple):
    """Describe the launches of layers of one x for a step of decoding."""

    d_in: int
    widths: tuple[int, ...]
    tokens: int
    dtype: torch.dtype
    r: int = 4
    heads: tuple[int, int] | None = None
    selects: bool = False
    masked: bool = False
    has_entropy: bool = False
    clamp: float | None = None
    by_column: bool = False

    def launch(self) -> None:
        """Launch as the backend does, with a bias where there is a mask."""
        d_in, widths, tokens, dtype, r, heads, selects, masked, has_entropy, clamp, by_column = self
        policy = new(9 + r if by_column else 9, dtype=torch.float64)
        layers = [
            decode.Layer(new(d, d_in, dtype=dtype), new(d, dtype=dtype) if masked else None, policy)
            for d in widths
        ]
        mask = new(tokens, 1, dtype=torch.bool) if masked else None
        I_in = None if selects else new(tokens, r, dtype=torch.int64)
        entropy = new(2, dtype=torch.float64) if has_entropy else None
        x = new(tokens, 1, d_in, dtype=dtype)
        decode.launch(x, layers, mask, I_in, None, entropy, r, True, 0.8, clamp, heads)


def steps(dtype: torch.dtype) -> Iterator[Decode]:
    """Yield the steps of all layers, those of one x together and each alone, and corners."""
    for model, tokens in itertools.product(shapes.MODELS.values(), (1, 16)):
        sizes, heads = model.projections(), (model.heads, model.kv_heads)
        queries, keys, inner = (sizes[name][1] for name in ("q_proj", "k_proj", "gate_proj"))
        for choice in (NOTHING, EVERYTHING):
            yield Decode(model.hidden, (queries, keys, keys), tokens, dtype, heads=heads, **choice)
            yield Decode(model.hidden, (inner, inner), tokens, dtype, **choice)
        yield Decode(model.hidden, (queries, keys), tokens, dtype, heads=heads)
        for d_in, d_out in {*sizes.values(), (model.hidden, model.vocabulary)}:
            yield Decode(d_in, (d_out,), tokens, dtype, selects=True)
    for r in (4, 8):
        yield Decode(8192, (28672,), 16, dtype, r)
        yield Decode(3584, (3584,), 16, dtype, r, **EVERYTHING)


def launches(architecture: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every launcher with the arguments of common layers, on tensors without memory."""
    for prefill in prefills():
        name = str(prefill.dtype).removeprefix("torch.")
        yield f"prefill {name}", prefill.launch
    for one in CORES:
        yield f"core {str(one.dtype).removeprefix('torch.')}", one.launch
    for dtype in (torch.bfloat16, torch.float32):  # float16 differs from bfloat16 in opcodes only
        name = str(dtype).removeprefix("torch.")
        for d_in, d_out, r, groups, tokens in (
            (3584, 3584, 4, 1, 1),
            (3584, 18944, 4, 1, 16),
            (18944, 3584, 2, 8, 1),
            (3584, 512, 4, 1, 1),
            (8192, 28672, 2, 1, 1),
            (18944, 3584, 4, 16, 1),
            (8192, 28672, 4, 1, 512),
            (3584, 3584, 8, 2, 17),
            (3584, 3584, 64, 1, 17),
        ):
            x, W = new(groups, tokens, d_in, dtype=dtype), new(d_out, d_in, dtype=dtype)
            I_in, E = new(groups, r, dtype=torch.int64), new(groups, r, d_in, dtype=dtype)
            arguments = (x, W, new(d_out, dtype=dtype), I_in, E)
            yield f"edited {name}", lambda a=arguments: edited.launch(*a)
        yield f"edited {name}", lambda x=x, one=(I_in, E): edited.edit(x, [one] * 3)
        for step in steps(dtype):
            yield f"decode {name}", step.launch
        values = new(2, 512, 3584, dtype=dtype)
        mask = new(2, 512, dtype=torch.bool)
        yield f"scores {name}", lambda v=values: scores.launch(v, None, True)
        yield f"scores {name}", lambda v=values, m=mask: scores.launch(v, m, True)
        yield f"scores {name}", lambda v=values[:, :1]: scores.launch(v, None, True)
        for width, k in ((3584, 4), (18944, 4), (28672, 64)):
            values = new(1, width, dtype=dtype)
            yield f"select {name}", lambda v=values, k=k: select.launch(v, k, True)
        for heads, kv_heads, size in ((28, 4, 128), (64, 8, 128), (64, 64, 128)):
            given = new(2, heads * size, dtype=dtype), new(2, kv_heads * size, dtype=dtype)
            I_in = new(2, 4, dtype=torch.int64)
            arguments = (*given, [], None, I_in, heads, kv_heads)
            yield f"couple {name}", lambda a=arguments: couple.launch(*a)
        logits = new(2, 151936, dtype=dtype)
        yield f"entropy {name}", lambda z=logits: entropy.launch(z)
    for heads, kv_heads in ((28, 4), (64, 8), (32, 16), (32, 32), (64, 64)):
        given = (new(2, heads * 128), new(2, kv_heads * 128), [new(2), new(2)], None)
        arguments = (*given, new(2, 4, dtype=torch.int64), heads, kv_heads)
        yield "couple float32", lambda a=arguments: couple.launch(*a)
    for width, k in ((3584, 4), (262144, 4), (262144, 64)):
        yield "select float32", lambda w=width, k=k: select.launch(new(2, w), k)
    yield "select float64", lambda: select.launch(new(2, 8192, dtype=torch.float64), 8)
    for W, I_in in ((new(3584, 512), new(2, 4, dtype=torch.int64)),):
        yield "columns float32", lambda W=W, I_in=I_in: columns.launch(W, I_in)
    yield "scores float64", lambda: scores.launch(new(2, 512, 512, dtype=torch.float64), None, True)
    yield "entropy float64", lambda: entropy.launch(new(2, 8192, dtype=torch.float64))


def compiled(
    architecture: str, of: Callable[[str], Iterator[tuple[str, Callable[[], object]]]] = launches
) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, compiled kernel)`` for every kernel that the launches ``of`` compile."""
    tuning.architecture = lambda device: architecture  # type: ignore[assignment]
    driver.set_active(Device(TARGETS[architecture]))  # type: ignore[arg-type]
    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    seen = set()
    try:
        for name, launch in of(architecture):
            kernels.clear()
            launch()
            for function, kernel in kernels:
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    yield f"{name}: {function}", kernel
    finally:
        JITFunction.run = run


def resources(architecture: str, kernel: Any) -> dict[str, int]:
    """Read registers a thread, bytes of shared memory, and bytes or registers spilled."""
    shared = int(kernel.metadata.shared)
    if architecture.startswith("gfx"):
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        spilled = sum(int(found[f"{kind}gpr_spill_count"]) for kind in "vs")
        return {"registers": int(found["vgpr_count"]), "shared": shared, "spills": spilled}
    report = _tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return {"registers": int(found["REG"]), "shared": shared, "spills": spilled}


def wide_loads(kernel: Any) -> int:
    """Count the 16-byte copies of W and x to shared memory; 0 unless W is among them.

    W is half of what is streamed or more, so it is when they carry more than half of the bytes.
    """
    sizes = [int(bits or 32) // 8 for bits in STREAMED.findall(disassemble(kernel))]
    wide = sizes.count(16)
    return wide if 2 * 16 * wide > sum(sizes) else 0


def disassemble(kernel: Any) -> str:
    """Return the listing of a kernel for an NVIDIA GPU."""
    return _tool("cuobjdump", "-sass", kernel.asm["cubin"])


def why_missing(architecture: str) -> str | None:
    """Say why the resources of this architecture cannot be read here, or ``None``."""
    if architecture.startswith("gfx") or (TOOLS / "cuobjdump").exists():
        return None
    return f"no cuobjdump in {TOOLS}"


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table; exit with 1 on a spill or a narrow load of W."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(TARGETS))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("benchmarks.aot: TRITON_INTERPRET is set, so nothing would be compiled")
    failures = []
    given = parser.parse_args()
    for architecture in given.architectures:
        if (reason := why_missing(architecture)) is not None:
            print(f"{architecture}: not read, {reason}")
        print(f"{architecture:<42} registers  shared  spills  16-byte loads")
        for name, kernel in compiled(architecture):
            if reason is not None:
                continue
            row = resources(architecture, kernel)
            wide = ""
            if architecture == "sm_90" and "gemv_kernel" in name:
                wide = str(wide_loads(kernel))
                if wide == "0":
                    failures.append(f"{architecture} {name}: W is not read by 16 bytes")
            print(
                f"{name:<42} {row['registers']:9} {row['shared']:7} {row['spills']:7}  {wide:>13}"
            )
            if row["spills"]:
                failures.append(f"{architecture} {name}: {row['spills']} spilled")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()

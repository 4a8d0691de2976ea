"""What the time of one layer call on a CPU is spent on, by Linux perf: plain and sharpened.

Samples of the calling thread are put into a few kinds by the library they fall into. Other threads
work for the base product alone or wait.

    python -m benchmarks.call_profile --dtype bfloat16 --tokens 32 --shape 576 576
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vps import VPSLinear

KINDS = {  # marks in the name of a library or function, the first kind that has one
    "matrix product": ("gemm", "gemv", "[JIT]", "dnnl::impl::cpu::x64::matmul::brgemm", "sbgemm"),
    "Python": ("libpython", "libtorch_python", "python"),
    "csrc": ("_cpp",),
    "waiting for threads": ("libgomp", "libiomp"),
    "operating system": ("[kernel", "[vdso]"),
}
DTYPES = ("float32", "bfloat16", "float16")
REST = "torch's dispatcher, tensors, memory"


def why_missing() -> str | None:
    """Why perf cannot record here, or ``None``."""
    if shutil.which("perf") is None:
        return "Linux perf is not on the PATH"
    tried = subprocess.run(
        ["perf", "record", "-q", "-o", "/dev/null", "true"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"perf cannot record: {tried.stderr.strip()}"


def kind(line: str) -> str:
    """That of a line of perf, which names library and function."""
    return next((k for k, marks in KINDS.items() if any(m in line for m in marks)), REST)


def shares(report: str) -> dict[str, float]:
    """Share of each kind in a report of perf, lines of percent, library and function."""
    found: Counter[str] = Counter()
    for line in report.splitlines():
        percent, _, rest = line.strip().partition("%")
        if rest and not line.startswith("#"):
            found[kind(rest)] += float(percent)
    total = sum(found.values())
    return {name: share / total for name, share in found.items()}


@torch.no_grad()
def profile(layer: nn.Module, x: torch.Tensor, seconds: float) -> tuple[float, dict[str, float]]:
    """Seconds a call, and by kind."""
    for _ in range(200):
        layer(x)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        thread = str(threading.get_native_id())
        command = ["perf", "record", "-q", "-F", "4000", "-t", thread, "-o", data]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(50):
                layer(x)
            calls += 50
        each = (time.perf_counter() - start) / calls
        recorder.terminate()
        recorder.wait()
        asked = ["perf", "report", "-i", data, "--stdio", "-q", "--sort", "dso,symbol"]
        report = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return each, {name: each * share for name, share in shares(report).items()}


def table(found: dict[str, tuple[float, dict[str, float]]]) -> str:
    """µs by kind, a column a layer, in Markdown."""
    lines = ["| µs a call | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    rows: dict[str, Any] = {
        name: [own.get(name, 0.0) for _, own in found.values()] for name in (*KINDS, REST)
    }
    rows["all"] = [each for each, _ in found.values()]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{1e6 * value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Profile one shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--shape", type=int, nargs=2, default=(576, 576), metavar=("IN", "OUT"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    reason = why_missing()
    if reason is not None:
        sys.exit(f"call_profile: {reason}")
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    linear = nn.Linear(*arguments.shape, bias=False).to(dtype)
    x = torch.randn(1, arguments.tokens, arguments.shape[0]).to(dtype)
    layers = {"nn.Linear": linear, "VPSLinear": VPSLinear.from_linear(linear)}
    print(table({name: profile(own, x, arguments.seconds) for name, own in layers.items()}))


if __name__ == "__main__":
    main()

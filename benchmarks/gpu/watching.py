"""Watch the kernels on a GPU: sanitizers and many replays for races, ncu for what each waits for.

``build`` compiles harness.cu, which runs csrc/cuda/decode.cuh without torch; ``run`` does the rest.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("harness.cu")
HARNESS = "harness"
TOOLS = ("racecheck", "synccheck", "memcheck")
KERNELS = "gemv_kernel|apply_kernel|delta_kernel|decode_kernel"
METRICS = (
    *("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("launch__registers_per_thread", "sm__warps_active.avg.pct_of_peak_sustained_active"),
)


def command(architecture: str, *options: str) -> list[str]:
    """Return the nvcc command for the harness, without outputs."""
    return [
        "nvcc",
        "-std=c++20",
        "-O3",
        "-lineinfo",
        f"-arch={architecture}",
        *options,
        str(SOURCE),
    ]


def build(out: Path) -> None:
    """Compile the harness to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(command("native", "-o", str(out / HARNESS)), check=True)


def watched(line: list[str], seconds: float) -> tuple[str, str]:
    """Run a command; return ``"ok"`` or what became of it, and its output."""
    if shutil.which(line[0]) is None:
        return f"not here: no {line[0]}", ""
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "the time was up", ""
    output = done.stdout + done.stderr
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}", output


def run(out: Path) -> bool:
    """Watch with every tool that is here; return whether none found anything."""
    commands: dict[str, tuple[list[str], float]] = {}
    for tool in TOOLS:
        line = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(out / HARNESS)]
        commands[tool] = ([*line, "check"], 10)
    soak = ["-m", "pytest", "-q", "-m", "cuda", "-k", "soak", "tests/backends/test_csrc_cuda.py"]
    commands["soak"] = ([sys.executable, *soak], 25)
    profiled = ["ncu", "--clock-control", "none", "--kernel-name", f"regex:{KERNELS}"]
    profiled += ["--launch-count", "6", "--metrics", ",".join(METRICS)]
    one = [sys.executable, "-m", "benchmarks.gpu.compiling", "0", "8"]
    commands["ncu"] = ([*profiled, *one], 25)
    lines, good = [], True
    for name, (line, seconds) in commands.items():
        status, output = watched(line, seconds)
        good = good and (status == "ok" or status.startswith("not here"))
        found = [text.strip() for text in output.splitlines() if text.strip()]
        shown = [t for t in found if "_kernel" in t or any(m in t for m in METRICS)]
        lines += [f"{name}: {status}; {found[-1][:100] if found else ''}", *shown[:40]]
        results.save(out / "gpu.json", "watching", {"lines": lines}, results.VISIT)
        print(*lines[-41:], sep="\n", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "build":
        build(arguments.out)
    else:
        sys.exit(not run(arguments.out))

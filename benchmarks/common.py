"""Interleaved timing of variants, after a check, with machine and versions in the result."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vps


def interleave(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per variant and round; every round runs each once, in rotating order."""
    names = list(variants)
    for name in names:
        variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _wait()
            start = time.perf_counter()
            variants[name]()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median ratio to ``base`` within a round, its quartiles, and the median seconds."""
    rows = {}
    for name, times in seconds.items():
        quotients = [t / b for t, b in zip(times, seconds[base], strict=True)]
        low, median, high = statistics.quantiles(quotients, n=4)
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": median,
            "ratio_q1": low,
            "ratio_q3": high,
        }
    return rows


def machine() -> dict[str, object]:
    """Where and with what a measurement was made."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "vps": vps.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def write(out: Path, name: str, rows: dict[str, dict[str, dict[str, float]]]) -> Path:
    """Write ``out/name.json`` and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
    for case, variants in rows.items():
        print(case)
        for variant, row in variants.items():
            print(
                f"  {variant:<28} {row['seconds'] * 1e3:9.3f} ms   "
                f"{row['ratio']:.3f}× [{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}]"
            )
    print(path)
    return path


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Describe where, with what and at which clocks a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import vps
from vps.doctor import processor_name

ROOT = Path(__file__).parents[1]
# What must agree for times to be compared.
COMPARED = ("cpu", "instructions", "threads", "wait_policy", "gpu")
PACKAGES = ("torch", "triton", "transformers", "peft")


def device() -> str:
    """Return ``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def facts() -> dict[str, object]:
    """Describe machine, versions and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "vps": vps.__version__,
        **versions,
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of the source, ``-dirty`` with changes; ``None`` outside of a checkout."""
    run = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or None


def clocks() -> dict[str, object]:
    """Read clocks and load at this moment."""
    found: dict[str, object] = {"load": os.getloadavg()[0]}
    try:
        lines = Path("/proc/cpuinfo").read_text()
        found["cpu_mhz"] = [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", lines)]
    except OSError:
        found["cpu_mhz"] = []
    if torch.cuda.is_available():
        fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
        try:
            run = subprocess.run(
                ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=True,
            )
            values = run.stdout.strip().split(", ")
            found |= dict(zip(fields.split(","), values, strict=True))
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            found["gpu_clocks"] = f"not read: {error}"
    return found


def name() -> str:
    """Name the machine for a file: its GPU, else processor, instruction set and threads.

    Threads that spin while they wait, as torch leaves them, are named too.
    """
    if torch.cuda.is_available():
        title = torch.cuda.get_device_name()
    else:
        isa = torch.backends.cpu.get_cpu_capability()
        title = f"{processor_name()} {isa} {torch.get_num_threads()} threads"
        if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
            title += " spinning"
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")

"""What this machine can run: versions, devices, backends, engines and optional packages."""

from __future__ import annotations

import platform
import re
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from vps.backends.dispatch import backends
from vps.engines import engines

OPTIONAL = {
    "transformers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "tqdm": "hf",
    "triton": "gpu",
    "sympy": "verify",
    "pint": "verify",
    "math_verify": "verify",
    "lm_eval": "eval",
    "reasoning_gym": "eval",
    "scipy": "eval",
    "matplotlib": "plots",
    "vllm": "vllm",
}


def diagnose() -> dict[str, dict[str, Any]]:
    """Sections of facts, each a name and a value or a reason; plain data, fit for JSON."""
    packages = {}
    for name, extra in OPTIONAL.items():
        if util.find_spec(name) is None:
            packages[name] = f"missing: pip install 'vps-kernels[{extra}]'"
        else:
            packages[name] = package_version(name)
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    }
    if torch.version.cuda is None and torch.version.hip is None:
        devices["cuda"] = f"none: torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        devices["cuda"] = "none: torch finds no CUDA device or driver"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return {
        "versions": {
            "vps": package_version("vps-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "packages": packages,
        "devices": devices,
        "backends": {name: reason or "available" for name, reason in backends().items()},
        "engines": engines(),
        "tools": {tool: shutil.which(tool) or "not found" for tool in ("c++", "nvcc")},
    }


def package_version(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def processor_name() -> str:
    """The model of the processor, or the architecture where the system does not tell."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()

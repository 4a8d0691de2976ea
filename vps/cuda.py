"""Builds, finds and loads the CUDA operator of csrc/cuda: decode of one token in one launch.

``python -m vps.cuda`` builds it for the GPU at hand (or ``--arch``) with the machine's nvcc.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vps.policy import Settings
from vps.torch_backend import Inputs, Outputs

SOURCE = Path(__file__).resolve().parents[1] / "csrc/cuda/decode.cu"
LIBRARY = Path(__file__).with_name("_cuda.so")
STABLE_ABI = "0x020a000000000000"


def command(architecture: str, *options: str) -> list[str]:
    """The nvcc command for one architecture such as ``"sm_90"``, without outputs.

    Raises:
        FileNotFoundError: no nvcc, or no source because vps is not installed from its repository.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("vps.cuda: nvcc is not on PATH")
    if not SOURCE.is_file():
        raise FileNotFoundError(f"vps.cuda: {SOURCE} is missing; build from the repository")
    include = Path(torch.__file__).parent / "include"
    return [
        nvcc,
        "-std=c++20",
        "-O3",
        f"-arch={architecture}",
        f"-I{include}",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
        *options,
        str(SOURCE),
    ]


def build(architecture: str | None = None) -> Path:
    """Compile the library beside this file and return its path.

    Args:
        architecture: such as ``"sm_90"``; that of the first GPU when ``None``.

    Raises:
        RuntimeError: no GPU to ask for its architecture, or nvcc failed; with its output.
    """
    if architecture is None:
        if not torch.cuda.is_available():
            raise RuntimeError("vps.cuda: no GPU here: name an architecture such as sm_90")
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    built = LIBRARY.with_suffix(".new")
    line = command(architecture, "-shared", "-Xcompiler", "-fPIC", "-o", str(built))
    run = subprocess.run(line, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"vps.cuda: nvcc failed:\n{run.stderr}")
    built.replace(LIBRARY)
    return LIBRARY


@cache
def why_missing() -> str | None:
    """Why the operator cannot run here, or ``None``; loads it."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    if not LIBRARY.is_file():
        return "its library is not built: python -m vps.cuda builds it with nvcc"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its library does not load: {error}"
    return None


def takes(inputs: Inputs, settings: Settings) -> bool:
    """Whether this call is one token of plain selection, component clip and first order."""
    x, weight = inputs.x, inputs.weight
    return (
        x.shape[:2] == (1, 1)
        and inputs.mask is None
        and inputs.H is None
        and settings.r <= 8
        and not (settings.coupled or settings.spectral or settings.second_order)
        and x.dtype == weight.dtype != torch.float64
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
    )


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """One token in one launch; whatever :func:`takes` refuses goes to the Triton kernels."""
    if not takes(inputs, settings):
        from vps import triton_backend

        return triton_backend.forward(inputs, settings)
    x, weight, bias, _, I_in, I_out, policy, entropy = inputs[:8]
    y, features, core, gamma, t = torch.ops.vps.cooperative_decode(
        x.contiguous(),
        weight,
        bias,
        _contiguous(I_in),
        _contiguous(I_out),
        policy,
        None if entropy is None else entropy.double(),
        settings.r,
        settings.adaptive,
        settings.tau,
        settings.clamp,
    )
    return Outputs(y, features[:, 0], features[:, 1], core, gamma, t)


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def main() -> None:
    """Build for ``--arch``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", help="such as sm_90; that of the first GPU by default")
    print(build(parser.parse_args().arch))


if __name__ == "__main__":
    main()

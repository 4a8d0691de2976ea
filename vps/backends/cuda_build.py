"""Build the CUDA operator of csrc/cuda with the machine's nvcc.

``python -m vps.backends.cuda_build`` builds it for the GPU at hand (or ``--arch``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import torch

from vps.backends.cuda import LIBRARY

SOURCE = Path(__file__).resolve().parents[2] / "csrc/cuda/decode.cu"
STABLE_ABI = "0x020a000000000000"


def command(architecture: str, *options: str) -> list[str]:
    """Return the nvcc command for one architecture such as ``"sm_90"``, without outputs.

    Raises:
        FileNotFoundError: there is no nvcc, or no source, as vps is not installed from its
            repository.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("vps.backends.cuda_build: nvcc is not on PATH")
    if not SOURCE.is_file():
        raise FileNotFoundError(
            f"vps.backends.cuda_build: {SOURCE} is missing; build from the repository"
        )
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


def linked(library: Path) -> list[str]:
    """Return the options that link ``library``, to be loaded where torch is."""
    folder = Path(torch.__file__).parent / "lib"
    # A CPU build of torch has no torch_cuda; what is linked there is good for checks alone.
    names = [n for n in ("torch_cpu", "torch_cuda") if (folder / f"lib{n}.so").exists()]
    return [
        "-shared",
        "-Xcompiler",
        "-fPIC",
        f"-L{folder}",
        *(f"-l{name}" for name in names),
        "-o",
        str(library),
    ]


def build(architecture: str | None = None) -> Path:
    """Compile the library and return its path.

    Args:
        architecture: such as ``"sm_90"``; the first GPU's when ``None``.

    Raises:
        RuntimeError: no GPU to ask for its architecture, or nvcc failed; with its output.
    """
    if architecture is None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "vps.backends.cuda_build: no GPU here: name an architecture such as sm_90"
            )
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    built = LIBRARY.with_suffix(".new")
    line = command(architecture, *linked(built))
    run = subprocess.run(line, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"vps.backends.cuda_build: nvcc failed:\n{run.stderr}")
    built.replace(LIBRARY)
    return LIBRARY


def main() -> None:
    """Build for ``--arch``; print the error and exit with 1 where that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", help="such as sm_90; that of the first GPU by default")
    options = parser.parse_args()
    try:
        print(build(options.arch))
    except (FileNotFoundError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""Packaging of vps-kernels; what pip builds, CONTRIBUTING.md explains."""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vps/__init__.py").read_text())[1]

# Listed by hand: find_packages would not follow the link vps/kernels -> ../kernels, and a
# top-level package `kernels` would overwrite Hugging Face's package of that name.
PACKAGES = [
    "vps",
    "vps.algorithm",
    "vps.backends",
    "vps.cli",
    "vps.cli.demo",
    "vps.evaluation",
    "vps.evaluation.templates",
    "vps.fitting",
    "vps.kernels",
    "vps.kernels.decode",
    "vps.kernels.prefill",
    "vps.layers",
    "vps.layers.shards",
    "vps.model",
    "vps.serving",
    "vps.verify",
]

CLI = ["typer>=0.20", "rich>=13.8", "jinja2"]
EXTRAS = {
    "gpu": ["triton>=3.6"],
    "cli": CLI,
    "hf": ["transformers>=5.17", "gguf", "accelerate", *CLI],
    "verify": ["sympy", "pint", "math-verify>=0.9"],
    "eval": [
        "lm-eval[hf]>=0.4.13",
        "reasoning-gym",
        "scipy>=1.15",
        "pyyaml",
        "filelock>=3.12",
        "jinja2",
    ],
    "plots": ["matplotlib"],
    "engines": ["bitsandbytes>=0.48", "torchao>=0.14", "peft", "accelerate"],
    "vllm": ["vllm>=0.32"],
    "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1"],  # one line, read by Makefile
    "dev": ["ruff", "mypy", "pre-commit"],
}
EXTRAS["test"] = [
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "expecttest",  # of torch.testing._internal
    "numpy",
    "packaging",
    *EXTRAS["engines"],
    *EXTRAS["gpu"],
    *EXTRAS["hf"],
    *EXTRAS["plots"],
    *EXTRAS["eval"],
    *EXTRAS["verify"],
]
# vLLM pins its own torch, so it is no part of "all".
EXTRAS["all"] = sorted({r for name, extra in EXTRAS.items() if name != "vllm" for r in extra})


def cpp_extension() -> dict:
    """What setup() needs to build csrc; nothing where torch or a compiler is missing.

    VPS_BUILD_CPP=0 leaves it out, VPS_BUILD_CPP=1 makes every obstacle an error.
    """
    wanted = os.environ.get("VPS_BUILD_CPP", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"VPS_BUILD_CPP must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # whatever torch raises where it does not work
        if wanted == "1":
            raise
        print(f"vps: without the C++ backend: no torch to build it with ({error})", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if wanted == "1":
                    raise
                print(f"vps: without the C++ backend: {error}", file=sys.stderr)
                self.extensions = []
                for stale in (ROOT / "vps").glob("_cpp*.so"):  # of an earlier build in place
                    stale.unlink()

    extension = CppExtension(
        "vps._cpp",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hi]*")),
        # torch's stable ABI of 2.10: one library for every torch since.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000ULL")],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-fvisibility=hidden",
            "-g0",
            "-Wno-uninitialized",
        ],
        py_limited_api=True,
        optional=wanted != "1",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    name="vps-kernels",
    version=VERSION,
    description="Virtual Parameter Sharpening: dynamic low-rank updates for frozen linear layers",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "vps": ["py.typed"],
        "vps.cli.demo": ["*.html", "*.json"],
        "vps.evaluation.templates": ["*.html", "*.md"],
        "vps.fitting": ["*.txt"],
        "vps.kernels": ["README.md"],
        "vps.verify": ["units.txt"],
    },
    install_requires=["torch>=2.11"],
    extras_require=EXTRAS,
    **cpp_extension(),
    entry_points={
        "console_scripts": ["vps = vps.cli:main"],
        "vllm.general_plugins": ["vps = vps.serving.plugin:register"],
    },
)

"""Packaging of vps-kernels; what pip builds, CONTRIBUTING.md explains."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vps/__init__.py").read_text())[1]

# Listed by hand: find_packages would not follow the link vps/kernels -> ../kernels, and a
# top-level package `kernels` would overwrite Hugging Face's package of that name.
PACKAGES = ["vps", "vps.demo", "vps.kernels"]

EXTRAS = {
    "gpu": ["triton>=3.6"],
    "hf": ["transformers>=5.17", "gguf", "accelerate", "tqdm"],
    "verify": ["sympy", "pint", "math-verify"],
    "eval": ["lm-eval", "reasoning-gym", "scipy"],
    "plots": ["matplotlib"],
    "dev": ["ruff", "mypy", "pre-commit"],
}
EXTRAS["test"] = [
    "pytest",
    "pytest-benchmark",
    "numpy",
    "packaging",
    "peft",
    *EXTRAS["gpu"],
    *EXTRAS["hf"],
    *EXTRAS["plots"],
]
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="vps-kernels",
    version=VERSION,
    description="Virtual Parameter Sharpening: dynamic low-rank updates for frozen linear layers",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"vps.kernels": ["README.md"]},
    install_requires=["torch>=2.11"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vps = vps.cli:main"]},
)

"""The error for a part whose package is not installed."""

from __future__ import annotations


def missing(part: str, package: str) -> ImportError:
    """An error that names the extra to install."""
    return ImportError(
        f"vps.verify: {part} needs {package}, which is not installed: "
        "pip install 'vps-kernels[verify]'"
    )

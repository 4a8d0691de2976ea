"""Finds and loads the C++ operator for CPUs, built from csrc.

``VPS_CPP_LIBRARY`` names another library than the installed one, such as one with sanitizers.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch


def why_missing() -> str | None:
    """Why the library cannot be loaded, or ``None``."""
    library = _library()
    if library is None:
        return "its library is not built: VPS_BUILD_CPP=1 pip install ... says why"
    return None if library.is_file() else f"VPS_CPP_LIBRARY={library} is no file"


def load() -> None:
    """Register its implementation of ``torch.ops.vps.linear`` for CPUs.

    Raises:
        ImportError: no library, or one that does not fit this torch or machine.
    """
    reason = why_missing()
    if reason is not None:
        raise ImportError(f"vps: no C++ backend: {reason}")
    try:
        torch.ops.load_library(str(_library()))
    except OSError as error:
        raise ImportError(f"vps: the C++ backend cannot be loaded: {error}") from error


def _library() -> Path | None:
    named = os.environ.get("VPS_CPP_LIBRARY")
    return Path(named) if named else next(Path(__file__).parent.glob("_cpp*.so"), None)

"""Finds and loads the C++ operator for CPUs, built from csrc."""

from __future__ import annotations

from pathlib import Path

import torch


def why_missing() -> str | None:
    """Why the library cannot be loaded, or ``None``."""
    return None if _library() else "its library is not built"


def load() -> None:
    """Register its implementation of ``torch.ops.vps.linear`` for CPUs."""
    torch.ops.load_library(str(_library()))


def _library() -> Path | None:
    return next(Path(__file__).parent.glob("_cpp*.so"), None)

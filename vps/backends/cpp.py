"""Find and load the C++ operator for CPUs, which is built from csrc.

``VPS_CPP_LIBRARY`` names a library to load instead of the installed one, such as a build with
sanitizers.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from vps.backends import operator
from vps.backends.call import Kind, why_not_native


@cache
def why_missing() -> str | None:
    """Load the C++ operator; return why that failed, or ``None``."""
    library = _library()
    if library is None:
        return "its library is not built: VPS_BUILD_CPP=1 pip install ... says why"
    if not library.is_file():
        return f"VPS_CPP_LIBRARY={library} is no file"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another machine or torch
        return f"its library does not load: {error}"
    return None


def why_not(kind: Kind) -> str | None:
    """Return why the operator does not take calls of a kind, or ``None``."""
    return why_not_native(kind, "cpu")


run = operator.run
later = operator.later


def _library() -> Path | None:
    named = os.environ.get("VPS_CPP_LIBRARY")
    return Path(named) if named else next(Path(__file__).parents[1].glob("_cpp*.so"), None)


if why_missing() is not None:  # graphs hold the operator, so torch has to implement it
    operator.implement_in_torch()

"""What traces a call."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, to which torch 2.11 says yes in ``torch.compile``, too."""
    return torch.compiler._is_exporting_flag

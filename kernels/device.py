"""Launch where the tensors are, and sum in a dtype that fits theirs.

Triton takes the current device, whatever its arguments lie on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(
    launch: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """Make the device of the first tensor current for ``launch``: models lie on several."""

    @wraps(launch)
    def there(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)

    return there


def accumulation(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Return the dtype of sums of ``dtype``, for torch and for Triton."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.float32, tl.float32
    raise TypeError(f"vps kernels take float16, bfloat16, float32 and float64, got {dtype}")

"""Launch where the tensors are: Triton takes the current device, whatever its arguments lie on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
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

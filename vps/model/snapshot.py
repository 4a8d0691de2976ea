"""Put back what a patch changed in a model, when the patch fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vps.layers.opaque_layer import sharpened_by

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class Snapshot:
    """Classes, attributes and hooks of all modules of a model, and what its layers hold.

    Parameters and buffers are not copied; a patch leaves them as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        # A scripted module takes no hooks, and nothing in it is sharpened.
        modules = [one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule)]
        self._modules = [
            (one, type(one), dict(vars(one)), {name: dict(vars(one)[name]) for name in HOOKS})
            for one in modules
        ]
        layers: list[Any] = [layer for one in modules if (layer := sharpened_by(one)) is not None]
        pairs = [layer.coupling for layer in layers if layer.coupling is not None]
        self._held = [(each, dict(vars(each))) for each in (*layers, *pairs)]

    def restore(self) -> None:
        """Put everything back."""
        for module, kind, attributes, hooks in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            _reset(vars(module), attributes)
            for name, content in hooks.items():
                _reset(vars(module)[name], content)
        for each, attributes in self._held:
            _reset(vars(each), attributes)


def _reset(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    for name in [name for name in now if name not in before]:
        del now[name]
    now.update(before)

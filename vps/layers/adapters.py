"""Adapters of PEFT put around sharpened layers, and taken away, at any time.

PEFT wraps a layer as the ``base_layer`` of a new module. Sharpening then means that of the merged
weights, so the new module is sharpened in place of the layer within. torch tells of every module
that is put into another; nothing is asked of PEFT, and nothing is looked for in a forward pass.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_WATCHING: list[Any] = []


def loaded(module: str, name: str) -> Any:
    """A class of a package, or ``None`` where nothing has imported it: then nothing is of it."""
    return getattr(sys.modules.get(module), name, None)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around another."""
    tuner = loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    return tuner is not None and isinstance(module, tuner)


def settle(module: nn.Module) -> None:
    """Unmerge an adapter that is switched off, as its own forward would begin by doing.

    That changes its weights, so it must happen to the module itself, before a stand-in without
    bias computes in its place.
    """
    if getattr(module, "disable_adapters", False) and getattr(module, "merged", False):
        module.unmerge()  # type: ignore[operator]


def watch() -> None:
    """From now on keep sharpened layers right when adapters come and go."""
    if not _WATCHING:
        _WATCHING.append(register_module_module_registration_hook(_placed))


def _placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """``module`` is being put into ``parent`` as ``name``."""
    from vps.layers import opaque_layer  # which imports this module

    if module is None:
        return
    layer = opaque_layer.sharpened_by(module)
    if layer is None:
        return
    if name == "base_layer" and is_adapter(parent):
        cover(parent, layer)
    elif layer.outer is not None:
        uncover(layer)


def cover(adapter: nn.Module, layer: Any) -> Any:
    """Sharpen an adapter in place of the layer that it wraps: settings and coupling pass to it,
    and go back when it is taken away.

    Raises:
        TypeError: a layer of which this process holds a part only.
    """
    from vps.layers import opaque_layer

    if not layer.is_whole:
        raise TypeError(
            f"vps: an adapter around a sharpened {type(layer).__name__} is not supported: its "
            "weight is split over ranks; expected vps.unpatch before adding adapters"
        )

    outer = opaque_layer.attach(adapter, layer.config, layer.state, layer.widths, wraps=True)
    _hand_over(layer, outer)
    layer.outer = outer
    return outer


def uncover(layer: Any) -> None:
    """Sharpen a layer itself again, whose adapters have been taken away."""
    outer = layer
    while outer.outer is not None:
        outer = outer.outer
    layer.outer = None
    layer.config = outer.config
    _hand_over(outer, layer)


def _hand_over(old: Any, new: Any) -> None:
    """Gradient flag, memory, own γ and coupling of one layer pass to another."""
    new.gradient, new.memory, new.gamma = old.gradient, old.memory, old.gamma
    pair = old.coupling
    if pair is not None:
        old.coupling, new.coupling = None, pair
        if pair.query is old:
            pair.query = new
        if pair.key is old:
            pair.key = new

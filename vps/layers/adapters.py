"""Keep sharpened layers right when adapters of PEFT are put around them or taken away.

PEFT wraps a layer as the ``base_layer`` of a new module. The merged weights are what counts then,
so the new module is sharpened in place of the layer within. A hook of torch reports every module
that is put into another, so a forward pass looks for nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_WATCHING: list[Any] = []


def loaded(module: str, name: str) -> Any:
    """Return a class of a module that is imported already, or ``None``."""
    return getattr(sys.modules.get(module), name, None)


def is_adapter(module: nn.Module) -> bool:
    """Return whether a module is a layer of PEFT around another layer."""
    tuner = loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    return tuner is not None and isinstance(module, tuner)


def settle(module: nn.Module) -> None:
    """Unmerge an adapter that is switched off, as its own forward would do first.

    Unmerging changes weights, so it must happen to the module itself, before a stand-in without
    bias computes in its place.
    """
    if getattr(module, "disable_adapters", False) and getattr(module, "merged", False):
        module.unmerge()  # type: ignore[operator]


def watch() -> None:
    """Watch, from now on, for adapters that come and go around sharpened layers."""
    if not _WATCHING:
        _WATCHING.append(register_module_module_registration_hook(_placed))


def _placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Follow a ``module`` that is being put into ``parent`` as ``name``."""
    from vps.layers import opaque_layer  # imports this module

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
    """Sharpen an adapter in place of the layer that it wraps.

    Settings and coupling pass to the adapter, and go back when it is taken away.

    Raises:
        TypeError: this process holds only a part of the layer.
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
    """Sharpen a layer itself again, after its adapters were taken away."""
    outer = layer
    while outer.outer is not None:
        outer = outer.outer
    layer.outer = None
    layer.config = outer.config
    _hand_over(outer, layer)


def _hand_over(old: Any, new: Any) -> None:
    """Pass gradient flag, memory, γ and coupling of one layer to another."""
    new.gradient, new.memory, new.gamma = old.gradient, old.memory, old.gamma
    pair = old.coupling
    if pair is not None:
        old.coupling, new.coupling = None, pair
        if pair.query is old:
            pair.query = new
        if pair.key is old:
            pair.key = new

"""Couple the query and key layers that an attention block calls one after the other.

Whichever is called first computes both; the output of the other waits for the very same x until the
block is done. Outside the block, and where a tracer runs, each call computes both; a graph keeps
one of equal calls (:mod:`vps.backends.sharing`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vps.algorithm import tracing
from vps.algorithm.fixed import FixedUpdate
from vps.functional import Kept, compute, keep, sharpen
from vps.masking import held_for

if TYPE_CHECKING:
    from vps.layers.linear import SharpenedLayer


class _Waiting(threading.local):
    """The pair of the block that runs on this thread, and the output that waits."""

    pair: Coupling | None = None
    layer: Any = None
    x: Tensor | None = None
    version: int = 0
    y: Tensor | None = None

    def clear(self) -> None:
        self.layer = self.x = self.y = None


_WAITING = _Waiting()


class Coupling:
    """A query and a key layer that read the same x.

    Args:
        query: layer to ``heads`` heads.
        key: layer to ``kv_heads`` heads of the same size.
        heads: query heads.
        kv_heads: key-value heads.
    """

    kept: Kept | None = None

    def __init__(
        self, query: SharpenedLayer, key: SharpenedLayer, heads: int, kv_heads: int
    ) -> None:
        self.query = query
        self.key = key
        self.heads = heads
        self.kv_heads = kv_heads

    def applies(self) -> bool:
        """Return whether both layers have the same settings, which ask for coupling."""
        config, other = self.query.config, self.key.config
        if self.query.state is not self.key.state or config is not other and config != other:
            return False
        return config.couples

    def sharpen(self, layer: SharpenedLayer, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` for x ``[..., d_in]``; ``None`` for the base layer's."""
        waits = self._may_wait(x)
        if waits and _WAITING.layer is layer:
            unchanged = x._version == _WAITING.version and _WAITING.x is x
            y = _WAITING.y
            _WAITING.clear()
            if unchanged:
                return y
        ys = self.outputs(layer, x)
        own, other = ys if layer is self.query else ys[::-1]
        if waits:
            _WAITING.layer = self.key if layer is self.query else self.query
            _WAITING.x, _WAITING.version, _WAITING.y = x, x._version, other
        return own

    def outputs(self, layer: SharpenedLayer, x: Tensor) -> list[Tensor | None]:
        """Return both outputs, the query's first, while the forward of ``layer`` runs.

        ``None`` stands for the output of the base layer.
        """
        held = held_for(x, layer.number) if layer.config.scope == "prompt" else None
        decided: list[FixedUpdate | None] = []
        if held is not None:
            for one in (self.query, self.key):
                held.note(one, x)
        ys = self._outputs(layer, x, None if held is None else decided)
        if held is not None:
            held.keep(zip((self.query, self.key), decided, strict=False), layer)
        return ys

    def _outputs(
        self, layer: SharpenedLayer, x: Tensor, decided: list[FixedUpdate | None] | None
    ) -> list[Tensor | None]:
        layers, kept, compiling = (self.query, self.key), self.kept, torch.compiler.is_compiling()
        plan = None if compiling or kept is None else kept.find(layers, x)
        if plan is not None:
            return compute(x, plan, held=decided)
        both = (
            self.query.projection(x, inside=layer is self.query),
            self.key.projection(x, inside=layer is self.key),
        )
        heads = self.heads, self.kv_heads
        ys = sharpen(x, both, layer.config, heads=heads, state=layer.state, held=decided)
        if not compiling:
            self.kept = keep(x, layers, both, heads)
        return ys

    def _may_wait(self, x: Tensor) -> bool:
        """Return whether the block runs eagerly, with an x whose edits are counted."""
        if torch.compiler.is_compiling() or tracing.is_transforming():
            return False
        return _WAITING.pair is self and not x.is_inference()


class _Enter:
    """A forward pre-hook of an attention block, whose pair may then let outputs wait."""

    def __init__(self, pair: Coupling) -> None:
        self.pair = pair

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            _WAITING.clear()
            _WAITING.pair = self.pair


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Drop what waits, as a forward hook of an attention block."""
    if not torch.compiler.is_compiling():
        _WAITING.clear()
        _WAITING.pair = None


def attach(block: nn.Module, pair: Coupling) -> None:
    """Couple the two layers of an attention block."""
    pair.query.coupling = pair.key.coupling = pair
    block.register_forward_pre_hook(_Enter(pair))
    block.register_forward_hook(_leave, always_call=True)


def detach(model: nn.Module) -> None:
    """Remove the hooks of :func:`attach` everywhere in ``model``."""
    for module in model.modules():
        remove_hooks(module, lambda hook: isinstance(hook, _Enter) or hook is _leave)


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove the forward hooks of ``module`` for which ``is_ours`` holds."""
    for hooks, options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    ):
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]
            options.pop(key, None)

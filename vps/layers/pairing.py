"""Compute layers that a block calls one after the other with the same x in one call.

The query and the key that select together: whichever is called first computes both; the output of
the other waits for the very same x until the block is done. Outside the block, and where a tracer
runs, each call computes both; a graph keeps one of equal calls (:mod:`vps.backends.sharing`).

On a GPU also layers that share no decision, such as gate and up: a step of a few tokens costs two
launches for all of them. Which layers read one x is learned from the calls (:func:`read`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vps.algorithm import tracing
from vps.algorithm.fixed import FixedUpdate
from vps.algorithm.flow import Layer
from vps.backends import dispatch, sharing
from vps.functional import Kept, Plan, compute, keep, sharpen
from vps.masking import STATE, held_for

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


class Reading:
    """Layers that read one x, one after the other, while the forward of a model runs.

    Args:
        x: a reference to what they read.
        state: its version, and where it is ready (:func:`vps.backends.sharing.state_of`).
        kept: the plan of the first, which remembers the others.
        layers: those that were called; first the query and the key, if they select together.
    """

    def __init__(self, x: Tensor, state: Any, kept: Kept, layers: tuple[Any, ...]) -> None:
        self.x, self.state, self.kept, self.layers = weakref.ref(x), state, kept, list(layers)
        self.forward = STATE.layouts[-1]
        # By layer: its output, and its weight with the version that was multiplied.
        self.outputs: dict[Any, tuple[Tensor, Tensor, int]] = {}

    def take(self, layer: Any) -> Tensor | None:
        """Return the output that waits for a layer, or ``None`` and note that it reads x too."""
        if (waiting := self.outputs.pop(layer, None)) is not None:
            y, W, version = waiting
            if layer.__dict__["_parameters"]["weight"] is W and W._version == version:
                return y
        if layer not in self.layers:
            self.layers.append(layer)
            if self.kept.readers is not None:
                self.kept.readers += (weakref.ref(layer),)
        return None

    def end(self) -> None:
        """Drop the outputs that nobody took, and compute none ahead again."""
        if self.outputs:
            self.kept.readers = None
        STATE.readings.clear()


def note(x: Tensor, layers: tuple[Any, ...], kept: Kept) -> tuple[Reading | None, Tensor | None]:
    """Note that layers read x while a model runs, perhaps after others.

    Return the reading that begins with them, or ``None``; and the output that waits for a single
    layer, or ``None``.
    """
    layouts = STATE.layouts
    if not layouts or layouts[-1].owner is None or torch.is_grad_enabled() or x.dim() != 3:
        return None, None
    if (state := sharing.state_of(x, None)) is None:
        return None, None
    for last in STATE.readings:
        if last.x() is x and last.state == state and last.forward is layouts[-1]:
            return None, last.take(layers[0]) if len(layers) == 1 else None
        last.end()
    reading = Reading(x, state, kept, layers)
    STATE.readings.append(reading)
    return reading, None


def read(x: Tensor, layers: tuple[Any, ...], kept: Kept, plan: Plan) -> list[Tensor | None]:
    """Return what :func:`compute` does, by kernels that take other layers of the same x as well.

    Their outputs wait in ``STATE.readings`` until they are called in the same forward of a model,
    where nothing else runs between. A layer with a hook before it is left alone.
    """
    reading, waiting = note(x, layers, kept)
    if waiting is not None:
        return [waiting]
    if reading is None or not dispatch.takes_several(plan, x):
        return compute(x, plan)
    others = []
    for reference in kept.readers or ():
        other = reference()
        if other is not None and (own := _ahead(other, x, plan)) is not None:
            others.append((other, own))
    if not others:
        return compute(x, plan)
    ys = compute(x, plan._replace(layers=(*plan.layers, *(own for _, own in others))))
    for (other, own), y in zip(others, ys[len(layers) :], strict=True):
        W: Tensor = own.weight.W  # type: ignore[attr-defined]
        if y is not None:
            reading.outputs[other] = y, W, W._version
    return ys[: len(layers)]


def _ahead(layer: Any, x: Tensor, plan: Plan) -> Layer | None:
    """Return what is settled for a layer if it may be computed before it is called."""
    if layer.is_coupled() or "forward" in layer.__dict__:
        return None
    if layer._forward_pre_hooks or torch_module._global_forward_pre_hooks:
        return None
    own: Plan | None = None if layer.kept is None else layer.kept.find((layer,), x)
    if own is None or own.drawn is not None or own.state is not plan.state:
        return None
    if own.config is not plan.config and own.config != plan.config:
        return None
    if own.layers[0].settings != plan.layers[0].settings:
        return None
    W: Tensor = own.layers[0].weight.W  # type: ignore[attr-defined]
    return own.layers[0] if W.device == x.device else None


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
        if plan is not None and kept is not None and decided is None:
            return read(x, layers, kept, plan)
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
            if self.kept is not None:
                note(x, layers, self.kept)
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

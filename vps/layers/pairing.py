"""Query and key layers of a model, which its attention block calls one after the other.

Whichever is called first computes both; the other's output waits until the block is done, for the
very same x. Outside its block, and where a tracer runs, each call computes both for itself; a graph
keeps one of equal calls (:mod:`vps.backends.sharing`).
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vps.algorithm import tracing
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import LayerGamma, PolicyState
from vps.config import VPSConfig
from vps.functional import Kept, Projection, compute, keep, sharpen


class Layer(Protocol):
    """What a sharpened layer holds."""

    config: VPSConfig
    state: PolicyState
    gradient: bool
    memory: CurvatureMemory | None
    gamma: LayerGamma | None
    coupling: Coupling | None

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def widths(self) -> tuple[int, int]: ...

    def matrix(self) -> Tensor | None: ...

    def vector(self) -> Tensor | None: ...

    def projection(self, x: Tensor, inside: bool = False) -> Projection: ...


class _Waiting(threading.local):
    """Of the block that runs on this thread: its pair, and the output that waits."""

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

    def __init__(self, query: Layer, key: Layer, heads: int, kv_heads: int) -> None:
        self.query = query
        self.key = key
        self.heads = heads
        self.kv_heads = kv_heads

    def applies(self) -> bool:
        """Whether both layers are set alike, and to be coupled."""
        config, other = self.query.config, self.key.config
        if self.query.state is not self.key.state or config is not other and config != other:
            return False
        return config.couples

    def sharpen(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Output of ``layer``, one of the two, for x ``[..., d_in]``; ``None`` where it is that of
        the base layer."""
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

    def outputs(self, layer: Layer, x: Tensor) -> list[Tensor | None]:
        """Both outputs, the query's first, while the forward of ``layer`` runs; ``None`` where one
        is that of the base layer."""
        layers, kept, compiling = (self.query, self.key), self.kept, torch.compiler.is_compiling()
        plan = None if compiling or kept is None else kept.find(layers, x)
        if plan is not None:
            return compute(x, plan)
        both = (
            self.query.projection(x, inside=layer is self.query),
            self.key.projection(x, inside=layer is self.key),
        )
        heads = self.heads, self.kv_heads
        ys = sharpen(x, both, layer.config, heads=heads, state=layer.state)
        if not compiling:
            self.kept = keep(x, layers, both, heads)
        return ys

    def _may_wait(self, x: Tensor) -> bool:
        """Whether this runs in its block, eagerly, with an x whose changes show."""
        if torch.compiler.is_compiling() or tracing.is_transforming():
            return False
        return _WAITING.pair is self and not x.is_inference()


class _Enter:
    """Forward pre-hook of an attention block: its pair may let outputs wait."""

    def __init__(self, pair: Coupling) -> None:
        self.pair = pair

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            _WAITING.clear()
            _WAITING.pair = self.pair


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: nothing waits any longer."""
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
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Enter):
                del module._forward_pre_hooks[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _leave:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)

"""Define what travels to a backend, and what each backend must answer: the contract of this folder.

A backend is a module with three functions. ``why_missing()`` says why it cannot run on this
machine, ``why_not(kind)`` why it does not take calls of a kind, and ``run(call)`` computes. A
backend names in ``why_not`` what it cannot compute, so the layer falls to torch by declaration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vps.algorithm import gradient
from vps.algorithm.core import Core
from vps.algorithm.fixed import FixedUpdate, fix
from vps.algorithm.flow import Given, Layer
from vps.algorithm.policy import PolicyState
from vps.algorithm.settings import CLIPS, Settings
from vps.algorithm.weight import Matrix
from vps.config import VPSConfig

BUILDERS = ("sk", "sc", "hybrid", "random")  # that compiled backends know
NOT_A_MATRIX = (
    "its weight is no plain matrix in memory, and such layers are computed by 'torch' alone"
)


class Kind(NamedTuple):
    """The facts by which a backend is chosen; they hold as long as a layer and its config stay.

    Attributes:
        device: type of the device of x, as in ``torch.device.type``.
        dtype: dtype of x.
        is_matrix: whether W is a plain matrix in memory.
        has_pairs: whether the layer holds L-BFGS pairs.
        builder: the config's ``builder``.
        clip: the config's ``clip``.
    """

    device: str
    dtype: torch.dtype
    is_matrix: bool = True
    has_pairs: bool = False
    builder: str = "hybrid"
    clip: str = "component"


class Call(NamedTuple):
    """One layer, or a query and a key that select together, with their input.

    Attributes:
        x: ``[G, T, d_in]``, G groups of T tokens that share a selection.
        layers: one layer, or query and key.
        mask: bool ``[G, T]``, True counts in the statistics; ``None`` when all count.
        entropy: ℋ in nats, or −1 where none is set, and the factor of the history, float64
            ``[2]`` (:meth:`PolicyState.signals`); ``None`` for neither.
        heads: query and key-value heads, with two layers.
        given: what is decided elsewhere.
        traced: whether a graph is made, which may be differentiated later.
        config: config of the layers, for the reference.
        state: policy state or ``None``, for the reference.
        held: a list that takes what is decided for each layer, ``None`` for a plain one; or
            ``None`` where nobody holds it.
    """

    x: Tensor
    layers: tuple[Layer, ...]
    mask: Tensor | None = None
    entropy: Tensor | None = None
    heads: tuple[int, int] | None = None
    given: Given = Given()
    traced: bool = False
    config: VPSConfig = VPSConfig()
    state: PolicyState | None = None
    held: list[FixedUpdate | None] | None = None

    def hold(
        self,
        layer: Layer,
        I_in: Tensor,
        I_out: Tensor,
        core: Core | None,
        rows: Tensor | None,
    ) -> None:
        """Append to ``held``, if there is one, what was decided for a layer.

        ``rows`` is ``W[I_out]`` ``[G, r, d_in]`` where it is known, else ``None``.
        """
        if self.held is None:
            return
        if core is None:
            self.held.append(None)
            return
        if layer.settings.clamp is not None:
            rows = None
        core = Core(*(None if one is None else one.detach() for one in core))  # type: ignore[arg-type]
        with torch.no_grad():
            self.held.append(fix(I_in, I_out, core, rows, self.x))

    def inputs(self, at: int = 0) -> Inputs:
        """Return the operator's arguments for the layer of that number."""
        layer, given = self.layers[at], self.given
        assert isinstance(layer.weight, Matrix)
        return Inputs(
            self.x, layer.weight.W, layer.bias, self.mask, given.I_in, given.I_out, layer.numbers,
            self.entropy, None, given.energy,
        )  # fmt: skip

    def needs_gradient(self) -> bool:
        """Return whether a backward pass may follow; all weights must be matrices."""
        return any(needs_gradient(self.inputs(at)) for at in range(len(self.layers)))


Result = tuple[list[Tensor | None], Tensor]  # y [G, T, d_out] of each layer, and I_in [G, r]


class Inputs(NamedTuple):
    """The tensors that the operator takes, in its order.

    Attributes:
        x: ``[G, T, d_in]``.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or ``None``.
        mask: bool ``[G, T]``, True counts in the statistics; ``None`` when all count.
        I_in: selected inputs ``[G, r]`` if they are known, or ``None``.
        I_out: selected outputs ``[G, r]`` if they are known, or ``None``.
        policy: the numbers of :func:`policy.bounds`, float64 ``[9]``, or ``[9 + r]`` with a factor
            for each column (:class:`policy.LayerGamma`).
        entropy: ℋ in nats, or −1 where none is set, and the factor of the history, float64
            ``[2]`` (:meth:`PolicyState.signals`); ``None`` for neither.
        H: base product ``[G, T, d_out]`` if it is known, or ``None``.
        energy: ``[G]`` if it is known, or ``None``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    I_in: Tensor | None
    I_out: Tensor | None
    policy: Tensor
    entropy: Tensor | None
    H: Tensor | None = None
    energy: Tensor | None = None


class Outputs(NamedTuple):
    """The output of one layer and what its backward pass needs.

    Args:
        y: ``[G, T, d_out]``.
        I_in: ``[G, r]``.
        I_out: ``[G, r]``.
        core: ``C`` without γ, a diagonal ``[G, 1, r]`` or ``[G, r, r]``; 0 in columns left out.
        gamma: ``[G]``, 0 for a group without a counted token.
        t: ``H[:, I_out]``, ``[G, T, r]``, 0 in columns left out; only needed with a clamp.
    """

    y: Tensor
    I_in: Tensor
    I_out: Tensor
    core: Tensor
    gamma: Tensor
    t: Tensor | None


def needs_gradient(inputs: Inputs) -> bool:
    """Return whether a backward pass may follow."""
    if not torch.is_grad_enabled():
        return False
    x, weight, bias = inputs[:3]
    return x.requires_grad or weight.requires_grad or bias is not None and bias.requires_grad


def why_not_native(kind: Kind, device: str) -> str | None:
    """Return why a compiled backend of that device does not take calls of a kind, or ``None``."""
    if kind.has_pairs:
        return (
            "it holds L-BFGS pairs, which only 'torch' and 'reference' compute; set lbfgs=False in "
            "the config to go without them"
        )
    if not kind.is_matrix:
        return NOT_A_MATRIX
    if kind.builder not in BUILDERS or kind.clip not in CLIPS:
        return (
            f"it has builder={kind.builder!r} and clip={kind.clip!r}, of which this backend knows "
            f"{', '.join(BUILDERS)} and {', '.join(CLIPS)}"
        )
    if kind.device != device:
        return f"x is on {kind.device!r}, expected {device!r}"
    if kind.dtype == torch.float64:
        return "x is float64, expected float32, bfloat16 or float16"
    return None


def run_native(call: Call, linear: Any, pair: Any, couple: Any) -> Result:
    """Run a call by the three functions of a compiled backend.

    Args:
        call: the call; all its weights are matrices.
        linear: computes a differentiable y, and I_in, from ``(inputs, settings, traced, kept)``,
            and appends its outputs to ``kept`` if that is a list.
        pair: computes both outputs of a query and a key, and I_in, without a gradient.
        couple: decides for a query and a key together, without a gradient.
    """
    layers = call.layers
    kept: list[Outputs] | None = None if call.held is None else []
    if call.heads is None:
        y, I_in = linear(call.inputs(), layers[0].settings, call.traced, kept)
        _hold(call, layers[0], kept)
        return [y], I_in
    query, key = call.inputs(0), call.inputs(1)
    if (
        kept is None
        and not torch.jit.is_tracing()
        and not (needs_gradient(query) or needs_gradient(key))
    ):
        y_q, y_k, I_in = pair(query, key, layers[0].settings, layers[1].settings, *call.heads)
        return [None if layers[0].is_plain else y_q, None if layers[1].is_plain else y_k], I_in
    r = layers[0].settings.r
    joint = couple(query.x, query.weight, key.weight, call.mask, query.I_in, r, *call.heads)
    energy = joint.energy if layers[0].settings.adaptive else None
    I_in, *outputs = joint.features.unbind(1)
    found: list[Tensor | None] = []
    for at, own in enumerate((query, key)):
        if layers[at].is_plain:
            found.append(None)
            call.hold(layers[at], I_in, outputs[at], None, None)
            continue
        own = own._replace(I_in=I_in, I_out=outputs[at], H=joint[at], energy=energy)
        found.append(linear(own, layers[at].settings, call.traced, kept)[0])
        _hold(call, layers[at], kept)
    return found, I_in


def _hold(call: Call, layer: Layer, kept: list[Outputs] | None) -> None:
    """Hold what the last of ``kept`` decided for a layer."""
    if kept:
        out, weight = kept[-1], layer.weight
        assert isinstance(weight, Matrix)
        rows = weight.W.detach()[out.I_out]
        call.hold(layer, out.I_in, out.I_out, Core(out.core, out.gamma, None), rows)


def differentiable(
    inputs: Inputs,
    settings: Settings,
    forward: Callable[[Inputs, Settings], Outputs],
    kept: list[Outputs] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a differentiable y ``[G, T, d_out]``, and ``I_in``, by a backend's ``forward``.

    Its outputs are appended to ``kept`` if that is a list.
    """

    def keeping(inputs: Inputs, settings: Settings) -> Outputs:
        out = forward(inputs, settings)
        if kept is not None:
            kept.append(out)
        return out

    if needs_gradient(inputs):
        y, I_in = _Differentiable.apply(*inputs, settings, keeping)
        return y, I_in
    return keeping(inputs, settings)[:2]


class _Differentiable(torch.autograd.Function):
    """The output of a compiled backend with the gradient of :mod:`vps.algorithm.gradient`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, (settings, forward) = Inputs(*arguments[:-2]), arguments[-2:]
        out = forward(inputs, settings)
        ctx.clamp = settings.clamp
        t = None if settings.clamp is None else out.t
        x = inputs.x if inputs.weight.requires_grad else None
        ctx.save_for_backward(x, inputs.weight, *out[1:5], t)
        ctx.mark_non_differentiable(out.I_in)
        return out.y, out.I_in

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        constants: Any = (*kept, ctx.clamp)
        wanted = ctx.needs_input_grad
        return (
            gradient.of_input(g, *constants) if wanted[0] else None,
            gradient.of_weight(g, x) if wanted[1] else None,
            gradient.of_bias(g) if wanted[2] else None,
            *[None] * (len(wanted) - 3),
        )

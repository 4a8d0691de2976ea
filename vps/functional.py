"""Sharpen a linear layer: ``vps_linear``, ``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)``.

This is the only door to the backends, for one layer or for a query and a key that select together,
whatever their weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vps.algorithm import policy, tracing
from vps.algorithm.fixed import FixedUpdate
from vps.algorithm.flow import NOTHING, Given, Layer
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import own_gamma, plan_for
from vps.algorithm.weight import Matrix, Weight, autocast_dtype, cast, check_input
from vps.backends import dispatch, reference_backend, sharing, torch_backend
from vps.backends.call import Call, Kind
from vps.backends.sharing import Kept
from vps.config import VPSConfig
from vps.masking import STATE, check_mask, group, groups_of, marks_for
from vps.packing import Packing

# Every call needs these, so they are looked up once.
_transform_running = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


class Projection(NamedTuple):
    """A layer to sharpen.

    Attributes:
        weight: ``[d_out, d_in]``, or another kind of :class:`~vps.algorithm.weight.Weight`.
        bias: ``[d_out]`` or ``None``.
        gradient: as for :func:`vps_linear`.
        memory: as for :func:`vps_linear`.
        gamma: γ of this layer in place of the config's.
    """

    weight: Tensor | Weight
    bias: Tensor | None = None
    gradient: bool = False
    memory: CurvatureMemory | None = None
    gamma: policy.LayerGamma | None = None

    def is_plain(self) -> bool:
        """Return whether its own γ is 0; then it takes part in a joint selection but is plain."""
        return self.gamma is not None and self.gamma.is_zero


def vps_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    config: VPSConfig | None = None,
    *,
    mask: Tensor | None = None,
    state: policy.PolicyState | None = None,
    gradient: bool = False,
    memory: CurvatureMemory | None = None,
    gamma: policy.LayerGamma | float | Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Sharpen one linear layer.

    Args:
        x: input ``[..., d_in]`` in float16, bfloat16, float32 or float64.
        weight: frozen weight ``[d_out, d_in]``, of the dtype of x (or any under autocast).
        bias: ``[d_out]`` or ``None``.
        config: the settings; defaults of :class:`VPSConfig` when ``None``.
        mask: bool ``[...]``, x without its last dim, True counts in the statistics; ``None``
            uses what :func:`vps.token_mask` or the patched model says.
        state: entropy and improvement history.
        gradient: whether the layer holds a gradient, which turns ``builder="hybrid"`` into SC.
        memory: L-BFGS pairs of the layer. Without pairs, or with ``lbfgs=False``, it changes
            nothing. Only the torch backend and the reference compute with pairs.
        gamma: γ in place of the config's, of either sign, as for :class:`policy.LayerGamma`. A
            tensor is data, so ``torch.compile`` does not compile anew for its value.

    Returns:
        ``[..., d_out]`` in the dtype of x. It is bit-identical to ``F.linear`` where γ is 0. For a
        group without a counted token it is too, except by ``triton`` and ``cuda``, which add b
        after rounding and have products of their own for a few tokens. It can be differentiated in
        x, weight and bias, twice and under the transforms of ``torch.func`` (SPEC §6); there torch
        computes, whatever the backend.

    Raises:
        TypeError: x or weight is no floating-point tensor, or the mask is not bool.
        ValueError: shapes do not fit; the message names both.
        NotImplementedError: the call is differentiated in forward mode (``torch.func.jvp``).
        RuntimeError: a backend was asked for that cannot run this layer.

    Source: SPEC §2–§6, §8.
    """
    layer = Projection(weight, bias, gradient, memory, own_gamma(gamma))
    config = VPSConfig() if config is None else config
    (y,) = sharpen(x, (layer,), config, mask=mask, state=state)
    return F.linear(x, weight, bias) if y is None else y


def coupled_vps_linear(
    x: Tensor,
    query: Projection,
    key: Projection,
    heads: int,
    kv_heads: int,
    config: VPSConfig | None = None,
    *,
    mask: Tensor | None = None,
    state: policy.PolicyState | None = None,
) -> tuple[Tensor, Tensor]:
    """Sharpen the query and the key projection of one attention block together.

    They share one policy decision, and both select channels by what these add to the attention
    logits. With ``qk_coupling=False`` or ``builder="random"`` each is sharpened alone.

    Args:
        x: input of both, ``[..., d_in]``.
        query: the projection to ``[..., heads * d]``, with its weight as a matrix.
        key: the projection to ``[..., kv_heads * d]``.
        heads: query heads.
        kv_heads: key-value heads; ``heads`` is a multiple.
        config: the settings; defaults of :class:`VPSConfig` when ``None``.
        mask: as for :func:`vps.vps_linear`.
        state: entropy and improvement history.

    Returns:
        Both outputs, each as :func:`vps.vps_linear` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`vps.vps_linear`.
        ValueError: the numbers of heads do not fit the weights.

    Source: SPEC §7.
    """
    config = VPSConfig() if config is None else config
    both: Any = (query, key)
    reason = why_not_heads(query.weight.shape[0], key.weight.shape[0], heads, kv_heads)  # type: ignore[union-attr]
    if reason is not None:
        raise ValueError(f"coupled_vps_linear: {reason}")
    if config.couples:
        ys = sharpen(x, both, config, heads=(heads, kv_heads), mask=mask, state=state)
    else:
        ys = [sharpen(x, (each,), config, mask=mask, state=state)[0] for each in both]
    y_q, y_k = (
        F.linear(x, *layer[:2]) if y is None else y for y, layer in zip(ys, both, strict=True)
    )
    return y_q, y_k


def why_not_heads(d_q: int, d_k: int, heads: int, kv_heads: int) -> str | None:
    """Return why projections of these widths cannot have so many heads, or ``None``."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        return f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}"
    if d_q % heads or d_k % kv_heads or d_q // heads != d_k // kv_heads:
        return (
            f"query and key features must be heads and kv_heads of one size, got {d_q} in {heads} "
            f"and {d_k} in {kv_heads}"
        )
    return None


def sharpen(
    x: Tensor,
    layers: tuple[Projection, ...],
    config: VPSConfig,
    *,
    heads: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    state: policy.PolicyState | None = None,
    given: Given = NOTHING,
    held: list[FixedUpdate | None] | None = None,
) -> list[Tensor | None]:
    """Sharpen one layer, or a query and a key layer together.

    Args:
        x: input ``[..., d_in]``.
        layers: one layer, or query and key.
        config: the settings.
        heads: query and key-value heads, with two layers.
        mask, state: as for :func:`vps_linear`.
        given: features and energy of one layer that are decided already, for x ``[G, T, d_in]``.
        held: as for :func:`compute`.

    Returns:
        For each layer its output ``[..., d_out]``, differentiable in x and in the layer's
        parameters; or ``None`` where γ is 0 whatever the input, so that the caller uses the layer
        as it is.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as for :func:`vps_linear`.
    """
    if all(config.is_off if one.gamma is None else one.gamma.is_zero for one in layers):
        return [None] * len(layers)
    check_input(x)
    weights = [Matrix(W) if isinstance(W, Tensor) else W for W in (one.weight for one in layers)]
    for weight in weights:
        weight.check(x)
    if mask is not None:
        check_mask(x, mask)
        if config.scope == "prompt" and (marks := marks_for(x, tuple(mask.shape))) is not None:
            mask = marks.among(mask, tuple(mask.shape))
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, found = cast(x, dtype), []
        for one, weight in zip(layers, weights, strict=True):
            bias = None if one.bias is None else cast(one.bias, dtype)
            found.append(one._replace(weight=weight.cast(dtype), bias=bias))
        with torch.autocast(x.device.type, enabled=False):
            return sharpen(
                x, tuple(found), config, heads=heads, mask=mask, state=state, given=given, held=held
            )
    plan = prepare(layers, weights, config, state, x, heads)
    if plan is None or weights[0].is_empty(x) or x.is_meta and not plan.kind.is_matrix:
        return [None] * len(layers)
    return compute(x, plan, mask, given, held)


class Plan(NamedTuple):
    """What is settled before the input comes.

    Args:
        layers: the layers as the flow takes them.
        config: the settings.
        state: the policy state, or ``None``.
        heads: query and key-value heads, with two layers.
        drawn: I_in and I_out ``[r]`` of the random builder, or ``None``.
        kind: the facts by which a backend is chosen.
        backend: the backend that computes unless another is asked for.
    """

    layers: tuple[Layer, ...]  # these three first, for sharing.Kept
    config: VPSConfig
    state: policy.PolicyState | None
    heads: tuple[int, int] | None
    drawn: tuple[Tensor, Tensor] | None
    kind: Kind
    backend: ModuleType


def prepare(
    layers: Sequence[Projection],
    weights: Sequence[Weight],
    config: VPSConfig,
    state: policy.PolicyState | None,
    x: Tensor,
    heads: tuple[int, int] | None = None,
) -> Plan | None:
    """Return the plan for inputs of the dtype and on the device of x.

    ``None`` where γ is 0 whatever the input.
    """
    (_, d_in), d_out = weights[0].widths, min(weight.widths[0] for weight in weights)
    calibrated = any(one.gamma is not None for one in layers)
    found, drawn, has_pairs = [], None, False
    for one, weight in zip(layers, weights, strict=True):
        own = plan_for(config, one.gradient, d_out, d_in, x.device, calibrated)
        if own is None or own.settings.r == 0:
            return None
        drawn = own.drawn
        pairs = one.memory.pairs if one.memory is not None and config.lbfgs else ()
        has_pairs = has_pairs or bool(pairs)
        of_layer = own.settings, own.numbers(one.gamma), pairs, one.is_plain(), one.gamma
        found.append(Layer(weight, one.bias, *of_layer))
    is_matrix = all(isinstance(weight, Matrix) for weight in weights)
    rules = config.builder, config.clip
    kind = Kind(x.device.type, x.dtype, is_matrix, has_pairs, *rules)
    return Plan(tuple(found), config, state, heads, drawn, kind, dispatch.fastest(kind))


def keep(
    x: Tensor, layers: tuple[Any, ...], projections: tuple[Projection, ...], heads: Any = None
) -> Kept | None:
    """Return the plan of layers for inputs like x, or ``None`` where it may not be kept.

    It may not if a weight is made anew at each call, such as a transposed weight; nor while a
    tracer, a mode or a transform looks on, or autocast casts.
    """
    first = layers[0]
    for layer, one in zip(layers, projections, strict=True):
        own = layer.__dict__.get("_parameters", {})
        if not isinstance(one.weight, Tensor) or own.get("weight") is not one.weight:
            return None
        if "bias" not in own:
            return None
    if type(x) is not Tensor or not tracing.is_alone() or _is_any_autocast_enabled():
        return None
    weights = [Matrix(one.weight) for one in projections]  # type: ignore[arg-type]
    plan = prepare(projections, weights, first.config, first.state, x, heads)
    return None if plan is None or plan.kind.has_pairs else Kept(layers, plan, x)


def compute(
    x: Tensor,
    plan: Plan,
    mask: Tensor | None = None,
    given: Given = NOTHING,
    held: list[FixedUpdate | None] | None = None,
) -> list[Tensor | None]:
    """Return the output ``[..., d_out]`` of each layer of a plan, or ``None`` for a plain layer.

    What is decided is appended to ``held`` if that is a list. Packed rows add nothing.
    """
    if forward_ad._current_level >= 0:
        weights = [W for layer in plan.layers for W in layer.weight.parameters()]
        biases = [layer.bias for layer in plan.layers if layer.bias is not None]
        tracing.refuse_tangents(x, *weights, *biases)
    if given.core is not None:
        return [dispatch.run_fixed(x, plan, given)]
    grouped, mask, counted, packing = arrange(x, mask, plan.config.scope)
    if packing is not None:
        return packing.apply_all(x, partial(compute, plan=plan))
    backend = plan.backend
    if STATE.backends or dispatch.FROM_ENVIRONMENT is not None:
        backend = dispatch.asked(plan.kind) or backend
    shared, r = False, plan.layers[0].settings.r
    if given is NOTHING:
        if plan.drawn is not None:
            I_in, I_out = (index.expand(grouped.shape[0], -1) for index in plan.drawn)
            given = Given(I_in, I_out)
        elif plan.layers[0].weight.reads_whole_input:
            shared = True
            known = sharing.find(x, mask, grouped.shape, r)
            if known is not None:
                given, shared = Given(known), False
    state = plan.state
    entropy = None  # a CPU replays no captured graph, which must find what is set later
    if state is not None and not (state.is_idle and x.is_cpu):
        entropy = state.signals(x.device)
    traced = torch.compiler.is_compiling()
    if tracing.is_compiled_transform(traced) if traced else _transform_running() is not None:
        if backend is not reference_backend:
            backend = torch_backend
            if not tracing.is_compiled_transform(traced):
                plan, grouped = _reverse_only(plan, grouped)
    call = Call(
        grouped, plan.layers, counted, entropy, plan.heads, given, traced or _is_tracing(),
        plan.config, state, held,
    )  # fmt: skip
    ys, I_in = backend.run(call)
    if shared and backend is not reference_backend:
        sharing.remember(x, mask, grouped.shape, I_in)
    if grouped is x:
        return ys
    return [None if y is None else y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _reverse_only(plan: Plan, x: Tensor) -> tuple[Plan, Tensor]:
    """Return a plan and its input, inside a transform, through which forward mode is refused."""
    layers = []
    for layer in plan.layers:
        weight, bias = layer.weight, layer.bias
        if isinstance(weight, Matrix):
            weight = Matrix(tracing.reverse_only(weight.W))
        bias = None if bias is None else tracing.reverse_only(bias)
        layers.append(layer._replace(weight=weight, bias=bias))
    return plan._replace(layers=tuple(layers)), tracing.reverse_only(x)


def arrange(
    x: Tensor, mask: Tensor | None, scope: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Packing | None]:
    """Return x as ``[G, T, d_in]``, its mask, and the mask as ``[G, T]`` on x's device.

    If rows hold several sequences, x is returned as it is, with the packing. The caller then
    arranges each part by itself, with its mask.
    """
    if mask is None:
        if (scope == "sequence" or scope == "prompt" and not STATE.prompts) and x.dim() == 3:
            layouts = STATE.layouts
            if not layouts:
                return x, None, None, None
            last = layouts[-1]  # nearly always it has just these tokens
            plain = last.packed is None and last.encoded is None and last.marks is None
            if plain and last.shape == x.shape[:-1]:
                mask = last.mask
                return x, mask, None if mask is None else mask.to(x.device), None
        dims, mask, packing = groups_of(x, scope)
        if packing is not None:
            return x, None, None, packing
    else:
        dims = tuple(mask.shape)
    grouped = group(x, dims, scope)
    if mask is None:
        return grouped, None, None, None
    counted = mask.to(x.device)
    if counted.shape != grouped.shape[:-1]:
        counted = counted.reshape(grouped.shape[:-1])
    return grouped, mask, counted, None

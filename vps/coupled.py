"""``coupled_vps_linear``: query and key projection of one attention block, sharpened together.

As :func:`vps.vps_linear` for each, with one policy decision and selections that rank channels by
what they add to the attention logits (SPEC §7).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import reference
from vps.algorithm import coupling, policy, tracing
from vps.algorithm.lbfgs import CurvatureMemory, Pair
from vps.algorithm.policy import Settings
from vps.algorithm.torch_backend import Inputs
from vps.backends import dispatch, one_group, operator, sharing, transforms
from vps.config import VPSConfig
from vps.functional import (
    arrange,
    autocast_dtype,
    cast,
    check,
    plain_gamma,
    plan_for,
    run,
    vps_linear,
)


class Projection(NamedTuple):
    """One of the two layers.

    Args:
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or ``None``.
        gradient: as for :func:`vps.vps_linear`.
        memory: as for :func:`vps.vps_linear`.
        gamma: γ of this projection in place of the config's.
    """

    weight: Tensor
    bias: Tensor | None = None
    gradient: bool = False
    memory: CurvatureMemory | None = None
    gamma: policy.LayerGamma | None = None


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

    With ``qk_coupling=False`` or ``builder="random"`` each is sharpened by itself.

    Args:
        x: input of both, ``[..., d_in]``.
        query: the projection to ``[..., heads * d]``.
        key: the projection to ``[..., kv_heads * d]``.
        heads: query heads.
        kv_heads: key-value heads; ``heads`` is a multiple.
        config: the settings; defaults of :class:`VPSConfig` when ``None``.
        mask: as for :func:`vps.vps_linear`.
        state: entropy and improvement history.

    Returns:
        Both outputs, each as of :func:`vps.vps_linear`.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`vps.vps_linear`.
        ValueError: head counts that do not fit the weights.

    Source: SPEC §7.
    """
    config = VPSConfig() if config is None else config
    both = (query, key)
    reason = why_not(query.weight.shape[0], key.weight.shape[0], heads, kv_heads)
    if reason is not None:
        raise ValueError(f"coupled_vps_linear: {reason}")
    if all(config.is_off if p.gamma is None else p.gamma.is_zero for p in both):
        return F.linear(x, *query[:2]), F.linear(x, *key[:2])
    for projection in both:
        check(x, projection.weight, mask)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, both = cast(x, dtype), (_cast(query, dtype), _cast(key, dtype))
        with torch.autocast(x.device.type, enabled=False):
            return coupled_vps_linear(x, *both, heads, kv_heads, config, mask=mask, state=state)
    if not config.qk_coupling or config.builder == "random":
        query_y, key_y = (
            vps_linear(
                x, p.weight, p.bias, config,
                mask=mask, state=state, gradient=p.gradient, memory=p.memory, gamma=p.gamma,
            )
            for p in both
        )  # fmt: skip
        return query_y, key_y
    factor = 1.0 if state is None else state.factor()
    d_k, d_in = key.weight.shape
    calibrated = any(p.gamma is not None for p in both)
    plans = [
        plan_for(config, p.gradient, factor, d_k, d_in, x.device, x.dtype, calibrated) for p in both
    ]
    plain = [p.gamma is not None and p.gamma.is_zero for p in both]
    if plans[0] is None or plans[1] is None or x.numel() == 0 or plans[0].settings.r == 0:
        return F.linear(x, *query[:2]), F.linear(x, *key[:2])
    grouped, mask, counted, packing = arrange(x, mask, config.scope)
    if packing is not None:
        part = partial(
            coupled_vps_linear, query=both[0], key=both[1], heads=heads, kv_heads=kv_heads,
            config=config, state=state,
        )  # fmt: skip
        y_q, y_k = packing.apply_all(x, part)
        assert y_q is not None and y_k is not None
        return y_q, y_k
    pairs = [p.memory.pairs if p.memory is not None and config.lbfgs else () for p in both]
    name = dispatch.choose_with_memory() if any(pairs) else dispatch.asked(x) or plans[0].fastest
    if name == "reference":
        ys = _reference(grouped, both, heads, kv_heads, config, counted, state, pairs)
        query_y, key_y = (
            F.linear(x, *p[:2]) if off else y.view(*x.shape[:-1], -1)
            for p, y, off in zip(both, ys, plain, strict=True)
        )
        return query_y, key_y

    r = plans[0].settings.r
    I_in = sharing.find(x, mask, grouped.shape, r)
    entropy = None if state is None else state.entropy_on(x.device)
    inputs = [
        Inputs(grouped, *p[:2], counted, I_in, None, plan.numbers(p.gamma), entropy)
        for p, plan in zip(both, (plans[0], plans[1]), strict=True)
    ]
    found = None
    if name in ("cpp", "triton", "cuda") and _is_plain_call(x, query, key):
        found = _in_one_call(name, inputs, plans[0].settings, plans[1].settings, heads, kv_heads)
    elif name == "torch" and not any(pairs) and plans[0].settings == plans[1].settings:
        found = one_group.sharpen_pair(inputs[0], inputs[1], plans[0].settings, heads, kv_heads)
    if found is not None:
        y_q, y_k, selected = found
    else:
        joint = couple_by(
            name, grouped, query.weight, key.weight, counted, I_in, r, heads, kv_heads
        )
        energy = joint.energy if plans[0].settings.adaptive else None
        selected = joint.features[:, 0]
        y_q, y_k = (
            run(
                name,
                own._replace(
                    I_in=selected, I_out=joint.features[:, i + 1], H=joint[i], energy=energy
                ),
                plan.settings,
                pairs[i],
            )[0]
            for i, (own, plan) in enumerate(zip(inputs, (plans[0], plans[1]), strict=True))
        )
    if I_in is None:
        sharing.remember(x, mask, grouped.shape, selected)
    if grouped is not x:
        y_q, y_k = y_q.view(*x.shape[:-1], -1), y_k.view(*x.shape[:-1], -1)
    if plain[0]:  # it takes part in the selection alone, and keeps the bits of its base
        y_q = F.linear(x, *query[:2])
    if plain[1]:
        y_k = F.linear(x, *key[:2])
    return y_q, y_k


def _in_one_call(
    name: str, inputs: list[Inputs], of_query: Settings, of_key: Settings, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Both outputs and ``I_in`` ``[G, r]`` by one call of the operator."""
    if name == "triton" and not inputs[0].x.is_cuda:  # interpreted
        from vps.backends.triton_backend import pair

        with torch._C._AutoDispatchBelowAutograd():
            return pair(inputs[0], inputs[1], of_query, of_key, heads, kv_heads)
    return operator.sharpen_pair(inputs[0], inputs[1], of_query, of_key, heads, kv_heads)


def _is_plain_call(x: Tensor, query: Projection, key: Projection) -> bool:
    """Whether no gradient or transform asks for the operator of each layer by itself."""
    if tracing.is_transforming() or torch.jit.is_tracing():
        return False
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in (x, *query[:2], *key[:2])
    )


def why_not(d_q: int, d_k: int, heads: int, kv_heads: int) -> str | None:
    """Why projections of these widths are none of so many heads, or ``None``."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        return f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}"
    if d_q % heads or d_k % kv_heads or d_q // heads != d_k // kv_heads:
        return (
            f"query and key features must be heads and kv_heads of one size, got {d_q} in {heads} "
            f"and {d_k} in {kv_heads}"
        )
    return None


def couple_by(
    name: str, x: Tensor, W_q: Tensor, W_k: Tensor, mask: Tensor | None, *rest: Any
) -> coupling.Joint:
    """The joint decision by the backend of that name."""
    if tracing.is_transforming():
        I_in, *sizes = rest

        def decide(*tensors: Any) -> coupling.Joint:
            return couple_by(name, *tensors, *sizes)

        return transforms.couple(decide, x, W_q, W_k, mask, I_in)
    if name == "torch":
        with torch.no_grad():
            return coupling.couple(x, W_q, W_k, mask, *rest)
    if name == "triton" and not x.is_cuda:
        from vps.backends import triton_backend

        with torch.no_grad():
            return triton_backend.couple(x, W_q, W_k, mask, *rest)
    return operator.couple(x, W_q, W_k, mask, *rest)


def _reference(
    x: Tensor,
    both: tuple[Projection, Projection],
    heads: int,
    kv_heads: int,
    config: VPSConfig,
    mask: Tensor | None,
    state: policy.PolicyState | None,
    pairs: list[tuple[Pair, ...]],
) -> tuple[Tensor, Tensor]:
    """The literal algorithm for x ``[G, T, d_in]``, without a gradient."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(p.weight for p in both))):
        raise RuntimeError(
            "vps backend 'reference' has no gradient: expected torch.no_grad() around the layers"
        )
    entropy = None if state is None else state.entropy
    query, key = (
        reference.Projection(
            p.weight,
            p.bias,
            p.gradient,
            [(pair.s, pair.y) for pair in own],
            plain_gamma(p.gamma),
        )
        for p, own in zip(both, pairs, strict=True)
    )
    results = reference.coupled_vps_linear(
        x,
        query,
        key,
        heads=heads,
        kv_heads=kv_heads,
        config=config.replace(scope="sequence"),
        mask=mask,
        entropy=None if entropy is None else float(entropy),
        outcomes=() if state is None else state.outcomes,
    )
    return results[0].y, results[1].y


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    bias = projection.bias
    return projection._replace(
        weight=cast(projection.weight, dtype), bias=None if bias is None else cast(bias, dtype)
    )

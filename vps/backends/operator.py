"""Declare ``torch.ops.vps.linear``, one sharpened linear layer as one operator (SPEC §1–§6).

The schemas, the fakes for tracers and the gradient stand here; the implementations stand in csrc
for CPU and in kernels for CUDA and ROCm. ``rules`` and ``numbers`` are ``Settings.packed()``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import coupling, fixed, gradient, tracing
from vps.algorithm.core import square
from vps.algorithm.flow import Given
from vps.algorithm.policy import Settings
from vps.algorithm.selection import accumulation_dtype
from vps.backends import sharing, torch_backend
from vps.backends.call import Call, Inputs, Outputs, Result, needs_gradient, run_native

LIBRARY = torch.library.Library("vps", "DEF")
ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? I_in, Tensor? I_out, "
    "Tensor policy, Tensor? entropy, Tensor? H, Tensor? energy, int[] rules, float[] numbers)"
)
PAIR = (
    "(Tensor x, Tensor W_q, Tensor? b_q, Tensor W_k, Tensor? b_k, Tensor? mask, Tensor? I_in, "
    "Tensor policy, Tensor? entropy, int heads, int kv_heads, int[] rules, float[] numbers, "
    "int[]? rules_k=None, Tensor? policy_k=None)"
)
LIBRARY.define(
    f"linear{ARGUMENTS} -> (Tensor y, Tensor features, Tensor core, Tensor gamma, Tensor t)",
    tags=[torch.Tag.pt2_compliant_tag],
)
LIBRARY.define(
    f"linear_only{ARGUMENTS} -> (Tensor y, Tensor I_in)", tags=[torch.Tag.pt2_compliant_tag]
)
LIBRARY.define(
    "couple(Tensor x, Tensor W_q, Tensor W_k, Tensor? mask, Tensor? I_in, int r, int heads, "
    "int kv_heads) -> (Tensor H_q, Tensor H_k, Tensor energy, Tensor features)",
    tags=[torch.Tag.pt2_compliant_tag],
)
LIBRARY.define(
    f"linear_pair{PAIR} -> (Tensor y_q, Tensor y_k, Tensor I_in)",
    tags=[torch.Tag.pt2_compliant_tag],
)
LIBRARY.define(
    "linear_backward(Tensor g, Tensor weight, Tensor features, Tensor core, Tensor gamma) "
    "-> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
LIBRARY.define(
    "edited(Tensor x, Tensor weight, Tensor? bias, Tensor I_in, Tensor through) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
sharing.register(LIBRARY)
packed_settings = lru_cache(Settings.packed)
LINEAR = torch.ops.vps.linear.default
LINEAR_ONLY = torch.ops.vps.linear_only.default
EDITED = torch.ops.vps.edited.default
LINEAR_PAIR = torch.ops.vps.linear_pair.default
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sharpen(
    inputs: Inputs, settings: Settings, traced: bool = False, kept: list[Outputs] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the differentiable output ``[G, T, d_out]`` and ``I_in`` ``[G, r]``.

    ``traced`` says that a graph is made, which may be differentiated later. All outputs are
    appended to ``kept`` if that is a list.
    """
    rules, numbers = settings.packed() if traced else packed_settings(settings)
    if kept is not None or traced or needs_gradient(inputs):
        y, features, *rest = LINEAR(*inputs, rules, numbers)
        if kept is not None:
            kept.append(Outputs(y, features[:, 0], features[:, 1], *rest))
        return y, features[:, 0]
    with torch._C._AutoDispatchBelowAutograd():  # past the gradient, which is written in Python
        if inputs.x.is_cpu:  # constants of a backward pass are not even allocated
            y, I_in = LINEAR_ONLY(*inputs, rules, numbers)
            return y, I_in
        y, features, *_ = LINEAR(*inputs, rules, numbers)
    return y, features[:, 0]


def run(call: Call, hold: Callable[[Call], Result | None] | None = None) -> Result:
    """Run a call through the operators; ``hold`` may compute one whose decisions are held."""
    if call.given.core is not None:
        return run_fixed(call, EDITED)
    if hold is not None and call.held is not None and (found := hold(call)) is not None:
        return found
    if call.heads is None and call.held is None:  # as run_native does, in one call less for a token
        y, I_in = sharpen(call.inputs(), call.layers[0].settings, call.traced)
        return [y], I_in
    return run_native(call, sharpen, sharpen_pair, couple)


def later(given: Given, x: Tensor) -> tuple[Any, tuple[Tensor, ...]] | None:
    """Return the function of x, W, b and these arguments that computes a later token."""
    if given.I_in is None or given.through is None:
        return None
    return EDITED._op, (given.I_in, given.through)


def run_fixed(call: Call, edited: Callable[..., Tensor]) -> Result:
    """Run a call whose update a prompt has fixed; torch computes what needs δ or a gradient."""
    (layer,), given = call.layers, call.given
    I_in: Any = given.I_in
    through: Any = given.through
    if (
        not torch_backend.edits(call, rounds=False)
        or torch.is_grad_enabled()
        and needs_gradient(call.inputs())
    ):
        return torch_backend.run(call)
    x, W, bias = call.x, layer.weight.W, layer.bias  # type: ignore[attr-defined]
    if call.traced:
        return [edited(x, W, bias, I_in, through)], I_in
    with torch._C._AutoDispatchBelowAutograd():
        if given.readers is not None and (x.is_cuda or edited is triton_edited):
            from vps.kernels.decode import edited as kernels

            state = sharing.state_of(x, None)
            if state is not None and not kernels.is_one_launch(x, through):
                readers, at = given.readers
                return [F.linear(readers.changed(x, at, kernels.edit, state), W, bias)], I_in
        return [edited(x, W, bias, I_in, through)], I_in


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Return the output, without a gradient, and the constants of its backward pass."""
    with torch._C._AutoDispatchBelowAutograd():
        y, features, *rest = LINEAR(*inputs, *settings.packed())
    return Outputs(y, features[:, 0], features[:, 1], *rest)


def couple(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
) -> coupling.Joint:
    """Decide as :func:`vps.algorithm.coupling.couple` does, without a gradient."""
    with torch.no_grad():
        return coupling.Joint(
            *torch.ops.vps.couple.default(x, W_q, W_k, mask, I_in, r, heads, kv_heads)
        )


def sharpen_pair(
    query: Inputs, key: Inputs, of_query: Settings, of_key: Settings, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both outputs, without a gradient, and ``I_in`` ``[G, r]`` by one call.

    x, mask, I_in and entropy come from ``query``; the settings may differ only in ``coupled``.
    """
    arguments = of_pair(query, key, of_query, of_key, heads, kv_heads)
    if torch.compiler.is_compiling():
        return LINEAR_PAIR(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return LINEAR_PAIR(*arguments)


def of_pair(
    query: Inputs, key: Inputs, of_query: Settings, of_key: Settings, heads: int, kv_heads: int
) -> tuple[Any, ...]:
    """Return the arguments of the operator of a query and a key."""
    packed = Settings.packed if torch.compiler.is_compiling() else packed_settings
    rules, numbers = packed(of_query)
    return (
        *query[:3], *key[1:3], *query[3:5], query.policy, query.entropy, heads, kv_heads,
        rules, numbers,
        None if of_key == of_query else packed(of_key)[0],
        None if key.policy is query.policy else key.policy,
    )  # fmt: skip


@torch.library.register_fake("vps::linear_pair")
def _fake_pair(
    x: Tensor,
    W_q: Tensor,
    b_q: Tensor | None,
    W_k: Tensor,
    b_k: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    heads: int,
    kv_heads: int,
    rules: list[int],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, length = x.shape[:2]
    outputs = (x.new_empty(groups, length, W.shape[0]) for W in (W_q, W_k))
    return *outputs, x.new_empty(groups, rules[0], dtype=torch.int64)  # type: ignore[return-value]


@torch.library.register_fake("vps::couple")
def _fake_joint(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, ...]:
    groups, length = x.shape[:2]
    return (
        x.new_empty(groups, length, W_q.shape[0]),
        x.new_empty(groups, length, W_k.shape[0]),
        x.new_empty(groups, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(groups, 3, r, dtype=torch.int64),
    )


@torch.library.register_fake("vps::linear")
def fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor | None,
    I_out: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    H: Tensor | None,
    energy: Tensor | None,
    rules: list[int],
    numbers: list[float],
) -> Results:
    """Return results of the shapes and dtypes of ``vps::linear``."""
    settings = Settings.unpacked(rules, numbers)
    r, (groups, length), dtype = settings.r, x.shape[:2], accumulation_dtype(x.dtype)
    return (
        x.new_empty(groups, length, weight.shape[0]),
        x.new_empty(groups, 2, r, dtype=torch.int64),
        x.new_empty(groups, r, r, dtype=dtype),
        x.new_empty(groups, dtype=dtype),
        x.new_empty(0) if settings.clamp is None else x.new_empty(groups, length, r),
    )


@torch.library.register_fake("vps::linear_backward")
def _fake_backward(g: Tensor, weight: Tensor, *selected: Tensor) -> Tensor:
    return g.new_empty(*g.shape[:2], weight.shape[1])


@torch.library.register_fake("vps::edited")
def _fake_edited(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.register_fake("vps::linear_only")
def _fake_only(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, features, *_ = fake_linear(*arguments)
    return y, y.new_empty(len(y), features.shape[-1], dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    x, weight = inputs[:2]
    ctx.clamp = Settings.unpacked(*inputs[-2:]).clamp
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if weight.requires_grad else None, weight, *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    if g is None:
        return (None,) * len(wanted)
    x, weight, features, core, gamma, t = ctx.saved_tensors
    return (
        _of_input(g, weight, features, core, gamma, t, ctx.clamp) if wanted[0] else None,
        gradient.of_weight(g, x) if wanted[1] else None,
        gradient.of_bias(g) if wanted[2] else None,
        *[None] * (len(wanted) - 3),
    )


def _of_input(
    g: Tensor,
    weight: Tensor,
    features: Tensor,
    core: Tensor,
    gamma: Tensor,
    t: Tensor,
    clamp: float | None,
) -> Tensor:
    """Return ``∂L/∂x``, by the operator if there is no clamp and no second derivative."""
    if clamp is None and not tracing.is_differentiated():
        return torch.ops.vps.linear_backward.default(g, weight, features, core, gamma)
    selected = features[:, 0], features[:, 1], core, gamma, t
    return gradient.of_input(g, weight, *selected, clamp)


torch.library.register_autograd("vps::linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def _torch_backward(
    g: Tensor, weight: Tensor, features: Tensor, core: Tensor, gamma: Tensor
) -> Tensor:
    """Compute the backward pass in torch, for a device without its own implementation."""
    selected = features[:, 0], features[:, 1], core, gamma
    return gradient.of_input(g, weight, *selected, None, None)


def _torch(*arguments: Any) -> Results:
    """Compute the operator in torch, for a device without its own implementation."""
    inputs, settings = _unpacked(arguments)
    out = torch_backend.forward(inputs, settings)
    core, gamma = square(out.core), out.gamma.clone()
    return _packed(out._replace(core=core, gamma=gamma), settings)


def _triton(*arguments: Any) -> Results:
    """Compute the operator by the Triton kernels, imported at the first call."""
    from vps.backends.triton_backend import linear

    return linear(*_unpacked(arguments))


def _unpacked(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings]:
    *inputs, rules, numbers = arguments
    return Inputs(*inputs), Settings.unpacked(rules, numbers)


def _packed(out: Outputs, settings: Settings) -> Results:
    features = torch.stack([out.I_in, out.I_out], 1)
    if settings.clamp is None:
        return out.y, features, out.core, out.gamma, out.y.new_empty(0)
    assert out.t is not None
    return out.y, features, out.core, out.gamma, out.t


def _triton_joint(*arguments: Any) -> coupling.Joint:
    from vps.backends.triton_backend import couple

    return couple(*arguments)


def _triton_pair(
    x: Tensor,
    W_q: Tensor,
    b_q: Tensor | None,
    W_k: Tensor,
    b_k: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    heads: int,
    kv_heads: int,
    rules: list[int],
    numbers: list[float],
    rules_k: list[int] | None = None,
    policy_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from vps.backends.triton_backend import pair

    of_query, of_key = (Settings.unpacked(own, numbers) for own in (rules, rules_k or rules))
    query = Inputs(x, W_q, b_q, mask, I_in, None, policy, entropy)
    key = query._replace(weight=W_k, bias=b_k, policy=policy if policy_k is None else policy_k)
    return pair(query, key, of_query, of_key, heads, kv_heads)


def _torch_edited(x: Tensor, W: Tensor, b: Tensor | None, I_in: Tensor, E: Tensor) -> Tensor:
    return F.linear(fixed.edited(x, I_in.unsqueeze(1), E.mT), W, b)


def triton_edited(x: Tensor, *arguments: Any) -> Tensor:
    """Compute ``vps::edited`` by the Triton kernels, imported at the first call."""
    from vps.kernels.decode import edited

    return edited.launch(x, *arguments)


LIBRARY.impl("edited", triton_edited, "CUDA")
LIBRARY.impl("linear", _triton, "CUDA")
LIBRARY.impl("linear_pair", _triton_pair, "CUDA")
LIBRARY.impl("couple", _triton_joint, "CUDA")
LIBRARY.impl("linear_backward", _torch_backward, "CUDA")


def implement_in_torch() -> None:
    """Implement the operators in torch on a CPU that has no other implementation."""
    LIBRARY.impl("linear", _torch, "CPU")
    LIBRARY.impl("edited", _torch_edited, "CPU")
    LIBRARY.impl("couple", coupling.couple, "CPU")
    LIBRARY.impl("linear_backward", _torch_backward, "CPU")

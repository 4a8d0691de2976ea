"""``vps_linear``: one sharpened linear layer, ``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)``.

The only door to the backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vps import masking, reference
from vps.algorithm import constants, policy, selection, torch_backend, tracing
from vps.algorithm.lbfgs import CurvatureMemory, Pair
from vps.algorithm.torch_backend import Inputs, Outputs
from vps.backends import cuda, dispatch, one_group, operator, sharing, transforms
from vps.config import VPSConfig
from vps.packing import Packing

# Of every call, so found once.
_transform_running = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        gradient: the layer holds a gradient, which turns ``builder="hybrid"`` into SC.
        memory: L-BFGS pairs of the layer; without one, or with ``lbfgs=False``, no change. Only
            the torch backend and the reference compute with pairs.
        gamma: γ in place of the config's, of either sign, as for
            :class:`policy.LayerGamma`; a tensor is data, so that no value compiles anew.

    Returns:
        ``[..., d_out]`` in the dtype of x, bit-identical to ``F.linear`` where γ is 0 and, by any
        backend but ``triton`` and ``cuda``, which add b after rounding and have products of their
        own for a few tokens, for a group without a counted token. Differentiable in x, weight and
        bias, twice and under the transforms of ``torch.func``, too (SPEC §6).

    Raises:
        TypeError: x or weight no floating-point tensor, or a mask that is not bool.
        ValueError: shapes that do not fit, naming both.
        NotImplementedError: differentiated in forward mode (``torch.func.jvp``).
        RuntimeError: another backend was asked for than can run this layer.

    Source: SPEC §2–§6, §8.
    """
    config = VPSConfig() if config is None else config
    gamma = own_gamma(gamma)
    if config.is_off if gamma is None else gamma.is_zero:
        return F.linear(x, weight, bias)
    check(x, weight, mask)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return vps_linear(
                x, weight, bias, config,
                mask=mask, state=state, gradient=gradient, memory=memory, gamma=gamma,
            )  # fmt: skip
    factor = 1.0 if state is None else state.factor()
    d_out, d_in = weight.shape
    plan = plan_for(config, gradient, factor, d_out, d_in, x.device, x.dtype, gamma is not None)
    if plan is None or x.numel() == 0 or plan.settings.r == 0:
        return F.linear(x, weight, bias)
    grouped, mask, counted, packing = arrange(x, mask, config.scope)
    if packing is not None:
        part = partial(
            vps_linear, weight=weight, bias=bias, config=config,
            state=state, gradient=gradient, memory=memory, gamma=gamma,
        )  # fmt: skip
        return packing.apply(x, part)
    pairs = memory.pairs if memory is not None and config.lbfgs else ()
    name = dispatch.choose_with_memory() if pairs else dispatch.asked(x) or plan.fastest
    if name == "reference":
        y = _reference(grouped, weight, bias, config, counted, state, gradient, pairs, gamma)
        return y.view(*x.shape[:-1], weight.shape[0])

    I_in = I_out = None
    if plan.drawn is None:
        I_in = sharing.find(x, mask, grouped.shape, plan.settings.r)
    else:
        I_in, I_out = (index.expand(grouped.shape[0], -1) for index in plan.drawn)
    entropy = None if state is None else state.entropy_on(x.device)
    inputs = Inputs(grouped, weight, bias, counted, I_in, I_out, plan.numbers(gamma), entropy)
    y, selected = run(name, inputs, plan.settings, pairs)
    if I_in is None:
        sharing.remember(x, mask, grouped.shape, selected)
    return y if grouped is x else y.view(*x.shape[:-1], weight.shape[0])


def run(
    name: str, inputs: Inputs, settings: policy.Settings, pairs: tuple[Pair, ...]
) -> tuple[Tensor, Tensor]:
    """Output ``[G, T, d_out]`` and ``I_in`` ``[G, r]`` by the backend of that name."""
    compiling = torch.compiler.is_compiling()
    if compiling and tracing.is_compiled_transform(compiling):
        return torch_backend.by_autograd(
            inputs, settings, _forward("torch", inputs.x, pairs), pairs
        )
    if not compiling and _transform_running() is not None:
        if tracing.is_compiled_transform(compiling):
            forward = _forward("torch", inputs.x, pairs)
            return torch_backend.by_autograd(inputs, settings, forward, pairs)
        return transforms.sharpen(inputs, settings, _forward(name, inputs.x, pairs), pairs)
    if pairs:
        return torch_backend.sharpen(inputs, settings, _forward(name, inputs.x, pairs), pairs)
    if name == "torch":
        result = one_group.sharpen(inputs, settings)
        if result is not None:
            return result
        return torch_backend.sharpen(inputs, settings, torch_backend.forward)
    if name == "cuda":
        return torch_backend.sharpen(inputs, settings, cuda.forward)
    if name == "triton" and not inputs.x.is_cuda:
        return _interpreted(inputs, settings)
    return operator.sharpen(inputs, settings, compiling or _is_tracing())


def _forward(
    name: str, x: Tensor, pairs: tuple[Pair, ...] = ()
) -> Callable[[Inputs, policy.Settings], Outputs]:
    """What a backend computes without a gradient."""
    if pairs:
        return partial(torch_backend.forward, pairs=pairs)
    if name == "torch":
        return torch_backend.forward
    if name == "cuda":
        return cuda.forward
    if name == "triton" and not x.is_cuda:
        from vps.backends import triton_backend

        return triton_backend.forward
    return operator.forward


def _interpreted(inputs: Inputs, settings: policy.Settings) -> tuple[Tensor, Tensor]:
    """The Triton kernels in Triton's interpreter, which is no device of the operator."""
    return torch_backend.sharpen(inputs, settings, _forward("triton", inputs.x))


class _Plan(NamedTuple):
    """What is settled before the input comes."""

    settings: policy.Settings
    bounds: Tensor  # of the policy, float64 [9]
    drawn: tuple[Tensor, Tensor] | None  # I_in and I_out [r] of the random builder
    fastest: str  # backend, unless another is asked for

    def numbers(self, gamma: policy.LayerGamma | None) -> Tensor:
        """The policy ``[9]``, or with the γ of a layer ``[9]`` or ``[9 + r]``."""
        return self.bounds if gamma is None else gamma.in_policy(self.bounds, self.settings.r)


@constants.kept
def plan_for(
    config: VPSConfig,
    gradient: bool,
    factor: float,
    d_out: int,
    d_in: int,
    device: torch.device,
    dtype: torch.dtype,
    calibrated: bool = False,
) -> _Plan | None:
    """``None`` when γ is 0 whatever the input."""
    settings = policy.settings(config, gradient, d_in, d_out, calibrated)
    if settings is None:
        return None
    drawn = None
    if config.builder == "random":
        features = selection.random_features(config.seed, d_in, d_out, settings.r)
        I_in, I_out = (constants.vector(index, torch.int64, device) for index in features)
        drawn = I_in, I_out
    numbers = constants.vector(policy.bounds(config, factor), torch.float64, device)
    return _Plan(settings, numbers, drawn, dispatch.fastest(device.type, dtype))


def own_gamma(
    gamma: policy.LayerGamma | float | Sequence[float] | Tensor | None,
) -> policy.LayerGamma | None:
    """``gamma`` as the layers hold it."""
    if gamma is None or isinstance(gamma, policy.LayerGamma):
        return gamma
    return policy.LayerGamma(gamma)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: VPSConfig,
    mask: Tensor | None,
    state: policy.PolicyState | None,
    gradient: bool,
    pairs: tuple[Pair, ...],
    gamma: policy.LayerGamma | None,
) -> Tensor:
    """The literal algorithm for x ``[G, T, d_in]``, without a gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(
            "vps backend 'reference' has no gradient: expected torch.no_grad() around the layer"
        )
    entropy = None if state is None else state.entropy
    return reference.vps_linear(
        x,
        weight,
        bias,
        config=config.replace(scope="sequence"),
        mask=mask,
        entropy=None if entropy is None else float(entropy),
        outcomes=() if state is None else state.outcomes,
        gradient=gradient,
        memory=[(pair.s, pair.y) for pair in pairs],
        gamma=plain_gamma(gamma),
    ).y


def plain_gamma(gamma: policy.LayerGamma | None) -> float | list[float] | None:
    """As the reference takes it."""
    if gamma is None:
        return None
    numbers: list[float] = gamma.numbers.tolist()
    return numbers if gamma.by_column else numbers[0]


def check(x: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    check_input(x)
    refuse_tangents(x, weight)
    if weight.dim() != 2 or weight.dtype not in FLOATING:
        raise TypeError(
            "vps_linear: weight must be a floating-point matrix [d_out, d_in], "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"vps_linear: x must be [..., {weight.shape[1]}] to fit weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise TypeError(f"vps_linear: mask must be bool, got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"vps_linear: mask must be {tuple(x.shape[:-1])}, x without its last dim, "
                f"got {tuple(mask.shape)}"
            )


def check_input(x: Tensor) -> None:
    """What holds for the input of every layer, whatever its weight.

    Raises:
        TypeError: no dense floating-point tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"vps: x must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"vps: x must be a dense tensor, got layout {x.layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"vps: x must be floating point (16 to 64 bits), got {x.dtype}")


def refuse_tangents(*tensors: Tensor) -> None:
    """Forward mode is not defined (SPEC §6) and would lose the tangents.

    Raises:
        NotImplementedError: a tensor carries one.
    """
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(tracing.NO_FORWARD_MODE)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to on the device of x, where it is on."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # without the name of the device, which takes longer
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an argument of F.linear: all but float64 takes its dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def arrange(
    x: Tensor, mask: Tensor | None, scope: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Packing | None]:
    """x as ``[G, T, d_in]``, the mask that applies, and that mask as ``[G, T]`` on x's device; or x
    as it is and the packing of rows that hold several sequences, each part of which is to be
    arranged by itself, with its mask.
    """
    if mask is None:
        if scope == "sequence" and x.dim() == 3:
            layouts = masking.STATE.layouts
            if not layouts:
                return x, None, None, None
            last = layouts[-1]  # nearly always of just these tokens
            if last.packed is None and last.encoded is None and last.shape == x.shape[:-1]:
                mask = last.mask
                return x, mask, None if mask is None else mask.to(x.device), None
        dims, mask, packing = masking.groups_of(x, scope)
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


def group(x: Tensor, dims: tuple[int, ...], scope: str) -> Tensor:
    """x as ``[G, T, d_in]``: G groups of T tokens each (SPEC §2, scope)."""
    if scope == "sequence" and x.dim() == 3:
        return x
    tokens = masking.count(dims)
    if scope == "token":
        length = 1
    else:
        length = dims[-1] if scope == "sequence" and dims else tokens
    return x.reshape(tokens // length, length, x.shape[-1])

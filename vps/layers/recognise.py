"""Recognise the kind of layer that a module is: the first recogniser that knows it decides.

A recogniser returns a :class:`Form`, a :class:`Refusal` with its reason, or ``None`` for a module
of another kind. To support layers of a new kind, add a file with a recogniser, and a line in
:data:`RECOGNISERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vps.algorithm.policy import PolicyState
from vps.algorithm.weight import FLOATING
from vps.config import VPSConfig
from vps.layers import adapters, linear, opaque_layer
from vps.layers.forms import Form, Refusal
from vps.layers.linear import SharpenedLayer
from vps.layers.own_forward import innermost
from vps.layers.shards import tensor_parallel
from vps.layers.shards.tensor_parallel import TensorParallelLinear


def recognise(module: nn.Module) -> Form | Refusal:
    """Return the form of a layer that a config names, which may be sharpened already."""
    kind = type(module).__name__
    for recogniser in RECOGNISERS:
        found = recogniser(module)
        if isinstance(found, Refusal) and kind not in found.reason:
            return Refusal(f"{found.reason} (a {kind})")
        if found is not None:
            return found
    return Refusal(f"its type is {kind}, which is no supported layer")


def _adapter(module: nn.Module) -> Form | Refusal | None:
    """Return the form of a layer of PEFT around another layer, or ``None`` for other modules."""
    if not adapters.is_adapter(module):
        return None
    base = innermost(module)
    within = recognise(base)
    if isinstance(within, Refusal):
        return Refusal(f"the layer in it: {within.reason}")
    if isinstance(base, TensorParallelLinear) or tensor_parallel.is_tensor_parallel(base):
        return Refusal(f"the layer in it is split over ranks: {within.name}")
    parts = type(module).__module__.split(".")  # "lora" of peft.tuners.lora.layer
    package = parts[2] if len(parts) > 2 else parts[0]
    return Form(f"opaque ({package}.{type(module).__name__})", _attach_adapter)


def _attach_adapter(module: nn.Module, config: VPSConfig, state: PolicyState) -> None:
    wrapped = module._modules["base_layer"]
    assert wrapped is not None
    sharpen(wrapped, config, state)
    adapters.cover(module, opaque_layer.sharpened_by(wrapped))


def _conv1d(module: nn.Module) -> Form | None:
    if adapters.loaded("transformers.pytorch_utils", "Conv1D") is None:
        return None
    from vps.layers import conv1d  # needs transformers, which is loaded

    return conv1d.recognise(module)


RECOGNISERS: tuple[Callable[[Any], Form | Refusal | None], ...] = (
    tensor_parallel.recognise,
    _adapter,
    linear.recognise,
    _conv1d,
    opaque_layer.recognise,
)


def sharpen(module: nn.Module, config: VPSConfig, state: PolicyState) -> None:
    """Sharpen ``module`` where it stands."""
    form = recognise(module)
    assert isinstance(form, Form)
    form.attach(module, config, state)


def check(module: nn.Module) -> str | None:
    """Try a layer that is sharpened in its place; return why it is no linear map, or ``None``."""
    layer = opaque_layer.handle_of(module)
    if layer is None or opaque_layer.is_sharded(module):
        return None
    return layer.try_on(layer.own_forward(_token_like(module)))


def plain(module: nn.Module) -> None:
    """Take back what :func:`sharpen` did to ``module``."""
    if isinstance(module, SharpenedLayer):
        module.plain()
        return
    opaque_layer.detach(module)
    if adapters.is_adapter(module):
        wrapped = module._modules["base_layer"]
        assert wrapped is not None
        plain(wrapped)


def _token_like(module: nn.Module) -> Tensor:
    """Return an empty tensor of the dtype and device with which a layer computes."""
    base = innermost(module)
    hook = getattr(base, "_hf_hook", None)
    device: Any = next((p.device for p in module.parameters()), torch.device("cpu"))
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None) or device
    candidates: list[Any] = [getattr(base, "compute_dtype", None)]
    quantized = getattr(getattr(base, "weight", None), "quant_state", None)
    candidates.append(getattr(quantized, "dtype", None))
    candidates += [getattr(getattr(base, name, None), "dtype", None) for name in ("weight", "bias")]
    candidates += [parameter.dtype for parameter in module.parameters()]
    dtype = next((one for one in candidates if one in FLOATING), torch.get_default_dtype())
    return torch.empty(0, dtype=dtype, device=device)

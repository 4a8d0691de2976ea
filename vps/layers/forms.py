"""In which form a layer is sharpened: by its weight, through its own forward, or not at all."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vps.algorithm.policy import PolicyState
from vps.config import VPSConfig
from vps.layers import adapters, opaque_layer
from vps.layers.linear import FLOATING, SharpenedLayer, VPSLinear, is_replaced, why_not_sharpenable
from vps.layers.own_forward import fsdp_module, innermost, is_matrix
from vps.layers.shards import tensor_parallel
from vps.layers.shards.tensor_parallel import TensorParallelLinear

WEIGHT = "weight"
# Names of a list of experts, of what holds one beside a router, and of its class.
EXPERTS = re.compile(r"(^|_)experts?$", re.IGNORECASE)
ROUTER = re.compile(r"(^|_)(router|gate|gating|switch|wg)$", re.IGNORECASE)
MIXTURE = re.compile(r"(^|_)(moe|experts?)$")
MIXTURE_CLASS = re.compile(r"(MoE|Moe|Experts?)(Block|Layer|MLP|FFN|FeedForward)?$")
# Modules of torch that read the weights of linear layers in them without calling these, the second
# in its fast path for inference.
READERS = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


@dataclass(frozen=True)
class Form:
    """How a layer can be sharpened.

    Args:
        name: ``"weight"``, or ``"opaque (…)"`` with the kind of layer; empty where it cannot be.
        reason: why it cannot be.
    """

    name: str = ""
    reason: str | None = None


def form_of(module: nn.Module) -> Form:
    """The form for a layer that a config names, which may be sharpened already."""
    form = _form(module)
    kind = type(module).__name__
    if form.reason is None or kind in form.reason:
        return form
    return Form(reason=f"{form.reason} (a {kind})")


def _form(module: nn.Module) -> Form:
    if isinstance(module, TensorParallelLinear):
        return Form(module.form)
    if isinstance(module, SharpenedLayer):
        return Form(WEIGHT)
    if tensor_parallel.is_tensor_parallel(module):
        return Form(tensor_parallel.form_of(module), tensor_parallel.why_not_sharpenable(module))
    if adapters.is_adapter(module):
        base = innermost(module)
        within = form_of(base)
        if within.reason is not None:
            return Form(reason=f"the layer in it: {within.reason}")
        if isinstance(base, TensorParallelLinear) or tensor_parallel.is_tensor_parallel(base):
            return Form(reason=f"the layer in it is split over ranks: {within.name}")
        return Form(f"opaque ({_package(module)}.{type(module).__name__})")
    expected = _kind(module)
    if expected is None:
        return Form(reason=f"its type is {type(module).__name__}, which is no supported layer")
    reason = why_not_sharpenable(module, expected)
    if reason is None and module.weight.device.type != "meta":  # type: ignore[union-attr]
        return Form(WEIGHT)
    reason = reason or "its weight is on the meta device (offloaded or not yet loaded)"
    return _opaque_form(module, expected, reason)


def _opaque_form(module: nn.Module, expected: type[nn.Module], reason: str) -> Form:
    """The opaque form of a layer that has no plain weight for that ``reason``."""
    hook = module.__dict__.get("_hf_hook")
    sharded = fsdp_module()
    alone = sharded is not None and isinstance(module, sharded)
    kind = type(module).__mro__[2 if alone else 0].__name__
    handle = opaque_layer.handle_of(module)
    if is_replaced(module) and hook is None and handle is None:
        return Form(reason=reason)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return Form(reason=f"a {kind} without a weight: {reason}")
    if _is_dtensor(weight):
        if not getattr(module, "_is_fsdp_managed_module", False):
            return Form(reason=f"its weight is a DTensor, which no FSDP2 module gathers ({kind})")
        return Form(f"opaque (FSDP2 {kind})")
    if weight.device.type == "meta":
        offloaded = any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))
        return Form(f"opaque (offloaded {kind})") if offloaded else Form(reason=reason)
    if "weight" in module.__dict__:  # torch.nn.utils.weight_norm, of old
        return Form(f"opaque ({kind} with a computed weight)")
    if type(module) is expected:
        if type(weight) is not nn.Parameter:
            return Form(f"opaque ({type(weight).__name__})")
        if not is_matrix(weight):
            return Form(reason=reason)
    return Form(f"opaque ({kind})" if hook is None else f"opaque (dispatched {kind})")


def sharpen(module: nn.Module, config: VPSConfig, state: PolicyState) -> None:
    """Sharpen ``module`` where it stands."""
    if adapters.is_adapter(module):
        wrapped = module._modules["base_layer"]
        assert wrapped is not None
        sharpen(wrapped, config, state)
        adapters.cover(module, opaque_layer.sharpened_by(wrapped))
    elif tensor_parallel.is_tensor_parallel(module):
        TensorParallelLinear.sharpened(module, config, state)
    elif form_of(module).name != WEIGHT:
        opaque_layer.attach(module, config, state, widths_of(module))
    elif isinstance(module, nn.Linear):
        VPSLinear.sharpened(module, config, state)
    else:
        from vps.layers.conv1d import VPSConv1D  # needs transformers, which this module came from

        VPSConv1D.sharpened(module, config, state)


def check(module: nn.Module) -> str | None:
    """Why a layer sharpened in its place is none after all, or ``None``: it is tried.

    Norms of the rows of W are found here, where they may be kept and the config asks for them.
    """
    layer = opaque_layer.handle_of(module)
    if layer is None or _is_sharded(module):
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


def widths_of(module: nn.Module) -> tuple[int, int]:
    """d_out and d_in of a layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx  # type: ignore[return-value]  # a Conv1D


def loose_targets(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Why modules of these names, which are no linear layers, are refused, by name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: f"its type is {type(modules[name]).__name__}, which is no supported layer"
        for name in names
        if next(modules[name].parameters(), None) is not None
    }


def bypassed(model: nn.Module) -> dict[int, str]:
    """Why layers that are not called whenever their weight is used are refused, by id."""
    return {
        id(parent._modules[name]): f"{reader.__name__} reads its weight without calling it"
        for parent in model.modules()
        for reader, names in READERS.items()
        if inspect.getattr_static(type(parent), "forward", None) is reader.forward
        for name in names
    }


def experts(model: nn.Module) -> dict[int, str]:
    """Why modules among the experts of a mixture are refused under every scope but ``"token"``, by
    id.

    A router gives an expert ``[n, d_in]``, gathered from all sequences; one that all tokens share
    stands in no list of experts.
    """
    reason = (
        "it is an expert, whose tokens a router gathers from all sequences; it is sharpened under "
        "scope='token' alone"
    )
    return {
        id(module): reason
        for name, parent in model.named_modules()
        for key, child in parent._modules.items()
        if child is not None and _is_of_experts(name.rpartition(".")[2], parent, key, child)
        for module in child.modules()
    }


def _is_of_experts(name: str, parent: nn.Module, key: str, child: nn.Module) -> bool:
    """Whether ``child``, the ``key`` of a parent of that name, is a list of experts or one of
    several that are numbered."""
    if "shared" in key or "shared" in name:
        return False
    if not isinstance(child, nn.ModuleList | nn.ModuleDict):
        return re.fullmatch(r"experts?_?\d+", key) is not None
    if EXPERTS.search(key) or "Expert" in type(child).__name__:
        return True
    routers = [other for other in parent._modules if ROUTER.search(other)]
    mixture = MIXTURE.search(name) or MIXTURE_CLASS.search(type(parent).__name__)
    return bool(routers) and (mixture is not None or any("router" in each for each in routers))


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` is of, of those that hold W in ``weight``."""
    if isinstance(module, nn.Linear):
        return nn.Linear
    conv1d = adapters.loaded("transformers.pytorch_utils", "Conv1D")
    return conv1d if conv1d is not None and isinstance(module, conv1d) else None


def _package(adapter: nn.Module) -> str:
    """``"lora"`` of ``peft.tuners.lora.layer``."""
    parts = type(adapter).__module__.split(".")
    return parts[2] if len(parts) > 2 else parts[0]


def _is_dtensor(weight: Tensor) -> bool:
    dtensor = adapters.loaded("torch.distributed.tensor", "DTensor")
    return dtensor is not None and isinstance(weight, dtensor)


def _is_sharded(module: nn.Module) -> bool:
    return any(_is_dtensor(parameter) for parameter in module.parameters())


def _token_like(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device with which a layer computes."""
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

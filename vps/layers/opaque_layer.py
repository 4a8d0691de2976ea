"""``OpaqueLayer``: sharpens a module in its place, through the module's own forward.

The module keeps its class, parameters, hooks and ``state_dict`` keys; its ``forward`` is replaced
on the instance. Where accelerate put a forward there that brings offloaded weights into memory, the
one inside that is replaced.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vps.algorithm.policy import PolicyState
from vps.config import VPSConfig
from vps.layers import adapters
from vps.layers.forms import Form, Refusal, is_replaced, why_not_sharpenable
from vps.layers.linear import SharpenedLayer
from vps.layers.own_forward import (
    OwnForward,
    fsdp_module,
    handle_of,
    innermost,
    is_matrix,
    plain,
    running_plain,
    without_bias,
)
from vps.layers.weight_rows import RowNorms, are_fixed
from vps.masking import STATE


class OpaqueLayer(SharpenedLayer):
    """One sharpened module, which may be no plain ``nn.Linear``.

    Args:
        module: a linear layer, or an adapter around one.
        config: the settings.
        state: policy state of the model.
        widths: d_out and d_in.
        wraps: whether the module is an adapter, which may not have the layer that it wraps yet.

    ``tried`` holds the states in which the module was found to be a linear map; a new state is
    tried at the next call. An adapter has several: merged or not, switched off or not.
    """

    def __init__(
        self,
        module: nn.Module,
        config: VPSConfig,
        state: PolicyState,
        widths: tuple[int, int],
        wraps: bool,
    ) -> None:
        self._module = module
        self._widths = widths
        self.config = config
        self.state = state
        self.wraps = wraps
        self.tried: set[Any] = set()
        self.gone = False
        self.offset = wraps  # an adapter may bring a bias of its own
        self.norms = RowNorms() if not wraps and are_fixed(module) else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        adapters.watch()
        self.__dict__.update(state)

    @property
    def module(self) -> nn.Module:
        return self._module

    def is_off(self) -> bool:
        return self.gone or super().is_off()

    def _condition(self) -> Any:
        """Return the state of an adapter on which its output depends beside its weights."""
        if not self.wraps:
            return None
        names = ("disable_adapters", "merged", "active_adapters")
        return tuple(str(getattr(self._module, name, None)) for name in names)

    @property
    def widths(self) -> tuple[int, int]:
        return self._widths

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the innermost layer, ``[d_out]``."""
        bias: Tensor | None = getattr(innermost(self._module), "bias", None)
        return bias

    def matrix(self) -> Tensor | None:
        if self.wraps or not _reads_weight(self._module):
            return None
        weight = getattr(self._module, "weight", None)
        if not is_matrix(weight):
            return None
        assert isinstance(weight, Tensor)
        return weight if isinstance(self._module, nn.Linear) else weight.t()

    def leaves_out_bias(self) -> bool:
        if self.bias is None:
            return True
        return not torch.compiler.is_compiling() and without_bias(self._module) is not None

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        twin = None if biased or self.bias is None else without_bias(self._module)
        module = self._module if twin is None else twin
        with plain(module, True):
            y: Tensor = type(module).forward(module, x)
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer in place of the module's ``forward``.

        Raises:
            TypeError: arguments beside the input, such as one adapter for each sequence, while
                sharpening is on.
            RuntimeError: an adapter has turned the module into something other than a linear map.
        """
        if self.is_off() and (not STATE.plain or running_plain(self._module) is None):
            with plain(self._module, True):
                return type(self._module).forward(self._module, *args, **kwargs)
        if self.wraps:
            adapters.settle(self._module)
        given = [*args, *kwargs.values()]
        if given and isinstance(given[0], Tensor) and all(rest is None for rest in given[1:]):
            if self._condition() not in self.tried and not torch.compiler.is_compiling():
                self._try(given[0])
            return self.answer(given[0])
        check = getattr(self._module, "_check_forward_args", None)
        if check is not None:
            check(*args, **kwargs)  # PEFT refuses some by itself
        raise TypeError(
            f"vps: a sharpened {type(self._module).__name__} takes its input alone, got "
            f"{len(args)} positional arguments and {sorted(kwargs)}; PEFT's adapter_names give "
            "every sequence of a batch other weights, and an update is made of one weight; "
            "expected one adapter (set_adapter), γ = 0 or vps.disabled"
        )

    def try_on(self, base: OwnForward) -> str | None:
        """Return why the module is no linear map, or ``None``.

        Of a linear map the norms of its rows are found, where they may be kept and the config asks
        for them.

        Warns:
            UserWarning: it has no backward pass for the rows that the config asks for.
        """
        reason = base.describe()
        if reason is None:
            self.tried.add(self._condition())
        if reason is not None or self.config.tau is None or base.matrix() is not None:
            return reason
        if self.norms is not None:
            self.norms.find(base, base.like.dtype)
            if self.config.builder != "sc" and self.config.clip != "spectral":
                return None
        missing = base.why_no_backward()
        if missing is not None:
            warnings.warn(
                f"vps: a {type(self._module).__name__} has no backward pass ({missing}), so the "
                f"rows of its weight that the clip asks for take {base.d_in} one-hot rows at every "
                "call; tau=None, or without an adapter builder='sk' with clip='component', does "
                "without them",
                stacklevel=2,
            )
        return None

    def _try(self, x: Tensor) -> None:
        if STATE.plain or not x.is_floating_point():  # it is being tried, or will be refused
            return
        if any(state is self.state for state in STATE.disabled):  # it stays plain
            return
        reason = self.try_on(self.own_forward(x.detach(), inside=True))
        if reason is not None:
            raise RuntimeError(
                f"vps: a {type(self._module).__name__} cannot be sharpened: {reason}"
            )

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """Register a forward hook on the module."""
        return self._module.register_forward_hook(hook, **options)

    def __repr__(self) -> str:
        return f"OpaqueLayer({type(self._module).__name__}, {self._widths[1]} to {self._widths[0]})"


def _reads_weight(module: nn.Module) -> bool:
    """Return whether the class of a module computes ``x Wᵀ + b`` from an attribute ``weight``."""
    if type(module).forward is nn.Linear.forward:
        return True
    conv1d = adapters.loaded("transformers.pytorch_utils", "Conv1D")
    return conv1d is not None and type(module).forward is conv1d.forward


def sharpened_by(module: nn.Module) -> SharpenedLayer | None:
    """Return what sharpens a module where it stands, or ``None``."""
    if isinstance(module, SharpenedLayer):
        return module
    found: SharpenedLayer | None = handle_of(module)
    return found


def attach(
    module: nn.Module,
    config: VPSConfig,
    state: PolicyState,
    widths: tuple[int, int],
    wraps: bool = False,
) -> OpaqueLayer:
    """Sharpen ``module`` in its place; arguments as for :class:`OpaqueLayer`."""
    layer = OpaqueLayer(module, config, state, widths, wraps)
    module.__dict__["_sharpened"] = layer
    module.__dict__[_slot(module)] = layer.forward
    return layer


def detach(module: nn.Module) -> None:
    """Take back what :func:`attach` did to a module, if it did."""
    layer = module.__dict__.pop("_sharpened", None)
    if layer is None:
        return
    layer.gone = True  # for whoever holds its forward
    for slot in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(slot), "__self__", None) is layer:
            if slot == "forward":
                del module.__dict__[slot]
            else:
                module.__dict__[slot] = type(module).forward.__get__(module)


def _slot(module: nn.Module) -> str:
    """Return the attribute in which to replace a module's forward: inside accelerate's, if any."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def recognise(module: nn.Module) -> Form | Refusal | None:
    """Return the form of a linear layer without a plain weight in memory.

    The weight may be quantized, offloaded, gathered by FSDP2, or computed. ``None`` for a module
    that is no linear layer.
    """
    conv1d = adapters.loaded("transformers.pytorch_utils", "Conv1D")
    if isinstance(module, nn.Linear):
        expected: type[nn.Module] = nn.Linear
        widths = module.out_features, module.in_features
    elif conv1d is not None and isinstance(module, conv1d):
        expected, widths = conv1d, (module.nf, module.nx)
    else:
        return None
    reason = why_not_sharpenable(module, expected)
    reason = reason or "its weight is on the meta device (offloaded or not yet loaded)"

    def as_form(name: str) -> Form:
        return Form(name, partial(attach, widths=widths))

    hook = module.__dict__.get("_hf_hook")
    sharded = fsdp_module()
    alone = sharded is not None and isinstance(module, sharded)
    kind = type(module).__mro__[2 if alone else 0].__name__
    handle = handle_of(module)
    if is_replaced(module) and hook is None and handle is None:
        return Refusal(reason)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return Refusal(f"a {kind} without a weight: {reason}")
    if _is_dtensor(weight):
        if not getattr(module, "_is_fsdp_managed_module", False):
            return Refusal(f"its weight is a DTensor, which no FSDP2 module gathers ({kind})")
        return as_form(f"opaque (FSDP2 {kind})")
    if weight.device.type == "meta":
        offloaded = any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))
        return as_form(f"opaque (offloaded {kind})") if offloaded else Refusal(reason)
    if "weight" in module.__dict__:  # torch.nn.utils.weight_norm, the old one
        return as_form(f"opaque ({kind} with a computed weight)")
    if type(module) is expected:
        if type(weight) is not nn.Parameter:
            return as_form(f"opaque ({type(weight).__name__})")
        if not is_matrix(weight):
            return Refusal(reason)
    return as_form(f"opaque ({kind})" if hook is None else f"opaque (dispatched {kind})")


def _is_dtensor(weight: Tensor) -> bool:
    dtensor = adapters.loaded("torch.distributed.tensor", "DTensor")
    return dtensor is not None and isinstance(weight, dtensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a parameter of a module is a DTensor."""
    return any(_is_dtensor(parameter) for parameter in module.parameters())

"""``VPSLinear``: a drop-in ``nn.Linear`` whose forward is sharpened (SPEC §1)."""

from __future__ import annotations

from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vps.config import VPSConfig
from vps.functional import FLOATING, vps_linear
from vps.lbfgs import CurvatureMemory
from vps.masking import STATE
from vps.pairing import Coupling
from vps.policy import LayerGamma, PolicyState

M = TypeVar("M", bound=nn.Module)


class SharpenedLayer:
    """What every sharpened layer holds beside its base layer.

    ``config`` and ``state`` always; ``coupling`` with its peer in a query or key layer. During a
    refinement also ``gradient``, whether the last verification pass brought one here (Hybrid turns
    to SC), and the L-BFGS ``memory``. ``gamma`` is that of a calibration, in place of the config's.
    """

    config: VPSConfig
    state: PolicyState
    gradient: bool = False
    memory: CurvatureMemory | None = None
    gamma: LayerGamma | None = None
    coupling: Coupling | None = None

    def deciding(self) -> tuple[Any, ...]:
        """The layers that share one policy decision with this one, which is among them (SPEC §7):
        query and key where they are coupled, else this one alone.
        """
        if self.coupling is None or not self.coupling.applies():
            return (self,)
        return self.coupling.query, self.coupling.key

    def sharpen(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The sharpened output, or ``None`` where the layer is switched off."""
        if STATE.disabled and any(state is self.state for state in STATE.disabled):
            return None
        if self.coupling is not None and self.coupling.applies():
            assert isinstance(self, VPSLinear)
            return self.coupling.sharpen(self, x)
        return vps_linear(
            x,
            weight,
            bias,
            self.config,
            state=self.state,
            gradient=self.gradient,
            memory=self.memory,
            gamma=self.gamma,
        )


class VPSLinear(SharpenedLayer, nn.Linear):
    """An ``nn.Linear`` with a low-rank update made from its weight and its input.

    Made by :meth:`from_linear`; created directly it is a freshly initialised ``nn.Linear``.
    Parameters, ``state_dict`` keys and hooks are those of the linear layer.

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether there is a bias ``[d_out]``.
        config: the settings; the defaults of :class:`VPSConfig` when ``None``.
        state: policy state, shared by the layers of a model; a new one when ``None``.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: VPSConfig | None = None,
        state: PolicyState | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = VPSConfig() if config is None else config
        self.state = PolicyState() if state is None else state

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: VPSConfig | None = None,
        state: PolicyState | None = None,
    ) -> Self:
        """A sharpened layer that shares the parameters of ``linear``, which stays as it is.

        Raises:
            TypeError: no plain ``nn.Linear`` with a floating-point weight in memory; the message
                says what it is.
        """
        reason = why_not_sharpenable(linear, nn.Linear)
        if reason is not None:
            raise TypeError(f"VPSLinear.from_linear: cannot sharpen this layer: {reason}")
        return as_class(
            linear,
            cls,
            config=VPSConfig() if config is None else config,
            state=PolicyState() if state is None else state,
        )

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` of the same parameters and hooks."""
        return as_class(self, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        """``y = H + b + γ · clamp(δ)`` for x ``[..., d_in]``; see :func:`vps.vps_linear`."""
        y = self.sharpen(x, self.weight, self.bias)
        return super().forward(x) if y is None else y

    def extra_repr(self) -> str:
        """Sizes and the main settings."""
        config = self.config
        return f"{super().extra_repr()}, builder={config.builder}, scope={config.scope}"


def as_class(module: nn.Module, cls: type[M], **attributes: Any) -> M:
    """``module`` as another class: same parameters, buffers and hooks, other attributes."""
    other: M = cls.__new__(cls)  # type: ignore[call-overload]
    inner = {k: v for k, v in module.__dict__.items() if k not in SharpenedLayer.__annotations__}
    for name in ("_parameters", "_buffers", "_modules"):
        inner[name] = inner[name].copy()
    other.__dict__.update(inner, **attributes)
    return other


def why_not_sharpenable(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why ``module`` is not a plain ``expected`` with a floating weight in memory, or ``None``."""
    if type(module) is not expected:
        return f"its type is {type(module).__name__}, expected exactly {expected.__name__}"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (accelerate offload or tensor parallel)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no weight parameter of its own (weight norm or a parametrization)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"its weight is {weight.dtype}, not a 16- to 64-bit float"
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}, expected a matrix"
    if weight.device.type == "meta":
        return "its weight is on the meta device (offloaded or not yet loaded)"
    return None

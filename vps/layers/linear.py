"""``VPSLinear``: a drop-in ``nn.Linear`` whose forward is sharpened (SPEC §1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vps.algorithm.fixed import FixedUpdate
from vps.algorithm.flow import Given
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import LayerGamma, PolicyState
from vps.backends import dispatch, triton
from vps.config import VPSConfig
from vps.functional import NOTHING, Kept, Projection, compute, keep, sharpen
from vps.layers import adapters
from vps.layers.forms import WEIGHT, Form, is_replaced, why_not_sharpenable
from vps.layers.own_forward import (
    OwnForward,
    fsdp_module,
    is_matrix,
    parameter,
    running_plain,
)
from vps.layers.pairing import Coupling, note, read
from vps.layers.riding import ForwardWeight
from vps.layers.weight_rows import RowNorms
from vps.masking import STATE, held_for

M = TypeVar("M", bound=nn.Module)


class SharpenedLayer:
    """What every sharpened layer holds beside its base layer.

    Attributes:
        config, state: the settings, and the policy state of the model.
        gradient: whether the last verification pass of a refinement brought a gradient here, which
            turns the hybrid builder to SC.
        memory: the L-BFGS memory of a refinement.
        gamma: the γ of a calibration, in place of the config's.
        coupling: the pair of a query and a key layer to which the layer belongs.
        outer: the adapter that wraps the layer and is sharpened in its place.
        offset: whether the product without bias may still add a constant (:mod:`own_forward`).
        norms: norms of all rows of W, found once, or ``None`` to ask the backward pass.
        keeps_bias: whether the output differs from the product without bias plus the bias; the
            product is then the output less the output for zeros.
        displaced: attributes of the base layer with one of these names.
        kept: the plan of the last call, until something of the layer changes.
        rounds_input: whether its forward rounds x; then δ is added to its output under every scope.
        number: by which a cache knows the layer (SPEC §11).
        is_whole: whether this process holds all of the layer.
        plain_class: the class that :meth:`plain` restores.
    """

    config: VPSConfig
    state: PolicyState
    gradient: bool = False
    memory: CurvatureMemory | None = None
    gamma: LayerGamma | None = None
    coupling: Coupling | None = None
    outer: Any = None
    offset: bool = False
    norms: RowNorms | None = None
    keeps_bias: bool = False
    displaced: dict[str, Any] | None = None
    kept: Kept | None = None
    rounds_input: bool = False
    number: int | None = None
    is_whole = True
    plain_class = nn.Module

    @classmethod
    def sharpened(cls, module: nn.Module, config: VPSConfig, state: PolicyState) -> Self:
        """Turn ``module`` itself into this class, so that whoever holds it holds the new layer."""
        if not is_replaced(module):
            module.__dict__.pop("forward", None)
        own = vars(module)
        displaced = {n: own.pop(n) for n in SharpenedLayer.__annotations__ if n in own}
        module.__class__ = cls  # type: ignore[assignment]
        own.update(config=config, state=state, **({"displaced": displaced} if displaced else {}))
        assert isinstance(module, cls)
        return module

    def plain(self) -> nn.Module:
        """Turn the layer itself back into its plain class."""
        module: Any = self
        own, plain = self._own_class(), self.plain_class
        module.__class__ = self.plain_kind()
        displaced = self.__dict__.get("displaced") or {}
        for name in SharpenedLayer.__annotations__:
            self.__dict__.pop(name, None)
        self.__dict__.update(displaced)
        for slot in ("forward", "_old_forward"):  # where accelerate leaves it
            if getattr(self.__dict__.get(slot), "__func__", None) is own.forward:
                self.__dict__[slot] = plain.forward.__get__(self)
        return module

    def plain_kind(self) -> type[nn.Module]:
        """Return the plain class, derived anew where FSDP2 or a parametrization derived from it."""
        kind, own, plain = type(self), self._own_class(), self.plain_class
        sharded = fsdp_module()
        bases = tuple(plain if base is own else base for base in kind.__bases__)
        if sharded is not None and issubclass(kind, sharded):
            return type(f"FSDP{plain.__name__}", bases, {})
        if is_parametrized(self.module):
            inner = {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
            return type(f"Parametrized{plain.__name__}", bases, inner)
        return plain

    def _own_class(self) -> Any:
        """Return the class of the layer that defines ``plain_class``."""
        return next(each for each in type(self).__mro__ if "plain_class" in vars(each))

    def __setstate__(self, state: dict[str, Any]) -> None:
        adapters.watch()
        super().__setstate__(state)  # type: ignore[misc]

    @property
    def module(self) -> nn.Module:
        """Return the layer in the model."""
        assert isinstance(self, nn.Module)
        return self

    @property
    def widths(self) -> tuple[int, int]:
        """Return d_out and d_in."""
        raise NotImplementedError

    if TYPE_CHECKING:

        @property
        def bias(self) -> Tensor | None: ...

        def register_forward_hook(self, hook: Any, **options: Any) -> Any: ...

    def matrix(self) -> Tensor | None:
        """Return W ``[d_out, d_in]`` where it is a plain matrix in memory now, else ``None``."""
        raise NotImplementedError

    def vector(self) -> Tensor | None:
        """Return the bias ``[d_out]`` or ``None``."""
        return self.bias

    def leaves_out_bias(self) -> bool:
        """Return whether :meth:`apply_plain` can leave out the bias."""
        return True

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        """Return ``H``, or ``H + b`` if ``biased``, while the forward of the module runs."""
        raise NotImplementedError

    def deciding(self) -> tuple[Any, ...]:
        """Return the layers that share one policy decision (SPEC §7).

        These are query and key where they are coupled, else this layer alone.
        """
        pair: Any = self.coupling
        return (pair.query, pair.key) if self.is_coupled() else (self,)

    def is_coupled(self) -> bool:
        """Return whether the layer decides with another."""
        return self.coupling is not None and self.coupling.applies()

    def own_forward(self, x: Tensor, inside: bool = False) -> OwnForward:
        """Return the layer as it is known by its forward, for tokens like x."""
        return OwnForward(self, x, inside)

    def projection(self, x: Tensor, inside: bool = False) -> Projection:
        """Return the layer for :func:`vps.functional.sharpen`, with a matrix where W is one.

        ``inside`` says that the module's forward runs now.
        """
        W = self.matrix()
        if W is not None:
            return Projection(W, self.vector(), self.gradient, self.memory, self.gamma)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        weight = ForwardWeight(self.own_forward(x, inside), trains)
        return Projection(weight, None, self.gradient, self.memory, self.gamma)

    def plain_output(self, x: Tensor) -> Tensor:
        """Return ``H + b`` of the unsharpened layer, without calling hooks of the module."""
        base = self.own_forward(x)
        base.biased = True
        try:
            return base.product(x)
        finally:
            base.release()

    def base_product(self, x: Tensor) -> Tensor:
        """Return ``H`` ``[..., d_out]`` for x ``[..., d_in]``."""
        W = self.matrix()
        if W is not None:
            return F.linear(x, W.to(x.dtype))
        base = self.own_forward(x)
        try:
            H = base.product(x.reshape(-1, x.shape[-1]))
            if base.offset:
                H = H - base.product(x.new_zeros(1, x.shape[-1]))
        finally:
            base.release()
        return H.view(*x.shape[:-1], -1)

    def whole(self, y: Tensor) -> Tensor:
        """Return the whole of an output, where this process may hold a part of it."""
        return y

    def is_off(self) -> bool:
        """Return whether the output is the base layer's whatever the input.

        The input then may be anything that the base layer takes.
        """
        if STATE.disabled and any(state is self.state for state in STATE.disabled):
            return True
        if self.gamma is None:
            return self.config.is_off
        return self.gamma.is_zero and all(
            one.gamma is not None and one.gamma.is_zero for one in self.deciding()
        )

    def sharpen(self, x: Tensor) -> Tensor | None:
        """Return the sharpened output for x, or ``None`` where the base layer's is right."""
        if self.config.scope == "prompt" and STATE.layouts and not self.is_off():
            return self._sharpen_prompted(x)
        pair = self.coupling if self.coupling is not None and self.coupling.applies() else None
        if not torch.compiler.is_compiling() and not STATE.disabled and pair is None:
            if (kept := self.kept) is not None and (plan := kept.find((self,), x)) is not None:
                alone = plan.backend is not triton and not STATE.backends
                return (compute(x, plan) if alone else read(x, (self,), kept, plan))[0]
        if (STATE.disabled or self.gamma is not None or self.config.is_off) and self.is_off():
            return None
        return self.sharpen_alone(x) if pair is None else pair.sharpen(self, x)

    def _sharpen_prompted(self, x: Tensor) -> Tensor | None:
        held = held_for(x, self.number)
        given = None if held is None else held.find(self)
        if given is NOTHING:  # its partner is sharpened
            return None
        if given is not None:
            y, plan = self.sharpen_alone(x, given), self.kept
            if STATE.layouts[-1].is_ready and plan is not None:
                held.prepare(self, x, dispatch.later(plan.facts, given, x))
            return y
        if self.is_coupled():
            return self.coupling.sharpen(self, x)  # type: ignore[union-attr]
        if held is None:
            return self.sharpen_alone(x)
        held.note(self, x)
        decided: list[FixedUpdate | None] = []
        y = self.sharpen_alone(x, held=decided)
        held.keep(zip((self,), decided, strict=False), self)
        return y

    def sharpen_alone(
        self,
        x: Tensor,
        given: Given = NOTHING,
        held: list[FixedUpdate | None] | None = None,
    ) -> Tensor | None:
        """Return the sharpened output for x, or ``None``, without a partner.

        Args:
            x: ``[..., d_in]``.
            given, held: as for :func:`vps.functional.sharpen`.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self.kept and (plan := self.kept.find((self,), x)) is not None:
            return compute(x, plan, None, given, held)[0]
        layers = (self.projection(x, inside=True),)
        (y,) = sharpen(x, layers, self.config, state=self.state, given=given, held=held)
        if not compiling:
            found = keep(x, (self,), layers)
            if found is not self.kept:
                self.kept = found
            if found is not None:
                note(x, (self,), found)
        return y

    def answer(self, x: Tensor) -> Tensor:
        """Return the output of the module for x: sharpened, or plain inside :func:`plain`."""
        entry = running_plain(self.module) if STATE.plain else None
        if entry is None and (y := self.sharpen(x)) is not None:
            return y
        if entry is None or entry.module is not self.module:
            return self.apply_plain(x, True)
        entry.matrix, entry.bias = self.matrix(), self.bias
        return self.apply_plain(x, entry.biased)


class VPSLinear(SharpenedLayer, nn.Linear):  # type: ignore[misc]  # bias
    """An ``nn.Linear`` with a low-rank update made from its weight and its input.

    :meth:`from_linear` makes one of a layer; created directly it is freshly initialised.
    Parameters, ``state_dict`` keys and hooks are the linear layer's own.

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether there is a bias ``[d_out]``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        config: the settings; the defaults of :class:`VPSConfig` when ``None``.
        state: policy state, shared by the layers of a model; a new one when ``None``.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: VPSConfig | None = None,
        state: PolicyState | None = None,
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
        """Return a sharpened layer that shares the parameters of ``linear``, which stays as it is.

        A layer on the meta device waits for its values as an ``nn.Linear`` does. ``config`` and
        ``state`` are as for :func:`vps.vps_linear`.

        Raises:
            TypeError: ``linear`` is no plain ``nn.Linear`` with a floating-point weight.
        """
        reason = why_not_sharpenable(linear, nn.Linear)
        if reason is not None:
            raise TypeError(f"VPSLinear.from_linear: cannot sharpen this layer: {reason}")
        own = VPSConfig() if config is None else config, PolicyState() if state is None else state
        return as_class(linear, cls, config=own[0], state=own[1])

    def to_linear(self) -> nn.Linear:
        """Return the plain ``nn.Linear`` of the same parameters and hooks."""
        plain: Any = as_class(self, self.plain_kind())
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """Return ``H + b + γ · clamp(δ)`` for input ``[..., d_in]`` (:func:`vps.vps_linear`)."""
        if not isinstance(self, SharpenedLayer):  # a reference taken while it was sharpened
            return nn.Linear.forward(self, input)
        if STATE.layouts and STATE.layouts[-1].is_ready:
            if (later := STATE.layouts[-1].held.later(self, input)) is not None:
                return later  # type: ignore[no-any-return]
        return self.answer(input)

    @property
    def widths(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def matrix(self) -> Tensor | None:
        weight = parameter(self, "weight")
        return weight if is_matrix(weight) else None

    def vector(self) -> Tensor | None:
        return parameter(self, "bias")

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        return super().forward(x) if biased else F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Return sizes and the main settings."""
        config = self.config
        return f"{super().extra_repr()}, builder={config.builder}, scope={config.scope}"


def as_class(module: nn.Module, cls: type[M], **attributes: Any) -> M:
    """Copy ``module`` as another class: same parameters, buffers and hooks, more attributes."""
    other: M = cls.__new__(cls)  # type: ignore[call-overload]
    inner = {k: v for k, v in module.__dict__.items() if k not in SharpenedLayer.__annotations__}
    if not is_replaced(module):
        inner.pop("forward", None)
    for name in ("_parameters", "_buffers", "_modules"):
        inner[name] = inner[name].copy()
    other.__dict__.update(inner, **attributes)
    return other


def recognise(module: nn.Module) -> Form | None:
    """Return the form of an ``nn.Linear`` with its weight in memory; ``None`` for any other."""
    if isinstance(module, SharpenedLayer):
        return Form(WEIGHT, type(module).sharpened)
    is_plain = isinstance(module, nn.Linear) and why_not_sharpenable(module, nn.Linear) is None
    if not is_plain or module.weight.is_meta:
        return None
    return Form(WEIGHT, VPSLinear.sharpened)

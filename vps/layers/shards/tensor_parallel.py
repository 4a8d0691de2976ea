"""Sharpen layers that transformers splits over ranks, with the result of a single process.

``AutoModelForCausalLM.from_pretrained(…, tp_plan="auto")`` makes weights DTensors and replaces the
``forward`` of each layer; activations stay plain tensors. :mod:`vps.layers.shards.column_wise` and
:mod:`vps.layers.shards.row_wise` compute, and list what ranks exchange.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm.fixed import FixedUpdate
from vps.algorithm.flow import Given
from vps.algorithm.policy import PolicyState
from vps.algorithm.weight import FLOATING
from vps.config import VPSConfig
from vps.functional import NOTHING, Projection, sharpen
from vps.layers import pairing
from vps.layers.forms import Form, Refusal
from vps.layers.linear import SharpenedLayer
from vps.layers.own_forward import OwnForward
from vps.layers.shards import sharding
from vps.layers.shards.column_wise import ColumnShard
from vps.layers.shards.row_wise import RowShard
from vps.layers.shards.sharding import Shard, split_evenly

STYLES = {"ColwiseParallel": 0, "RowwiseParallel": 1}  # each with the dim of W that it splits


class TensorParallelLinear(SharpenedLayer, nn.Linear):  # type: ignore[misc]  # bias
    """A linear layer that is split over ranks; :meth:`sharpened` makes it in place.

    Parameters, ``state_dict`` keys and hooks stay the layer's own; ``base_forward`` is the forward
    that transformers gave it.
    """

    base_forward: Callable[[Tensor], Tensor]
    style: Any
    shard: Shard
    is_whole = False
    plain_class = nn.Linear

    @classmethod
    def sharpened(cls, module: nn.Module, config: VPSConfig, state: PolicyState) -> Self:
        """Turn ``module`` itself into this class.

        Raises:
            TypeError: :func:`why_not_sharpenable` refuses the layer.
        """
        reason = why_not_sharpenable(module)
        if reason is not None:
            raise TypeError(f"TensorParallelLinear.sharpened: cannot sharpen this layer: {reason}")
        style, shard = _style(module), _shard(module)
        forward = module.__dict__.pop("forward")
        layer = super().sharpened(module, config, state)
        vars(layer).update(base_forward=forward, style=style, shard=shard)
        return layer

    def plain(self) -> nn.Module:
        forward = self.base_forward
        for name in ("base_forward", "style", "shard"):
            del self.__dict__[name]
        module = super().plain()
        module.__dict__["forward"] = forward
        return module

    @property
    def widths(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def form(self) -> str:
        """Return the form that a :class:`vps.PatchReport` shows."""
        return _form(self.style)

    def matrix(self) -> None:
        """Return ``None``: no rank holds the whole W."""

    def plain_output(self, x: Tensor) -> Tensor:
        return self.base_forward(x)

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        raise self._not_whole()

    def own_forward(self, x: Tensor, inside: bool = False) -> OwnForward:
        raise self._not_whole()

    @torch.no_grad()
    def base_product(self, x: Tensor) -> Tensor:
        """Return ``H`` of all ranks; it is moved whole, so this is for statistics alone."""
        x = _own_input(self, x)
        H = F.linear(x, _local(self.weight).to(x.dtype))
        if self.splits_inputs:
            dist.all_reduce(H, group=self.shard.group)
            return H
        return sharding.gather(H, self.shard)

    def whole(self, y: Tensor) -> Tensor:
        if y.shape[-1] == self.out_features:
            return y
        return sharding.gather(y.detach(), self.shard)

    def _not_whole(self) -> TypeError:
        return TypeError(
            f"vps: each rank holds a part of a {self.form} layer, so it is not known by its own "
            "forward; expected a model in one process"
        )

    @property
    def splits_inputs(self) -> bool:
        """Return whether this rank holds some of the inputs, rather than of the outputs."""
        return STYLES[type(self.style).__name__] == 1

    def forward(self, input: Tensor) -> Tensor:
        """Return the sharpened output; input and output are split as for the base layer."""
        if self.is_off():
            return self.base_forward(input)
        y = self.sharpen(input)
        return self.base_forward(input) if y is None else y

    def sharpen_alone(
        self,
        x: Tensor,
        given: Given = NOTHING,
        held: list[FixedUpdate | None] | None = None,
    ) -> Tensor | None:
        return _sharpen((self,), x, given=given, held=held)[0]

    def projection(self, x: Tensor, inside: bool = False) -> Projection:
        if self.memory and self.config.lbfgs:
            raise RuntimeError(
                "a tensor-parallel layer holds L-BFGS pairs, which it cannot compute with; set "
                "lbfgs=False in the config"
            )
        kind = RowShard if self.splits_inputs else ColumnShard
        bias = None if self.bias is None else _local(self.bias)
        weight = kind(_local(self.weight), self.shard)
        return Projection(weight, bias, self.gradient, None, self.gamma)

    def extra_repr(self) -> str:
        """Return sizes, the part that this rank holds, and the main settings."""
        end = self.shard.offset + self.shard.size
        return (
            f"{super().extra_repr()}, {'inputs' if self.splits_inputs else 'outputs'} "
            f"{self.shard.offset} to {end}, builder={self.config.builder}, "
            f"scope={self.config.scope}"
        )


class TensorParallelCoupling(pairing.Coupling):
    """A query and a key layer; each rank holds whole key-value groups of their heads."""

    def _outputs(
        self, layer: SharpenedLayer, x: Tensor, decided: list[FixedUpdate | None] | None
    ) -> list[Tensor | None]:
        return _sharpen((self.query, self.key), x, (self.heads, self.kv_heads), held=decided)


def _sharpen(
    layers: tuple[Any, ...],
    x: Tensor,
    heads: tuple[int, int] | None = None,
    given: Given = NOTHING,
    held: list[FixedUpdate | None] | None = None,
) -> list[Tensor | None]:
    """Return outputs of one layer, or of a coupled query and key layer, for the same x.

    Args:
        layers: one :class:`TensorParallelLinear`, or two that split their outputs.
        x: as the base layers take it.
        heads: query and key-value heads of coupled layers.
        given, held: as for :func:`vps.functional.sharpen`.

    Raises:
        TypeError: x is no plain floating-point tensor.
        ValueError: x has another number of features than this rank takes.
        RuntimeError: a layer holds L-BFGS pairs, or a backend other than torch was asked for.
    """
    first, part = layers[0], _own_input(layers[0], x)
    both = tuple(layer.projection(part) for layer in layers)
    ys = sharpen(part, both, first.config, heads=heads, state=first.state, given=given, held=held)
    each = zip(layers, ys, strict=True)
    return [None if y is None else _own_output(layer, y) for layer, y in each]


def pair(
    query: TensorParallelLinear, key: TensorParallelLinear, heads: int, kv_heads: int
) -> TensorParallelCoupling | str:
    """Return the coupling of two layers, or why they are not coupled."""
    if query.splits_inputs or key.splits_inputs:
        return "they split their inputs over ranks"
    if query.shard.group is not key.shard.group and query.shard.group != key.shard.group:
        return "they are split over different ranks"
    size = key.out_features // kv_heads
    whole = [bound * (heads // kv_heads) for bound in key.shard.bounds]
    if any(bound % size for bound in key.shard.bounds) or whole != list(query.shard.bounds):
        return "the ranks do not hold whole key-value heads"
    return TensorParallelCoupling(query, key, heads, kv_heads)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return whether transformers' tensor parallelism replaced the forward of ``module``."""
    forward = module.__dict__.get("forward")
    return "install_forward.<locals>" in getattr(forward, "__qualname__", "")


def recognise(module: nn.Module) -> Form | Refusal | None:
    """Return the form of a layer that transformers splits over ranks; ``None`` for any other."""
    if isinstance(module, TensorParallelLinear):
        return Form(module.form, TensorParallelLinear.sharpened)
    if not is_tensor_parallel(module):
        return None
    reason = why_not_sharpenable(module)
    if reason is not None:
        return Refusal(reason)
    return Form(_form(_style(module)), TensorParallelLinear.sharpened)


def _form(style: Any) -> str:
    return f"tensor parallel ({'row' if STYLES[type(style).__name__] else 'column'}-wise)"


def why_not_sharpenable(module: nn.Module) -> str | None:
    """Return why a tensor-parallel ``module`` cannot be sharpened, or ``None``."""
    if type(module) is not nn.Linear:
        return f"its type is {type(module).__name__}, expected exactly Linear"
    style = _style(module)
    name = type(style).__name__ if style is not None else _style_name(module)
    if style is None or name not in STYLES:
        return f"its tensor-parallel style is {name}, expected {' or '.join(STYLES)}"
    layouts = [str(getattr(style, f"{side}_layouts", None)) for side in ("input", "output")]
    if name == "RowwiseParallel" and layouts[1] != str(_replicated()):
        return f"its tensor-parallel style {name} gives {layouts[1]}, expected a whole output"
    if name == "ColwiseParallel" and layouts[0] != str(_replicated()):
        return f"its tensor-parallel style {name} takes {layouts[0]}, expected a whole input"
    if not getattr(style, "use_local_output", False):
        return f"its tensor-parallel style {name} gives DTensors, expected plain tensors"
    weight = module._parameters.get("weight")
    data: Any = None if weight is None else weight.data
    if data is None or type(data).__name__ != "DTensor":
        return f"its weight is a {type(data).__name__}, expected a DTensor"
    mesh, placements = data.device_mesh, data.placements
    if mesh.ndim != 1:
        return f"its weight is sharded over {mesh.ndim} mesh dimensions, expected 1"
    if not placements[0].is_shard(STYLES[name]) or type(placements[0]).__name__ != "Shard":
        return f"its weight is {placements[0]}, expected Shard(dim={STYLES[name]})"
    local = data.to_local()
    if type(local) is not Tensor or local.dtype not in FLOATING or data.dim() != 2:
        return f"this rank's weight is {type(local).__name__} of {local.dtype}, not a plain matrix"
    if local.device.type == "meta":
        return "its weight is on the meta device (offloaded or not yet loaded)"
    shard = _shard(module)
    if mesh.get_local_rank() != shard.rank or local.shape[STYLES[name]] != shard.size:
        return "its weight is not split over the ranks in their order"
    return None


def _style_name(module: nn.Module) -> str:
    """Return the name of the class that installed the forward of ``module``."""
    return str(getattr(module.__dict__["forward"], "__qualname__", "unknown")).split(".")[0]


def _style(module: nn.Module) -> Any:
    """Return the parallel style of transformers in the forward of ``module``, or ``None``."""
    forward = module.__dict__["forward"]
    if not inspect.isfunction(forward):  # another party wrapped it under the same name
        return None
    return inspect.getclosurevars(forward).nonlocals.get("self")


def _shard(module: nn.Module) -> Shard:
    """Return how the weight of ``module`` is split."""
    weight: Any = module._parameters["weight"]
    process_group = weight.device_mesh.get_group()
    ranks = dist.get_world_size(process_group)
    features = weight.shape[STYLES[type(_style(module)).__name__]]
    return Shard(process_group, dist.get_rank(process_group), split_evenly(features, ranks))


def _replicated() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _local(parameter: Any) -> Tensor:
    """Return this rank's part of a parameter, with its graph."""
    from torch.distributed.tensor import DTensor

    local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local


def _own_input(layer: TensorParallelLinear, x: Tensor) -> Tensor:
    """Return this rank's part of the base layer's input."""
    if type(x) is not Tensor and not isinstance(x, nn.Parameter):
        raise TypeError(f"a tensor-parallel layer takes a plain tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"a tensor-parallel layer takes floating-point x, got {x.dtype}")
    features = layer.in_features
    if layer.splits_inputs and layer.style.input_layouts != _replicated():
        features = layer.shard.size
    if x.shape[-1] != features:
        raise ValueError(
            f"a tensor-parallel layer takes x [..., {features}] on this rank, got {tuple(x.shape)}"
        )
    if features == layer.shard.size or not layer.splits_inputs:
        return x
    mesh: Any = layer.weight.device_mesh  # type: ignore[attr-defined]
    (part,), _ = layer.style.transform_inputs_pre_forward(layer, (x,), {}, mesh)
    return _local(part)


def _own_output(layer: TensorParallelLinear, y: Tensor) -> Tensor:
    """Return the output as the base layer returns it: gathered where its style gathers."""
    if layer.splits_inputs or layer.style.output_layouts != _replicated():
        return y
    mesh: Any = layer.weight.device_mesh  # type: ignore[attr-defined]
    gathered: Tensor = layer.style.transform_output_post_forward(layer, y, mesh)
    return gathered

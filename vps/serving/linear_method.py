"""Let a linear layer of vLLM multiply by ``torch.ops.vps.serve``.

The operator is opaque to vLLM's compiler, and finds the requests of a batch in the forward context.
The weight stays a plain matrix, which vLLM on a CPU would pack and drop, so the backends of
:func:`vps.vps_linear` compute as everywhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from vps.serving.requests import Fused, Run, runs, sharpen

if TYPE_CHECKING:
    from vps.serving.plugin import Sharpening

LIBRARY = torch.library.Library("vps", "FRAGMENT")
LIBRARY.define("serve(Tensor x, Tensor weight, Tensor? bias, str settings) -> Tensor")
CACHED = "vps_runs"
NEEDED = ("query_start_loc", "seq_lens")


@register_weight_loader_v2_supported_method
class Sharpened(UnquantizedLinearMethod):
    """How one layer multiplies: as vLLM does where the settings do not name the layer.

    Args:
        sharpening: the settings, and the layers found so far.
        prefix: the layer's name.
    """

    supports_pre_processed_weights = False

    def __init__(self, sharpening: Sharpening, prefix: str) -> None:
        super().__init__()
        self.sharpening = sharpening
        self.prefix = prefix
        self.settings: str | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *arguments: Any,
        **attributes: Any,
    ) -> None:
        """Create the weights of a plain layer, and settle how its parts are sharpened."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, *arguments, **attributes
        )
        fused = self.sharpening.fuse(layer, self.prefix, output_partition_sizes)
        self.settings = None if fused is None else fused.to_json()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weight of a sharpened layer as it is."""
        self.sharpening.report()
        if self.settings is None:
            super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the output ``[..., d_out]`` for x ``[..., d_in]``."""
        if self.settings is None:
            return super().apply(layer, x, bias)
        return torch.ops.vps.serve(x, layer.weight, bias, self.settings)


def keeps_prompts_whole(engine: Any) -> bool:
    """Return whether the engine, a ``VllmConfig``, runs with vps's own scheduler."""
    from vps.serving.scheduler import Scheduler

    return engine.scheduler_config.scheduler_cls is not None and issubclass(
        engine.scheduler_config.get_scheduler_cls(), Scheduler
    )


def _serve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: str) -> Tensor:
    fused = Fused.from_json(settings)
    grouping = None if fused.config.scope == "token" else _runs(get_forward_context())
    y = sharpen(x.reshape(-1, x.shape[-1]), weight, bias, fused, grouping)
    return y.view(*x.shape[:-1], y.shape[-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, settings: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _runs(context: ForwardContext) -> list[Run] | None:
    """Find the requests of the batch, once a forward pass; ``None`` in a pass without any.

    Raises:
        RuntimeError: the attention backend does not say where requests start, or the batch holds a
            part of a prompt whose beginning was computed before.
    """
    if not context.attn_metadata:  # a pass that measures memory or warms up
        return None
    known, grouping = context.additional_kwargs.get(CACHED, (None, None))
    if known is context.attn_metadata:
        return grouping
    assert isinstance(context.attn_metadata, dict)  # micro-batches are refused
    kinds = context.attn_metadata.values()
    found = (kind for kind in kinds if all(hasattr(kind, name) for name in NEEDED))
    metadata = next(found, None)
    if metadata is None:
        names = sorted({type(kind).__name__ for kind in kinds})
        raise RuntimeError(
            "vps: scope='sequence' needs to know where requests start, which "
            f"{', '.join(names)} does not say; set scope to 'token'"
        )
    starts = metadata.query_start_loc
    lengths = starts.diff()
    if bool(((lengths > 1) & (metadata.seq_lens > lengths)).any()):
        raise RuntimeError(
            "vps: scope='sequence' was given a part of a prompt, whose beginning was computed "
            "before; set scope to 'token'"
        )
    grouping = runs(starts.tolist())
    context.additional_kwargs[CACHED] = context.attn_metadata, grouping
    return grouping


LIBRARY.impl("serve", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("vps::serve", _fake, lib=LIBRARY)

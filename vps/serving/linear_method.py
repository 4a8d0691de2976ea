"""How a linear layer of vLLM multiplies when it is sharpened: ``torch.ops.vps.serve``.

The operator is opaque to vLLM's compiler, and finds the requests of a batch in the forward context.
The weight stays a plain matrix (vLLM on a CPU would pack it and let it go), so the backends of
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

from vps.serving.grouping import Run, runs, sharpen
from vps.serving.parts import Fused

if TYPE_CHECKING:
    from vps.serving.plugin import Sharpening

LIBRARY = torch.library.Library("vps", "FRAGMENT")
LIBRARY.define("serve(Tensor x, Tensor weight, Tensor? bias, str settings) -> Tensor")
CACHED = "vps_runs"
NEEDED = ("query_start_loc", "seq_lens")


@register_weight_loader_v2_supported_method
class Sharpened(UnquantizedLinearMethod):
    """The method of one layer; a layer that the settings do not name multiplies as vLLM does.

    Args:
        sharpening: the settings, with what they have found so far.
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
        """As for a plain layer, and settle how its parts are sharpened."""
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
        """``[..., d_in]`` to ``[..., d_out]``."""
        if self.settings is None:
            return super().apply(layer, x, bias)
        return torch.ops.vps.serve(x, layer.weight, bias, self.settings)


def keeps_prompts_whole(engine: Any) -> bool:
    """Whether the engine, a ``VllmConfig``, runs with the scheduler of :mod:`vps.serving`."""
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
    """The requests of the batch, found once a forward pass; ``None`` in a pass without any.

    Raises:
        RuntimeError: an attention backend that does not say where requests start, or a part of a
            prompt whose beginning was computed before.
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

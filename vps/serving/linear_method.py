"""Let a linear layer of vLLM multiply by ``torch.ops.vps.serve``.

The operator is opaque to vLLM's compiler. It finds where the requests of a batch start in the
forward context, and with ``scope="prompt"`` which they are in the step of the model runner.
The weight stays a plain matrix, which vLLM on a CPU would pack and drop, so the backends of
:func:`vps.vps_linear` compute as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from vps.serving.requests import Decisions, Fused, Run, runs, sharpen

if TYPE_CHECKING:
    from vps.serving.plugin import Sharpening

LIBRARY = torch.library.Library("vps", "FRAGMENT")
LIBRARY.define("serve(Tensor x, Tensor weight, Tensor? bias, str settings) -> Tensor")
CACHED = "vps_runs"
DECISIONS = "vps_decisions"
NEEDED = ("query_start_loc", "seq_lens")
# The model runner and its scheduler's output for the step that runs; ``None`` in a step of its own.
STEPS: list[tuple[Any, Any] | None] = []


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


@cache
def follow_requests() -> None:
    """Let the operator know the requests of each step; what they decided ends with them."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def begin(runner: Any, scheduled: Any, *rest: Any) -> tuple[Any, Any]:
        runner.__dict__.setdefault(DECISIONS, Decisions()).finish(scheduled.finished_req_ids)
        return runner, scheduled

    def noting(function: Any, step: Callable[..., Any]) -> Any:
        @wraps(function)
        def noted(*arguments: Any, **options: Any) -> Any:
            STEPS.append(step(*arguments))
            try:
                return function(*arguments, **options)
            finally:
                STEPS.pop()

        return noted

    GPUModelRunner.execute_model = noting(GPUModelRunner.execute_model, begin)
    GPUModelRunner._dummy_run = noting(GPUModelRunner._dummy_run, lambda *rest: None)


def _serve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: str) -> Tensor:
    fused = Fused.from_json(settings)
    scope = fused.config.scope
    grouping = None if scope == "token" else _runs(get_forward_context(), scope)
    y = sharpen(x.reshape(-1, x.shape[-1]), weight, bias, fused, grouping)
    return y.view(*x.shape[:-1], y.shape[-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, settings: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _runs(context: ForwardContext, scope: str = "sequence") -> list[Run] | None:
    """Find the requests of the batch, once a forward pass; ``None`` in a pass without any.

    Raises:
        RuntimeError: the attention backend does not say where requests start, or the model runner
            which they are; or a part of a prompt came, whose beginning was computed before.
    """
    if not context.attn_metadata:  # a pass that measures memory or warms up
        return None
    known, grouping = context.additional_kwargs.get(CACHED, (None, None))
    if known is context.attn_metadata:
        return grouping
    grouping = _of_step() if scope == "prompt" else _of_metadata(context.attn_metadata)
    context.additional_kwargs[CACHED] = context.attn_metadata, grouping
    return grouping


def _of_step() -> list[Run] | None:
    """Return the runs of the requests, with what their prompts decided."""
    if not STEPS:
        raise RuntimeError(
            "vps: scope='prompt' needs to know the requests of a batch, which this model runner "
            "does not say; set scope to 'token'"
        )
    if STEPS[-1] is None:
        return None
    runner, scheduled = STEPS[-1]
    new = scheduled.scheduled_new_reqs
    starting = {request.req_id for request in new if request.num_computed_tokens == 0}
    decisions: Decisions = getattr(runner, DECISIONS)
    return decisions.runs(runner.input_batch.req_ids, scheduled.num_scheduled_tokens, starting)


def _of_metadata(attn_metadata: Any) -> list[Run]:
    """Return the runs of whole prompts and single tokens, by where requests start."""
    assert isinstance(attn_metadata, dict)  # micro-batches are refused
    kinds = attn_metadata.values()
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
    return runs(starts.tolist())


LIBRARY.impl("serve", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("vps::serve", _fake, lib=LIBRARY)

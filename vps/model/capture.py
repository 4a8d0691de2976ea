"""What passes through the sharpened layers in a forward and a backward pass (SPEC §8).

``w`` is the mean over counted tokens of a layer's output, ``g`` that of ``∂L/∂output``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vps import masking
from vps.algorithm.selection import accumulation_dtype
from vps.model.patching import sharpened_layers


class LayerCapture:
    """One layer's record.

    Args:
        outputs: outputs ``[..., d_out]``, one a call; empty unless ``tensors`` was asked for.
        gradients: ``∂L/∂output`` likewise, in the order of the backward pass.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Any] = {"output": 0, "gradient": 0}

    @property
    def output_mean(self) -> Tensor | None:
        """``w`` ``[d_out]`` over the counted tokens of all calls; ``None`` before the first."""
        return self._mean("output")

    @property
    def gradient_mean(self) -> Tensor | None:
        """``g`` ``[d_out]`` likewise; ``None`` where no backward pass has come through."""
        return self._mean("gradient")

    def _mean(self, kind: str) -> Tensor | None:
        total = self._sums.get(kind)
        if total is None:
            return None
        count = self._counts[kind]
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(1, count))

    def add(self, kind: str, values: Tensor, mask: Tensor | None) -> None:
        """Add ``values`` ``[..., d_out]`` of the tokens that ``mask`` ``[...]`` counts."""
        values = values.detach().reshape(-1, values.shape[-1])
        count: Any = len(values)
        if mask is not None:
            mask = mask.to(values.device).reshape(-1, 1)
            values, count = values.masked_fill(~mask, 0.0), mask.sum()
        total = values.sum(0, dtype=accumulation_dtype(values.dtype))
        before = self._sums.get(kind)
        self._sums[kind] = total if before is None else before + total
        self._counts[kind] = self._counts[kind] + count

    def clear(self) -> None:
        """Let go of everything."""
        self.__init__()  # type: ignore[misc]


@contextmanager
def capture(model: nn.Module, *, tensors: bool = False) -> Iterator[dict[str, LayerCapture]]:
    """Record outputs and output gradients of every sharpened layer that runs inside.

    Gradients come also where all parameters are frozen; no parameter is changed, and those that
    require a gradient get theirs as ever. Several passes inside add up to one mean. Under gradient
    checkpointing a block that runs again in the backward pass is recorded once.

    Args:
        model: a sharpened model.
        tensors: also keep outputs and gradients whole; they are views where that is possible,
            but keep every one of them in memory to the end of the block.

    Yields:
        :class:`LayerCapture` by name of the layer, emptied when the block ends: read or copy
        inside.

    A model that ``torch.compile`` compiles inside is recorded between its graphs; what was compiled
    before may leave out hooks, and then the block ends with an error.

    Raises:
        ValueError: no sharpened layer in the model.
        RuntimeError: at the end of a block in which no layer was recorded.

    Source: SPEC §8 and §10.
    """
    layers = sharpened_layers(model)
    if not layers:
        raise ValueError("vps.capture: the model holds no sharpened layer; call vps.patch first")
    captured = {name: LayerCapture() for name in layers}
    handles: list[RemovableHandle] = []
    for name, layer in layers.items():
        hook = partial(_record, captured[name], handles, tensors)
        handles.append(layer.register_forward_hook(hook))
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if isinstance(embeddings, nn.Module):  # where a reentrant checkpoint has to see it
        handles.append(embeddings.register_forward_hook(_begin_gradient))
    try:
        yield captured
        if all(record.output_mean is None for record in captured.values()):
            raise RuntimeError(
                "vps.capture: no sharpened layer was recorded; run the model inside the block, and "
                "if it was compiled by torch.compile before, which leaves out hooks that come "
                "later, run it uncompiled or after torch.compiler.reset()"
            )
    finally:
        for handle in handles:
            handle.remove()
        for record in captured.values():
            record.clear()


def _begin_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook: a frozen module's output is where the backward pass ends."""
    if torch.is_grad_enabled() and not output.requires_grad and output.is_floating_point():
        output.requires_grad_()


def _record(
    record: LayerCapture,
    handles: list[RemovableHandle],
    tensors: bool,
    layer: nn.Module,
    args: tuple[Any, ...],
    y: Tensor,
) -> None:
    """Forward hook of a sharpened layer."""
    _begin_gradient(layer, args, y)
    mask = masking.token_dims(args[0] if args else y)[1]
    # A checkpoint runs its block again inside the backward pass.
    if torch._C._current_graph_task_id() == -1:
        record.add("output", y, mask)
        if tensors:
            record.outputs.append(y.detach())
    if not (torch.is_grad_enabled() and y.requires_grad):
        return

    def backward(g: Tensor) -> None:
        record.add("gradient", g, mask)
        if tensors:
            record.gradients.append(g.detach())

    handles.append(y.register_hook(backward))


# As torch.compiler.disable does, which would import torch._dynamo with vps (1 s): the hooks run
# between compiled graphs.
_begin_gradient._torchdynamo_disable = True  # type: ignore[attr-defined]
_record._torchdynamo_disable = True  # type: ignore[attr-defined]

"""Record outputs and gradients of the sharpened layers in a pass (SPEC §8 and §10).

``w`` is the mean over counted tokens of a layer's output, and ``g`` the mean of ``∂L/∂output``. A
refinement lends the layers a gradient flag, which turns the hybrid builder to SC, and an L-BFGS
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vps import masking
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.selection import accumulation_dtype
from vps.model.patching import policy_state, sharpened_layers

LENT = ("config", "gradient", "memory", "gamma")


class LayerCapture:
    """The record of one layer.

    Attributes:
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
        """Return ``w`` ``[d_out]`` over all calls, or ``None`` before the first."""
        return self._mean("output")

    @property
    def gradient_mean(self) -> Tensor | None:
        """Return ``g`` ``[d_out]`` over all calls, or ``None`` before a backward pass."""
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
        """Empty the record."""
        self.__init__()  # type: ignore[misc]


@contextmanager
def capture(model: nn.Module, *, tensors: bool = False) -> Iterator[dict[str, LayerCapture]]:
    """Record outputs and output gradients of every sharpened layer that runs inside.

    Gradients are recorded even if all parameters are frozen. No parameter is changed, and those
    that require a gradient still get it. Several passes inside give one mean. Under gradient
    checkpointing a block that runs again in the backward pass is recorded once.

    Args:
        model: a sharpened model.
        tensors: also keep outputs and gradients whole. All of them stay in memory until the block
            ends, as views where that is possible.

    Yields:
        A ``LayerCapture`` for each layer, by its name. The records are emptied when the block ends,
        so read or copy them inside.

    A model that ``torch.compile`` compiles inside is recorded between its graphs. A model compiled
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
    if isinstance(embeddings, nn.Module):  # a reentrant checkpoint must see a gradient here
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
    """Let the backward pass end at the output of a frozen module, as a forward hook."""
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
    """Record a call of a sharpened layer, as a forward hook."""
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


# The hooks run between compiled graphs. torch.compiler.disable sets this too, but imports
# torch._dynamo (1 s).
_begin_gradient._torchdynamo_disable = True  # type: ignore[attr-defined]
_record._torchdynamo_disable = True  # type: ignore[attr-defined]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` in evaluation mode, and put everything back when the block ends.

    This covers every layer's config, flag, memory and γ, entropy and history, each parameter's
    ``requires_grad`` and each module's mode. A frozen parameter gets no ``.grad``.

    Raises:
        ValueError: no sharpened layer in the model, or layers of differently patched models.
    """
    state = policy_state(model)
    policy = state.entropy, state.outcomes
    layers = layers_of(model)
    lent = [{name: vars(layer)[name] for name in LENT if name in vars(layer)} for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
        for layer, attributes in zip(layers, lent, strict=True):
            for name in LENT:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)
        state.entropy, state.outcomes = policy


def start_over(model: nn.Module) -> None:
    """Clear history, entropy, gradients and L-BFGS, as before a new prompt."""
    policy_state(model).reset()
    for layer in layers_of(model):
        layer.gradient = False
        layer.memory = CurvatureMemory() if layer.config.lbfgs else None


def take_gradient(model: nn.Module, logits_of: Any, ids: Tensor, count: int) -> float:
    """Run a backward pass from the last ``count`` tokens, teacher-forced.

    Each layer keeps a flag and an L-BFGS record of it.

    Args:
        model: frozen, in evaluation mode.
        logits_of: a function of token ids and a number n that returns logits ``[1, ≥ n, V]`` of
            the last n tokens.
        ids: ``[1, T]``.
        count: number of tokens in the loss, less than T.

    Returns:
        The mean cross-entropy of these tokens, in nats.
    """
    with capture(model) as captured:
        logits = logits_of(ids, count + 1)[0, -count - 1 : -1]
        loss = F.cross_entropy(logits.float(), ids[0, -count:].to(logits.device))
        loss.backward()
        for name, layer in sharpened_layers(model).items():
            record, held = captured[name], cast(Any, layer)
            output, gradient = record.output_mean, record.gradient_mean
            held.gradient = gradient is not None
            if held.memory is not None and output is not None and gradient is not None:
                held.memory.record(output, gradient)
    return float(loss.detach())


def forget_gradients(model: nn.Module) -> None:
    """Take the flags back, which hold for one answer; the L-BFGS memory stays for the prompt."""
    for layer in layers_of(model):
        layer.gradient = False


def builder_in_use(model: nn.Module) -> str:
    """Return ``"sk"``, ``"sc"`` or ``"random"``, or ``"mixed"`` where layers differ."""
    used = set()
    for layer in layers_of(model):
        hybrid = layer.config.builder == "hybrid"
        used.add(("sc" if layer.gradient else "sk") if hybrid else layer.config.builder)
    return used.pop() if len(used) == 1 else "mixed"


def pairs_held(model: nn.Module) -> float:
    """Return the number of L-BFGS pairs, averaged over layers."""
    held = [len(layer.memory or ()) for layer in layers_of(model)]
    return sum(held) / len(held)


def layers_of(model: nn.Module) -> list[Any]:
    """Return the sharpened layers of ``model``."""
    return list(sharpened_layers(model).values())

"""What a refinement lends to the layers of a model and takes back (SPEC §8 and §10).

Each layer gets a gradient flag, which turns the hybrid builder to SC, and an L-BFGS memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm.lbfgs import CurvatureMemory
from vps.model.capture import capture
from vps.model.patching import policy_state, sharpened_layers

LENT = ("config", "gradient", "memory", "gamma")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` in evaluation mode, and put everything back when the block ends.

    That is: every layer's config, flag and memory, entropy and history, each parameter's
    ``requires_grad`` and each module's mode. A frozen parameter gets no ``.grad``.

    Raises:
        ValueError: no sharpened layer in it, or layers of differently patched models.
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
    """One backward pass from the last ``count`` tokens, teacher-forced; the layers keep of it a
    flag and an L-BFGS record.

    Args:
        model: frozen, in evaluation mode.
        logits_of: from token ids and a number n to logits ``[1, ≥ n, V]`` of the last n tokens.
        ids: ``[1, T]``.
        count: of tokens in the loss, less than T.

    Returns:
        Their mean cross-entropy, in nats a token.
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
    """Take the flags back, which are for one answer; the L-BFGS memory stays for the prompt."""
    for layer in layers_of(model):
        layer.gradient = False


def builder_in_use(model: nn.Module) -> str:
    """``"sk"``, ``"sc"`` or ``"random"``; ``"mixed"`` where layers differ."""
    used = set()
    for layer in layers_of(model):
        hybrid = layer.config.builder == "hybrid"
        used.add(("sc" if layer.gradient else "sk") if hybrid else layer.config.builder)
    return used.pop() if len(used) == 1 else "mixed"


def pairs_held(model: nn.Module) -> float:
    """L-BFGS pairs, averaged over layers."""
    held = [len(layer.memory or ()) for layer in layers_of(model)]
    return sum(held) / len(held)


def layers_of(model: nn.Module) -> list[Any]:
    """The sharpened layers."""
    return list(sharpened_layers(model).values())

"""The loss of an example: negative log-likelihood of its scored tokens, in nats."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps.fitting.examples import Encoded


def nll(model: Any, example: Encoded) -> Tensor:
    """Sum over the scored tokens, without dims; the head runs for them alone where it can."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = example.scored + 1
    logits = model(input_ids=example.ids, **options).logits[0, -example.scored - 1 : -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, example.ids[0, -example.scored :], reduction="sum")


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Blocks of the model run again in the backward pass instead of keeping what they need.

    transformers does so in training mode only; the modules that switch it on are put into that mode
    by themselves, so that nothing inside them drops out.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        yield
        return
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    modules = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    before = [{n: vars(m)[n] for n in names if n in vars(m)} for m in modules]
    try:
        for module in modules:
            for name, value in zip(names, (True, _checkpoint, True), strict=True):
                vars(module)[name] = value
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)


def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next(model.parameters()).device

"""The loss of an example: negative log-likelihood of its scored tokens, in nats."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vps.fitting.examples import Encoded

UNSCORED = -100
BUNDLE_TOKENS = 512  # of a pass, padding included: no more memory than one long example takes
KEPT_TOKENS = 160  # of a pass that keeps what its backward pass needs: faster, for some memory


def nll(model: Any, example: Encoded) -> Tensor:
    """Sum over the scored tokens, without dims."""
    return nlls(model, [example])[0]


def nlls(model: Any, examples: Sequence[Encoded]) -> Tensor:
    """Sum over the scored tokens of each example ``[B]``, by one forward pass.

    They are padded on the left, as for generation, so that their ends stand together; the head runs
    for the scored tokens alone where it can.
    """
    accepted = inspect.signature(model.forward).parameters
    last = max(each.scored for each in examples)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = last + 1
    rows = [each.ids[0] for each in examples]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    if len({len(row) for row in rows}) > 1:
        ones = [torch.ones_like(row) for row in rows]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")
        options["attention_mask"] = mask
        if "position_ids" in accepted:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)
    logits = model(input_ids=ids, **options).logits[:, -last - 1 : -1]
    labels = ids[:, -last:].clone()
    for row, example in zip(labels, examples, strict=True):
        row[: last - example.scored] = UNSCORED
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(wide.mT, labels, ignore_index=UNSCORED, reduction="none")
    return each.sum(1)


def padded(examples: Sequence[Encoded]) -> int:
    """Tokens of a pass of these examples."""
    return len(examples) * max(each.ids.shape[1] for each in examples)


def bundles(
    examples: Sequence[Encoded], scope: str, tokens: int = BUNDLE_TOKENS
) -> list[list[int]]:
    """Places of the examples that share a pass, like lengths together; in scope "batch" none do.

    One example may have more than ``tokens``; several, padded, have at most as many.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(examples)), key=lambda at: examples[at].ids.shape[1]):
        length = examples[place].ids.shape[1]  # the longest so far
        if scope != "batch" and found and (len(found[-1]) + 1) * length <= tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found


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

"""Answer choice questions by the paper's loop with the gold in it, and resample its selection.

Algorithm 3 with an answer by likelihood: the plain model answers, then each iteration sets the
entropy of the next token, takes the gradient of the gold option (SC, L-BFGS), answers sharpened,
and tells the policy whether the verification loss fell (SPEC §10). The paper compares on the
questions of smallest confidence margin of the plain model: ``"uncertain"``, by its distance from 0,
or ``"hardest"``, by the margin of the right option, which knows the labels. What a change without
meaning gains there is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reproduce import scoring
from vps import masking
from vps.evaluation.confidence import ORDERS
from vps.model.capture import forget_gradients, start_over, take_gradient
from vps.model.generation import token_entropy
from vps.model.patching import disabled, policy_state
from vps.refine import GOLD_TOKENS

ITERATIONS = 3  # with the plain answer
RESAMPLES = 50
KEPT = 3  # one of so many questions is kept


@dataclass(frozen=True)
class Answer:
    """Hold one answer: whether it is right, its margin in nats, and the verification loss."""

    right: bool
    margin: float
    loss: float


def refined(
    model: Any, tokenizer: Any, context: str, document: Mapping[str, Any], verifier: Any
) -> list[Answer]:
    """Answer one question ``ITERATIONS`` times, the plain model first.

    Args:
        model: a patched model, frozen and in evaluation mode.
        tokenizer: its tokenizer.
        context: the question as it is put.
        document: its ``choices`` and the index ``gold`` of the right one.
        verifier: a :class:`vps.verify.CompositeVerifier`.
    """
    choices, gold = document["choices"], document["gold"]
    row = scoring.encoded(tokenizer, context, choices)
    prompt = row.tokens[: row.context]
    state = policy_state(model)

    def answer() -> Answer:
        (scores,) = scoring.log_likelihoods(model, [row])
        margin = scoring.margin(scores, gold)
        given = choices[max(range(len(scores)), key=scores.__getitem__)]
        return Answer(margin > 0, margin, verifier(given, choices[gold]).total)

    def logits(ids: Tensor, count: int) -> Tensor:
        marks = (torch.arange(ids.shape[1]) < row.context).expand(ids.shape)
        with masking.prompt(marks.to(model.device)):
            return model(ids.to(model.device), use_cache=False, logits_to_keep=count).logits

    start_over(model)
    with disabled(model):
        found = [answer()]
    label = [token for token, _ in row.options[gold]]
    for _ in range(1, ITERATIONS):
        state.set_entropy(None)
        with torch.no_grad():
            entropy = token_entropy(logits(torch.tensor([prompt]), 1)[0, -1])
        state.set_entropy(float(entropy.nan_to_num(0.0)))
        text = torch.tensor([[*prompt, *label]])
        take_gradient(model, logits, text, min(GOLD_TOKENS, len(label)))
        found.append(answer())
        state.record(found[-1].loss < found[-2].loss)
        forget_gradients(model)
    return found


def best(answers: Sequence[Answer]) -> Answer:
    """Return the answer of lowest loss, the earliest of equals: the labels choose."""
    return min(answers, key=lambda each: each.loss)


@dataclass(frozen=True)
class Gain:
    """Say what an arm gains on the questions kept, in accuracy, over resamples of the pool.

    Args:
        mean: of the resamples.
        low, high: their 2.5 % and 97.5 % quantiles.
    """

    mean: float
    low: float
    high: float


def resampled(
    margins: Sequence[float], arms: Mapping[str, Sequence[float]], order: str, *, seed: int = 0
) -> dict[str, Gain]:
    """Draw the pool anew, keep a third of it, and compare there, ``RESAMPLES`` times.

    Args:
        margins: of the plain model, of every question of the pool.
        arms: of each arm 1 where it answers a question right, else 0.
        order: ``"uncertain"`` or ``"hardest"``, which questions are kept.
        seed: of the resamples, which all arms share.
    """
    plain = np.asarray(margins, dtype=float)
    values = {name: np.asarray(each, dtype=float) for name, each in arms.items()}
    return _gains(
        plain, lambda name, kept, generator: values[name][kept], list(values), order, seed
    )


def without_meaning(
    margins: Sequence[float],
    spread: float,
    order: str,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> dict[str, Gain]:
    """Return what Gaussian noise on the margins gains: in the last look, and in the best of all.

    Args:
        margins: of the plain model, of every question of the pool.
        spread: standard deviation of the noise, in nats.
        order: as for :func:`resampled`.
        iterations: looks, the plain answer among them.
        seed: of resamples and noise.
    """
    plain = np.asarray(margins, dtype=float)

    def drawn(name: str, kept: Any, generator: Any) -> Any:
        looks = plain[kept] + generator.normal(0, spread, (iterations - 1, len(kept)))
        if name == "last":
            return looks[-1] > 0
        return (looks > 0).any(0) | (plain[kept] > 0)

    return _gains(plain, drawn, ["last", "best"], order, seed)


def _gains(
    plain: Any, right: Callable[[str, Any, Any], Any], names: Sequence[str], order: str, seed: int
) -> dict[str, Gain]:
    if order not in ORDERS:
        raise ValueError(f"resampled: order must be one of {', '.join(ORDERS)}, got {order!r}")
    generator = np.random.default_rng(seed)
    keys = np.abs(plain) if order == "uncertain" else plain
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(RESAMPLES):
        pool = generator.integers(0, len(plain), len(plain))
        kept = pool[np.argsort(keys[pool], kind="stable")[: max(1, len(pool) // KEPT)]]
        for name in names:
            gain = right(name, kept, generator).mean() - (plain[kept] > 0).mean()
            found[name].append(float(gain))
    return {
        name: Gain(float(np.mean(each)), *map(float, np.quantile(each, (0.025, 0.975))))
        for name, each in found.items()
    }

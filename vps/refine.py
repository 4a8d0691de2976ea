"""Refine an answer: answer, verify, adapt the sharpening, answer again (SPEC §10).

``ŷ₀`` comes from the plain model. Iteration t sets the entropy of the next token, takes the
gradient of the gold answer's loss (SC, L-BFGS), answers ``ŷ_t`` sharpened, and tells the policy
whether the verification loss fell.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vps import masking
from vps.backends import dispatch
from vps.backends.call import Kind
from vps.config import VPSConfig
from vps.model.capture import (
    builder_in_use,
    forget_gradients,
    layers_of,
    pairs_held,
    restored,
    start_over,
    take_gradient,
)
from vps.model.generation import (
    EntropyProcessor,
    Generation,
    encode,
    generate,
    input_device,
    sample,
    token_entropy,
)
from vps.model.patching import disabled, set_config, shared_state
from vps.model.statistics import observe
from vps.verify import CompositeVerifier, Losses
from vps.verify.composite import DEFAULT_WEIGHTS, check_weights

GOLD_TOKENS = 8
KEEP = ("best", "last")
WITHOUT_GOLD = ("self_consistency", "units")


@dataclass(frozen=True)
class Iteration:
    """One answer and how it was made; iteration 0 is the plain model's answer.

    Args:
        index: t.
        text: the answer ŷ_t.
        tokens: number of its tokens.
        losses: parts and total of the verification loss; ``None`` if nothing was verified.
        improved: whether the loss fell below the loss before; ``None`` for iteration 0.
        samples: the answers drawn for self-consistency.
        entropy: ℋ of the first new token, in nats.
        sigma: σ that the policy found for the prompt with that ℋ, averaged over layers; 0 in
            iteration 0.
        gamma: γ that it decided, likewise.
        rank: the rank that it decided, likewise.
        builder: ``"base"`` in iteration 0, else ``"sk"``, ``"sc"``, ``"random"``, or ``"mixed"`` if
            some layers had no gradient.
        surrogate_loss: cross-entropy of the gold tokens in nats a token, or ``None``.
        pairs: L-BFGS pairs, averaged over layers.
    """

    index: int
    text: str
    tokens: int
    losses: Losses | None = None
    improved: bool | None = None
    samples: tuple[str, ...] = ()
    entropy: float | None = None
    sigma: float = 0.0
    gamma: float = 0.0
    rank: float = 0.0
    builder: str = "base"
    surrogate_loss: float | None = None
    pairs: float = 0.0


@dataclass(frozen=True)
class RefineResult:
    """The result of :func:`refine`.

    Args:
        answer: the text kept.
        chosen: index of the iteration that gave it.
        keep: ``"best"`` or ``"last"``.
        used_labels: whether the gold answer was looked at. If so, accuracy of ``answer`` on the
            same gold is not accuracy.
        iterations: all iterations.
    """

    answer: str
    chosen: int
    keep: str
    used_labels: bool
    iterations: tuple[Iteration, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return asdict(self)


def refine(
    model: Any,
    tokenizer: Any,
    prompt: str,
    gold: str | None = None,
    *,
    iterations: int = 3,
    keep: str = "best",
    surrogate: bool = True,
    samples: int = 0,
    weights: Mapping[str, float] | None = None,
    config: VPSConfig | None = None,
    max_new_tokens: int = 128,
    chat: bool = True,
    temperature: float = 0.7,
    timeout: float = 2.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> RefineResult:
    """Answer ``prompt``, verify, adapt the sharpening and answer again.

    With ``gold`` the answer is steered by it, and the result says so in ``used_labels``. Without it
    the plain model's answer comes back, unless ``samples`` asks to judge by the agreement of
    sampled answers and their units alone. The model comes back bit for bit as it was, with its
    config, policy state and requires_grad, also after an exception. No other thread may run it
    meanwhile.

    Args:
        model: a sharpened Hugging Face causal language model.
        tokenizer: its tokenizer.
        prompt: the question, put into the chat template unless ``chat`` is false.
        gold: the reference answer or solution, whose last number, unit or expression counts.
        iterations: T, the number of answers with the plain answer; 1 gives the plain answer.
        keep: ``"best"`` for the lowest loss (the earliest of equals), or ``"last"``.
        surrogate: take the gradient of the gold's cross-entropy. The whole gold follows the prompt,
            and its last eight tokens count.
        samples: answers drawn in each iteration for self-consistency, 0 or at least 2.
        weights: weights of the parts of the loss, as for :class:`vps.verify.CompositeVerifier`.
        config: a config to use instead of the layers' own, with the same target modules.
        max_new_tokens: most new tokens of an answer.
        chat: put the prompt into the tokenizer's chat template, where there is one.
        temperature: temperature of the samples, positive; answers themselves are greedy.
        timeout: seconds for one verification.
        seed: seed of the samples, the same in every iteration.
        progress: a function that is called with the name of each step as it begins.

    Returns:
        The answer that is kept, and all iterations.

    Raises:
        TypeError: prompt or gold is no string.
        ValueError: an argument is out of range (the message names it), or the model has no
            sharpened layer.
        RuntimeError: a backend was asked for that cannot compute what the run needs.
        ImportError: verification needs a package of the extra ``verify``.

    Source: SPEC §10; the paper, algorithm 3.
    """
    _check(prompt, gold, iterations, keep, samples, temperature)
    state = shared_state(model, "vps.refine")
    refining = iterations >= 2 and (gold is not None or samples > 0)
    verifier = CompositeVerifier(_usable(weights, gold), timeout=timeout) if refining else None
    inputs = encode(tokenizer, prompt, chat)
    run = _Run(model, tokenizer, inputs, max_new_tokens, samples, seed, temperature)
    say = progress or (lambda message: None)
    with restored(model):
        if config is not None:
            set_config(model, config)
        if gold is not None and surrogate and iterations > 2:  # two passes make a pair
            _check_backend(model)
        start_over(model)
        say("answering, plain")
        with disabled(model):
            answer, drawn = run.answer()
        if verifier is None:
            first = Iteration(0, answer.text, len(answer.tokens))
            return RefineResult(answer.text, 0, keep, False, (first,))
        losses = verifier(answer.text, gold, drawn or None)
        done = [Iteration(0, answer.text, len(answer.tokens), losses, samples=drawn)]
        for index in range(1, iterations):
            say(f"iteration {index} of {iterations - 1}")
            entropy, observed = run.look()
            state.set_entropy(entropy)
            loss = run.surrogate(gold) if gold is not None and surrogate else None
            decided = [observation.decided() for observation in observed]
            builder, pairs = builder_in_use(model), pairs_held(model)
            answer, drawn = run.answer([EntropyProcessor(model)])
            losses = verifier(answer.text, gold, drawn or None)
            before = done[-1].losses
            assert before is not None
            improved = losses.total < before.total
            state.record(improved)
            forget_gradients(model)
            done.append(
                Iteration(
                    index=index,
                    text=answer.text,
                    tokens=len(answer.tokens),
                    losses=losses,
                    improved=improved,
                    samples=drawn,
                    entropy=entropy,
                    sigma=_mean([layer.sigma for layer in decided]),
                    gamma=_mean([layer.gamma for layer in decided]),
                    rank=_mean([layer.rank for layer in decided]),
                    builder=builder,
                    surrogate_loss=loss,
                    pairs=pairs,
                )
            )
    totals = [entry.losses.total for entry in done if entry.losses is not None]
    chosen = totals.index(min(totals)) if keep == "best" else len(done) - 1
    return RefineResult(done[chosen].text, chosen, keep, gold is not None, tuple(done))


@dataclass(frozen=True)
class _Run:
    """The model passes of one refinement."""

    model: Any
    tokenizer: Any
    inputs: dict[str, Tensor]
    max_new_tokens: int
    samples: int
    seed: int
    temperature: float

    def answer(self, processors: Any = ()) -> tuple[Generation, tuple[str, ...]]:
        """Return the greedy answer and the samples, each begun with the same entropy."""
        common = (self.model, self.tokenizer, self.inputs, self.max_new_tokens)
        state = shared_state(self.model, "vps.refine")
        entropy = state.entropy
        answer = generate(*common, processors=processors)
        drawn: list[str] = []
        if self.samples:
            state.set_entropy(entropy)
            drawn = sample(
                *common, self.samples, seed=self.seed, temperature=self.temperature,
                processors=processors,
            )  # fmt: skip
        return answer, tuple(drawn)

    def look(self) -> tuple[float, list[Any]]:
        """Return ℋ after the prompt, computed without an entropy, and what the layers saw."""
        shared_state(self.model, "vps.refine").set_entropy(None)
        with torch.no_grad(), observe(self.model) as observed:
            logits = self.logits(self.inputs["input_ids"], 1, self.inputs["attention_mask"])
            entropy = token_entropy(logits[0, -1])
        return float(entropy.nan_to_num(0.0)), observed

    def surrogate(self, gold: str) -> float | None:
        """Return the cross-entropy of the gold's last tokens, or ``None`` without tokens.

        The layers take note of its gradient.
        """
        ids = self.tokenizer(gold, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.numel() == 0:
            return None
        count = min(GOLD_TOKENS, ids.shape[1])
        with torch.inference_mode(False), torch.enable_grad():
            text = torch.cat([self.inputs["input_ids"], ids.long()], 1)
            return take_gradient(self.model, self.logits, text, count)

    def logits(self, ids: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
        """Return logits ``[1, ≥ count, V]`` of the last tokens."""
        device = input_device(self.model)
        arguments: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
        if mask is not None:
            arguments["attention_mask"] = mask.to(device)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = count
        is_prompt = torch.arange(ids.shape[1], device=device) < self.inputs["input_ids"].shape[1]
        with masking.prompt(is_prompt.expand(ids.shape)):
            logits: Tensor = self.model(**arguments).logits
        return logits


def _check(
    prompt: str, gold: str | None, iterations: int, keep: str, samples: int, temperature: float
) -> None:
    for name, text in (("prompt", prompt), ("gold", gold)):
        if not isinstance(text, str) and (name == "prompt" or text is not None):
            raise TypeError(f"vps.refine: {name} must be a str, got {type(text).__name__}")
        if text is not None and not text.strip():
            raise ValueError(f"vps.refine: {name} must hold text, got {text!r}")
    for name, number, low in (("iterations", iterations, 1), ("samples", samples, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise ValueError(f"vps.refine: {name} must be an integer ≥ {low}, got {number!r}")
    if samples == 1:
        raise ValueError("vps.refine: samples must be 0 or at least 2, got 1")
    if keep not in KEEP:
        raise ValueError(f"vps.refine: keep must be one of {KEEP}, got {keep!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"vps.refine: temperature must be positive, got {temperature!r}")


def _usable(weights: Mapping[str, float] | None, gold: str | None) -> Mapping[str, float] | None:
    """Return the weights; without a gold, only of the parts that need none."""
    if gold is not None:
        return weights
    checked = check_weights(DEFAULT_WEIGHTS if weights is None else weights)
    usable = {name: checked[name] for name in WITHOUT_GOLD if name in checked}
    if not usable:
        raise ValueError(
            f"vps.refine: without gold, weights must name one of {WITHOUT_GOLD}, "
            f"got {tuple(checked)}"
        )
    return usable


def _check_backend(model: Any) -> None:
    if any(layer.config.lbfgs for layer in layers_of(model)):
        dispatch.asked(Kind("cpu", torch.float32, has_pairs=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class _Refine(ModuleType):
    """The module, and the function ``vps.refine()`` that has its name."""

    __call__ = staticmethod(refine)


__signature__ = inspect.signature(refine)
sys.modules[__name__].__class__ = _Refine

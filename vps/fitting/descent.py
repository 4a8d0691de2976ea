"""Fit a candidate by few steps of Adam, stopped early by examples of their own."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vps.fitting.candidates import Candidate
from vps.fitting.examples import Encoded
from vps.masking import prompt

UNSCORED = -100
BUNDLE_TOKENS = 512  # of a pass, padding included: no more memory than one long example takes
KEPT_TOKENS = 160  # of a pass that keeps what its backward pass needs: faster, for some memory


@dataclass(frozen=True)
class Options:
    """How to fit, the same for every candidate.

    Args:
        steps: most steps of Adam.
        batch_size: examples a step.
        learning_rates: rates of Adam; each is tried, and the one that stops lowest is kept.
        every: steps from one look at the stopping examples to the next.
        patience: looks without a new lowest loss after which to stop.
        seed: seed of the order of the examples.
    """

    steps: int = 16
    batch_size: int = 6
    learning_rates: tuple[float, ...] = (0.1,)
    every: int = 4
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"calibrate: {name} must be an integer ≥ 1, got {value!r}")
        rates = self.learning_rates
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)):
                raise TypeError(f"calibrate: learning_rate must be a number, got {rate!r}")
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"calibrate: learning_rate must be positive, got {rate!r}")
        if not rates:
            raise ValueError("calibrate: learning_rate must be at least one number, got none")

    @property
    def looks(self) -> int:
        """Count the looks at the stopping examples, at most, for one candidate."""
        return len(self.learning_rates) * (1 + -(-self.steps // self.every))


@dataclass
class Fit:
    """Hold what came of fitting one candidate.

    Args:
        values: of its parameters, those of the lowest loss.
        learning_rate: that of the values.
        step: at which they were; 0 where no step made the loss lower.
        loss: nll per token of the stopping examples with the values.
        plain: that of the plain model.
        steps: taken, over all learning rates.
        curves: by learning rate, ``(step, loss)`` of every look.
        seconds: wall-clock time.
    """

    values: list[list[float]] = field(default_factory=list)
    learning_rate: float = 0.0
    step: int = 0
    loss: float = math.inf
    plain: float = math.nan
    steps: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0


Save = Callable[[dict[str, Any]], None]


def fit(
    model: Any,
    candidate: Candidate,
    examples: Sequence[Encoded],
    stop: Sequence[Encoded],
    options: Options,
    plain: float,
    *,
    advance: Callable[[], None] = lambda: None,
    state: dict[str, Any] | None = None,
    save: Save = lambda state: None,
) -> Fit:
    """Fit ``candidate``, which then holds its best numbers.

    Args:
        model: patched, frozen, in evaluation mode.
        candidate: what is fitted; all else is frozen.
        examples: to take gradients of.
        stop: to stop by.
        options: the rest.
        plain: nll per token of ``stop`` by the plain model, which is that of the first numbers.
        advance: called after every look at the stopping examples.
        state: of ``save``, to go on from: the same numbers come out as without the break.
        save: called after every look with what is needed to go on, plain values for JSON.
    """
    start = time.perf_counter()
    initial = candidate.state()
    found, place, resumed = Fit(values=initial, plain=plain), 0, None
    if state is not None:
        found, place, resumed = Fit(**state["fit"]), state["place"], state["running"]
        found.curves = {k: [(s, v) for s, v in curve] for k, curve in found.curves.items()}
    before = found.seconds
    for at, rate in list(enumerate(options.learning_rates))[place:]:
        optimizer = torch.optim.Adam(candidate.parameters, lr=rate)
        if resumed is not None:
            step, since = _restore(candidate, optimizer, resumed)
            resumed = None
        else:
            candidate.set_state(initial)
            step, since = 0, _look(found, candidate, rate, 0, plain, 0)
        while step < options.steps and since < options.patience:
            for _ in range(min(options.every, options.steps - step)):
                _step(model, candidate, optimizer, _batch(examples, step, options))
                step += 1
                found.steps += 1
            since = _look(found, candidate, rate, step, mean_nll(model, candidate, stop), since)
            found.seconds = before + time.perf_counter() - start
            advance()
            save(_state(found, candidate, optimizer, at, step, since))
    candidate.set_state(found.values)
    found.seconds = before + time.perf_counter() - start
    return found


@torch.no_grad()
def mean_nll(model: Any, candidate: Candidate, examples: Sequence[Encoded]) -> float:
    """Return the nll per scored token of all examples together."""
    return sum(each_nll(model, candidate, examples)) / sum(each.scored for each in examples)


@torch.no_grad()
def each_nll(
    model: Any,
    candidate: Candidate,
    examples: Sequence[Encoded],
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the nll of every example, summed over its scored tokens; call ``advance`` for each."""
    found = [0.0] * len(examples)
    with candidate.applied():
        for places in bundles(examples, candidate.scope):
            values = nlls(model, [examples[place] for place in places]).tolist()
            for place, value in zip(places, values, strict=True):
                found[place] = value
                advance()
    return found


def gradients(
    model: Any, candidate: Candidate, examples: Sequence[Encoded]
) -> Iterator[list[Tensor]]:
    """Yield ``∂ nll per token / ∂ parameters`` of each example by itself."""
    with candidate.applied():
        for example in examples:
            with _differentiated(model, [example]):
                loss = nlls(model, [example]).sum() / example.scored
                found = torch.autograd.grad(loss, candidate.parameters, materialize_grads=True)
            yield list(found)


@contextmanager
def _differentiated(model: Any, examples: Sequence[Encoded]) -> Iterator[None]:
    """Keep what a backward pass needs, or run blocks again in it where the examples are long."""
    few = padded(examples) <= KEPT_TOKENS
    with torch.enable_grad(), nullcontext() if few else checkpointed(model):
        yield


def _step(model: Any, candidate: Candidate, optimizer: Any, batch: Sequence[Encoded]) -> None:
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(each.scored for each in batch)
    with candidate.applied():
        for places in bundles(batch, candidate.scope, KEPT_TOKENS):
            own = [batch[place] for place in places]
            with _differentiated(model, own):
                (nlls(model, own).sum() / tokens).backward()
    optimizer.step()


def _batch(examples: Sequence[Encoded], step: int, options: Options) -> list[Encoded]:
    """Return the examples of a step, which go through all in an order drawn anew each time."""
    size = min(options.batch_size, len(examples))
    steps = -(-len(examples) // size)
    order = list(range(len(examples)))
    random.Random(f"{options.seed}:{step // steps}").shuffle(order)
    first = step % steps * size
    chosen = order[first : first + size]
    return [examples[index] for index in chosen]


def _look(found: Fit, candidate: Candidate, rate: float, step: int, loss: float, since: int) -> int:
    """Note a loss, and count the looks since the lowest of this learning rate."""
    curve = found.curves.setdefault(repr(rate), [])
    lowest = min((each for _, each in curve), default=math.inf)
    curve.append((step, loss))
    if loss < found.loss:
        vars(found).update(values=candidate.state(), learning_rate=rate, step=step, loss=loss)
    return 0 if loss < lowest else since + 1


def _state(
    found: Fit, candidate: Candidate, optimizer: Any, place: int, step: int, since: int
) -> dict[str, Any]:
    moments = [
        {
            name: value.flatten().tolist() if name != "step" else float(value)
            for name, value in optimizer.state[parameter].items()
        }
        for parameter in candidate.parameters
    ]
    running = {"values": candidate.state(), "moments": moments, "step": step, "since": since}
    return {"fit": dict(vars(found)), "place": place, "running": running}


def _restore(candidate: Candidate, optimizer: Any, running: dict[str, Any]) -> tuple[int, int]:
    candidate.set_state(running["values"])
    for parameter, moments in zip(candidate.parameters, running["moments"], strict=True):
        like: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
        optimizer.state[parameter] = {
            name: torch.tensor(value)
            if name == "step"
            else torch.tensor(value, **like).view_as(parameter)
            for name, value in moments.items()
        }
    return running["step"], running["since"]


def nlls(model: Any, examples: Sequence[Encoded]) -> Tensor:
    """Sum the nll over the scored tokens of each example ``[B]``, in nats, by one forward pass.

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
    scored = torch.tensor([each.scored for each in examples], device=ids.device).unsqueeze(1)
    is_prompt = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - scored
    with prompt(is_prompt):  # for scope="prompt"
        logits = model(input_ids=ids, **options).logits[:, -last - 1 : -1]
    labels = ids[:, -last:].clone()
    for row, example in zip(labels, examples, strict=True):
        row[: last - example.scored] = UNSCORED
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(wide.mT, labels, ignore_index=UNSCORED, reduction="none")
    return each.sum(1)


def padded(examples: Sequence[Encoded]) -> int:
    """Count the tokens of a pass of these examples."""
    return len(examples) * max(each.ids.shape[1] for each in examples)


def bundles(
    examples: Sequence[Encoded], scope: str, tokens: int = BUNDLE_TOKENS
) -> list[list[int]]:
    """Group the places of examples that share a pass, like lengths together; none in scope "batch".

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
    """Run blocks of the model again in the backward pass instead of keeping what they need.

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

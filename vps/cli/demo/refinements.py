"""Refine two problems: one that comes right and one that does not, chosen by a rule beforehand.

The rule: of the demo's ten problems (``problems.json``), in their order, those that the plain model
gets wrong; of these the first that refinement gets right, and the first that it leaves wrong. An
answer is right or wrong where a reader, by its last number, and the verifier agree. :func:`choose`
carries the rule out; :data:`CHOSEN` is what it gave on SmolLM2-135M.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vps.cli.demo.calibrated import PROBLEMS, states
from vps.evaluation.tasks import right
from vps.refine import RefineResult, refine

CHOSEN = {"comes right": 4, "stays wrong": 0}  # places in the list
NEW_TOKENS = 32
ITERATIONS = 2


@dataclass(frozen=True)
class Refinement:
    """Hold one problem, its gold answer, what the rule says of it, and what came now."""

    expected: str
    prompt: str
    gold: str
    result: RefineResult

    @property
    def found(self) -> str:
        """Return ``"comes right"``, ``"stays wrong"``, or what else happened."""
        texts = [self.result.iterations[n].text for n in (0, self.result.chosen)]
        before, after = (judged(text, self.gold) for text in texts)
        if before is None or after is None:
            return "is read in two ways"
        if before:
            return "is right from the start" if after else "turns wrong"
        return "comes right" if after else "stays wrong"


def judged(text: str, gold: str) -> bool | None:
    """Tell whether an answer is right; ``None`` where a reader and the verifier disagree."""
    by_reader, by_verifier = states(text, gold), right(text, gold)
    return by_reader if by_reader == by_verifier else None


def problems() -> list[tuple[str, str]]:
    """Return prompts and gold answers of the list."""
    given = json.loads(PROBLEMS.read_text(encoding="utf-8"))
    return [(each["prompt"], each["answer"]) for each in given]


def refine_one(model: Any, tokenizer: Any, place: int, expected: str) -> Refinement:
    """Refine the problem at one place of the list."""
    prompt, gold = problems()[place]
    result = refine(
        model, tokenizer, prompt, gold, iterations=ITERATIONS, max_new_tokens=NEW_TOKENS
    )
    return Refinement(expected, prompt, gold, result)


def refine_both(model: Any, tokenizer: Any) -> list[Refinement]:
    """Refine the two problems of :data:`CHOSEN`."""
    return [refine_one(model, tokenizer, place, expected) for expected, place in CHOSEN.items()]


def choose(model: Any, tokenizer: Any) -> dict[str, int]:
    """Carry out the rule; what no problem of the list fits is left out."""
    chosen: dict[str, int] = {}
    for place in range(len(problems())):
        found = refine_one(model, tokenizer, place, "").found
        if found in CHOSEN and found not in chosen:
            chosen[found] = place
        if len(chosen) == len(CHOSEN):
            break
    return chosen

"""Answer ten held-out problems with the plain and with the calibrated model.

The calibration that comes with the package was fitted to SmolLM2-135M on other problems of their
kind, by ``benchmarks/study/calibration.py``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vps.model.calibration import Calibration, clear_calibration
from vps.model.generation import encode, generate_together
from vps.model.patching import disabled

FOLDER = Path(__file__).parent
CALIBRATION = FOLDER / "calibration.json"
PROBLEMS = FOLDER / "problems.json"
NEW_TOKENS = 20
WRITTEN = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


def states(text: str, answer: str) -> bool:
    """Tell whether the last number that is written in ``text`` is ``answer``.

    The verifier calculates what stands in a text, so it takes a repeated ``9 * 4`` for an answer; a
    reader of the page would not.
    """
    written = WRITTEN.findall(text)
    return bool(written) and float(written[-1].replace(",", "")) == float(answer)


@dataclass(frozen=True)
class Problem:
    """Hold one problem: its answer, and the text of both models."""

    question: str
    answer: str
    plain: str
    calibrated: str


@dataclass(frozen=True)
class Calibrated:
    """Hold all problems; or none, and why the calibration was refused."""

    problems: list[Problem] = field(default_factory=list)
    refused: str | None = None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"calibrated: nothing, {self.refused}"
        plain = sum(states(each.plain, each.answer) for each in self.problems)
        calibrated = sum(states(each.calibrated, each.answer) for each in self.problems)
        return (
            f"{len(self.problems)} held-out problems: {plain} right plain, {calibrated} right "
            "calibrated; so few show no difference in accuracy"
        )


def solve(model: Any, tokenizer: Any, calibration: Calibration) -> Calibrated:
    """Answer the problems with a patched model, which is left without a calibration.

    Raises:
        ValueError: a problem that the calibration was fitted or stopped by.
    """
    from vps.fitting import Example, check_apart

    given = json.loads(PROBLEMS.read_text(encoding="utf-8"))
    check_apart([Example(p["prompt"], p["answer"]) for p in given], calibration.examples)
    try:
        calibration.apply(model)
    except ValueError as error:
        return Calibrated(refused=str(error))
    try:
        inputs = [encode(tokenizer, problem["prompt"]) for problem in given]
        with disabled(model):
            plain = generate_together(model, tokenizer, inputs, NEW_TOKENS)
        own = generate_together(model, tokenizer, inputs, NEW_TOKENS)
        return Calibrated(
            [
                Problem(problem["prompt"], problem["answer"], *texts)
                for problem, *texts in zip(given, plain, own, strict=True)
            ]
        )
    finally:
        clear_calibration(model)

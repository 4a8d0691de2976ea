"""Let SmolLM2-135M answer three prompts, plain and sharpened, and refine one answer."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vps.cli.demo.calibrated import CALIBRATION, Calibrated, solve
from vps.cli.demo.heatmap import draw
from vps.config import VPSConfig
from vps.evaluation.tasks import right
from vps.evaluation.templates import render
from vps.model.calibration import Calibration
from vps.model.generation import Generation, changed_choices, encode, first_difference, generate
from vps.model.loading import load_model
from vps.model.patching import disabled, patch, set_config
from vps.model.statistics import LayerStatistics, measure
from vps.refine import RefineResult, refine

PROMPTS = (
    "Tom has 3 boxes with 4 apples each. He eats 5 apples. How many apples are left?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
)
TEMPLATE = Path(__file__).with_name("report.html")
GOLD = "7"  # of the first prompt, which is refined
CONFIG = VPSConfig(scope="sequence")


@dataclass(frozen=True)
class Answer:
    """Hold one prompt, both answers, and how each goes on from their first difference."""

    prompt: str
    plain: Generation
    sharpened: Generation
    first_difference: int | None
    plain_part: str
    sharpened_part: str


@dataclass(frozen=True)
class DemoRun:
    """Hold what the demo found.

    Args:
        answers: one for each of :data:`PROMPTS`.
        plain_rate, sharpened_rate: tokens per second.
        changed: share of the next-token choices that sharpening changes.
        statistics: of every layer, for the first prompt.
        prompt_tokens: of the first prompt.
        refined: the first prompt, refined.
        config: of the answers.
        report: the path of the page.
        calibrated: problems, answered by the calibrated model.
    """

    answers: list[Answer]
    plain_rate: float
    sharpened_rate: float
    changed: float
    statistics: list[LayerStatistics]
    prompt_tokens: int
    refined: RefineResult
    config: VPSConfig
    report: Path
    calibrated: Calibrated | None = None


def run_demo(
    model_dir: Path, out: Path, new_tokens: int, progress: Callable[[str], None]
) -> DemoRun:
    """Load the model of ``model_dir`` (one GGUF file or a saved model), compare, write a report.

    Raises:
        FileNotFoundError: no model there.
        ModuleNotFoundError: transformers, gguf or matplotlib is missing.
    """
    progress("loading the model")
    model, tokenizer = load_model(str(model_dir.absolute()))
    patch(model, CONFIG)
    calibration = Calibration.load(CALIBRATION)
    return compare(model, tokenizer, out, new_tokens, progress, calibration)


def compare(
    model: Any,
    tokenizer: Any,
    out: Path,
    new_tokens: int,
    progress: Callable[[str], None],
    calibration: Calibration | None = None,
) -> DemoRun:
    """Do everything after loading, on a patched model, which is left with :data:`CONFIG`."""
    encoded = [encode(tokenizer, prompt) for prompt in PROMPTS]
    _plain(model, tokenizer, encoded[0], 4)
    generate(model, tokenizer, encoded[0], 4)
    answers = []
    for number, (prompt, inputs) in enumerate(zip(PROMPTS, encoded, strict=True), 1):
        progress(f"prompt {number} of {len(PROMPTS)}")
        if number % 2:  # alternate who goes first, so that a drifting clock favours neither
            plain = _plain(model, tokenizer, inputs, new_tokens)
        sharpened = generate(model, tokenizer, inputs, new_tokens)
        if not number % 2:
            plain = _plain(model, tokenizer, inputs, new_tokens)
        difference = first_difference(plain.tokens, sharpened.tokens)
        parts = [
            "" if difference is None else tokenizer.decode(t[difference:], skip_special_tokens=True)
            for t in (plain.tokens, sharpened.tokens)
        ]
        answers.append(Answer(prompt, plain, sharpened, difference, parts[0], parts[1]))

    progress("measuring every layer")
    statistics = measure(model, encoded[0])
    set_config(model, CONFIG.replace(scope="token"))
    shares = [
        (changed_choices(model, inputs, answer.plain.tokens), len(answer.plain.tokens))
        for inputs, answer in zip(encoded, answers, strict=True)
    ]
    set_config(model, CONFIG)
    changed = sum(share * n for share, n in shares) / sum(n for _, n in shares)

    progress("refining the first answer")
    result = refine(model, tokenizer, PROMPTS[0], GOLD, max_new_tokens=new_tokens)

    calibrated = None
    if calibration is not None:
        progress("held-out problems, calibrated")
        calibrated = solve(model, tokenizer, calibration)

    out.mkdir(parents=True, exist_ok=True)
    prompt_tokens = encoded[0]["input_ids"].shape[1]
    draw(statistics, out / "heatmap.png", f"the {prompt_tokens} tokens of the first prompt")
    run = DemoRun(
        answers,
        _rate([answer.plain for answer in answers]),
        _rate([answer.sharpened for answer in answers]),
        changed,
        statistics,
        prompt_tokens,
        result,
        CONFIG,
        out / "report.html",
        calibrated,
    )
    write_report(run, out / "heatmap.png")
    return run


def write_report(run: DemoRun, picture: Path) -> None:
    """Write ``run.report``, one HTML file with its picture inside."""
    text = render(
        TEMPLATE,
        run=run,
        prompt=PROMPTS[0],
        gold=GOLD,
        right=right,
        positions=sum(len(answer.plain.tokens) for answer in run.answers),
        picture=base64.b64encode(picture.read_bytes()).decode(),
    )
    run.report.write_text(text, encoding="utf-8")


def _plain(model: Any, tokenizer: Any, inputs: dict[str, Tensor], new_tokens: int) -> Generation:
    with disabled(model):
        return generate(model, tokenizer, inputs, new_tokens)


def _rate(generations: list[Generation]) -> float:
    return sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations)

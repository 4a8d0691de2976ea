"""Let SmolLM2-135M answer prompts, plain and sharpened, and do the rest of what the page shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

from vps.cli.demo.calibrated import CALIBRATION, Calibrated, solve
from vps.cli.demo.heatmap import draw
from vps.cli.demo.page import write_page
from vps.cli.demo.refinements import Refinement, refine_both
from vps.cli.demo.speed import Speed, measure_speed
from vps.config import VPSConfig
from vps.doctor import package_version, processor_name
from vps.model.calibration import Calibration
from vps.model.generation import (
    Generation,
    GrowingText,
    encode,
    first_difference,
    generate,
    next_choices,
)
from vps.model.loading import load_model, step_of_loading
from vps.model.patching import disabled, patch, set_config
from vps.model.statistics import LayerStatistics, measure

PROMPTS = (
    "Tom has 3 boxes with 4 apples each. He eats 5 apples. How many apples are left?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
)
CONFIG = VPSConfig(scope="sequence")
# The prompt decides for all tokens of its answer, so reading an answer repeats each choice exactly.
ANSWERING = CONFIG.replace(scope="prompt")


@dataclass(frozen=True)
class Piece:
    """Hold the text of one token, and the likeliest token of the other model where it differs."""

    text: str
    other: str | None = None

    @property
    def core(self) -> str:
        """Return the text without the white space around it, or a sign for what shows nothing."""
        return self.text.strip() or ("" if self.other is None else visible(self.text))

    @property
    def before(self) -> str:
        """Return the white space before the core."""
        return self.text[: len(self.text) - len(self.text.lstrip())] if self.text.strip() else ""

    @property
    def after(self) -> str:
        """Return the white space after the core, which is all where the core is a sign."""
        return self.text[len(self.text.rstrip()) :]


@dataclass(frozen=True)
class Answer:
    """Hold one prompt and both answers, whole and in pieces, and their first difference."""

    prompt: str
    plain: Generation
    sharpened: Generation
    first_difference: int | None
    plain_pieces: tuple[Piece, ...]
    sharpened_pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class DemoRun:
    """Hold what the demo found.

    Args:
        answers: one for each of :data:`PROMPTS`.
        changed: share of the next-token choices along the plain answers that sharpening changes.
        positions: how many choices that are.
        new_tokens: of an answer, at most.
        speed: of the models, on the second prompt.
        statistics: of every layer, for the first prompt.
        prompt_tokens: of the first prompt.
        refinements: the two problems that are refined.
        config: of everything but the answers.
        facts: what ran where.
        seconds: that all of it took.
        report: the path of the page.
        calibrated: problems, answered by the calibrated model.
    """

    answers: list[Answer]
    changed: float
    positions: int
    new_tokens: int
    speed: Speed
    statistics: list[LayerStatistics]
    prompt_tokens: int
    refinements: list[Refinement]
    config: VPSConfig
    facts: dict[str, str]
    seconds: float
    report: Path
    calibrated: Calibrated | None = None


def run_demo(
    model_dir: Path, out: Path, new_tokens: int, progress: Callable[[str], None]
) -> DemoRun:
    """Load the model of ``model_dir`` (one GGUF file or a saved model), compare, write a report.

    Raises:
        FileNotFoundError: no model there.
        ModuleNotFoundError: transformers, gguf or jinja2 is missing.
    """
    start = time.perf_counter()
    name = str(model_dir.absolute())
    progress(f"1 of 9: {step_of_loading(name)}")
    model, tokenizer = load_model(name)
    patch(model, CONFIG)
    calibration = Calibration.load(CALIBRATION)
    return compare(model, tokenizer, out, new_tokens, progress, calibration, start)


def compare(
    model: Any,
    tokenizer: Any,
    out: Path,
    new_tokens: int,
    progress: Callable[[str], None],
    calibration: Calibration | None = None,
    start: float | None = None,
) -> DemoRun:
    """Do everything after loading, on a patched model, which is left with :data:`CONFIG`."""
    start = time.perf_counter() if start is None else start
    encoded = [encode(tokenizer, prompt) for prompt in PROMPTS]
    answers, changed, positions = [], 0, 0
    set_config(model, ANSWERING)
    for number, (prompt, inputs) in enumerate(zip(PROMPTS, encoded, strict=True), 1):
        progress(f"{number + 1} of 9: prompt {number} of {len(PROMPTS)}, plain and sharpened")
        with disabled(model):
            plain = generate(model, tokenizer, inputs, new_tokens)
        sharpened = generate(model, tokenizer, inputs, new_tokens)
        own, other = next_choices(model, inputs, plain.tokens)
        changed += sum(a != b for a, b in zip(own, other, strict=True))
        positions += len(own)
        also, _ = next_choices(model, inputs, sharpened.tokens)
        answers.append(
            Answer(
                prompt,
                plain,
                sharpened,
                first_difference(plain.tokens, sharpened.tokens),
                pieces(tokenizer, plain.tokens, other),
                pieces(tokenizer, sharpened.tokens, also),
            )
        )

    progress("5 of 9: timing, beside LoRA")
    configs = {"sharpened, scope prompt": ANSWERING, "sharpened, scope sequence": CONFIG}
    speed = measure_speed(model, tokenizer, encoded[1], configs)

    progress("6 of 9: measuring every layer")
    set_config(model, CONFIG)
    statistics = measure(model, encoded[0])

    progress("7 of 9: refining two problems")
    refinements = refine_both(model, tokenizer)

    calibrated = None
    if calibration is not None:
        progress("8 of 9: ten held-out problems, calibrated")
        calibrated = solve(model, tokenizer, calibration)

    progress("9 of 9: drawing")
    out.mkdir(parents=True, exist_ok=True)
    prompt_tokens = encoded[0]["input_ids"].shape[1]
    if util.find_spec("matplotlib") is not None:
        draw(statistics, out / "heatmap.png", f"the {prompt_tokens} tokens of the first prompt")
    run = DemoRun(
        answers,
        changed / positions,
        positions,
        new_tokens,
        speed,
        statistics,
        prompt_tokens,
        refinements,
        CONFIG,
        facts(model),
        time.perf_counter() - start,
        out / "report.html",
        calibrated,
    )
    write_page(run)
    return run


def pieces(tokenizer: Any, tokens: list[int], other: list[int]) -> tuple[Piece, ...]:
    """Cut an answer into the texts of its tokens, with the other model's choice where it differs.

    Tokens that together make a letter are one piece, with the first choice that differs.
    """
    made: list[Piece] = []
    texts: list[str] = []
    growing = GrowingText(tokenizer, texts.append)
    growing.REST = 0
    waiting: str | None = None
    for token, choice in zip(tokens, other, strict=True):
        if choice != token and waiting is None:
            waiting = shown(tokenizer, choice)
        growing.add([token])
        if texts:
            made.append(Piece("".join(texts), waiting))
            texts.clear()
            waiting = None
    growing.end()
    if texts or waiting is not None:
        made.append(Piece("".join(texts), waiting))
    return tuple(made)


def shown(tokenizer: Any, token: int) -> str:
    """Return the text of one token, with signs for the end and for white space."""
    if token in tokenizer.all_special_ids:
        return "end"
    text: str = tokenizer.decode([token])
    return text.strip() or visible(text)


def visible(text: str) -> str:
    """Return a sign for text that shows nothing; an empty text is that of the end."""
    return "↵" if "\n" in text else "space" if text else "end"


def facts(model: Any) -> dict[str, str]:
    """Return what ran where, for the foot of the page."""
    from vps.backends.dispatch import backends

    usable = [name for name, reason in backends().items() if reason is None]
    parameters = sum(each.numel() for each in model.parameters())
    return {
        "model": f"{type(model).__name__}, {parameters / 1e6:.0f} million parameters, "
        f"{str(model.dtype).removeprefix('torch.')}",
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads",
        "versions": f"vps {package_version('vps-kernels')}, torch {torch.__version__}, "
        f"transformers {package_version('transformers')}",
        "backends": ", ".join(usable),
    }

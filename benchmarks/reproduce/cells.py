"""Evaluate the cells of the study: what runs, on what, and how a killed run goes on.

A part of the study is an ablation (``vps.evaluation.runs``) over cells that share documents. Each
block of questions is appended to ``blocks/CELL.jsonl`` as soon as it is scored, so a run that is
killed loses one block at most; a finished cell is a file of its own and needs its blocks no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.reproduce import measures, questions
from benchmarks.reproduce.measures import Asked
from vps import files
from vps.evaluation.controls import SHARPENED, configured, control
from vps.evaluation.grid import BASELINE, Cell, Grid, make_grid
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import AblationResult, Evaluation, ablate, fingerprint
from vps.model.capture import restored
from vps.model.patching import policy_state

SCOPES = ("token", "prompt")
BLOCK = 100  # questions
PILOT_QUESTIONS = 100  # of each kind
BEGINNING = '{"block": 0, "outcomes": '

PAPER = COUPLED = "paper"
UNCOUPLED = "no coupling"
SETTINGS: dict[str, dict[str, Any]] = {
    "γ = 0.1": {"gamma": 0.1},
    "γ = 0.3": {"gamma": 0.3},
    "γ = 0.65": {"gamma": 0.65},
    "SC": {"builder": "sc"},
}


@dataclass(frozen=True)
class Part:
    """Describe a part of the study: cells, and what each of them is asked.

    Args:
        name: of its folder.
        grid: its cells.
        questions: choice questions of each kind.
        paragraphs: of prose of each kind.
        problems: to be answered in text.
        pool: questions of each kind to be answered in the paper's loop, with their gold.
        pilot: ask the questions of the pilot.
    """

    name: str
    grid: Grid
    questions: int = 0
    paragraphs: int = 0
    problems: int = 0
    pool: int = 0
    pilot: bool = False


def grid(
    title: str, settings: dict[str, dict[str, Any]], scopes: Sequence[str], **more: Any
) -> Grid:
    """Make a grid of settings under scopes, each with its controls unless ``more`` says less."""
    cells = [
        {"name": f"{name}, {scope}", "scope": scope, **changes}
        for scope in scopes
        for name, changes in settings.items()
    ]
    return make_grid({"title": title, "cells": cells, **more})


def joined(first: Grid, second: Grid) -> Grid:
    """Add the cells of another grid, without its baseline."""
    start = len(first.cells) - 1
    added = (
        dataclasses.replace(cell, index=cell.index + start)
        for cell in second.cells
        if cell.name != BASELINE
    )
    return Grid(first.title, (*first.cells, *added))


def parts(quick: bool = False) -> dict[str, Part]:
    """Return the parts of the study by name, or of its subset of ten minutes."""
    paper = {PAPER: {}}
    main = joined(
        grid("The paper's configuration", paper, SCOPES),
        grid("without coupling", {UNCOUPLED: {"qk_coupling": False}}, SCOPES, controls=False),
    )
    generated = joined(
        grid("Generated answers", paper, ("token", "sequence")),
        grid("of the prompt", paper, ("prompt",), controls=["random_indices"]),
    )
    settings = grid("Other settings", SETTINGS, SCOPES)
    loop = joined(
        grid("The paper's loop, with the gold in it", paper, ("prompt",)),
        grid("without L-BFGS", {"no L-BFGS": {"lbfgs": False}}, ("prompt",), controls=False),
    )
    if quick:
        chosen = grid("The paper's configuration", paper, ("prompt",))
        return {
            "main": Part("main", chosen, questions=100, paragraphs=4),
            "generated": Part("generated", generated, problems=24),
            "loop": Part("loop", loop, pool=5),
        }
    return {
        "main": Part("main", main, questions=900, paragraphs=16),
        "settings": Part("settings", settings, questions=334, paragraphs=8),
        "generated": Part("generated", generated, problems=200),
        "loop": Part("loop", loop, pool=40),
    }


def pilot() -> Part:
    """Return the part that estimates accuracy and discordance, on questions of its own."""
    cells = grid("Pilot", {PAPER: {}, **SETTINGS}, SCOPES, controls=False)
    return Part("pilot", cells, questions=PILOT_QUESTIONS, pilot=True)


def asked(part: Part, tokenizer: Any) -> dict[str, Asked]:
    """Return what a part asks by task, and how it is measured."""
    found: dict[str, Asked] = {}
    if part.questions:
        for kind in questions.KINDS:
            drawn = questions.questions(kind, part.questions, pilot=part.pilot)
            found[kind] = drawn, partial(measures.choices, kind, tokenizer)
    if part.paragraphs:
        for kind in questions.PROSE:
            texts = questions.prose(kind, part.paragraphs, tokenizer, measures.TEXT_TOKENS)
            found[kind] = texts, partial(measures.prose, kind)
    if part.problems:
        drawn = questions.problems(part.problems, pilot=part.pilot)
        found["generated"] = drawn, partial(measures.answers, tokenizer)
    if part.pool:
        for kind in questions.KINDS:
            drawn = questions.questions(kind, part.pool, pilot=part.pilot)
            found[kind] = drawn, partial(measures.loop, kind, tokenizer)
    return found


def run(part: Part, model: Any, tokenizer: Any, name: str, folder: Path) -> AblationResult:
    """Evaluate the cells of a part that ``folder`` does not hold yet.

    Args:
        part: what to evaluate.
        model: a patched causal language model, named ``name``, of which a fingerprint is kept.
        tokenizer: its tokenizer.
        folder: of this part; one that holds another run is refused.
    """
    work = asked(part, tokenizer)
    settings = {
        "model": fingerprint(name) or name,
        "seed": questions.SEED,
        "pilot": part.pilot,
        "block": BLOCK,
        "documents": {each: questions.digest(documents) for each, (documents, _) in work.items()},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }

    def evaluate(cell: Cell) -> Evaluation:
        path = folder / f"blocks/{cell.index}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(restored(model))
            policy_state(model).reset()
            stack.enter_context(configured(model, cell.config))
            variant = BASELINE if cell.config is None else cell.control or SHARPENED
            stack.enter_context(control(model, variant, cell.draw))
            outcomes = list(_measured(work, model, path))
        return Evaluation(outcomes, {} if cell.config is None else {"all": cell.config.scope})

    folder.mkdir(parents=True, exist_ok=True)
    result = ablate(part.grid, evaluate, folder, settings, facts=machine.facts())
    if not result.failed:
        for path in folder.glob("blocks/*.jsonl"):
            path.unlink()
    return result


def _measured(work: dict[str, Asked], model: Any, path: Path) -> Iterator[Outcome]:
    """Yield all outcomes of a cell: of the blocks in ``path``, then new ones, which are added."""
    done: list[dict[str, Any]] = []
    if path.exists():
        done, end = files.read_objects(path, BEGINNING)
        files.cut(path, end)
    number = 0
    for documents, measure in work.values():
        for start in range(0, len(documents), BLOCK):
            if number < len(done):
                values = done[number]["outcomes"]
            else:
                found = measure(model, documents[start : start + BLOCK], start)
                values = [list(vars(each).values()) for each in found]
                files.append(path, {"block": number, "outcomes": values})
            number += 1
            yield from (Outcome(*each) for each in values)

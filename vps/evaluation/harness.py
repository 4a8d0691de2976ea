"""Run tasks of lm-evaluation-harness on a sharpened model, its plain self and the controls.

All variants see the same documents. Requests that score given continuations run under
``scope="token"``, which is causal (SPEC §2), or under ``"prompt"``, where the context of a request
decides; generation runs under the config's scope.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vps.config import VPSConfig
from vps.evaluation.controls import CONTROLS, SHARPENED, configured, control
from vps.evaluation.grid import BASELINE, Cell
from vps.evaluation.lm import language_model, outcomes_of
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Evaluation, Evaluator
from vps.evaluation.tasks import load
from vps.model.capture import restored
from vps.model.patching import patch, policy_state, shared_state, sharpened_layers, unpatch

VARIANTS = (SHARPENED, *CONTROLS)
SCOPES = ("token", "prompt", "sequence", "batch", "config")


@dataclass(frozen=True)
class Scores:
    """Hold what one variant of a model got on all tasks.

    Args:
        variant: ``"sharpened"`` or the name of a control.
        config: the settings; ``None`` where the layers kept their own, unequal ones.
        outcomes: one for every document and metric, in the order of tasks and documents.
        results: the figures that lm-eval reports, by task and ``"metric,filter"``.
        scopes: the scope that ran, by type of request; none for the baseline.
        batch_sizes: rows a call, by type of request.
        seconds: wall-clock time.
    """

    variant: str
    config: VPSConfig | None
    outcomes: list[Outcome]
    results: dict[str, dict[str, float]]
    scopes: dict[str, str] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Harness:
    """Run tasks on one patched model under any config and control.

    Args:
        model: a patched causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of lm-eval, of the offline tasks
            (:func:`vps.evaluation.tasks.names`), paths of YAML files, or lm-eval task objects.
        limit: documents of each task, from its first; ``None`` for all.
        batch_size: rows a call. Results do not depend on it beyond rounding; under
            ``scope="batch"`` every row is run alone.
        num_fewshot: examples before each question; ``None`` for the task's own number.
        include_path: folders of YAML tasks beside lm-eval's own.
        chat: put the prompts into the tokenizer's chat template.
        scoring_scope: scope for given continuations; ``"config"`` for the config's, which leaks
            from late tokens to early ones unless it is ``"token"``.
        seed: seed of few-shot examples and sampled generation.
        group: a process group of torch whose ranks each have the whole model and run the same
            tasks: they share the requests, and all get every answer. Sampled generation then
            draws other numbers than one process.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        TypeError, ValueError: arguments out of range, an unknown task, an unpatched model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Any],
        *,
        limit: int | None = None,
        batch_size: int = 1,
        num_fewshot: int | None = None,
        include_path: Sequence[str | Path] = (),
        chat: bool = False,
        scoring_scope: str = "token",
        seed: int = 1234,
        group: Any = None,
    ) -> None:
        for name, value, low in (
            ("limit", limit, 1),
            ("batch_size", batch_size, 1),
            ("num_fewshot", num_fewshot, 0),
        ):
            optional = name != "batch_size"
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(
                    f"evaluation: {name} must be an integer ≥ {low}"
                    f"{' or None' if optional else ''}, got {value!r}"
                )
        if scoring_scope not in SCOPES:
            raise ValueError(
                f"evaluation: scoring_scope must be one of {', '.join(SCOPES)}, "
                f"got {scoring_scope!r}"
            )
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"evaluation: tasks must be a list of at least one, got {tasks!r}")
        shared_state(model, "evaluation")  # raises where nothing is patched
        self.model = model
        self.limit = limit
        self.chat = chat
        self.seed = seed
        with restored(model):
            self._lm = language_model(model, tokenizer, batch_size, scoring_scope, group)
        self._tasks = load(tasks, [Path(path) for path in include_path], num_fewshot, seed)

    def documents(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield the task of every document that a run sees, with question and answer: as the task
        puts them, then as the document holds them."""
        for name, task in self._tasks["tasks"].items():
            for document in islice(task.eval_docs, self.limit):
                target = task.doc_to_target(document)
                if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
                    target = task.doc_to_choice(document)[target]
                forms = [(str(task.doc_to_text(document)), str(target))]
                held = [document.get(key) for key in ("question", "answer")]
                if all(isinstance(part, str) for part in held):
                    forms.append((held[0], held[1]))
                yield name, forms

    def run(
        self, config: VPSConfig | None = None, variant: str = SHARPENED, seed: int = 0
    ) -> Scores:
        """Run all tasks under one config and control; the model is then as it was.

        Args:
            config: the settings; ``None`` for those of the layers. Other target modules than the
                model's are patched for the time.
            variant: ``"sharpened"``, or one of :data:`vps.evaluation.controls.CONTROLS`.
            seed: seed of the control.

        Returns:
            The outcomes of every document, and the figures of lm-eval.

        Raises:
            ValueError: an unknown variant, target modules that match nothing, or a task without a
                metric that is a number per document.
        """
        from lm_eval import evaluator

        start = time.perf_counter()
        self._lm.ran = {}
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(self.seed)
        with ExitStack() as stack:
            stack.enter_context(restored(self.model))
            policy_state(self.model).reset()  # of an earlier prompt
            stack.enter_context(_seeded(self.seed))
            stack.enter_context(configured(self.model, config))
            configs = {layer.config for layer in sharpened_layers(self.model).values()}
            stack.enter_context(control(self.model, variant, seed))
            found = evaluator.evaluate(
                lm=self._lm,
                task_dict=self._tasks,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )
        outcomes = []
        for name, samples in found["samples"].items():
            task = self._tasks["tasks"][name]
            outcomes += outcomes_of(task, samples, lambda text: len(self._lm.tok_encode(text)))
        results = {
            name: {metric: value for metric, value in row.items() if isinstance(value, float)}
            for name, row in found["results"].items()
        }
        plain = variant == "baseline"
        return Scores(
            variant,
            next(iter(configs)) if len(configs) == 1 else None,
            outcomes,
            results,
            {} if plain else {kind: scope for kind, (scope, _) in self._lm.ran.items()},
            {kind: size for kind, (_, size) in self._lm.ran.items()},
            time.perf_counter() - start,
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fix the random numbers of sampled generation; the caller's go on where they were."""
    before = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    config: VPSConfig | None = None,
    *,
    variants: Sequence[str] = (BASELINE, SHARPENED, *list(CONTROLS)[1:]),
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> dict[str, Scores]:
    """Run baseline, sharpened model and controls on the same documents.

    Args:
        model: a causal language model of transformers; one without sharpened layers is patched for
            the time.
        tokenizer: its tokenizer.
        tasks: as for :class:`Harness`, like the ``options``.
        config: the settings; ``None`` for those of the layers, or the defaults.
        variants: what to run, in this order.
        seed: of the controls.
        progress: called with the name of each variant before it runs.

    Returns:
        :class:`Scores` by variant.

    Raises:
        ValueError: an unknown variant, or as for :class:`Harness`.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants:
        raise ValueError(
            f"evaluation: variants must be of {', '.join(VARIANTS)}, got {list(variants)!r}"
        )
    patched_here = not sharpened_layers(model)
    if patched_here:
        patch(model, config)
    try:
        harness = Harness(model, tokenizer, tasks, **options)
        scores = {}
        for name in variants:
            progress(name)
            scores[name] = harness.run(config, name, seed)
        return scores
    finally:
        if patched_here:
            unpatch(model)


def evaluator(harness: Harness) -> Evaluator:
    """Return what evaluates the cells of an ablation.

    Make the harness with ``scoring_scope="config"``, so that given continuations are scored under
    the scope of the cell, which is causal unless the grid asks for another.
    """

    def evaluate(cell: Cell) -> Evaluation:
        variant = BASELINE if cell.config is None else cell.control or SHARPENED
        scores = harness.run(cell.config, variant, seed=cell.draw)
        return Evaluation(scores.outcomes, scores.scopes)

    return evaluate

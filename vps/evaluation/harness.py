"""Any task of lm-evaluation-harness on a sharpened model, its plain self and the controls.

All variants see the same documents. Requests that score given continuations run under
``scope="token"``, which alone is causal (SPEC §2); generation runs under the config's scope.
"""

from __future__ import annotations

import difflib
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
from vps.evaluation import tasks as offline
from vps.evaluation.controls import CONTROLS, SHARPENED, control
from vps.evaluation.lm import language_model
from vps.evaluation.outcome import Outcome
from vps.evaluation.samples import outcomes_of
from vps.layers.forms import experts
from vps.model.patching import patch, policy_state, sharpened_layers, unpatch

VARIANTS = (SHARPENED, *CONTROLS)
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform")
SCOPES = ("token", "sequence", "batch", "config")


@dataclass(frozen=True)
class Scores:
    """One variant of a model on all tasks.

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
    """Tasks on one patched model, to be run under any config and control.

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
        seed: of few-shot examples and sampled generation.
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
        policy_state(model)  # raises where nothing is patched
        self.model = model
        self.limit = limit
        self.chat = chat
        self.seed = seed
        with _as_it_was(model):
            self._lm = language_model(model, tokenizer, batch_size, scoring_scope, group)
        self._tasks = _load(tasks, [Path(path) for path in include_path], num_fewshot, seed)

    def documents(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Every document that a run sees: its task, and question and answer as the task puts them,
        then as the document holds them."""
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
        """All tasks under one config and control; the model is then as it was.

        Args:
            config: the settings; ``None`` for those of the layers. Other target modules than the
                model's are patched for the time.
            variant: ``"sharpened"``, or one of :data:`vps.evaluation.controls.CONTROLS`.
            seed: of the control.

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
            stack.enter_context(_as_it_was(self.model))
            stack.enter_context(_seeded(self.seed))
            stack.enter_context(_configured(self.model, config))
            configs = {layer.config for layer in _layers(self.model)}
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


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    config: VPSConfig | None = None,
    *,
    variants: Sequence[str] = ("baseline", SHARPENED, *list(CONTROLS)[1:]),
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    include_path: Sequence[str | Path] = (),
    chat: bool = False,
    scoring_scope: str = "token",
    seed: int = 0,
    group: Any = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Scores]:
    """Baseline, sharpened model and controls on the same documents.

    Args:
        model: a causal language model of transformers; one without sharpened layers is patched for
            the time.
        tokenizer: its tokenizer.
        tasks: as for :class:`Harness`, like the arguments that are not listed here.
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
        harness = Harness(
            model,
            tokenizer,
            tasks,
            limit=limit,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
            include_path=include_path,
            chat=chat,
            scoring_scope=scoring_scope,
            group=group,
        )
        scores = {}
        for name in variants:
            progress(name)
            scores[name] = harness.run(config, name, seed)
        return scores
    finally:
        if patched_here:
            unpatch(model)


def _layers(model: nn.Module) -> list[Any]:
    return list(sharpened_layers(model).values())


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Without the entropy and history of an earlier prompt; then as before, training mode too."""
    state, training = policy_state(model), {m: m.training for m in model.modules()}
    entropy, outcomes = state.entropy, state.outcomes
    state.reset()
    model.eval()
    try:
        yield
    finally:
        state.entropy, state.outcomes = entropy, outcomes
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fixed random numbers for sampled generation; the caller's go on where they were."""
    before = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


@contextmanager
def _configured(model: nn.Module, config: VPSConfig | None) -> Iterator[None]:
    """Every layer under ``config``, patched anew where it selects other layers."""
    layers = _layers(model)
    before = [layer.config for layer in layers]
    if config is None:
        yield
        return
    if not isinstance(config, VPSConfig):
        raise TypeError(f"evaluation: config must be a VPSConfig, got {type(config).__name__}")
    if any(_selects_otherwise(model, old, config) for old in before):
        if any(old != before[0] for old in before):
            raise ValueError(
                "evaluation: a config with other target modules needs layers of one config, got "
                f"{len(set(before))}"
            )
        patch(model, config)
        try:
            yield
        finally:
            patch(model, before[0])
        return
    try:
        for layer in layers:
            layer.config = config
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.config = old


def _selects_otherwise(model: nn.Module, old: VPSConfig, new: VPSConfig) -> bool:
    """Whether other layers are sharpened under another config, as experts are by their scope."""
    if any(getattr(old, name) != getattr(new, name) for name in SELECTING):
        return True
    return (old.scope == "token") != (new.scope == "token") and bool(experts(model))


def _load(
    wanted: Sequence[Any], include_path: list[Path], num_fewshot: int | None, seed: int
) -> dict[str, Any]:
    """Tasks by lm-eval's loader, set as its ``simple_evaluate`` sets them.

    lm-eval's own index takes 10 s, so it is read only for names that are found nowhere else.
    """
    from lm_eval.tasks import TaskManager

    for path in include_path:
        if not path.is_dir():
            raise ValueError(f"evaluation: include_path must be a folder, got {path}")
    specs = [
        offline.task(spec) if isinstance(spec, str) and spec in offline.names() else spec
        for spec in wanted
    ]
    paths: list[str | Path] = list(include_path)
    manager = TaskManager(include_path=paths or None, include_defaults=False)

    def missing() -> list[str]:
        return [
            spec
            for spec in specs
            if isinstance(spec, str)
            and spec not in manager.task_index
            and not (spec.endswith((".yaml", ".yml")) and Path(spec).is_file())
        ]

    names = list(offline.names())
    if any(not name.startswith("vps_") for name in missing()):
        manager = TaskManager(include_path=paths or None)
    for name in missing():
        close = difflib.get_close_matches(name, [*names, *manager.all_tasks], n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"evaluation: no task {name!r}{hint}")
    loaded: dict[str, Any] = manager.load(specs)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed)
    return loaded

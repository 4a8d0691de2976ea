"""Make tasks that need no download, drawn by reasoning-gym with fixed seeds, and load others.

Each kind comes in two forms: ``vps_KIND`` generates and compares the answer in the text exactly;
``vps_KIND_choice`` scores four given answers, three of them near the right one.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vps.verify import extract_number

SIZE = 240
EXAMPLES = 16
SEED = 2026
PROMPT = "Question: {{question}}\nAnswer:"
NUMBER = re.compile(r"-?\d+")
CLOCK = re.compile(r"(\d{1,4}):(\d{2})(?!\d)")
WRITTEN = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
OPERATION = re.compile(r"\d[\s)]*[-+*/^×·÷−]")


class _Kind(NamedTuple):
    """Name a dataset of reasoning-gym, its settings and the form of its answers."""

    dataset: str
    settings: dict[str, Any]
    answer: re.Pattern[str] = NUMBER


# No division: reasoning-gym 0.1.25 calculates 4 / 1 to 2.
KINDS = {
    "arithmetic": _Kind(
        "basic_arithmetic",
        {
            "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2,
            "operators": ["+", "-", "*"], "allow_parentheses": False, "allow_negation": False,
        },
    ),
    "chains": _Kind(
        "chain_sum", {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2}
    ),
    "word_problems": _Kind("gsm_symbolic", {}),
    "units": _Kind("time_intervals", {"task_types": ["time"]}, CLOCK),
}  # fmt: skip

WHERE = (
    f"{', '.join(f'vps_{kind}' for kind in KINDS)} need no network, and `lm_eval ls tasks` lists "
    "the tasks of lm-evaluation-harness"
)


def names() -> tuple[str, ...]:
    """List all offline tasks."""
    return tuple(f"vps_{kind}{form}" for kind in KINDS for form in ("", "_choice"))


def documents(kind: str, size: int = SIZE, seed: int = SEED) -> list[dict[str, Any]]:
    """Return the first ``size`` different documents of a kind, the same for the same seed.

    Args:
        kind: a key of :data:`KINDS`.
        size: how many, at least 1.
        seed: seed of questions, wrong answers and their order.

    Returns:
        Dicts of ``question``, ``answer``, ``choices`` (four, one of them the answer) and ``gold``,
        its index.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: an unknown kind, a size below 1, or more documents than there are.
    """
    if kind not in KINDS:
        raise ValueError(f"documents: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"documents: size must be an integer ≥ 1, got {size!r}")
    found: dict[str, dict[str, Any]] = {}
    for question, answer in _drawn(KINDS[kind], 40 * size, seed):
        if question in found:
            continue
        generator = random.Random(f"{seed}:{question}")
        choices = [answer, *near(answer, generator)]
        generator.shuffle(choices)
        found[question] = {
            "question": question,
            "answer": answer,
            "choices": choices,
            "gold": choices.index(answer),
        }
        if len(found) == size:
            return list(found.values())
    raise ValueError(f"documents: size is {size}, but {kind} has only {len(found)} for this seed")


def task(name: str, size: int = SIZE, seed: int = SEED) -> Any:
    """Make an offline task as an lm-eval task object.

    Args:
        name: one of :func:`names`.
        size: documents in the test split; the training split has 16 others for few-shot examples.
        seed: as for :func:`documents`.

    Raises:
        ModuleNotFoundError: lm-eval or reasoning-gym is not installed.
        ValueError: an unknown name, or as for :func:`documents`.
    """
    if name not in names():
        raise ValueError(f"task: name must be one of {', '.join(names())}, got {name!r}")
    try:
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise ModuleNotFoundError(
            f"evaluation needs lm-eval: pip install 'vps-kernels[eval]' ({error})"
        ) from None
    kind = name.removeprefix("vps_").removesuffix("_choice")
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": partial(_splits, kind, size, seed),
        "test_split": "test",
        "training_split": "train",
        "doc_to_text": PROMPT,
        "num_fewshot": None,
        "metadata": {"version": 1.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    if name.endswith("_choice"):
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "process_results": _graded,
            "metric_list": [{"metric": "exact_match", **mean}],
            "generation_kwargs": {
                "until": ["\n\n", "Question:"], "max_gen_toks": 64, "do_sample": False,
            },
        }  # fmt: skip
    return ConfigurableTask(config=config)


def load(
    wanted: Sequence[Any], include_path: Sequence[Path], num_fewshot: int | None, seed: int
) -> dict[str, Any]:
    """Load tasks as lm-eval's ``simple_evaluate`` does, the offline ones too.

    lm-eval's own index takes 10 s, so it is read only for names that are found nowhere else.

    Args:
        wanted: names of tasks or groups, paths of YAML files, or lm-eval task objects.
        include_path: folders of YAML tasks.
        num_fewshot: examples before each question; ``None`` for the task's own number.
        seed: of those examples.

    Raises:
        ValueError: a task that is not found, with the nearest names, or a path that is no folder.
    """
    from lm_eval.tasks import TaskManager

    for path in include_path:
        if not path.is_dir():
            raise ValueError(f"evaluation: include_path must be a folder, got {path}")
    own = names()
    specs = [task(spec) if isinstance(spec, str) and spec in own else spec for spec in wanted]
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

    if any(not name.startswith("vps_") for name in missing()):
        manager = TaskManager(include_path=paths or None)
    for name in missing():
        close = difflib.get_close_matches(name, [*own, *manager.all_tasks], n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; {WHERE}"
        raise ValueError(f"evaluation: no task {name!r}{hint}")
    try:
        loaded: dict[str, Any] = manager.load(specs)
    except ConnectionError as error:
        raise ConnectionError(
            f"evaluation: the data of a task cannot be loaded: {error}; {WHERE}"
        ) from error
    for each in loaded["tasks"].values():
        default = each.get_config("num_fewshot")
        if default is None:
            each.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot is not None and default != 0:
            each.set_config(key="num_fewshot", value=num_fewshot)
        each.set_fewshot_seed(seed)
    return loaded


def right(text: str, answer: str) -> bool:
    """Tell whether the last time of day in ``text``, or the number it answers, is ``answer``.

    A sum that equals the answer is none, or the repeated question would be right; so the number
    must be written out where anything is left to work out.
    """
    gold = CLOCK.fullmatch(answer)
    if gold is None:
        number = Fraction(answer)
        if extract_number(text) != number:
            return False
        numbers = (found.rstrip(",").replace(",", "") for found in WRITTEN.findall(text))
        return number in map(Fraction, numbers) or OPERATION.search(text) is None
    given = CLOCK.findall(text)
    return bool(given) and [int(part) for part in given[-1]] == [int(p) for p in gold.groups()]


def _drawn(kind: _Kind, size: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions and answers of reasoning-gym, where the answer has the kind's form."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ModuleNotFoundError(
            f"offline tasks need reasoning-gym: pip install 'vps-kernels[eval]' ({error})"
        ) from None
    drawn = reasoning_gym.create_dataset(kind.dataset, size=size, seed=seed, **kind.settings)
    for index in range(size):
        entry = drawn[index]
        question, answer = entry["question"].strip(), entry["answer"].strip()
        if kind.answer.fullmatch(answer):
            yield question, answer


def near(answer: str, generator: random.Random) -> list[str]:
    """Draw three wrong answers near ``answer``, of its form and sign.

    As a rule none to three of them are smaller, equally often: the middle one is no better guess.
    """
    clock = CLOCK.fullmatch(answer)
    if clock is not None:
        value, steps = int(clock[1]) * 60 + int(clock[2]), [1, 2, 5, 10, 20, 30, 60, 120]
    else:
        value, steps = int(answer), [1, 2, 3, 5, 10, 20, 100]
    below = [value - step for step in steps if (value - step < 0) == (value < 0)]
    above = [value + step for step in steps if (value + step < 0) == (value < 0)]
    count = min(max(generator.randrange(4), 3 - len(above)), len(below))
    wrong = generator.sample(below, count) + generator.sample(above, 3 - count)
    return [f"{v // 60:02d}:{v % 60:02d}" if clock else str(v) for v in wrong]


def _splits(kind: str, size: int, seed: int, **_: Any) -> dict[str, Any]:
    """Return what lm-eval takes for a dataset."""
    from datasets import Dataset

    drawn = documents(kind, size + EXAMPLES, seed)
    return {"test": Dataset.from_list(drawn[:size]), "train": Dataset.from_list(drawn[size:])}


def _graded(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(right(results[0], document["answer"]))}

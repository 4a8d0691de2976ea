"""Per-document results of lm-eval as :class:`vps.evaluation.outcome.Outcome`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from vps.evaluation.outcome import Outcome

ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def outcomes_of(task: Any, samples: list[dict[str, Any]], tokens: Callable[[str], int]) -> list:
    """Outcomes of the samples that lm-eval logged for a task, in their order.

    A metric keeps its name; one of a named filter is ``"metric,filter"``. Log-likelihoods become
    ``"nll"`` in nats: per token, weighted by the tokens, for whole texts; per target for
    ``perplexity``. Metrics that are no number per document (F1, Matthews) are left out.

    Args:
        task: the lm-eval task.
        samples: what it logged.
        tokens: counts the tokens of a text.

    Raises:
        ValueError: none of the task's metrics is a number per document.
    """
    outcomes: list[Outcome] = []
    for sample in samples:
        document = f"{sample['doc_id']}:{sample['doc_hash'][:8]}"
        margin = _margin(task, sample)
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        seen: dict[str, tuple[float, float]] = {}
        for metric in sample["metrics"]:
            value = sample[metric]
            if metric in ROLLING:
                count = tokens(sample["arguments"][0][0])
                seen["nll"] = (-float(value[0]) / max(1, count), float(max(1, count)))
            elif metric == "perplexity":
                seen["nll"] = (-float(value), 1.0)
            elif isinstance(value, (bool, int, float, numpy.number, numpy.bool_)):
                seen[metric] = (float(value), 1.0)
        outcomes += [
            Outcome(task.task_name, document, metric + suffix, value, margin, weight)
            for metric, (value, weight) in seen.items()
        ]
    if not outcomes:
        metrics = sorted({metric for sample in samples for metric in sample["metrics"]})
        raise ValueError(
            f"evaluation: task {task.task_name!r} has no metric that is a number per document, "
            f"got {', '.join(metrics) or 'none'}"
        )
    return outcomes


def _margin(task: Any, sample: dict[str, Any]) -> float | None:
    """Log-likelihood of the right choice less that of the best wrong one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    document = sample["doc"]
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    right = set(gold) if isinstance(gold, list) else {gold}
    scores = [float(response[0]) for response in sample["filtered_resps"][: len(choices)]]
    good = [score for index, score in enumerate(scores) if index in right]
    bad = [score for index, score in enumerate(scores) if index not in right]
    return max(good) - max(bad) if good and bad else None

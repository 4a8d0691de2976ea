"""What an evaluation says of one document, the unit that variants are paired by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One document of a task under one variant of a model.

    Args:
        task: name of the task.
        document: identity of the document within the task, the same in every run.
        metric: what is measured, such as ``"acc"``, ``"exact_match"`` or ``"nll"``.
        value: of the metric; 0 or 1 where the answer is right or wrong.
        margin: log-likelihood of the right choice less that of the best wrong one, in nats;
            ``None`` where there are no choices.
        weight: what the value is averaged by, such as the tokens of a text for ``"nll"``.
    """

    task: str
    document: str
    metric: str
    value: float
    margin: float | None = None
    weight: float = 1.0

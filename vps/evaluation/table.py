"""Figures of several variants beside each other, as text and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vps.evaluation.harness import Scores
from vps.evaluation.outcome import Outcome

BASELINE = "baseline"


def rows(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """One row for every task, metric and variant.

    Returns:
        Dicts of ``task``, ``metric``, ``variant``, ``n`` (documents) and ``value`` (weighted mean);
        with a baseline among the variants also ``difference`` from it and, where all values are 0
        or 1, ``gained`` and ``lost`` documents, else ``None``.

    Raises:
        ValueError: variants of unequal documents.
    """
    groups = {name: _grouped(each.outcomes) for name, each in scores.items()}
    plain = groups.get(BASELINE)
    found = []
    order = dict.fromkeys(key for group in groups.values() for key in group)
    for task, metric in order:
        for variant, group in groups.items():
            own = group.get((task, metric), {})
            row = {"task": task, "metric": metric, "variant": variant, "n": len(own)}
            row["value"] = _mean(own)
            if plain is not None:
                base = plain.get((task, metric), {})
                if base.keys() != own.keys():
                    raise ValueError(
                        f"table: {variant} must have the documents of the baseline in {task!r}, "
                        f"{metric!r}, {len(base.keys() ^ own.keys())} are in one of them only"
                    )
                row["difference"] = _mean(own) - _mean(base)
                row["gained"], row["lost"] = _flips(base, own)
            found.append(row)
    return found


def text(scores: Mapping[str, Scores]) -> str:
    """The rows as a table, and under which scope they ran."""
    lines = []
    last = None
    for row in rows(scores):
        title = (row["task"], row["metric"])
        if title != last:
            lines += ["" if last else None, f"{row['task']}, {row['metric']}, {row['n']} documents"]
            last = title
        line = f"  {row['variant']:<20} {row['value']:9.4f}"
        if "difference" in row and row["variant"] != BASELINE:
            line += f"  {row['difference']:+9.4f}"
            if row["gained"] is not None:
                line += f"  +{row['gained']} −{row['lost']}"
        lines.append(line)
    scopes = {
        f"{kind} under scope {scope}"
        for each in scores.values()
        for kind, scope in each.scopes.items()
    }
    lines += ["", *([f"ran: {', '.join(sorted(scopes))}"] if scopes else [])]
    lines.append("Differences are counted, not tested: few documents show large ones by chance.")
    return "\n".join(line for line in lines if line is not None)


Documents = dict[str, Outcome]


def _grouped(outcomes: list[Outcome]) -> dict[tuple[str, str], Documents]:
    groups: dict[tuple[str, str], Documents] = {}
    for outcome in outcomes:
        group = groups.setdefault((outcome.task, outcome.metric), {})
        if outcome.document in group:
            raise ValueError(
                f"table: document {outcome.document!r} of {outcome.task!r} comes twice for "
                f"{outcome.metric!r}"
            )
        group[outcome.document] = outcome
    return groups


def _mean(documents: Documents) -> float:
    total = sum(outcome.weight for outcome in documents.values())
    if total == 0:
        return float("nan")
    return sum(outcome.value * outcome.weight for outcome in documents.values()) / total


def _flips(before: Documents, after: Documents) -> tuple[int | None, int | None]:
    pairs = [(outcome.value, after[key].value) for key, outcome in before.items()]
    if any(value not in (0, 1) for pair in pairs for value in pair):
        return None, None
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)

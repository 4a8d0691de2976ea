"""Ask the plain model the questions of *main* once more: ``python -m benchmarks.study.again``.

A part that was begun on one machine and finished on another mixes the rounding of both. How many
answers differ says how much that is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.reproduce import cells, questions
from benchmarks.reproduce.measures import ACCURACY, LOSS, Asked
from vps import files
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import read_run
from vps.model.loading import load_model

STUDY = Path("benchmarks/results/reproduction")


def ask(work: dict[str, Asked], model: Any) -> Iterator[Outcome]:
    """Yield what a part asks, by the blocks in which its cells do."""
    for documents, measure in work.values():
        for start in range(0, len(documents), cells.BLOCK):
            yield from measure(model, documents[start : start + cells.BLOCK], start)


def differences(first: Iterable[Outcome], again: Iterable[Outcome]) -> dict[str, Any]:
    """Count answers that differ, and find the largest changes, nats.

    Raises:
        ValueError: other questions.
    """
    one, other = (
        {(each.task, each.document, each.metric): each for each in own} for own in (first, again)
    )
    if one.keys() != other.keys():
        raise ValueError(f"again: {len(one.keys() ^ other.keys())} questions are in one run alone")
    answers = [key for key in one if key[2] == ACCURACY]
    margins = [abs(float(one[key].margin or 0) - float(other[key].margin or 0)) for key in answers]
    losses = [abs(one[key].value - other[key].value) for key in one if key[2] == LOSS]
    return {
        "answers": len(answers),
        "that differ": sum(one[key].value != other[key].value for key in answers),
        "largest change of a margin": round(max(margins), 3),
        "paragraphs": len(losses),
        "largest change of a loss": round(max(losses), 5),
    }


def main() -> None:
    """Ask, compare, and write the result beside the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--study", type=Path, default=STUDY)
    given = parser.parse_args()
    record = read_run(given.study / "main").finished[0]
    model, tokenizer = load_model(given.model)
    found = differences(record.outcomes, ask(cells.asked(cells.parts()["main"], tokenizer), model))
    values = {
        "first": record.facts, "again": machine.facts(), "seed": questions.SEED, "found": found,
    }  # fmt: skip
    path = given.study / "again.json"
    files.replace(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    print(path, found)


if __name__ == "__main__":
    main()

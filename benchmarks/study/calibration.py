"""Run the study of calibration: does it matter that it is sharpening which is fitted?

Every cell is a task, a number of examples, a γ a layer or a column, a scope, a builder and a seed.
It fits sharpening and its controls alike, to convergence with early stopping, each with the
learning rate of lowest stopping loss, and compares all of them on held-out examples. The cells are
one that stands for all, those that differ from it in one thing, two more seeds of each, and two
sizes between. What neither scope nor builder changes is left to the cell that stands for all. A
finished cell is a file in the folder of results; the same command goes on where it was.

    python -m benchmarks.study.calibration --model .cache/smollm2 --minutes 60
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import vps
from benchmarks.study.report import Cell, write_report
from vps import Calibration, VPSConfig
from vps.evaluation.tasks import PROMPT, documents
from vps.fitting import CONTROLS, Options
from vps.model.loading import load_model

OUT = Path("benchmarks/results/calibration")
LARGEST = 256
HELD_OUT = 60
SHORTEST_TEXT = 150  # characters
LONGEST_TEXT = 32  # tokens


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"builder": "sc"},
    {"size": 256},
    {"task": "text"},
    {"size": 8},
    {"per": "column"},
    {"scope": "sequence"},
    {"task": "units"},
)
BETWEEN = (Cell(size=24), Cell(size=96))
CELLS = (
    *(Cell(**change) for change in CHANGES),
    *BETWEEN,
    *(Cell(**change, seed=seed) for change in CHANGES for seed in (1, 2)),
)


def examples(task: str, size: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """Return ``size`` examples of a task to fit and stop by, and others that no size uses.

    Problems are put as ``vps eval`` puts them. Texts are paragraphs of the Python reference that
    CPython carries, in an order of their own.
    """
    count = LARGEST + held_out
    drawn: list[Any]
    if task == "text":
        pieces = (piece for name in sorted(topics) for piece in topics[name].split("\n\n"))
        whole = [" ".join(piece.split()) for piece in pieces if piece.lstrip()[:1].isupper()]
        drawn = [each for each in dict.fromkeys(whole) if len(each) >= SHORTEST_TEXT]
        random.Random(0).shuffle(drawn)
    else:
        drawn = [
            (PROMPT.replace("{{question}}", each["question"]), each["answer"])
            for each in documents(task, count)
        ]
    return drawn[:size], drawn[LARGEST:count]


def run(cell: Cell, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Calibration:
    """Calibrate one cell."""
    given, held_out = examples(cell.task, cell.size, arguments.held_out)
    controls = [name for name in arguments.controls if name not in cell.elsewhere]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return vps.calibrate(
            model,
            tokenizer,
            given,
            held_out=held_out,
            config=VPSConfig(builder=cell.builder),
            per=cell.per,
            scope=cell.scope,
            chat=False,
            longest=LONGEST_TEXT if cell.task == "text" else 512,
            controls=controls,
            options=Options(
                steps=arguments.steps,
                every=arguments.every,
                learning_rates=tuple(arguments.learning_rates),
                patience=arguments.patience,
                seed=cell.seed,
            ),
            seed=cell.seed,
            resume=arguments.out / f"{cell.name}.partial",
            progress=lambda message, total: print(f"  {message}", flush=True),
        )


def main() -> None:
    """Run the cells that are not finished, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--cells", nargs="+", choices=[cell.name for cell in CELLS], metavar="CELL",
        help="those alone, such as " + CELLS[0].name,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[0.02, 0.1])
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS))
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after these")
    parser.add_argument("--only-report", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in CELLS if arguments.cells is None or cell.name in arguments.cells]
    cells = [] if arguments.only_report else wanted
    start = time.monotonic()
    loaded: Any = None
    for cell in cells:
        path = arguments.out / f"{cell.name}.json"
        if path.exists() or time.monotonic() - start > 60 * arguments.minutes:
            continue
        if loaded is None:
            loaded = load_model(arguments.model)
        print(cell.name, flush=True)
        began = time.monotonic()
        run(cell, *loaded, arguments).save(path)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    print(write_report(arguments.out, CELLS))
    planned = sum((arguments.out / f"{cell.name}.json").exists() for cell in cells)
    print(json.dumps({"cells asked for": len(cells), "finished": planned}))


if __name__ == "__main__":
    main()

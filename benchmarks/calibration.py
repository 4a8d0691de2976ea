"""The study of calibration: does it matter that it is sharpening which is fitted?

Every cell is a task, a number of examples, a γ a layer or a column, a scope, a builder and a seed.
It fits sharpening and its controls alike, to convergence with early stopping, each with the
learning rate of lowest stopping loss, and compares all of them on held-out examples. The cells are
one that stands for all, those that differ from it in one thing, two more seeds of each, and two
sizes between. What neither scope nor builder changes is left to the cell that stands for all. A
finished cell is a file in the folder of results; the same command goes on where it was.

    python -m benchmarks.calibration --model .cache/smollm2 --minutes 60
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import vps
from vps import Calibration, VPSConfig, jsonl
from vps.evaluation.tasks import PROMPT, documents
from vps.fitting import CONTROLS, Options
from vps.loading import load_model

OUT = Path("benchmarks/results/calibration")
LARGEST = 256
HELD_OUT = 60
SHORTEST_TEXT = 150  # characters
LONGEST_TEXT = 32  # tokens
TITLES = {
    "sharpening": "sharpening",
    "scale": "output scale",
    "random-1": "random features 1",
    "random-2": "random features 2",
    "static": "static features",
    "lora": "LoRA",
}


class Cell(NamedTuple):
    """One calibration with its controls."""

    task: str = "arithmetic"
    size: int = 48
    per: str = "layer"
    scope: str = "token"
    builder: str = "sk"
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Controls that are those of the cell which differs in scope or builder alone."""
        return () if (self.scope, self.builder) == ("token", "sk") else ("scale", "lora")


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
    """The first ``size`` examples of a task to fit and stop by, and others that no size uses.

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


def summary(folder: Path) -> str:
    """A table of the held-out and side effects of all finished cells, in Markdown."""
    lines = [
        "| cell | form | numbers | rate | steps | held-out nll | difference | other text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*-*.json")):
        report = Calibration.load(path).report
        families = report["comparisons"]
        rows = families["sharpening"] + families.get("controls", [])
        side = {row["cell"]: row for row in rows if row["task"] == "other text"}
        held = [row for row in rows if row["task"] != "other text"]
        lines.append(f"| {path.stem} | plain | 0 | | | {held[0]['base']:.3f} | | |")
        for row in held:
            form = report["forms"][row["cell"]]
            lines.append(
                f"| | {TITLES[row['cell']]} | {form['numbers']} | {form['learning_rate']:g} | "
                f"{form['step']} | {row['value']:.3f} | {interval(row)} {row['verdict']} | "
                f"{interval(side[row['cell']])} |"
            )
        for row in families.get("against controls", []):
            if row["task"] != "other text":
                lines.append(
                    f"| | sharpening less {TITLES[row['against']]} | | | | | "
                    f"{interval(row)} {row['verdict']} | |"
                )
    return "\n".join(lines) + "\n"


def interval(row: dict[str, Any]) -> str:
    """A difference with its 95 % interval."""
    low, high = (row[end] for end in ("low", "high"))
    return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(folder: Path, path: Path) -> None:
    """Held-out difference of every form from the plain model, a panel a cell, as PNG."""
    from matplotlib.figure import Figure

    cells = sorted(folder.glob("*-*.json"))
    across = min(3, len(cells))
    down = -(-len(cells) // across)
    figure = Figure(figsize=(1.5 + 4.5 * across, 2.6 * down + 0.8), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    for axes, cell in zip(panels, cells, strict=False):
        families = Calibration.load(cell).report["comparisons"]
        rows = families["sharpening"] + families.get("controls", [])
        held = [row for row in rows if row["task"] != "other text"]
        for place, row in enumerate(held):
            axes.plot([row["low"], row["high"]], [place, place], color="#57606a", linewidth=1.4)
            axes.plot(row["difference"], place, "o", color="#0b57d0" if place == 0 else "#57606a")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(held)), [TITLES[row["cell"]] for row in held])
        axes.invert_yaxis()
        axes.set_xlabel(f"held-out nll per token less plain, nats, n = {held[0]['n']}")
        axes.set_title(cell.stem, fontsize=9, loc="left")
        axes.grid(True, axis="x", linewidth=0.3)
    figure.savefig(path, dpi=130)


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
    text = summary(arguments.out)
    jsonl.replace(arguments.out / "report.md", text)
    if any(arguments.out.glob("*-*.json")):
        draw(arguments.out, arguments.out / "held-out.png")
    print(text)
    planned = sum((arguments.out / f"{cell.name}.json").exists() for cell in cells)
    print(json.dumps({"cells asked for": len(cells), "finished": planned}))


if __name__ == "__main__":
    main()

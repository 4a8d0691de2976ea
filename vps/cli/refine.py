"""``vps refine``: verified refinement of one prompt, or of the rows of a JSONL file.

A row in is ``{"prompt": …, "gold"?: …, "id"?: …}``. A row out is what :func:`vps.refine` gave for
it, or its error, with its number and the settings of the run. It is written as soon as it is done,
so the file can be continued after any interruption.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vps import __version__, files
from vps.cli.options import (
    AnswerOptions,
    CalibrationOptions,
    Json,
    ModelOptions,
    PromptOptions,
    Seed,
    Sharpening,
    count,
    integer,
    typed,
)
from vps.cli.terminal import Progress
from vps.cli.values import UsageError, blaming
from vps.config import VPSConfig
from vps.reading import parse_json

if TYPE_CHECKING:
    from vps.refine import RefineResult

BEGINNING = '{"row": 0, "id": '  # of every row out
LABELLED = "The gold answer was used: accuracy of these answers on the same gold is not accuracy."


@dataclass(kw_only=True)
class Refine(AnswerOptions, CalibrationOptions, PromptOptions, ModelOptions):
    """Answer, verify against a gold answer, adapt, answer again.

    Without a gold answer the plain answer comes back, unless --samples asks to judge by agreement
    of sampled answers.
    """

    data: Annotated[Path | None, Option(help='JSONL rows {"prompt", "gold"?, "id"?}')] = None
    out: Annotated[Path | None, Option(help="JSONL of results of --data, continued if there")] = (
        None
    )
    gold: Annotated[str | None, typed(help="the reference answer of --prompt")] = None
    iterations: Annotated[int, count(help="answers, counting the plain one")] = 3
    keep: Annotated[Literal["best", "last"], Option(help="which answer counts")] = "best"
    samples: Annotated[int, integer(help="answers drawn for self-consistency")] = 0
    no_surrogate: Annotated[
        bool, Option("--no-surrogate", help="take no gradient from the gold answer")
    ] = False
    weights: Annotated[
        str | None,
        Option(
            metavar="JSON",
            help='parts of the loss with their weights, e.g. {"numeric": 1, "units": 0.5}',
        ),
    ] = None
    seed: Seed = 0
    as_json: Json = False

    def run(self) -> None:
        """Refine and print, or write the rows."""
        sharpening = self.sharpening()
        if self.samples == 1 or self.samples < 0:
            raise UsageError(f"--samples {self.samples}: expected 0 or at least 2")
        options: dict[str, Any] = {
            "iterations": self.iterations,
            "keep": self.keep,
            "surrogate": not self.no_surrogate,
            "samples": self.samples,
            "weights": self._loss_weights(),
            "max_new_tokens": self.max_new_tokens,
            "chat": not self.no_chat,
            "seed": self.seed,
        }
        self.exclude("prompt", "prompt_file", "data")
        if self.data is None:
            self._refine_prompt(sharpening, options)
        else:
            self._refine_rows(self.data, sharpening, options)

    def _loss_weights(self) -> dict[str, float] | None:
        if self.weights is None:
            return None
        from vps.verify.composite import check_weights

        with blaming("--weights", self.weights):
            return check_weights(parse_json(self.weights))

    def _refine_prompt(self, sharpening: Sharpening, options: dict[str, Any]) -> None:
        if self.out is not None:
            raise UsageError(
                "--out: only with --data; the answer to --prompt is printed, with --json as JSON"
            )
        prompt = self.read_prompt()
        if self.gold is not None and not self.gold.strip():
            raise UsageError("--gold: expected an answer, got nothing")
        self.check_model()
        from vps.refine import refine

        with Progress() as progress:
            model, tokenizer = self.load(progress)
            sharpening.patch(model)
            result = refine(model, tokenizer, prompt, self.gold, **options, progress=progress.step)
        if self.as_json:
            values = {"model": self.model, "prompt": prompt, "gold": self.gold}
            print(json.dumps(values | result.as_dict(), ensure_ascii=False))
        else:
            print(told(result))

    def _refine_rows(self, data: Path, sharpening: Sharpening, options: dict[str, Any]) -> None:
        if self.out is None:
            raise UsageError("--data: needs --out, the file of its results")
        if self.gold is not None:
            raise UsageError("--gold: not with --data, whose rows hold their own")
        settings = {
            "version": __version__,
            "model": self.model,
            "dtype": self.dtype,
            **options,
            "config": json.loads(sharpening.config.to_json()),
            "calibration": None,
        }
        if sharpening.calibration is not None:
            text = sharpening.calibration.to_json().encode()
            settings["calibration"] = hashlib.sha256(text).hexdigest()
        rows, finished = self._checked_rows(data, self.out, settings)
        with Progress() as progress:
            model, tokenizer = self.load(progress)
            sharpening.patch(model)
            progress.step("refining", len(rows))
            counts = refine_rows(
                model, tokenizer, rows, finished, self.out,
                settings=settings, options=options, advance=progress.advance,
            )  # fmt: skip
        labelled = any(row.gold is not None for row in rows) and self.iterations > 1
        if self.as_json:
            print(json.dumps(counts | {"used_labels": labelled, "out": str(self.out)}))
        else:
            print(", ".join(f"{number} {name}" for name, number in counts.items()))
            if labelled:
                print(LABELLED)
        if counts["failed"]:
            raise RuntimeError(f"{counts['failed']} of {len(rows)} rows failed; see {self.out}")

    @staticmethod
    def _checked_rows(
        data: Path, out: Path, settings: Mapping[str, Any]
    ) -> "tuple[list[Row], set[int]]":
        """Read the rows, and which of them ``out`` holds; it must be theirs and can be written."""
        with blaming("--data", data):
            rows = read_rows(data)
        if not rows:
            raise UsageError(f"--data {data}: holds no row")
        if all(row.error is not None for row in rows):
            first = f"line {rows[0].number}: {rows[0].error}"
            raise UsageError(f"--data {data}: no row can be used; {first}")
        if out.exists() and out.samefile(data):
            raise UsageError(f"--out {out}: is the file of --data; give another")
        with blaming("--out"):
            finished = finished_rows(out, rows, settings)
            out.open("ab").close()
        return rows, finished


def told(result: "RefineResult") -> str:
    """Tell every iteration with its losses, then the answer and whether labels were used."""
    lines = []
    for entry in result.iterations:
        parts = [f"iteration {entry.index}"]
        if entry.index == 0:
            parts.append("plain")
        else:
            parts.append(
                f"{entry.builder}, ℋ {entry.entropy:.2f} nats, σ {entry.sigma:.2f}, "
                f"γ {entry.gamma:.2f}, rank {entry.rank:.1f}, {entry.pairs:.1f} L-BFGS pairs"
            )
        if entry.losses is not None:
            each = ", ".join(f"{name} {loss:.4g}" for name, loss in entry.losses.parts.items())
            parts.append(f"loss {entry.losses.total:.4g} ({each})")
        lines += [": ".join(parts), f"  {' '.join(entry.text.split())}"]
    lines += ["", f"answer, of iteration {result.chosen} ({result.keep}):", result.answer]
    lines.append(LABELLED if result.used_labels else "No gold answer was used.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """Hold one line: its number from 1, its parts, and why it cannot be used, or ``None``."""

    number: int
    prompt: str = ""
    gold: str | None = None
    id: Any = None
    error: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a file, broken ones with their error; empty lines are none.

    Raises:
        OSError: the file cannot be read.
    """
    return [_row(number, line) for number, line in files.lines(path)]


def finished_rows(path: Path, rows: list[Row], settings: Mapping[str, Any]) -> set[int]:
    """Cut a broken last line off an output file, and return the numbers of the rows it holds.

    Raises:
        ValueError: the file is no output of these rows with these settings.
        OSError: the file cannot be read or shortened.
    """
    if not path.exists():
        return set()
    records, end = files.read_objects(path, BEGINNING)
    finished, known = set(), {row.number: row for row in rows}
    wanted = json.loads(json.dumps(settings))
    for place, record in enumerate(records, 1):
        number, made = record.get("row"), record.get("settings")
        row = known.get(number) if isinstance(number, int) else None
        if row is None or record.get("prompt") != row.prompt or record.get("gold") != row.gold:
            raise ValueError(f"{path}: line {place} is not of a row of this input")
        for name, value in wanted.items():
            came = made.get(name) if isinstance(made, dict) else None
            if came != value and not (name == "config" and _mean_the_same(came, value)):
                raise ValueError(
                    f"{path}: line {place} was made with {name} {came!r}, not {value!r}"
                )
        finished.add(row.number)
    files.cut(path, end)
    return finished


def _mean_the_same(*configs: Any) -> bool:
    """Tell whether two configs are equal; earlier versions wrote out what was left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = (VPSConfig.from_json(json.dumps(config)) for config in configs)
    except (TypeError, ValueError):
        return False
    return one == other


def refine_rows(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    finished: set[int],
    out: Path,
    *,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    advance: Callable[[], None],
) -> dict[str, int]:
    """Refine every row that ``out`` does not hold; return how many were refined, failed, skipped.

    A row that fails is written with its error and counts as finished: remove its line to try it
    again.

    Args:
        model, tokenizer: as for :func:`vps.refine`.
        rows: of :func:`read_rows`.
        finished: of :func:`finished_rows`.
        out: the output file; continued if it is there.
        settings: what the run is, for JSON; written to each row and compared on continuing.
        options: keyword arguments of :func:`vps.refine`.
        advance: called after every row, finished ones too.

    Raises:
        OSError: ``out`` cannot be written.
    """
    counts = {"refined": 0, "failed": 0, "skipped": len(finished)}
    for row in rows:
        if row.number not in finished:
            record = _refined(model, tokenizer, row, options)
            counts["failed" if "error" in record else "refined"] += 1
            files.append(out, record | {"settings": settings})
        advance()
    return counts


def _refined(model: Any, tokenizer: Any, row: Row, options: Mapping[str, Any]) -> dict[str, Any]:
    from vps.refine import refine

    record = {"row": row.number, "id": row.id, "prompt": row.prompt, "gold": row.gold}
    if row.error is not None:
        return record | {"error": row.error, "used_labels": False}
    try:
        return record | refine(model, tokenizer, row.prompt, row.gold, **options).as_dict()
    except Exception as error:  # whatever a row brings up must not end the others
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        labelled = row.gold is not None and options["iterations"] >= 2
        return record | {"error": reason, "used_labels": labelled}


def _row(number: int, line: bytes) -> Row:
    values = files.parse_object(line)
    if values is None:
        return Row(number, error=files.why_none(line))
    error = None
    given = {name: values.get(name) for name in ("prompt", "gold")}
    for name, value in given.items():
        if not isinstance(value, str):
            if name == "prompt" or value is not None:
                came = type(value).__name__ if name in values else "nothing"
                error = error or f"{name!r} must be a string, got {came}"
            given[name] = None
    return Row(number, given["prompt"] or "", given["gold"], values.get("id"), error)

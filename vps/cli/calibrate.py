"""``vps calibrate``: fit a γ to every layer, beside controls, or only say where γ would matter."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vps import files
from vps.cli.options import (
    ConfigOptions,
    ModelOptions,
    Scope,
    Seed,
    count,
)
from vps.cli.terminal import Progress, warn
from vps.cli.values import UsageError, blaming, names_of, read_config
from vps.reading import parse_json, read_text

if TYPE_CHECKING:
    from vps.fitting import Options, Sensitivity
    from vps.fitting.examples import LeftOut

SHOWN = 15  # layers of --gradient-only on the terminal
RANKING = "ranking by --gradient-only"


@dataclass(kw_only=True)
class Calibrate(ConfigOptions, ModelOptions):
    """Fit a γ to every layer on examples, with controls.

    Rows of --data are {"prompt", "answer"}, whose answers are scored, or {"text"}. A quarter of
    them is kept for early stopping and, without --held-out, a quarter for the report. Started
    again, an interrupted run continues.
    """

    data: Annotated[Path, Option(help="JSONL of examples")]
    out: Annotated[Path, Option(help="the calibration, as JSON")]
    held_out: Annotated[Path | None, Option(help="JSONL of examples for the report")] = None
    other_text: Annotated[
        Path | None,
        Option(help="JSONL of other texts, for side effects (default: twelve short ones)"),
    ] = None
    per: Annotated[Literal["layer", "column"], Option(help="what gets a γ of its own")] = "layer"
    layers: Annotated[
        str | None,
        Option(metavar="A,B", help="fit these alone, by name or its end; the others stay plain"),
    ] = None
    top_layers: Annotated[int | None, count(help="fit the N layers of largest |∂L/∂γ|")] = None
    steps: Annotated[int | None, count(help="of Adam, at most (default: 16)")] = None
    batch_size: Annotated[int | None, count(metavar="B", help="examples a step (default: 6)")] = (
        None
    )
    learning_rate: Annotated[
        str | None,
        Option(
            metavar="R,R",
            help="of Adam (default: 0.1); of several, the one of lowest stopping loss",
        ),
    ] = None
    patience: Annotated[
        int | None, count(help="checks without a lower loss before stopping (default: 2)")
    ] = None
    scope: Annotated[
        Scope, Option(help="for scoring the examples; only token and prompt do not look ahead")
    ] = "token"
    no_chat: Annotated[bool, Option("--no-chat", help="do not use the chat template")] = False
    seed: Seed = 0
    no_controls: Annotated[
        bool,
        Option(
            "--no-controls",
            help="do not fit output scale, random and static features, LoRA as well",
        ),
    ] = False
    gradient_only: Annotated[
        bool,
        Option(
            "--gradient-only", help="fit nothing: rank and plot the layers by ∂L/∂γ and its noise"
        ),
    ] = False
    as_json: Annotated[bool, Option("--json", help="print the file's JSON instead")] = False

    def run(self) -> None:
        """Fit or take gradients, write, print."""
        self.exclude("layers", "top_layers")
        for option, path in (
            ("--data", self.data),
            ("--held-out", self.held_out),
            ("--other-text", self.other_text),
        ):
            if path is not None:
                with blaming(option, path):
                    for _ in files.objects(path):  # before torch is loaded
                        pass
        self.check_model()
        config = read_config(self.config, self.settings)
        examples = _read("--data", self.data)
        held_out = None if self.held_out is None else _read("--held-out", self.held_out)
        others = None
        if self.other_text is not None:
            others = [each.answer for each in _read("--other-text", self.other_text)]
        options = self._fit_options()
        partial = self.out.with_name(f"{self.out.name}.partial")
        self._claim(partial)

        from vps.fitting import calibrate, text
        from vps.model.patching import patch

        layers = self.top_layers if self.layers is None else names_of("--layers", self.layers)
        with Progress() as progress:
            model, tokenizer = self.load(progress)
            patch(model, config)
            shared: dict[str, Any] = {
                "scope": self.scope,
                "chat": not self.no_chat,
                "progress": progress.step,
                "advance": progress.advance,
            }
            if self.gradient_only:
                self._rank(model, tokenizer, examples, progress, shared)
                return
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                calibration = calibrate(
                    model,
                    tokenizer,
                    examples,
                    held_out=held_out,
                    other_texts=others,
                    per=self.per,
                    layers=layers,
                    controls=not self.no_controls,
                    options=options,
                    seed=self.seed,
                    resume=partial,
                    **shared,
                )
        calibration.save(self.out)
        print(calibration.to_json() if self.as_json else text(calibration))
        for each in said:
            if str(each.message).startswith("vps.calibrate: "):
                warn(str(each.message).removeprefix("vps.calibrate: "))

    def _fit_options(self) -> "Options":
        from vps.fitting import Options

        given: dict[str, Any] = {"seed": self.seed}
        for name in ("steps", "batch_size", "patience"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        with blaming("--learning-rate", self.learning_rate):
            if self.learning_rate is not None:
                try:
                    rates = tuple(float(rate) for rate in self.learning_rate.split(","))
                except ValueError:
                    raise ValueError("expected numbers, separated by commas") from None
                given["learning_rates"] = rates
            return Options(**given)

    def _claim(self, partial: Path) -> None:
        """Refuse to replace, at the end, what an earlier call of the same kind did not write."""
        from vps.fitting.calibrate import left

        out, where = self.out, f"--out {self.out}"
        if not out.absolute().parent.is_dir() or (out.exists() and not out.is_file()):
            raise UsageError(f"{where}: expected a file in a folder that exists")
        kind = RANKING if self.gradient_only else "calibration"
        if out.exists() and out.stat().st_size > 0 and _kind(out) != kind:
            raise UsageError(
                f"{where}: holds no {kind}, and would be overwritten; give another file"
            )
        if not self.gradient_only:
            try:
                left(partial)
            except ValueError as error:
                raise UsageError(f"{where}: {str(error).removeprefix('calibrate: ')}") from error
            return
        picture = out.with_suffix(".png")
        if picture == out:
            raise UsageError(
                f"{where}: expected another ending, of a JSON file; .png is the heat map"
            )
        if picture.exists() and (not out.exists() or _kind(out) != kind):
            raise UsageError(
                f"{where}: {picture} is there and would be overwritten; give another file"
            )

    def _rank(
        self,
        model: Any,
        tokenizer: Any,
        examples: list[Any],
        progress: Progress,
        shared: dict[str, Any],
    ) -> None:
        """Rank the layers by their gradients, and say which examples could not be used."""
        from vps.fitting import sensitivity
        from vps.fitting.examples import told, usable
        from vps.model.patching import sharpened_layers

        kept, left_out = usable(tokenizer, "examples", examples, chat=shared["chat"])
        found = sensitivity(model, tokenizer, [each for each, _ in kept], **shared)
        progress.close()
        self._write_ranking(found, len(kept), left_out, list(sharpened_layers(model)))
        if left_out:
            warn(told(left_out, len(examples)))

    def _write_ranking(
        self, found: "list[Sensitivity]", examples: int, left_out: "list[LeftOut]", order: list[str]
    ) -> None:
        """Write and draw the ranking, and print its head; the picture has the model's order."""
        from vps.cli.demo.heatmap import Panel, draw_panels
        from vps.fitting import agreement

        together = agreement(found)
        rows = [
            dataclasses.asdict(each) | {"ratio": each.ratio, "agrees": each.agrees}
            for each in found
        ]
        values = {
            "model": self.model,
            "examples": examples,
            "left_out": [dataclasses.asdict(each) for each in left_out],
            "scope": self.scope,
            "agreement": _finite(together),
            "layers": [{key: _finite(value) for key, value in row.items()} for row in rows],
        }
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        files.replace(self.out, text)
        picture, unit = self.out.with_suffix(".png"), "nats per token"
        drawn = sorted(found, key=lambda each: order.index(each.name))
        draw_panels(
            [each.name for each in drawn],
            [
                Panel("∂L/∂γ", unit, [each.gradient for each in drawn], centred=True),
                Panel("first half", unit, [each.halves[0] for each in drawn], centred=True),
                Panel("second half", unit, [each.halves[1] for each in drawn], centred=True),
                Panel(
                    "|∂L/∂γ| over its error", "no unit", [min(each.ratio, 99.0) for each in drawn]
                ),
            ],
            picture,
            f"How the loss of {examples} examples answers to γ of every layer, at γ = 0",
        )
        if self.as_json:
            print(text, end="")
            return
        width = max(len(each.name) for each in found)
        print(f"{'layer':<{width}}  {'∂L/∂γ':>9}  {'error':>8}  {'halves':>19}")
        for each in found[:SHOWN]:
            halves = f"{each.halves[0]:+9.4f} {each.halves[1]:+9.4f}"
            print(f"{each.name:<{width}}  {each.gradient:+9.4f}  {each.error:8.4f}  {halves}")
        agreeing = sum(each.agrees for each in found)
        print(
            f"{len(found)} layers, {examples} examples; {agreeing} layers have one sign in both "
            f"halves (half would by chance); correlation of the halves {together:.2f}"
        )
        print(f"all layers: {self.out}; heat map: {picture}")


def _read(option: str, path: Path) -> list[Any]:
    from vps.fitting import read_examples

    with blaming(option, path):
        found = read_examples(path)
    if not found:
        raise UsageError(f"{option} {path}: holds no example")
    return found


def _kind(path: Path) -> str | None:
    """Tell which of the two files of this command that is, if it is one."""
    from vps.model.calibration import FORMAT

    try:
        values = parse_json(read_text(path))
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    if values.get("format") == FORMAT:
        return "calibration"
    ranking = {"model", "examples", "scope", "agreement", "layers"}
    return RANKING if set(values) >= ranking else None


def _finite(value: Any) -> Any:
    """Return ``None`` for a number that JSON has no name for."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value

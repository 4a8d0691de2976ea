"""``vps calibrate``: fit a γ to every layer, beside controls, or only say where γ would matter."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vps.cli.options import (
    UsageError,
    add_config,
    add_model,
    load_named_model,
    positive,
    read_config,
    usable_device,
)
from vps.cli.terminal import Progress, muted, quiet_transformers
from vps.model.calibration import FORMAT
from vps.reading import parse_json, read_text

if TYPE_CHECKING:
    from vps.fitting import Sensitivity
    from vps.fitting.examples import LeftOut

SHOWN = 15  # layers of --gradient-only on the terminal


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        parents=[common],
        help="fit a γ to every layer on examples, with controls",
        description='Rows of --data are {"prompt", "answer"}, whose answers are scored, or '
        '{"text"}. A quarter of them is kept to stop by and, without --held-out, a quarter to '
        "report on. An interrupted run goes on where it was when it is started again.",
    )
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of examples")
    parser.add_argument("--out", type=Path, required=True, help="the calibration, as JSON")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="JSONL to report on")
    parser.add_argument(
        "--other-text", type=Path, metavar="FILE",
        help="JSONL of texts that the examples do not cover, for side effects (twelve short ones "
        "by default)",
    )  # fmt: skip
    add_config(parser)
    parser.add_argument(
        "--per", choices=("layer", "column"), default="layer", help="what gets a γ of its own"
    )
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument(
        "--layers", metavar="A,B", help="fit these alone, by name or its end; the others stay plain"
    )
    subset.add_argument(
        "--top-layers", type=positive, metavar="N", help="fit the N layers of largest |∂L/∂γ|"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="at most")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="examples a step")
    parser.add_argument(
        "--learning-rate", metavar="R,R", help="of Adam; of several the one that stops lowest"
    )
    parser.add_argument("--patience", type=positive, metavar="N", help="looks without a lower loss")
    parser.add_argument(
        "--scope", choices=("token", "sequence", "batch"), default="token",
        help="for scoring the examples (default: token, the only one without leaks)",
    )  # fmt: skip
    parser.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--no-controls", action="store_true",
        help="do not fit plain scale, random and static features and LoRA beside it",
    )  # fmt: skip
    parser.add_argument(
        "--gradient-only", action="store_true",
        help="fit nothing: rank the layers by ∂L/∂γ and its noise into --out, with a heat map "
        "beside it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the file's JSON instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fit or take gradients, write, print."""
    config = read_config(arguments.config, arguments.set)
    examples = _read("--data", arguments.data)
    held_out = None if arguments.held_out is None else _read("--held-out", arguments.held_out)
    others = None
    if arguments.other_text is not None:
        others = [each.answer for each in _read("--other-text", arguments.other_text)]
    options = _options(arguments)
    partial = arguments.out.with_name(f"{arguments.out.name}.partial")
    _claim(arguments.out, partial, arguments.gradient_only)
    quiet_transformers(arguments.debug)

    from vps import patch
    from vps.fitting import calibrate, sensitivity, text
    from vps.fitting.examples import told, usable
    from vps.model.patching import sharpened_layers

    device = usable_device(arguments.device)
    progress = Progress()
    try:
        progress.step("loading the model")
        with muted(arguments.debug):
            model, tokenizer = load_named_model(arguments, device)
        patch(model, config)
        shared: dict[str, Any] = {
            "scope": arguments.scope,
            "chat": not arguments.no_chat,
            "progress": progress.step,
            "advance": progress.advance,
        }
        if arguments.gradient_only:
            kept, left_out = usable(tokenizer, "examples", examples, chat=shared["chat"])
            found = sensitivity(model, tokenizer, [each for each, _ in kept], **shared)
            progress.close()
            _gradients(arguments, found, len(kept), left_out, list(sharpened_layers(model)))
            if left_out:
                _warn(told(left_out, len(examples)))
            return
        layers: Any = arguments.top_layers
        if arguments.layers is not None:
            layers = [name.strip() for name in arguments.layers.split(",") if name.strip()]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            calibration = calibrate(
                model,
                tokenizer,
                examples,
                held_out=held_out,
                other_texts=others,
                per=arguments.per,
                layers=layers,
                controls=not arguments.no_controls,
                options=options,
                seed=arguments.seed,
                resume=partial,
                **shared,
            )
    finally:
        progress.close()
    calibration.save(arguments.out)
    print(calibration.to_json() if arguments.json else text(calibration))
    for each in said:
        if str(each.message).startswith("vps.calibrate: "):
            _warn(str(each.message).removeprefix("vps.calibrate: "))


def _claim(out: Path, partial: Path, gradient_only: bool) -> None:
    """Refuse to replace, at the end, what an earlier call of the same kind did not write."""
    from vps.fitting.calibrate import left

    where = f"--out {out}"
    if not out.absolute().parent.is_dir() or (out.exists() and not out.is_file()):
        raise UsageError(f"{where}: expected a file in a folder that exists")
    kind = "ranking by --gradient-only" if gradient_only else "calibration"
    ours = not out.exists() or out.stat().st_size == 0 or _kind(out) == kind
    if not ours:
        raise UsageError(f"{where}: holds no {kind}, and would be overwritten; give another file")
    if not gradient_only:
        try:
            left(partial)
        except ValueError as error:
            raise UsageError(f"{where}: {str(error).removeprefix('calibrate: ')}") from error
        return
    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError(f"{where}: expected another ending, of a JSON file; .png is the heat map")
    if picture.exists() and (not out.exists() or _kind(out) != kind):
        raise UsageError(f"{where}: {picture} is there and would be overwritten; give another file")


def _kind(path: Path) -> str | None:
    """Which of the two files of this command that is, if it is one."""
    try:
        values = parse_json(read_text(path))
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    if values.get("format") == FORMAT:
        return "calibration"
    ranking = {"model", "examples", "scope", "agreement", "layers"}
    return "ranking by --gradient-only" if set(values) >= ranking else None


def _warn(message: str) -> None:
    print(f"vps: warning: {message}", file=sys.stderr)


def _read(option: str, path: Path) -> list[Any]:
    from vps.fitting import read_examples

    try:
        found = read_examples(path)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error
    if not found:
        raise UsageError(f"{option} {path}: holds no example")
    return found


def _options(arguments: argparse.Namespace) -> Any:
    from vps.fitting import Options

    given: dict[str, Any] = {"seed": arguments.seed}
    for name in ("steps", "batch_size", "patience"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    try:
        if arguments.learning_rate is not None:
            rates = tuple(float(rate) for rate in arguments.learning_rate.split(","))
            given["learning_rates"] = rates
        return Options(**given)
    except ValueError as error:
        raise UsageError(f"--learning-rate {arguments.learning_rate}: {error}") from error


def _gradients(
    arguments: argparse.Namespace,
    found: list[Sensitivity],
    examples: int,
    left_out: list[LeftOut],
    order: list[str],
) -> None:
    """Write and draw the ranking, print its head; the picture is in the order of the model."""
    from vps import files
    from vps.cli.demo.heatmap import Panel, draw_panels
    from vps.fitting import agreement

    together = agreement(found)
    rows = [
        dataclasses.asdict(each) | {"ratio": _finite(each.ratio), "agrees": each.agrees}
        for each in found
    ]
    values = {
        "model": arguments.model,
        "examples": examples,
        "left_out": [dataclasses.asdict(each) for each in left_out],
        "scope": arguments.scope,
        "agreement": _finite(together),
        "layers": [{key: _finite(value) for key, value in row.items()} for row in rows],
    }
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    files.replace(arguments.out, text)
    picture, unit = arguments.out.with_suffix(".png"), "nats per token"
    names = [each.name for each in found]
    drawn = sorted(found, key=lambda each: order.index(each.name))
    draw_panels(
        [each.name for each in drawn],
        [
            Panel("∂L/∂γ", unit, [each.gradient for each in drawn], centred=True),
            Panel("first half", unit, [each.halves[0] for each in drawn], centred=True),
            Panel("second half", unit, [each.halves[1] for each in drawn], centred=True),
            Panel("|∂L/∂γ| over its error", "no unit", [min(each.ratio, 99.0) for each in drawn]),
        ],
        picture,
        f"How the loss of {examples} examples answers to γ of every layer, at γ = 0",
    )
    if arguments.json:
        print(text, end="")
        return
    width = max(len(name) for name in names)
    print(f"{'layer':<{width}}  {'∂L/∂γ':>9}  {'error':>8}  {'halves':>19}")
    for each in found[:SHOWN]:
        halves = f"{each.halves[0]:+9.4f} {each.halves[1]:+9.4f}"
        print(f"{each.name:<{width}}  {each.gradient:+9.4f}  {each.error:8.4f}  {halves}")
    agreeing = sum(each.agrees for each in found)
    print(
        f"{len(found)} layers, {examples} examples; {agreeing} layers have one sign in both halves "
        f"(half would by chance); correlation of the halves {together:.2f}"
    )
    print(f"all layers: {arguments.out}; heat map: {picture}")


def _finite(value: Any) -> Any:
    """``None`` for a number that JSON has no name for."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value

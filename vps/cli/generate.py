"""``vps generate``: text of a sharpened model, beside the plain model's if asked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from vps.cli.options import (
    UsageError,
    add_answer,
    add_calibration,
    add_config,
    add_model,
    add_prompt,
    apply_calibration,
    load_named_model,
    read_calibration,
    read_prompt,
    usable_device,
)
from vps.cli.terminal import Progress, difference_line, muted, quiet_transformers, side_by_side


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate", parents=[common], help="generate text with a sharpened model"
    )
    add_model(parser)
    add_prompt(parser)
    add_config(parser)
    add_calibration(parser)
    add_answer(parser)
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same as --set seed=N; decoding is greedy"
    )
    parser.add_argument("--compare", action="store_true", help="also generate without sharpening")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Generate and print."""
    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    config, calibration = read_calibration(arguments, seed + arguments.set)
    prompt = read_prompt(arguments)
    quiet_transformers(arguments.debug)

    from vps import disabled, patch
    from vps.model.generation import encode, first_difference, generate

    device = usable_device(arguments.device)
    progress = Progress()
    tokens = arguments.max_new_tokens
    try:
        progress.step("loading the model")
        with muted(arguments.debug):
            model, tokenizer = load_named_model(arguments, device)
        report = patch(model, config)
        apply_calibration(arguments, model, calibration)
        inputs = encode(tokenizer, prompt, chat=not arguments.no_chat)
        progress.step("generating, sharpened", tokens)
        sharpened = generate(model, tokenizer, inputs, tokens, progress.advance)
        plain = None
        if arguments.compare:
            progress.step("generating, plain", tokens)
            with disabled(model):
                plain = generate(model, tokenizer, inputs, tokens, progress.advance)
    except FileNotFoundError as error:
        raise UsageError(f"--model: {error}") from error
    finally:
        progress.close()
    result: dict[str, Any] = {
        "model": arguments.model,
        "prompt": prompt,
        "config": dataclasses.asdict(config),
        "layers": len(report.patched),
        "refused": report.refused,
        "not_patched": report.not_patched,
        "sharpened": dataclasses.asdict(sharpened),
    }
    if calibration is not None:
        result["calibration"] = str(arguments.calibration)
    if plain is not None:
        result["plain"] = dataclasses.asdict(plain)
        result["first_difference"] = first_difference(plain.tokens, sharpened.tokens)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    elif plain is not None:
        print(side_by_side(plain.text, sharpened.text))
        print(difference_line(result["first_difference"]))
    else:
        print(sharpened.text)

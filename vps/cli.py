"""The command ``vps``: parses, calls, prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from importlib import util
from pathlib import Path
from typing import Any

from vps import VPSConfig, __version__
from vps.config import nearest_field

EPILOG = """examples:
  vps generate --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "What is 17 + 25?" --compare
  vps generate --model model.gguf --prompt-file question.txt --set gamma=0.1 --set builder=sk
  vps doctor
"""


class UsageError(Exception):
    """The user's arguments cannot be used; exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a failure, 2 for bad usage, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    _quiet(arguments.debug)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("vps: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"vps: error: {line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    parser = argparse.ArgumentParser(
        prog="vps",
        description="Sharpen the linear layers of a language model on the fly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vps {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser(
        "generate", parents=[common], help="generate text with a sharpened model"
    )
    generate.add_argument("--model", required=True, help="Hugging Face id, folder or .gguf file")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt; standard input when neither is given")
    source.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    generate.add_argument("--config", type=Path, help="JSON file of VPSConfig fields")
    generate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field, e.g. gamma=0.3, tau=null, rank_bounds=[1,2]; setting gamma, rank, "
        "topk or order also turns its adaptive_ switch off unless that is set too",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    generate.add_argument("--compare", action="store_true", help="also generate without sharpening")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    generate.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    generate.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    generate.set_defaults(run=_generate)

    demo = commands.add_parser(
        "demo", parents=[common], help="three prompts on SmolLM2-135M, plain and sharpened"
    )
    demo.add_argument("--model-dir", type=Path, default=Path(".cache/smollm2"))
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    demo.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="versions, devices and backends of this machine"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _quiet(debug: bool) -> None:
    """Keep the libraries' own notices off the terminal; one clear line is ours to write."""
    if debug:
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _quiet_transformers(debug: bool) -> None:
    """No notices, and progress bars only where somebody watches."""
    if debug or util.find_spec("transformers") is None:
        return
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    if not sys.stderr.isatty():
        notices.disable_progress_bar()
        os.environ.setdefault("TQDM_DISABLE", "1")


def read_config(path: Path | None, settings: list[str]) -> VPSConfig:
    """The config of a file, changed by ``FIELD=VALUE`` settings.

    Raises:
        UsageError: a missing or broken file, an unknown field or a bad value.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected FIELD=VALUE")
        if name not in VPSConfig.field_names():
            raise UsageError(f"--set {setting}: unknown field {name!r}{nearest_field(name)}")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
    for name in ("gamma", "rank", "topk", "order"):
        if name in changes:
            changes.setdefault(f"adaptive_{name}", False)
    try:
        config = VPSConfig() if path is None else VPSConfig.from_json(path.read_text("utf-8"))
        return config.replace(**changes)
    except (OSError, ValueError, TypeError) as error:
        where = f"{path}: " if path is not None and not isinstance(error, OSError) else ""
        raise UsageError(f"{where}{error}") from error


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.prompt_file is not None:
        try:
            prompt = arguments.prompt_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompt-file {arguments.prompt_file}: {error}") from error
    else:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def _generate(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, arguments.set)
    prompt = _read_prompt(arguments)
    _quiet_transformers(arguments.debug)
    import torch

    from vps import disabled, patch
    from vps.generation import encode, first_difference, generate
    from vps.loading import load_model

    try:
        device = str(torch.device(arguments.device))
    except RuntimeError:
        raise UsageError(f"--device {arguments.device}: no torch device of this name") from None
    try:
        model, tokenizer = load_model(arguments.model, getattr(torch, arguments.dtype), device)
    except FileNotFoundError as error:
        raise UsageError(f"--model: {error}") from error
    report = patch(model, config)
    inputs = encode(tokenizer, prompt, chat=not arguments.no_chat)
    sharpened = generate(model, tokenizer, inputs, arguments.max_new_tokens)
    result: dict[str, Any] = {
        "model": arguments.model,
        "prompt": prompt,
        "config": json.loads(config.to_json()),
        "layers": len(report.patched),
        "sharpened": dataclasses.asdict(sharpened),
    }
    if arguments.compare:
        with disabled(model):
            plain = generate(model, tokenizer, inputs, arguments.max_new_tokens)
        result["plain"] = dataclasses.asdict(plain)
        result["first_difference"] = first_difference(plain.tokens, sharpened.tokens)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    elif arguments.compare:
        print(side_by_side(plain.text, sharpened.text))
        print(difference_line(result["first_difference"]))
    else:
        print(sharpened.text)


def side_by_side(plain: str, sharpened: str) -> str:
    """Two texts in two columns as wide as the terminal allows."""
    import shutil
    import textwrap
    from itertools import zip_longest

    width = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    columns = []
    for title, text in (("plain", plain), ("sharpened", sharpened)):
        lines = [title, "-" * width]
        for line in text.splitlines():
            lines += textwrap.wrap(line, width) or [""]
        columns.append(lines)
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in rows)


def difference_line(position: int | None) -> str:
    """Where two continuations part, in words."""
    if position is None:
        return "no token differs"
    return f"first difference at generated token {position + 1}"


def _demo(arguments: argparse.Namespace) -> None:
    _quiet_transformers(arguments.debug)
    from vps.demo import run_demo

    run = run_demo(arguments.model_dir, arguments.out, arguments.max_new_tokens, _progress)
    for answer in run.answers:
        print(f"\n> {answer.prompt}\n")
        print(side_by_side(answer.plain.text, answer.sharpened.text))
        print(difference_line(answer.first_difference))
    print(
        f"\nplain {run.plain_rate:.1f} tokens/s, sharpened {run.sharpened_rate:.1f} tokens/s, "
        f"time ratio {run.plain_rate / run.sharpened_rate:.2f}"
    )
    print(f"next-token choices changed: {run.changed:.1%} (scope token, along the plain answers)")
    print(f"report: {run.report}")


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr)


def _doctor(arguments: argparse.Namespace) -> None:
    from vps.doctor import diagnose

    facts = diagnose()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for section, entries in facts.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:<14} {value}")


if __name__ == "__main__":
    sys.exit(main())

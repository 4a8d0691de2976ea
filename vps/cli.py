"""The command ``vps``: parses, calls, prints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
import threading
import warnings
from importlib import util
from pathlib import Path
from typing import Any, NoReturn

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
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            _quiet(arguments.debug)
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
    finally:
        logging.disable(level)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vps: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    parser = _Parser(
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
        help="change one field, e.g. gamma=0.3, tau=null, rank_bounds=[1,2]; may be repeated; "
        "setting gamma, rank, topk or order also turns its adaptive_ switch off unless that is "
        "set too",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    generate.add_argument(
        "--seed", type=int, metavar="N", help="the same as --set seed=N; decoding is greedy"
    )
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
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
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
    """No notices and no bars of transformers; :class:`_Progress` shows our own."""
    if debug or util.find_spec("transformers") is None:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def _muted(debug: bool) -> contextlib.AbstractContextManager[Any]:
    """Keeps bars off standard error that no setting of their library turns off (GGUF files)."""
    return contextlib.nullcontext() if debug else contextlib.redirect_stderr(io.StringIO())


class _Progress:
    """A tqdm line on a terminal, for every step that takes over two seconds; silent elsewhere."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._shown = self._stream.isatty() and util.find_spec("tqdm") is not None
        self._bar: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, message: str, total: int | None = None) -> None:
        """Begin a step, of ``total`` parts where they can be counted; ends the one before."""
        self.close()
        if not self._shown:
            return
        from tqdm import tqdm

        layout = "{desc} [{elapsed}]" if total is None else "{desc} {bar} {n}/{total} [{elapsed}]"
        self._bar = tqdm(
            desc=message, total=total, delay=2, leave=False, file=self._stream,
            bar_format=layout, miniters=0,
        )  # fmt: skip
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._tick, args=(self._bar, self._over), daemon=True
        )
        self._thread.start()

    @staticmethod
    def _tick(bar: Any, over: threading.Event) -> None:
        while not over.wait(0.5):
            bar.update(0)

    def advance(self) -> None:
        """One part is done."""
        if self._bar is not None:
            self._bar.update(1)

    def close(self) -> None:
        """End the step and take its line away."""
        if self._bar is not None:
            self._over.set()
            if self._thread is not None:
                self._thread.join()
            self._bar.close()
            self._bar = None


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
        changes[name] = _value(name, text)
    for name in ("gamma", "rank", "topk", "order"):
        if name in changes:
            changes.setdefault(f"adaptive_{name}", False)
    try:
        config = VPSConfig() if path is None else VPSConfig.from_json(path.read_text("utf-8"))
        return config.replace(**changes)
    except (OSError, ValueError, TypeError) as error:
        where = f"{path}: " if path is not None and not isinstance(error, OSError) else ""
        raise UsageError(f"{where}{error}") from error


def _value(name: str, text: str) -> Any:
    """``text`` as field ``name`` takes it; what does not fit is left for VPSConfig to refuse."""
    kind = str(next(field.type for field in dataclasses.fields(VPSConfig) if field.name == name))
    word = text.strip().lower()
    if "None" in kind and word in ("null", "none"):
        return None
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[word]
        if kind.startswith("float"):
            return float(word)
        if kind.startswith("tuple") and "str" not in kind and not word.startswith("["):
            return json.loads(f"[{text}]")
        return json.loads(text)
    except (ValueError, KeyError, RecursionError):
        return text


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
    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    config = read_config(arguments.config, seed + arguments.set)
    prompt = _read_prompt(arguments)
    _quiet_transformers(arguments.debug)
    import torch

    from vps import disabled, patch
    from vps.generation import encode, first_difference, generate
    from vps.loading import load_model

    device = _device(arguments.device)
    progress = _Progress()
    tokens = arguments.max_new_tokens
    try:
        progress.step("loading the model")
        with _muted(arguments.debug):
            model, tokenizer = load_model(arguments.model, getattr(torch, arguments.dtype), device)
        report = patch(model, config)
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
        "config": json.loads(config.to_json()),
        "layers": len(report.patched),
        "refused": report.refused,
        "not_patched": report.not_patched,
        "sharpened": dataclasses.asdict(sharpened),
    }
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


def _device(name: str) -> str:
    """``name``, once torch has shown that it can hold a tensor there."""
    import torch

    try:
        kind = torch.device(name).type
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not a usable torch device: {reason}") from None
    if kind == "meta":
        raise UsageError(f"--device {name}: holds no data")
    return name


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

    progress = _Progress()
    try:
        with _muted(arguments.debug):
            run = run_demo(
                arguments.model_dir, arguments.out, arguments.max_new_tokens, progress.step
            )
    except FileNotFoundError as error:
        raise UsageError(f"--model-dir: {error}") from error
    finally:
        progress.close()
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

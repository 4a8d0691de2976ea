"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from vps import Calibration, VPSConfig
from vps.config import nearest_field
from vps.reading import MARK, parse_json, read_values
from vps.reading import read_text as text_of

NAMES = r"[\w-]+(\.[\w-]+)*"  # a list of module names; anything else is a regular expression


class UsageError(Exception):
    """The user's arguments cannot be used; exit code 2."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vps: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """An argument's type: an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def spoken(text: str) -> str:
    """An argument's type: text as it was typed, also where the locale is ASCII."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the locale has no letters for
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model`` and how to load it."""
    parser.add_argument("--model", required=True, help="Hugging Face id, folder or .gguf file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def add_prompt(parser: argparse.ArgumentParser) -> Any:
    """``--prompt`` and ``--prompt-file``; the group of these alternatives."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", type=spoken, help="the prompt; standard input when neither is given"
    )
    source.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    return source


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``."""
    parser.add_argument("--config", type=Path, help="JSON or YAML file of VPSConfig fields")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field, e.g. gamma=0.3, tau=null, rank_bounds=1,2, "
        "target_modules=q_proj,v_proj (names) or '.*up_proj' (a regular expression); may be "
        "repeated; a value given for gamma, rank, topk or order holds",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """``--calibration``."""
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="γ of every layer, of vps calibrate; brings its config",
    )


def add_answer(parser: argparse.ArgumentParser) -> None:
    """``--max-new-tokens`` and ``--no-chat``."""
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--no-chat", action="store_true", help="do not use the chat template")


def read_config(
    path: Path | None, settings: list[str], default: VPSConfig | None = None
) -> VPSConfig:
    """The config of a file, or ``default``, changed by ``FIELD=VALUE`` settings.

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
    for name in VPSConfig.ADAPTIVE:
        if name in changes:  # holds, whatever the file says
            changes.setdefault(f"adaptive_{name}", None)
    config = VPSConfig() if default is None else default
    if path is not None:
        config = _config_of(path)
    try:
        return config.replace(**changes)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--set: {error}") from error


def _config_of(path: Path) -> VPSConfig:
    from vps.evaluation.grid import numbers

    try:
        values = read_values(path)
        if isinstance(values, dict):
            known = VPSConfig.field_names()
            values = {k: numbers(k, v) if k in known else v for k, v in values.items()}
        return VPSConfig.from_json(json.dumps(values, default=str))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    except RecursionError:
        raise UsageError(f"--config {path}: nested too deeply") from None


def read_calibration(
    arguments: argparse.Namespace, settings: list[str]
) -> tuple[VPSConfig, Calibration | None]:
    """The config, and the calibration of ``--calibration`` with which it has to agree.

    Raises:
        UsageError: as for :func:`read_config`, or a file that is no calibration or of another
            config.
    """
    if arguments.calibration is None:
        return read_config(arguments.config, settings), None
    where = f"--calibration {arguments.calibration}"
    try:
        calibration = Calibration.load(arguments.calibration)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"--calibration: {error}") from error
    config = read_config(arguments.config, settings, calibration.config)
    own = dataclasses.asdict(calibration.config)
    other = [
        f"{name} is {value!r}, expected {own[name]!r}"
        for name, value in dataclasses.asdict(config).items()
        if value != own[name]
    ]
    if other:
        raise UsageError(f"{where}: refused, it was made for another config: {'; '.join(other)}")
    return config, calibration


def apply_calibration(arguments: argparse.Namespace, model: Any, calibration: Any) -> None:
    """Give the patched model the γ of a calibration, if there is one.

    Raises:
        UsageError: it is of another model or version of the weights.
    """
    if calibration is None:
        return
    try:
        calibration.apply(model)
    except ValueError as error:
        raise UsageError(f"--calibration {arguments.calibration}: {error}") from error
    if calibration.found is False:
        print(
            f"vps: warning: {arguments.calibration}: held-out examples showed no improvement by it",
            file=sys.stderr,
        )


def _value(name: str, text: str) -> Any:
    """``text`` as field ``name`` takes it; what does not fit is left for VPSConfig to refuse."""
    kind = str(next(field.type for field in dataclasses.fields(VPSConfig) if field.name == name))
    word = text.strip().lower()
    of_names = "tuple[str" in kind
    if "None" in kind and word in ("null", "none"):
        return None
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[word]
        if kind.startswith("float"):
            return float(word)
        if kind.startswith("tuple") and "str" not in kind and not word.startswith("["):
            return parse_json(f"[{text.strip().removeprefix('(').removesuffix(')')}]")
        value = parse_json(text)
    except (ValueError, KeyError):
        return _names(text) if of_names else text
    if not of_names or isinstance(value, (list, str)) or value is None:
        return value
    return _names(text)


def _names(text: str) -> str | list[str]:
    """The names in a text, if it holds nothing else; what is more than names stays as it is."""
    word = text.strip()
    inner = word.strip("[]()") if "," in word or "'" in word else word
    names = [name for each in inner.split(",") if (name := each.strip().strip("'\"")) != ""]
    if not names or word == "all-linear" or not all(re.fullmatch(NAMES, name) for name in names):
        return text
    return names


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt, of its option, its file or standard input.

    Raises:
        UsageError: a file that cannot be read, or nothing in it.
    """
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.prompt_file is not None:
        try:
            prompt = text_of(arguments.prompt_file)
        except OSError as error:
            where = f"--prompt-file {arguments.prompt_file}"
            raise UsageError(f"{where}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--prompt-file {arguments.prompt_file}: {error}") from error
    else:
        prompt = _standard_input()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def _standard_input() -> str:
    """All of it, in the terminal's encoding, or in UTF-8 where that is ASCII."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; give --prompt or --prompt-file")
    try:
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding is not None:
            ascii_ = codecs.lookup(sys.stdin.encoding).name == "ascii"
            sys.stdin.reconfigure(encoding="utf-8" if ascii_ else None, errors="strict")
        return sys.stdin.read().removeprefix(MARK)
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise UsageError(f"standard input: not {kind} text, at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"standard input: {error.strerror or error}") from error


def usable_device(name: str) -> str:
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


def load_named_model(arguments: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """The model of ``--model`` on ``device`` and its tokenizer.

    Raises:
        UsageError: a path without a model.
        ModuleNotFoundError, OSError, ValueError: as for :func:`vps.model.loading.load_model`.
    """
    import torch

    from vps.model.loading import load_model

    try:
        return load_model(arguments.model, getattr(torch, arguments.dtype), device)
    except FileNotFoundError as error:
        raise UsageError(f"--model: {error}") from error

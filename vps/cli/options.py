"""Options that several commands share, and what they mean.

A command is a dataclass. Typer makes its options from the fields and an instance from the
arguments; :meth:`Command.run` carries it out. It inherits the groups of options that it takes.
Their annotations are no strings, since Typer reads those of several modules at once.
"""

import codecs
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import BadParameter, Option, TyperException

from vps.cli.terminal import Progress, muted, quiet_transformers, warn
from vps.config import VPSConfig, nearest_field
from vps.reading import MARK, parse_json, read_text, read_values

if TYPE_CHECKING:
    from vps.model.calibration import Calibration

NAMES = r"[\w-]+(\.[\w-]+)*"  # a list of module names; anything else is a regular expression


class UsageError(TyperException):
    """The user's arguments cannot be used; exit code 2."""

    exit_code = 2


def text_as_typed(text: str) -> str:
    """Return an argument as it was typed, also where the locale is ASCII."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the locale has no letters for
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise BadParameter("not UTF-8 text") from None
    return text


def whole(text: str) -> int:
    """Read an integer; Typer's own reading of one does not say what came."""
    try:
        return int(text)
    except ValueError:
        raise BadParameter(f"{text!r} is not an integer") from None


def positive(text: str) -> int:
    """Read an integer above 0."""
    value = whole(text)
    if value < 1:
        raise BadParameter(f"{value} is not positive")
    return value


integer = partial(Option, parser=whole, metavar="N")
count = partial(Option, parser=positive, metavar="N")
Json = Annotated[bool, Option("--json", help="print one JSON object")]
Seed = Annotated[int, integer(help="of what is drawn")]
Scope = Literal["token", "sequence", "batch"]


@contextmanager
def blaming(
    option: str,
    value: object = None,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, RecursionError),
) -> Iterator[None]:
    """Turn what a library says against an option's value into a :class:`UsageError`.

    Args:
        option: named in the message.
        value: named too, where the library does not.
        kinds: of errors, which the value may cause.
    """
    try:
        yield
    except kinds as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        elif isinstance(error, OSError) and value is not None:
            reason = error.strerror or reason
        named = value is None or reason.startswith((f"{value}:", f"{value},"))
        where = option if named else f"{option} {value}"
        raise UsageError(f"{where}: {reason}") from error


def names_of(option: str, text: str) -> list[str]:
    """Split names at their commas.

    Raises:
        UsageError: there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{option} {text!r}: expected names, separated by commas; it names none")
    return names


@dataclass(kw_only=True)
class Command:
    """What every command has."""

    debug: Annotated[bool, Option("--debug", help="show tracebacks and library warnings")] = False

    def run(self) -> None:
        """Carry the command out and print what came of it."""
        raise NotImplementedError

    def exclude(self, *fields: str) -> None:
        """Refuse more than one of these options.

        Raises:
            UsageError: two are given.
        """
        given = [f"--{field.replace('_', '-')}" for field in fields if getattr(self, field)]
        if len(given) > 1:
            raise UsageError(f"{given[1]}: not allowed with {given[0]}")


@dataclass(kw_only=True)
class ModelOptions(Command):
    """A model and how to load it."""

    model: Annotated[str, Option(help="Hugging Face id, folder or .gguf file")]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Option(help="torch device")] = "cpu"

    def load(self, progress: Progress, device: str | None = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer, on ``device`` where it is not that of the option.

        Raises:
            UsageError: an unusable device, or a path without a model.
            ModuleNotFoundError, OSError, ValueError: as for :func:`vps.model.loading.load_model`.
        """
        import torch

        quiet_transformers(self.debug)
        device = usable_device(device or self.device)
        from vps.model.loading import load_model

        progress.step("loading the model")
        with muted(self.debug), blaming("--model", kinds=(FileNotFoundError,)):
            return load_model(self.model, getattr(torch, self.dtype), device)


def usable_device(name: str) -> str:
    """Return ``name`` once torch has shown that it can hold a tensor there.

    Raises:
        UsageError: it cannot.
    """
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


@dataclass(kw_only=True)
class PromptOptions(Command):
    """A prompt and where it comes from."""

    prompt: Annotated[
        str | None,
        Option(
            parser=text_as_typed, metavar="TEXT", help="standard input when neither this nor a file"
        ),
    ] = None
    prompt_file: Annotated[Path | None, Option(help="read the prompt from a file")] = None

    def read_prompt(self) -> str:
        """Return the prompt of its option, its file or standard input.

        Raises:
            UsageError: a file that cannot be read, or nothing in it.
        """
        self.exclude("prompt", "prompt_file")
        if self.prompt is not None:
            prompt = self.prompt
        elif self.prompt_file is not None:
            with blaming("--prompt-file", self.prompt_file):
                prompt = read_text(self.prompt_file)
        else:
            prompt = _standard_input()
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        return prompt


def _standard_input() -> str:
    """Read all of it, in the terminal's encoding, or in UTF-8 where that is ASCII."""
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


@dataclass(kw_only=True)
class AnswerOptions(Command):
    """How a model answers."""

    max_new_tokens: Annotated[int, count(help="length of an answer, at most")] = 128
    no_chat: Annotated[bool, Option("--no-chat", help="do not use the chat template")] = False


@dataclass(kw_only=True)
class ConfigOptions(Command):
    """Settings of the sharpening."""

    config: Annotated[Path | None, Option(help="JSON or YAML file of VPSConfig fields")] = None
    settings: Annotated[
        list[str],
        Option(
            "--set",
            default_factory=list,
            show_default=False,
            metavar="FIELD=VALUE",
            help="change one field, e.g. gamma=0.3, tau=null, rank_bounds=1,2, "
            "target_modules=q_proj,v_proj (names) or '.*up_proj' (a regular expression); may be "
            "repeated; a value given for gamma, rank, topk or order holds",
        ),
    ]


@dataclass(kw_only=True)
class CalibrationOptions(ConfigOptions):
    """Settings of the sharpening, and a fitted γ."""

    calibration: Annotated[
        Path | None,
        Option(metavar="FILE", help="γ of every layer, of vps calibrate; brings its config"),
    ] = None

    def read_calibration(self) -> "tuple[VPSConfig, Calibration | None]":
        """Return the config, and the calibration with which it has to agree.

        Raises:
            UsageError: as for :func:`read_config`, or a file that is no calibration or of another
                config.
        """
        if self.calibration is None:
            return read_config(self.config, self.settings), None
        from vps.model.calibration import Calibration

        with blaming("--calibration", self.calibration):
            calibration = Calibration.load(self.calibration)
        config = read_config(self.config, self.settings, calibration.config)
        own = dataclasses.asdict(calibration.config)
        other = [
            f"{name} is {value!r}, expected {own[name]!r}"
            for name, value in dataclasses.asdict(config).items()
            if value != own[name]
        ]
        if other:
            where = f"--calibration {self.calibration}"
            raise UsageError(
                f"{where}: refused, it was made for another config: {'; '.join(other)}"
            )
        return config, calibration

    def patch(self, model: Any, config: VPSConfig, calibration: "Calibration | None") -> Any:
        """Sharpen the model, with the γ of a calibration if there is one; return the report.

        Raises:
            UsageError: the calibration is of another model or version of the weights.
            ValueError: as for :func:`vps.patch`.
        """
        from vps import patch

        report = patch(model, config)
        if calibration is not None:
            with blaming("--calibration", self.calibration):
                calibration.apply(model)
            if calibration.found is False:
                warn(f"{self.calibration}: held-out examples showed no improvement by it")
        return report


@dataclass(kw_only=True)
class TaskOptions(ModelOptions):
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[str, Option(metavar="A,B", help="names of tasks or groups, or YAML files")]
    include_path: Annotated[
        list[Path],
        Option(
            default_factory=list,
            show_default=False,
            metavar="DIR",
            help="folder of YAML tasks; may be repeated",
        ),
    ]
    limit: Annotated[int | None, count(help="documents of each task (default: all)")] = None
    batch_size: Annotated[int, count(metavar="B", help="documents at once")] = 8
    num_fewshot: Annotated[
        int | None,
        integer(help="examples before a question (default: the task's own)"),
    ] = None
    chat: Annotated[bool, Option("--chat", help="use the tokenizer's chat template")] = False

    def task_names(self) -> list[str]:
        """Return the names of the tasks.

        Raises:
            UsageError: there is none, or another of these options cannot be used.
        """
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"--num-fewshot {self.num_fewshot}: expected at least 0")
        for path in self.include_path:
            if not path.is_dir():
                raise UsageError(f"--include-path {path}: no such folder")
        return names_of("--tasks", self.tasks)

    def of_harness(self) -> dict[str, Any]:
        """Return what the harness is to do with each task."""
        names = ("limit", "batch_size", "num_fewshot", "include_path", "chat")
        return {name: getattr(self, name) for name in names}


def read_config(
    path: Path | None, settings: list[str], default: VPSConfig | None = None
) -> VPSConfig:
    """Return the config of a file, or ``default``, changed by ``FIELD=VALUE`` settings.

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
        with blaming("--config", path):
            config = _config_of(path)
    with blaming("--set"):
        return config.replace(**changes)


def _config_of(path: Path) -> VPSConfig:
    from vps.evaluation.grid import numbers

    values = read_values(path)
    if isinstance(values, dict):
        known = VPSConfig.field_names()
        values = {k: numbers(k, v) if k in known else v for k, v in values.items()}
    return VPSConfig.from_json(json.dumps(values, default=str))


def _value(name: str, text: str) -> Any:
    """Read ``text`` as field ``name`` takes it; VPSConfig refuses what does not fit."""
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
    """Read names separated by commas; a text that holds more than names stays as it is."""
    word = text.strip()
    inner = word.strip("[]()") if "," in word or "'" in word else word
    names = [name for each in inner.split(",") if (name := each.strip().strip("'\"")) != ""]
    if not names or word == "all-linear" or not all(re.fullmatch(NAMES, name) for name in names):
        return text
    return names

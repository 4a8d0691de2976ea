"""Declare the options that several commands share, and say what they mean.

A command is a dataclass. Typer makes its options from the fields and an instance from the
arguments; :meth:`Command.run` carries it out. It inherits the groups of options that it takes.
Their annotations are no strings, since Typer reads those of several modules at once.
"""

import codecs
import dataclasses
import difflib
import gc
import io
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from typer import Option

from vps.cli.terminal import Progress, muted, quiet_transformers, warn
from vps.cli.values import (
    UsageError,
    blaming,
    complete_field,
    complete_tasks,
    names_of,
    positive,
    read_config,
    text_as_typed,
    whole,
)
from vps.config import VPSConfig
from vps.reading import MARK, read_text

if TYPE_CHECKING:
    from vps.model.calibration import Calibration
    from vps.model.patching import PatchReport

DEVICES = (
    "cpu", "cuda", "mps", "xpu", "hpu", "ipu", "mtia", "maia", "meta", "npu", "mlu", "musa",
    "privateuseone",
)  # fmt: skip
PATIENCE = timedelta(weeks=52)  # processes need not be equally fast

typed = partial(Option, parser=text_as_typed, metavar="TEXT")
many = partial(Option, default_factory=list, show_default=False)
integer = partial(Option, parser=whole, metavar="N")
count = partial(Option, parser=positive, metavar="N")
Json = Annotated[bool, Option("--json", help="print one JSON object")]
Seed = Annotated[int, integer(help="seed of random draws")]
Scope = Literal["token", "prompt", "sequence", "batch"]


@dataclass(kw_only=True)
class Command:
    """Hold what every command has."""

    debug: Annotated[bool, Option("--debug", help="show tracebacks and library warnings")] = False

    def run(self) -> None:
        """Carry the command out and print what came of it."""
        raise NotImplementedError

    def exclude(self, *fields: str) -> None:
        """Refuse more than one of these options.

        Raises:
            UsageError: two are given.
        """
        given = [
            f"--{field.replace('_', '-')}" for field in fields if getattr(self, field) is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{given[1]}: not allowed with {given[0]}")


@dataclass(kw_only=True)
class ModelOptions(Command):
    """Take a model, and load it."""

    model: Annotated[str, Option(help="Hugging Face id, folder or .gguf file")]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Option(help="torch device")] = "cpu"

    def check_model(self) -> None:
        """Refuse a path without a model and a misspelled device; loads no torch.

        Raises:
            UsageError: one of them.
            ValueError: the file is no GGUF file.
        """
        kind = self.device.partition(":")[0]
        if kind not in DEVICES:
            near = difflib.get_close_matches(kind, DEVICES, n=1)
            meant = "cuda" if kind == "gpu" else near[0] if near else None
            if meant is not None:  # others may be of a plugin, so torch is asked
                raise UsageError(f"--device {self.device}: unknown; did you mean {meant!r}?")
        from vps.model.loading import located

        with blaming("--model", kinds=(FileNotFoundError,)):
            located(self.model)

    def load(self, progress: Progress, device: str | None = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer, on ``device`` where it is not that of the option.

        Raises:
            UsageError: an unusable device, or a path without a model.
            ModuleNotFoundError, OSError, ValueError: as for :func:`vps.model.loading.load_model`.
        """
        self.check_model()
        import torch

        from vps.model.loading import load_model, step_of_loading

        progress.step(step_of_loading(self.model))
        quiet_transformers(self.debug)
        device = usable_device(device or self.device)
        with muted(self.debug), blaming("--model", kinds=(FileNotFoundError,)):
            loaded = load_model(self.model, getattr(torch, self.dtype), device)
        gc.enable()  # which the start of a command turns off
        return loaded


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
        raise UsageError(
            f"--device {name}: not a usable torch device: {reason}; "
            "`vps doctor` lists those of this machine"
        ) from None
    if kind == "meta":
        raise UsageError(f"--device {name}: holds no data")
    return name


@dataclass(kw_only=True)
class PromptOptions(Command):
    """Take a prompt, and read it."""

    prompt: Annotated[str | None, typed(help="the prompt (default: standard input)")] = None
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
            given = self.prompt is not None or self.prompt_file is not None
            hint = "" if given else "; give --prompt, --prompt-file or text on standard input"
            raise UsageError(f"the prompt is empty{hint}")
        return prompt


def _standard_input() -> str:
    """Read all of it, in the terminal's encoding, or in UTF-8 where that is ASCII."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; give --prompt or --prompt-file")
    try:
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding is not None:
            ascii_ = codecs.lookup(sys.stdin.encoding).name == "ascii"
            sys.stdin.reconfigure(encoding="utf-8" if ascii_ else None, errors="strict")
        if sys.stdin.isatty():
            print(
                "vps: type the prompt, and end it with Ctrl-D on a line of its own", file=sys.stderr
            )
        return sys.stdin.read().removeprefix(MARK)
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise UsageError(f"standard input: not {kind} text, at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"standard input: {error.strerror or error}") from error


@dataclass(kw_only=True)
class AnswerOptions(Command):
    """Take how a model answers."""

    max_new_tokens: Annotated[int, count(help="length of an answer, at most")] = 128
    no_chat: Annotated[bool, Option("--no-chat", help="do not use the chat template")] = False


@dataclass(kw_only=True)
class ConfigOptions(Command):
    """Take settings of the sharpening."""

    config: Annotated[Path | None, Option(help="JSON or YAML file of VPSConfig fields")] = None
    settings: Annotated[
        list[str],
        many(
            "--set",
            metavar="FIELD=VALUE",
            help="change one field, e.g. gamma=0.3, tau=null, rank_bounds=1,2, "
            "target_modules=q_proj,v_proj (names) or '.*up_proj' (a regular expression); may be "
            "repeated; a value given for gamma, rank, topk or order holds",
            autocompletion=complete_field,
        ),
    ]


@dataclass(kw_only=True)
class CalibrationOptions(ConfigOptions):
    """Take settings of the sharpening and a fitted γ, and read both."""

    calibration: Annotated[
        Path | None, Option(help="file of vps calibrate: γ of every layer, and their config")
    ] = None

    def sharpening(self) -> "Sharpening":
        """Read the config, and the calibration with which it has to agree.

        Raises:
            UsageError: as for :func:`read_config`, or a file that is no calibration or of another
                config.
        """
        if self.calibration is None:
            return Sharpening(read_config(self.config, self.settings))
        with blaming("--calibration", self.calibration):
            read_text(self.calibration)  # before torch is loaded
            from vps.model.calibration import Calibration

            calibration = Calibration.load(self.calibration)
        config = read_config(self.config, self.settings, calibration.config)
        own = dataclasses.asdict(calibration.config)
        other = [
            f"{name} is {value!r}, expected {own[name]!r}"
            for name, value in dataclasses.asdict(config).items()
            if value != own[name]
        ]
        if other:
            refused = f"refused, it was made for another config: {'; '.join(other)}"
            raise UsageError(f"--calibration {self.calibration}: {refused}")
        return Sharpening(config, calibration, self.calibration)


class Sharpening(NamedTuple):
    """Hold how a model is to be sharpened: a config, and a calibration with its file."""

    config: VPSConfig
    calibration: "Calibration | None" = None
    file: Path | None = None

    def patch(self, model: Any) -> "PatchReport":
        """Sharpen the model.

        Raises:
            UsageError: the calibration is of another model or version of the weights.
            ValueError: as for :func:`vps.patch`.
        """
        from vps.model.patching import patch

        report = patch(model, self.config)
        if self.calibration is not None:
            with blaming("--calibration", self.file):
                self.calibration.apply(model)
            if self.calibration.found is False:
                warn(f"{self.file}: held-out examples showed no improvement by it")
        return report


@dataclass(kw_only=True)
class TaskOptions(ModelOptions):
    """Take tasks of lm-evaluation-harness."""

    tasks: Annotated[
        str,
        Option(
            metavar="A,B",
            help="names of tasks or groups, or YAML files",
            autocompletion=complete_tasks,
        ),
    ]
    include_path: Annotated[list[Path], many(help="folder of YAML tasks; may be repeated")]
    limit: Annotated[int | None, count(help="documents of each task (default: all)")] = None
    batch_size: Annotated[int, count(metavar="B", help="documents at once")] = 8
    num_fewshot: Annotated[
        int | None, integer(help="examples before a question (default: the task's own)")
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


class Process(NamedTuple):
    """Say which of several processes this is, and which on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def take_process(environment: MutableMapping[str, str]) -> Process:
    """Take what torchrun or accelerate say of this process out of the environment.

    Each process computes what is its own, so the libraries below must not look for the others.

    Raises:
        UsageError: numbers that do not fit.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [environment.pop(name, None) for name in names]
    environment.pop("LOCAL_WORLD_SIZE", None)
    if texts[0] is None and texts[1] is None:
        return Process()
    try:
        rank, world = int(texts[0] or 0), int(texts[1] or 1)
        local = rank if texts[2] is None else int(texts[2])
    except ValueError:
        world = rank = local = -1
    if not 0 <= rank < world or local < 0:
        came = ", ".join(f"{name} {text!r}" for name, text in zip(names, texts, strict=True))
        raise UsageError(f"expected 0 ≤ RANK < WORLD_SIZE and LOCAL_RANK ≥ 0, got {came}")
    return Process(rank, world, local)


def own_device(name: str, process: Process) -> str:
    """Give each process of one machine a GPU of its own, where ``cuda`` names none."""
    return f"cuda:{process.local}" if name == "cuda" and process.world > 1 else name


@contextmanager
def joined(process: Process) -> Iterator[Any]:
    """Join the group of all processes, to exchange Python objects; it is ``None`` for one alone.

    Raises:
        UsageError: the others cannot be reached.
    """
    if process.world == 1:
        yield None
        return
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo", rank=process.rank, world_size=process.world, timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        where = [os.environ.get(name, "none") for name in ("MASTER_ADDR", "MASTER_PORT")]
        raise UsageError(
            f"process {process.rank} of {process.world} cannot join the others at "
            f"{':'.join(where)}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield dist.group.WORLD
        dist.barrier()  # none leaves while another still listens to it
    finally:
        dist.destroy_process_group()

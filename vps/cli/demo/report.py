"""The demo's report: one HTML file with its picture inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vps.cli.demo.calibrated import Calibrated
    from vps.cli.demo.comparison import Answer, DemoRun, Refined

STYLE = """
body { font-family: sans-serif; max-width: 70rem; margin: 2rem auto; line-height: 1.4 }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
td, th { border: 1px solid #ccc; padding: .6rem; vertical-align: top; text-align: left }
td { white-space: pre-wrap } img { width: 100% } mark { background: #fff3b0 }
.refined th:nth-child(-n+2) { width: 22% }
.figures { width: auto } dt { font-weight: bold } code { font-size: .85em }
"""


def write_report(run: DemoRun, picture: Path) -> None:
    """Write ``run.report``; all text of the model is escaped."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    ratio = run.plain_rate / run.sharpened_rate
    positions = sum(len(answer.plain.tokens) for answer in run.answers)
    body = "".join(_section(answer) for answer in run.answers)
    run.report.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>VPS demo</title><style>{STYLE}</style>
<h1>Plain and sharpened, side by side</h1>
<table class="figures">
<tr><th>plain</th><td>{run.plain_rate:.1f} tokens/s</td></tr>
<tr><th>sharpened</th><td>{run.sharpened_rate:.1f} tokens/s,
{ratio:.2f} times as long a token</td></tr>
<tr><th>next-token choices changed</th><td>{run.changed:.1%} of {positions}</td></tr>
</table>
<p>Greedy decoding, {len(run.statistics)} layers sharpened; the speeds are of this machine,
prompt included, in turn after a warm-up. The choices are counted along the plain
answer: both models read the same text and name the likeliest next token at every position. That
count uses scope "token", where no position sees later ones; under scope "{run.config.scope}", which
wrote the answers, reading a finished text would look ahead. A difference is a difference: whether
it is better, it does not say.</p>
{body}
{_refinement(run.refined)}
{_problems(run.calibrated)}
<h2>What sharpening decided and did</h2>
<p>One forward pass over the {run.prompt_tokens} tokens of the first prompt. Every layer sets its
scale γ and its rank by the energy of its own output H = xWᵀ; the last map is what the update
γδ adds, relative to H.</p>
<img alt="Heat maps of γ, rank, energy and relative size of the update per layer"
src="data:image/png;base64,{encoded}">
<details><summary>Settings</summary><pre>{html.escape(run.config.to_json())}</pre></details>
</html>
""",
        encoding="utf-8",
    )


def _refinement(refined: Refined) -> str:
    result = refined.result
    rows = ""
    for entry in result.iterations:
        how = "plain"
        if entry.index:
            how = (
                f"{entry.builder}, γ {entry.gamma:.2f}, rank {entry.rank:.1f}, "
                f"{entry.pairs:.1f} L-BFGS pairs"
            )
        parts = {} if entry.losses is None else {"total": entry.losses.total, **entry.losses.parts}
        losses = "\n".join(f"{name} {loss:.4g}" for name, loss in parts.items())
        text = html.escape(entry.text)
        rows += f"<tr><td>{entry.index}: {how}</td><td>{losses}</td><td>{text}</td></tr>\n"
    return f"""<h2>One refinement</h2>
<p>{html.escape(refined.prompt)} Gold answer: {html.escape(refined.gold)}. Iteration 0 is the plain
model's; γ, rank and pairs are means over the layers. The answer kept is that of iteration
{result.chosen}, of lowest loss. The gold answer steered it, so being right here is no accuracy.</p>
<table class="refined"><tr><th>iteration</th><th>loss</th><th>text</th></tr>
{rows}</table>
"""


def _problems(calibrated: Calibrated | None) -> str:
    if calibrated is None:
        return ""
    if calibrated.refused is not None:
        return f"<h2>Calibrated</h2><p>Refused: {html.escape(calibrated.refused)}</p>"
    rows = "".join(
        f"<tr><td>{html.escape(each.question)}\n{html.escape(each.answer)}</td>"
        + "".join(
            f"<td>{'right' if good else 'wrong'}: {html.escape(text)}</td>"
            for text, good in (
                (each.plain, each.plain_right),
                (each.calibrated, each.calibrated_right),
            )
        )
        + "</tr>\n"
        for each in calibrated.problems
    )
    return f"""<h2>Calibrated</h2>
<p>{html.escape(str(calibrated))}. γ of every layer was fitted on other problems of this kind.
That fitting changes answers does not say that it has to be sharpening which is fitted: controls
with as many numbers are in docs/calibration.md.</p>
<table><tr><th>problem and answer</th><th>plain</th><th>calibrated</th></tr>
{rows}</table>
"""


def _section(answer: Answer) -> str:
    position = answer.first_difference
    where = "No token differs." if position is None else f"They part at token {position + 1}."
    plain = _marked(answer.plain.text, answer.plain_part)
    sharpened = _marked(answer.sharpened.text, answer.sharpened_part)
    return f"""<h2>{html.escape(answer.prompt)}</h2>
<table><tr><th>plain</th><th>sharpened</th></tr>
<tr><td>{plain}</td><td>{sharpened}</td></tr>
</table><p>{where}</p>
"""


def _marked(text: str, part: str) -> str:
    """``text`` escaped, with its end ``part`` marked, if it does end that way."""
    if not part or not text.endswith(part):
        return html.escape(text)
    return f"{html.escape(text[: -len(part)])}<mark>{html.escape(part)}</mark>"

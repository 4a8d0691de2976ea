"""The demo's report: one HTML file with its picture inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vps.demo import Answer, DemoRun

STYLE = """
body { font-family: sans-serif; max-width: 70rem; margin: 2rem auto; line-height: 1.4 }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
td, th { border: 1px solid #ccc; padding: .6rem; vertical-align: top; text-align: left }
td { white-space: pre-wrap } img { width: 100% }
"""


def write_report(run: DemoRun, picture: Path) -> None:
    """Write ``run.report``; all text of the model is escaped."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    ratio = run.plain_rate / run.sharpened_rate
    body = "".join(_section(answer) for answer in run.answers)
    run.report.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>VPS demo</title><style>{STYLE}</style>
<h1>Plain and sharpened, side by side</h1>
<p>Plain {run.plain_rate:.1f} tokens/s, sharpened {run.sharpened_rate:.1f} tokens/s on this machine:
sharpening takes {ratio:.2f} times as long. Along the plain answers, {run.changed:.1%} of the
next-token choices change (scope "token", so that no choice sees later tokens).</p>
{body}
<h2>What the policy decided for the first prompt</h2>
<img alt="Heat maps of γ, rank, energy and relative size of the update per layer"
src="data:image/png;base64,{encoded}">
</html>
""",
        encoding="utf-8",
    )


def _section(answer: Answer) -> str:
    position = answer.first_difference
    where = "no token differs" if position is None else f"first difference: token {position + 1}"
    return f"""<h2>{html.escape(answer.prompt)}</h2>
<table><tr><th>plain</th><th>sharpened</th></tr>
<tr><td>{html.escape(answer.plain.text)}</td><td>{html.escape(answer.sharpened.text)}</td></tr>
</table><p>{where}</p>
"""

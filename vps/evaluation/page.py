"""The report as one HTML page: no network, readable on a phone, tables that sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from vps.evaluation import summary
from vps.evaluation.comparison import NO_DIFFERENCE, Analysis, Comparison
from vps.evaluation.figures import nice_ticks

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --back: #fff; --card: #f6f8fa;
  --better: #1a7f37; --worse: #b3261e; --none: #57606a; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --card: #161b22; --better: #3fb950; --worse: #ff7b72; --none: #9198a1 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.findings { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem .8rem 2rem } .findings li { margin: .25rem 0 }
.note, caption { color: var(--soft); font-size: .87rem; text-align: left }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right;
  vertical-align: middle; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
td.words, th.words { text-align: left }
thead th { font-size: .8rem; font-weight: 600; vertical-align: bottom }
thead button { all: unset; cursor: pointer; color: var(--soft) }
thead button:hover, thead button:focus-visible { color: var(--ink); text-decoration: underline }
th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
tr.control td { font-size: .87rem; color: var(--soft) }
tr.control td:first-child { padding-left: 1.4rem }
td.strip, th.strip { width: 15rem; min-width: 9rem; padding: 0 .5rem }
svg { display: block; width: 100% }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
.axis { stroke: var(--line) } .zero { stroke: var(--soft) } .mark { stroke-width: 2 }
.better { color: var(--better) } .worse { color: var(--worse) } .none { color: var(--none) }
.mark, .ci { stroke: currentColor } .mark.full { fill: currentColor }
.mark.open { fill: var(--back) } .ci { stroke-width: 2.5 } .control .ci, .faint { opacity: .45 }
.cost { max-width: 44rem } td.better, td.worse { font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem }
dt { color: var(--soft) } dd { margin: 0 }
@media (max-width: 46rem) {
  thead tr { display: flex; flex-wrap: wrap; gap: .2rem .9rem; padding: .4rem 0 }
  thead th { border: 0; padding: 0 } thead th.strip { width: 100%; order: 9 }
  table, tbody, thead { display: block }
  tbody tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; padding: .5rem 0;
    border-bottom: 1px solid var(--line) }
  td, tr.control td:first-child { border: 0; padding: .05rem 0; text-align: left }
  .strip svg { max-width: 26rem } thead .strip { padding: 0 }
  td:first-child, td.strip { grid-column: 1 / -1; width: 100%; padding: 0 }
  td:first-child { font-weight: 600 } tr.control td:first-child { font-weight: 400 }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); font-weight: 400;
    font-size: .85em }
  dl { grid-template-columns: 1fr } dd { margin: 0 0 .4rem }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("thead button")) {
  button.onclick = () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[head.cellIndex].dataset.value;
    const order = (a, b) => value(a) === "" ? 1 : value(b) === "" ? -1 :
      (up ? 1 : -1) * (isNaN(value(a)) || isNaN(value(b)) ?
        value(a).localeCompare(value(b)) : value(a) - value(b));
    body.append(...[...body.rows].sort(order));
  };
}
"""

CLASS = {"better": "better", "worse": "worse", NO_DIFFERENCE: "none"}


def html_page(analysis: Analysis) -> str:
    """The whole page; every text that is not ours is escaped."""
    words = summary.summarise(analysis)
    title = escape(analysis.run.title)
    findings = "".join(f"<li>{escape(line)}</li>\n" for line in words.findings + words.missing)
    methods = "".join(f"<li>{escape(line)}</li>\n" for line in words.methods)
    conditions = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in words.conditions
    )
    configs = "".join(
        f"<dt>{escape(cell.name)}</dt><dd>{escape(summary.settings_of(cell.config))}</dd>\n"
        for cell in analysis.run.cells
        if cell.config is not None and cell.control is None
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<ul class="findings">
{findings}</ul>
{_baseline_sections(analysis)}
{_control_sections(analysis)}
{_cost_section(analysis)}
<h2>How it was measured</h2>
<ul>
{methods}</ul>
<dl>
{conditions}</dl>
<h2>Settings that differ from the defaults</h2>
<dl>
{configs}</dl>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _baseline_sections(analysis: Analysis) -> str:
    parts = []
    for (task, metric), group in summary.units(analysis.to_baseline).items():
        first = group[0]
        ends = _ends(group)
        rows = ""
        for each in group:
            cell = analysis.cells[each.cell]
            control = cell.control is not None
            name = f"↳ {summary.control_title(cell)}" if control else each.cell
            cost = analysis.cost.get(each.cell, math.nan)
            first_mark = "*" if analysis.run.records[cell.index].first else ""
            rows += f'<tr class="{"control" if control else "asked"}">' + "".join(
                (
                    _cell(name, cell.index),
                    _cell(summary.level(each.value, each.value_error, each), each.value, "value"),
                    _strip(each, ends),
                    *_numbers(each),
                    _cell(f"{summary.number(cost, 2)}{first_mark}", cost, "time"),
                )
            ) + "</tr>\n"  # fmt: skip
        head = _head(
            (
                "cell",
                "value",
                _axis(ends, group),
                "difference",
                "interval",
                "flips",
                "p",
                "verdict",
                "time ÷ baseline",
            )  # fmt: skip
        )
        name = escape(summary.unit_name(task, metric))
        base = escape(summary.level(first.base, first.base_error, first))
        parts.append(
            f"<h2>{name} against the baseline</h2>\n"
            f'<p class="note">n = {first.n}; the baseline has {base}{summary.direction(metric)}. '
            "Controls (↳) follow their cell. p is corrected. A filled mark differs after the "
            "correction. Time with * is "
            f"of the first cell of a process.</p>\n<table>{head}<tbody>\n{rows}</tbody></table>"
        )
    return "\n".join(parts)


def _control_sections(analysis: Analysis) -> str:
    parts = []
    for (task, metric), group in summary.units(analysis.to_controls).items():
        ends = _ends(group)
        rows = ""
        for place, each in enumerate(group):
            control = summary.control_title(analysis.cells[each.against])
            cells = (
                _cell(each.cell, place),
                _cell(control, control, "less", "words"),
                _strip(each, ends),
                *_numbers(each),
            )
            rows += f'<tr class="asked">{"".join(cells)}</tr>\n'
        head = _head(
            (
                "cell",
                "less its control",
                _axis(ends, group),
                "difference",
                "interval",
                "flips",
                "p",
                "verdict",
            )  # fmt: skip
        )
        parts.append(
            f"<h2>{escape(summary.unit_name(task, metric))} against controls</h2>\n"
            '<p class="note">What sharpening the selected features does beyond the same update '
            f"without guidance. p is corrected.</p>\n<table>{head}<tbody>\n{rows}</tbody></table>"
        )
    return "\n".join(parts)


def _numbers(each: Comparison) -> tuple[str, ...]:
    net = "" if each.gained is None or each.lost is None else each.gained - each.lost
    return (
        _cell(summary.change(each), each.difference, "difference"),
        _cell(summary.interval(each), each.low, "95 %"),
        _cell(summary.flips(each), net, "gained, lost"),
        _cell(summary.probability(each.corrected), each.corrected, "corrected p"),
        _cell(each.verdict, each.verdict, "verdict", CLASS[each.verdict]),
    )


def _cell(text: str, value: object, label: str = "", kind: str = "") -> str:
    shown = "" if isinstance(value, float) and math.isnan(value) else value
    label = f' data-label="{escape(label)}"' if label else ""
    kind = f' class="{kind}"' if kind else ""
    return f'<td{kind}{label} data-value="{escape(str(shown))}">{escape(text)}</td>'


def _head(names: Sequence[str]) -> str:
    cells = ""
    for name in names:
        if name.startswith("<svg"):
            cells += f'<th class="strip" scope="col">{name}</th>'
        else:
            cells += f'<th scope="col"><button type="button">{escape(name)}</button></th>'
    return f"<thead><tr>{cells}</tr></thead>"


def _ends(group: Sequence[Comparison]) -> tuple[float, float]:
    """The range of a forest: all intervals and 0, with a margin."""
    values = [0.0]
    for each in group:
        values += [v for v in (each.low, each.high, each.difference) if math.isfinite(v)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _x(value: float, ends: tuple[float, float], width: float = 240) -> str:
    low, high = ends
    return f"{width * (value - low) / (high - low):.1f}"


def _strip(each: Comparison, ends: tuple[float, float]) -> str:
    """One row of the forest."""
    kind = CLASS[each.verdict]
    x, zero = _x(each.difference, ends), _x(0, ends)
    line = ""
    if math.isfinite(each.low):
        line = (
            f'<line class="ci" x1="{_x(each.low, ends)}" x2="{_x(each.high, ends)}" '
            'y1="11" y2="11"/>'
        )
    fill = "open" if each.verdict == NO_DIFFERENCE else "full"
    return (
        f'<td class="strip {kind}" data-value="{each.difference}">'
        f'<svg viewBox="0 0 240 22" role="img" aria-label="{escape(summary.change(each))} '
        f'{escape(summary.interval(each))}"><line class="zero" x1="{zero}" x2="{zero}" y1="0" '
        f'y2="22"/>{line}<circle class="mark {fill}" cx="{x}" cy="11" r="4"/></svg></td>'
    )


def _axis(ends: tuple[float, float], group: Sequence[Comparison]) -> str:
    scale, digits = summary.scaled(group[0])
    parts = []
    for tick in nice_ticks(ends[0] * scale, ends[1] * scale, 4):
        x = _x(tick / scale, ends)
        text = summary.number(tick, 0 if digits == 1 and tick == int(tick) else 2, True)
        parts.append(
            f'<line class="axis" x1="{x}" x2="{x}" y1="14" y2="20"/>'
            f'<text x="{x}" y="11" text-anchor="middle">{text}</text>'
        )
    return f'<svg viewBox="0 0 240 20" aria-hidden="true">{"".join(parts)}</svg>'


def _cost_section(analysis: Analysis) -> str:
    units = summary.units(analysis.to_baseline)
    if not units or not analysis.cost:
        return ""
    (task, metric), group = next(iter(units.items()))
    group = [each for each in group if each.cell in analysis.cost]
    scale = summary.scaled(group[0])[0]
    low, high = (scale * end for end in _ends(group))
    most = 1.08 * max([1.0, *(analysis.cost[each.cell] for each in group)])
    width, height, left, top = 640, 320, 56, 12
    parts = []
    digits = 0 if high - low > 5 else 2

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 12) * x / most, top + height * (high - y) / (high - low)

    for tick in nice_ticks(low, high, 6):
        y = at(0, tick)[1]
        kind = "zero" if abs(tick) < 1e-12 else "axis"
        text = summary.number(tick, digits, True)
        parts.append(
            f'<line class="{kind}" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick in nice_ticks(0, most, 6):
        x = at(tick, low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{tick:.4g}</text>'
        )
    for each in sorted(group, key=lambda each: not analysis.is_control(each.cell)):
        x, y = at(analysis.cost[each.cell], scale * each.difference)
        control = analysis.is_control(each.cell)
        kind = f"{CLASS[each.verdict]}{' faint' if control else ''}"
        about = (
            f"{each.cell}: {summary.change(each)}, {each.verdict}, "
            f"{analysis.cost[each.cell]:.2f} × the time"
        )
        parts.append(
            f'<g class="{kind}"><title>{escape(about)}</title><circle '
            f'class="mark {"open" if control else "full"}" cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    name = escape(summary.unit_name(task, metric))
    unit = "points" if group[0].gained is not None else escape(metric)
    return f"""<h2>Cost against effect</h2>
<p class="note">{name}: difference from the baseline ({unit}) over time ÷ time of the baseline.
Full: cells; open: controls.</p>
<svg class="cost" viewBox="0 0 {width} {height + 40}" role="img" aria-label="Cost against effect">
{"".join(parts)}
<text x="{(left + width) / 2}" y="{height + 40}" text-anchor="middle">time ÷ baseline</text>
</svg>"""

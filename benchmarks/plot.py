"""Draw bars and curves of results: ``python -m benchmarks.plot RESULTS_DIR --out docs/images``.

Writes a PNG for each figure that the results allow. Colours are those of Okabe and Ito, told apart
by the colour-blind; curves differ in their markers too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.baselines import GEMV
from benchmarks.results import AGAIN, Case, Section
from benchmarks.variants import AUTHOR, COMPILED, REFERENCE

COLOURS = {
    "vps cpp": "#0072B2",
    "vps triton": "#0072B2",
    "vps cuda": "#009E73",
    "vps torch": "#56B4E9",
    "peft lora": "#E69F00",
    COMPILED: "#CC79A7",
    AUTHOR: "#D55E00",
    REFERENCE: "#8C8C8C",
    GEMV: "#F0E442",
    "modelled": "#000000",
}
MARKERS = {"vps cpp": "o", "vps triton": "o", "vps cuda": "D", "vps torch": "s", "peft lora": "^"}
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)
LEAST = 0.1  # percent: smaller overheads, and none, have no place of their own on a log axis
AXES = {
    "N": "tokens N",
    "d": "width d of a square layer",
    "rank": "rank",
    "sequences": "sequences of 16 tokens",
}


def style(name: str, table: dict[str, str], default: str) -> str:
    """Look a variant up by the start of its name."""
    return next((value for key, value in table.items() if name.startswith(key)), default)


def bars(axes: Any, cases: dict[str, Case], label: Callable[[str], str]) -> None:
    """Draw ratios to the base, a group of bars a case, with quartiles and grey noise band."""
    names = list(
        dict.fromkeys(
            name
            for case in cases.values()
            for name, row in case["rows"].items()
            if "ratio_q1" in row and name not in (case["base"], case["base"] + AGAIN)
        )
    )
    width = 0.85 / max(1, len(names))
    values = [1.0]
    for place, case in enumerate(cases.values()):
        band = results.noise(case)
        if band is not None:
            span = (place - 0.46, place + 0.46)
            axes.fill_between(span, *band, color="0.75", zorder=0, linewidth=0)
        for number, name in enumerate(names):
            row = case["rows"].get(name, {})
            if "ratio_q1" not in row:
                continue
            at = place + (number - (len(names) - 1) / 2) * width
            ratio = row["ratio"]
            values.append(ratio)
            spread = [
                [max(0.0, ratio - row["ratio_q1"])],
                [max(0.0, row["ratio_q3"] - ratio)],
            ]
            axes.bar(
                at,
                ratio - 1,
                0.9 * width,
                bottom=1,
                yerr=spread,
                color=style(name, COLOURS, "0.5"),
                label=name if place == 0 else None,
                error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
            )
            end = max(ratio, row["ratio_q3"]) if ratio >= 1 else 1
            axes.annotate(
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
                (at, end),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                rotation=90 if len(names) * len(cases) > 24 else 0,
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(min(0.9, 0.9 * min(values)), 1.6 * max(values))
    low, high = axes.get_ylim()
    crowded = (1.2, 1.5) if high / low > 8 else ()
    axes.set_yticks([t for t in TICKS if low <= t <= high and t not in crowded])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.yaxis.set_minor_locator(_locators().NullLocator())
    axes.set_xticks(range(len(cases)), [label(title) for title in cases], fontsize=8)
    axes.set_xlim(-0.55, len(cases) - 0.45)
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: Any, cases: list[Case]) -> None:
    """Draw overhead in percent over one size, the modelled limit dashed and noise in grey."""
    cases = sorted(cases, key=lambda case: case["at"]["value"])
    rows = [{_of_any_rank(n): row for n, row in case["rows"].items()} for case in cases]
    names = list(dict.fromkeys(name for row in rows for name in row))
    bands = [(c["at"]["value"], results.noise(c)) for c in cases if results.noise(c) is not None]
    if bands:
        high = [max(100 * (max(b[1], 2 - b[0]) - 1), LEAST) for _, b in bands]
        axes.fill_between([x for x, _ in bands], LEAST, high, color="0.85", linewidth=0)
    for name in names:
        row = [(c["at"]["value"], r.get(name, {})) for c, r in zip(cases, rows, strict=True)]
        found = [(x, max(LEAST, 100 * (r["ratio"] - 1))) for x, r in row if "ratio" in r]
        if not found or name == cases[0]["base"] or name.endswith(AGAIN):
            continue
        modelled = name.startswith("modelled")
        axes.plot(
            *zip(*found, strict=True),
            color=style(name, COLOURS, "0.5"),
            marker="" if modelled else style(name, MARKERS, "x"),
            linestyle="--" if modelled else "-",
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(AXES[cases[0]["at"]["over"]])
    axes.set_title(cases[0]["at"]["curve"], fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _of_any_rank(name: str) -> str:
    """Return a variant's name without its rank, which differs at every point over the rank."""
    return re.sub(r"^peft lora r=\d+$", "peft lora of the same rank", name)


def draw(sections: dict[str, Section], kind: str, out: Path) -> list[Path]:
    """Draw every figure of one device, ``"cpu"`` or ``"gpu"``, and return the files written."""
    made = []
    wanted = {"cpu": "geometric mean", "gpu": "7 linears of (Qwen2.5-7B|Llama-3-70B)"}[kind]
    if "layer" in sections:
        chosen = _measured(sections["layer"], wanted)
        groups: dict[str, dict[str, Case]] = {}
        for title, case in chosen.items():
            group = title.rsplit(", ", 1)[1]
            if kind == "gpu":
                group = f"{title.split(',')[0]}, {group}"
            groups.setdefault(group, {})[title] = case
        if groups:
            made += _bar_figure(groups, sections["layer"], f"layer-{kind}", out)
    whole = {name: _measured(sections[name], "") for name in ("block", "model") if name in sections}
    whole = {name: cases for name, cases in whole.items() if cases}
    if whole:
        made += _bar_figure(whole, sections[next(iter(whole))], f"model-{kind}", out)
    if "scaling" in sections:
        made += _curve_figure(sections["scaling"], f"scaling-{kind}", out)
    if "memory" in sections:
        made += _memory_figure(sections["memory"], f"memory-{kind}", out)
    return made


def _measured(section: Section, pattern: str) -> dict[str, Case]:
    return {
        title: case
        for title, case in section["cases"].items()
        if re.search(pattern, title) and results.noise(case) is not None
    }


def _bar_figure(
    groups: dict[str, dict[str, Case]], section: Section, name: str, out: Path
) -> list[Path]:
    figure, axes = _figure(len(groups), 1, 8.5, 2.9)
    for (group, cases), each in zip(groups.items(), axes.flat, strict=True):
        bars(each, cases, _short)
        each.set_title(group, fontsize=9, loc="left")
        each.set_ylabel("time ÷ base")
    _legend(figure, axes)
    return _save(figure, section, name, out)


def _curve_figure(section: Section, name: str, out: Path) -> list[Path]:
    found: dict[str, list[Case]] = {}
    for case in section["cases"].values():
        if "at" in case and results.noise(case) is not None:
            found.setdefault(case["at"]["curve"], []).append(case)
    if not found:
        return []
    rows = -(-len(found) // 2)
    figure, axes = _figure(rows, 2, 8.5, 2.7)
    for cases, each in zip(found.values(), axes.flat, strict=False):
        curves(each, cases)
    for each in axes.flat[len(found) :]:
        each.set_visible(False)
    for each in axes[:, 0]:
        each.set_ylabel(f"overhead ({LEAST:g} %: or less)")
    _legend(figure, axes)
    return _save(figure, section, name, out)


def _memory_figure(section: Section, name: str, out: Path) -> list[Path]:
    figure, axes = _figure(len(section["cases"]), 1, 8.5, 1.7)
    for (title, case), each in zip(section["cases"].items(), axes.flat, strict=True):
        rows = {n: r["bytes"] / 2**20 for n, r in case["rows"].items() if "bytes" in r}
        colours = [style(n, COLOURS, "0.3") for n in rows]
        drawn = each.barh(list(rows), list(rows.values()), color=colours)
        each.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
        each.invert_yaxis()
        each.margins(x=0.12)
        each.tick_params(labelsize=7)
        each.set_title(title, fontsize=8, loc="left")
        each.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_xlabel("peak MiB beyond what was there", fontsize=8)
    return _save(figure, section, name, out, note="")


def _short(title: str) -> str:
    title = title.removeprefix("geometric mean, ").replace("block of ", "")
    parts = title.split(", ")
    if title.startswith("7 linears"):
        parts = parts[1:2]
    elif len(parts) > 2 or parts[-1] in ("float32", "bfloat16"):
        parts = [*parts[:-1], parts[-1]] if len(parts) > 2 else parts[:1]
    return "\n".join(parts)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width, 0.6 + height * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _locators() -> Any:
    from matplotlib import ticker

    return ticker


def _legend(figure: Any, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for each in axes.flat:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )


def _save(
    figure: Any,
    section: Section,
    name: str,
    out: Path,
    note: str = "; grey: the base against itself",
) -> list[Path]:
    from matplotlib import pyplot

    machine = section["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = f"{where}, torch {machine['torch']}, commit {machine['commit']}"
    figure.suptitle(text + note, fontsize=7, color="0.3")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


def main() -> None:
    """Draw what the results hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    made = [
        path
        for kind in ("cpu", "gpu")
        for path in draw(results.merged(arguments.results, kind == "gpu"), kind, arguments.out)
    ]
    print(*made, sep="\n")


if __name__ == "__main__":
    main()

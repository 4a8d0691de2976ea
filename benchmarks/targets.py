"""The targets of PERFORMANCE.md §4, and of issues 2, 4 and 6 for SmolLM2, beside what was measured.

``python -m benchmarks.targets RESULTS_DIR`` prints them as Markdown. A cell never measured says so.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.results import Case, Section

RATIO, OF_LORA, OF_REFERENCE = "ratio", "overhead ÷ LoRA's", "overhead ÷ reference's"
NOT_MEASURED = "not measured"
GPU, CPU = ("vps triton", "vps cuda"), ("vps cpp",)
WHOLE = r"7 linears of \S+, "
TYPES = r"(float32|bfloat16)"


class Target(NamedTuple):
    """What is aimed at.

    Args:
        title: what it is about.
        form: ``"drop-in"``, or another that a target names.
        most: the largest value that meets it.
        section: of the result file; ``None`` for a form that is not built.
        cases: regular expression for the full titles of the cases that it covers.
        variants: the variants that it is about; the best of them counts in each case.
        kind: a ratio to the base, or a quotient of two overheads.
        gpu: whether it is about a GPU.
    """

    title: str
    form: str
    most: float
    section: str | None
    cases: str
    variants: tuple[str, ...]
    kind: str
    gpu: bool


def _drop_in(title: str, most: float, cases: str, kind: str = RATIO, form: str = "layer") -> Target:
    return Target(title, "drop-in", most, form, cases, GPU, kind, True)


def _fused(title: str, most: float) -> Target:
    return Target(title, "fused consumers", most, None, "", (), RATIO, True)


def _on_cpu(
    title: str, most: float, cases: str, variants: tuple[str, ...] = CPU, section: str = "layer"
) -> Target:
    return Target(title, "drop-in", most, section, cases, variants, RATIO, False)


GREEDY = "SmolLM2-135M, 64 greedy tokens after 32, float32"
PREFILL = "SmolLM2-135M, prefill of 512 tokens, float32"
BACKWARD = "SmolLM2-135M, backward of .* tokens, float32"
WIDE = "(3584 to 18944|18944 to 3584)"
TARGETS = (
    _drop_in("decode 3584²", 1.35, "3584 to 3584, N = 1, bfloat16"),
    _drop_in("decode 3584→18944 and back", 1.09, f"{WIDE}, N = 1, bfloat16"),
    _drop_in("decode, 7 linears, 7B", 1.18, "7 linears of Qwen2.5-7B, N = 1, bfloat16"),
    _drop_in("decode, 7 linears, 70B", 1.06, "7 linears of Llama-3-70B, N = 1, bfloat16"),
    _drop_in(
        "prefill, 7 linears, 7B, N ≥ 2048", 1.15,
        "7 linears of Qwen2.5-7B, N = (2048|8192), bfloat16",
    ),
    _drop_in(
        "prefill, 7 linears, 70B", 1.07, "7 linears of Llama-3-70B, N = (512|2048|8192), bfloat16"
    ),
    _drop_in("overhead ÷ LoRA's, decode", 0.5, f"{WHOLE}N = 1, bfloat16", OF_LORA),
    _drop_in("overhead ÷ LoRA's, prefill", 0.5, f"{WHOLE}N = (512|2048|8192), bfloat16", OF_LORA),
    # The reference waits for the device, so it is compared where everything is: call by call.
    _drop_in(
        "overhead ÷ reference's, decode", 0.1, f"{WHOLE}N = 1, bfloat16", OF_REFERENCE,
        "layer, eager",
    ),
    _drop_in(
        "overhead ÷ reference's, prefill", 0.12, f"{WHOLE}N = (512|2048|8192), bfloat16",
        OF_REFERENCE, "layer, eager",
    ),
    _fused("decode 3584²", 1.10),
    _fused("decode 3584→18944 and back", 1.03),
    _fused("decode, 7 linears, 7B", 1.05),
    _fused("decode, 7 linears, 70B", 1.02),
    _fused("prefill, 7 linears, 7B, N ≥ 2048", 1.05),
    _fused("prefill, 7 linears, 70B", 1.03),
    _fused("overhead ÷ LoRA's", 0.2),
    _fused("overhead ÷ reference's", 0.05),
    _on_cpu("CPU, C++, N = 1, mean of 5 shapes", 1.05, f"geometric mean, N = 1, {TYPES}"),
    _on_cpu("the same, stretch", 1.00, f"geometric mean, N = 1, {TYPES}"),
    _on_cpu("CPU, C++, N = 32, mean of 5 shapes", 1.05, f"geometric mean, N = 32, {TYPES}"),
    _on_cpu("CPU, C++, N = 256, mean of 5 shapes", 1.05, f"geometric mean, N = 256, {TYPES}"),
    _on_cpu(
        "CPU, torch, N = 256, mean of 5 shapes", 1.25, f"geometric mean, N = 256, {TYPES}",
        ("vps torch",),
    ),
    _on_cpu("SmolLM2 on a CPU, 64 greedy tokens, C++", 1.08, GREEDY, section="model"),
    _on_cpu("SmolLM2 on a CPU, prefill of 512, C++", 1.04, PREFILL, section="model"),
    _on_cpu("SmolLM2 on a CPU, 64 greedy tokens, torch", 1.30, GREEDY, ("vps torch",), "model"),
    _on_cpu("SmolLM2 on a CPU, prefill of 512, torch", 1.10, PREFILL, ("vps torch",), "model"),
    _on_cpu(
        "SmolLM2 on a CPU, backward pass", 1.15, BACKWARD, ("vps torch", "vps cpp"), "backward"
    ),
)  # fmt: skip


class Measured(NamedTuple):
    """A target's worst case: its value, quartiles, noise band, and where."""

    value: float
    low: float
    high: float
    noise: tuple[float, float] | None
    title: str
    variant: str


def judge(target: Target, sections: dict[str, Section]) -> Measured | str:
    """The worst of the cases that a target covers, or why there is none."""
    if target.section is None:
        return "no such form yet"
    section = sections.get(target.section)
    if section is None or (section["machine"]["gpu"] is not None) != target.gpu:
        return NOT_MEASURED
    cases = {t: c for t, c in section["cases"].items() if re.fullmatch(target.cases, t)}
    found, missing = [], []
    for title, case in cases.items():
        best = [m for v in target.variants if (m := _value(target.kind, title, case, v))]
        if best:
            found.append(min(best, key=lambda m: m.value))
        else:
            missing.append(title)
    if not found:
        return NOT_MEASURED
    worst = max(found, key=lambda m: m.value)
    if missing:
        worst = worst._replace(title=f"{worst.title}; without {', '.join(missing)}")
    return worst


def _value(kind: str, title: str, case: Case, variant: str) -> Measured | None:
    row = case["rows"].get(variant, {})
    if "ratio_q1" not in row:
        return None
    numbers = [row["ratio"], row["ratio_q1"], row["ratio_q3"]]
    if kind != RATIO:
        prefix = "peft lora" if kind == OF_LORA else "eager reference"
        other = next((r for n, r in case["rows"].items() if n.startswith(prefix)), {})
        if "ratio" not in other or other["ratio"] <= 1:
            return None
        numbers = [(number - 1) / (other["ratio"] - 1) for number in numbers]
    return Measured(*numbers, results.noise(case), title, variant)


def verdict(target: Target, measured: Measured) -> str:
    """Whether a target is met; a claim inside the noise band is none."""
    margin = 0.0
    if measured.noise is not None and target.kind == RATIO:
        margin = max(0.0, measured.noise[1] - 1, 1 - measured.noise[0])
    if abs(measured.value - target.most) <= margin:
        return "within noise of it"
    return "met" if measured.value < target.most else "not met"


def table(sections: dict[str, Section], gpu: bool | None = None) -> str:
    """Markdown: a target a row; those of a GPU, of a CPU, or all."""
    lines = [
        "| target | form | at most | measured [quartiles] | noise | |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        if gpu is not None and target.gpu != gpu:
            continue
        head = f"| {target.title} | {target.form} | {target.most:.2f} |"
        found = judge(target, sections)
        if isinstance(found, str):
            lines.append(f"{head} | | {found} |")
            continue
        band = "" if found.noise is None else f"{found.noise[0]:.2f} to {found.noise[1]:.2f}"
        value = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
        where = f"{verdict(target, found)}: {found.variant}, worst at {found.title}"
        lines.append(f"{head} {value} | {band} | {where} |")
    return "\n".join(lines)


def ratios(section: Section, cases: str, variants: list[str] | None = None) -> str:
    """Markdown for a README: a case a row, a variant a column; empty cells stay empty."""
    chosen = {t: c for t, c in section["cases"].items() if re.search(cases, t)}
    names = variants or list(
        dict.fromkeys(
            name
            for case in chosen.values()
            for name, row in case["rows"].items()
            if "ratio" in row and name not in (case["base"], case["base"] + results.AGAIN)
        )
    )
    lines = [f"| | noise | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for title, case in chosen.items():
        band = results.noise(case)
        cells = [NOT_MEASURED if band is None else f"{band[0]:.2f} to {band[1]:.2f}"]
        for name in names:
            row = case["rows"].get(name, {})
            cells.append("" if "ratio" not in row else _cell(row))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: results.Row) -> str:
    if "ratio_q1" not in row:
        return f"{row['ratio']:.2f} (modelled)"
    return f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"


def merged(folder: Path, gpu: bool) -> dict[str, Section]:
    """The sections of a folder that were measured with, or without, a GPU."""
    found: dict[str, Section] = {}
    for sections in results.read_folder(folder).values():
        for name, section in sections.items():
            if (section["machine"]["gpu"] is not None) == gpu:
                found[name] = section
    return found


def main() -> None:
    """Print the targets, and with ``--ratios`` the ratios of the cases that match."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("benchmarks/results"))
    parser.add_argument("--ratios", metavar="REGEX", help="print a table of these cases instead")
    parser.add_argument("--section", default="layer", help="where --ratios looks")
    parser.add_argument("--gpu", action="store_true", help="let --ratios look at a GPU's results")
    parser.add_argument("--variants", nargs="+", help="the columns of --ratios")
    arguments = parser.parse_args()
    if arguments.ratios is not None:
        section = merged(arguments.folder, arguments.gpu)[arguments.section]
        print(ratios(section, arguments.ratios, arguments.variants))
        return
    for gpu in (True, False):
        print(table(merged(arguments.folder, gpu), gpu), end="\n\n")


if __name__ == "__main__":
    main()

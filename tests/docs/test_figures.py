"""Figures in README and documentation are those of benchmarks/results."""

import csv
import json
import re

import pytest
from processes import ROOT

from benchmarks.results import _cell, noise
from benchmarks.study.page import filled

RESULTS = ROOT / "benchmarks/results"
AMD, INTEL = "amd-epyc-avx512-2-threads", "prompt/intel-r-xeon-r-processor-{}-2-threads"
VARIANTS = {
    "VPS, `cpp`": "vps cpp",
    "VPS, `torch`": "vps torch",
    "`cpp`": "vps cpp",
    "`torch`": "vps torch",
    '`cpp`, `"prompt"`': "vps cpp, scope prompt",
    '`torch`, `"prompt"`': "vps torch, scope prompt",
    "PEFT LoRA r = 4": "peft lora r=4",
    "as published": "published form, eager",
}


def text(name):
    """The text of a page with its lines joined."""
    return " ".join((ROOT / name).read_text().split())


def tables(path):
    """Tables of ratios: the cells of the header, and of each row below."""
    header = None
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif "PEFT LoRA r = 4" in cells:
            header = cells
        elif header and not cells[0].startswith("---"):
            yield header, cells


def measured(header, label):
    """The file, the section and the case of a row."""
    title = label.replace("SmolLM2", "SmolLM2-135M").replace(
        "prefill of 512", "prefill of 512 tokens"
    )
    if '`cpp`, `"prompt"`' in header:
        instructions, _, title = label.partition(", ")
        file = INTEL.format(instructions.lower().replace("-", ""))
        return file, "model", f"SmolLM2-135M, {title}, float32"
    file = AMD if header[0] == "threads sleep" else f"spinning/{AMD}-spinning"
    if label.startswith("layers"):
        return file, "layer", f"geometric mean, N = {re.search(r'[0-9]+', label)[0]}, float32"
    if "backward" in label:
        return file, "backward", f"{title}, float32"
    return file, "model", f"{title.replace('greedy tokens', 'greedy tokens after 32')}, float32"


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_figures_are_those_of_the_results(name):
    """Ratios, quartiles and noise, cell by cell; a cell without a result says "not measured"."""
    rows = 0
    for header, cells in tables(ROOT / name):
        file, section, title = measured(header, cells[0])
        sections = json.loads((RESULTS / f"{file}.json").read_text())["sections"]
        case = sections[section]["cases"][title]
        low, high = noise(case)
        assert cells[1] == f"{low:.2f} to {high:.2f}", title
        for column, cell in zip(header[2:], cells[2:], strict=True):
            row = case["rows"].get(VARIANTS[column], {})
            assert cell == (_cell(row) if "ratio" in row else "not measured"), (title, column)
        rows += 1
    assert rows == {"README.md": 5, "docs/benchmarks.md": 16}[name]


def test_what_the_controls_show():
    """Right answers of 30, of the plain model, of seven settings and of their controls."""
    folder = RESULTS / "smollm2-controls"
    with (folder / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["family"] == "baseline"]
    assert {row["n"] for row in rows} == {"30"}
    settings, controls = (
        sorted(
            round(30 * float(row["value"])) for row in rows if bool(row["control"]) == is_control
        )
        for is_control in (False, True)
    )
    assert len(settings) == 7
    found = (
        f"{settings[0]} to {settings[-1]} right, the plain model {30 * float(rows[0]['base']):.0f} "
        f"and the controls {controls[0]} to {controls[-1]}"
    )
    points = float(re.search(r"effect is ([\d.]+) points", (folder / "report.md").read_text())[1])
    guide = text("docs/guides/evaluation.md")
    assert found in guide and f"difference of {points:.0f} points" in guide


def test_what_the_study_shows():
    """The sentences of README are the findings of the preregistered primary comparison."""
    own = json.loads((RESULTS / "reproduction/findings.json").read_text())["parts"]["main"]
    found = {
        (each["comparison"]["cell"], each["comparison"]["against"]): each
        for each in own["findings"]
        if each["comparison"]["metric"] == "acc"
    }
    token, prompt = (found[f"paper, {scope}", "baseline"] for scope in ("token", "prompt"))
    assert {token["verdict"], prompt["verdict"]} == {"worse"}
    right = {
        name: f"{100 * each['comparison']['value']:.1f}"
        for (name, against), each in found.items()
        if against == "baseline"
    }
    plain, n = f"{100 * token['comparison']['base']:.1f}", f"{token['comparison']['n']:,}"
    seen = max(each["detectable"] for each in (token, prompt))
    random = [f"paper, {scope} · random_indices" for scope in ("token", "prompt")]
    noise = [right[f"paper, {scope} · random_noise"] for scope in ("token", "prompt")]
    assert {found[name, "baseline"]["verdict"] for name in random} == {"equivalent"}
    assert {right[name] for name in random} == {"39.7"}
    sentences = (
        f"Of {n} multiple-choice questions",
        f"has {right['paper, token']} % right under scope `token` and {right['paper, prompt']} %",
        f"the plain model {plain} %",
        f"a true difference of {100 * seen:.1f} points",
        "is equivalent to the plain model within 2 points (39.7 %)",
        f"does about as much harm ({noise[0]} and {noise[1]} %)",
    )
    readme = text("README.md")
    assert not [each for each in sentences if each not in readme]


def test_what_the_calibration_shows():
    """The mean over three seeds of the base cell, and the tables of the guide."""
    losses = {}
    for seed in range(3):
        path = RESULTS / f"calibration/arithmetic-48-layer-token-sk-{seed}.json"
        comparisons = json.loads(path.read_text())["report"]["comparisons"]
        for each in (*comparisons["sharpening"], *comparisons["controls"]):
            if (each["task"], each["against"]) == ("held-out examples", "plain"):
                losses.setdefault(each["cell"], []).append(each["value"])
                losses.setdefault(f"before {each['cell']}", []).append(each["base"])
    before, after, static = (
        f"{sum(losses[name]) / 3:.2f}" for name in ("before sharpening", "sharpening", "static")
    )
    assert f"from {before} to {after} nats per token" in text("README.md")
    assert f"on fixed features reach {static}:" in text("README.md")
    guide = (ROOT / "docs/guides/calibration.md").read_text()
    for folder in ("calibration", "calibration/longer"):
        table = (RESULTS / folder / "report.md").read_text().partition("\n\n")[0]
        assert table in guide


def test_tables_of_the_reproduction_are_those_of_the_results():
    """Each table of the page as its program writes it; "Not finished" where a part is not."""
    page = (ROOT / "docs/reproduction.md").read_text()
    assert filled(page, RESULTS) == page
    picture = RESULTS / "reproduction/answers.png"
    shown = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text())
    assert ("](docs/images/study.png)" in shown) == picture.exists()
    if picture.exists():
        assert picture.read_bytes() == (ROOT / "docs/images/study.png").read_bytes()

"""What a run is said to show: nothing where there is nothing, and what was planted where it is."""

import csv
import html
import html.parser
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
from scipy import stats

from vps.evaluation import paired
from vps.evaluation.comparison import ALL_TASKS, analyse
from vps.evaluation.grid import make_grid
from vps.evaluation.paired import Outcome
from vps.evaluation.report import FILES, write_report
from vps.evaluation.runs import Evaluation, RunError, ablate, machine_facts, read_run
from vps.evaluation.summary import summarise

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "a/model", "tasks": ["sums", "units"], "limit": 80}
RESAMPLES = 200


def right(task, number):
    """Whether the unpatched model answers a document right."""
    return random.Random(f"{task} {number}").random() < 0.5


def evaluator(effect, documents=80, texts=12):
    """Outcomes of two tasks and of texts; ``effect(cell, task, number, right)`` may turn one."""

    def evaluate(cell):
        found = []
        for task in ("sums", "units"):
            for number in range(documents):
                value = right(task, number)
                if cell.config is not None:
                    value = effect(cell, task, number, value)
                found.append(Outcome(task, str(number), "acc", float(value)))
        for number in range(texts):
            draw = random.Random(f"{cell.name} {number}")
            nll = 2.5 + number / 10
            if cell.config is not None:
                nll += cell.config.gamma * (0.1 + draw.gauss(0, 0.01))
            found.append(Outcome("text", str(number), "nll", nll, None, 20.0 + number))
        scopes = {} if cell.config is None else {"loglikelihood": cell.config.scope}
        return Evaluation(found, scopes)

    return evaluate


def nothing(cell, task, number, value):
    return value


def chance(cell, task, number, value):
    """One answer in ten turns, for no reason."""
    return value != (random.Random(f"{cell.name} {task} {number}").random() < 0.1)


def planted(cell, task, number, value):
    """Only the sharpened model, not its controls, turns two wrong answers in three on sums."""
    on = cell.control is None and cell.config.gamma > 0
    return value or (on and task == "sums" and number % 3 > 0)


def finished(folder, effect, *, values=None, **options):
    grid = make_grid(values or {"grid": {"gamma": [0.3, 0.5], "builder": ["sk"]}, "title": "a run"})
    ablate(grid, evaluator(effect, **options), folder, SETTINGS, facts=machine_facts())
    return read_run(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The planted run and its report."""
    folder = tmp_path_factory.mktemp("planted")
    finished(folder, planted)
    return folder, write_report(folder, resamples=RESAMPLES)


@pytest.mark.parametrize("effect", [nothing, chance])
def test_a_null_experiment_reports_no_difference_in_every_cell(tmp_path, effect):
    values = {"grid": {"gamma": [0.0], "builder": ["sk", "sc"], "rank": [1, 2, 4]}}
    finished(tmp_path, effect, values=values)
    analysis = write_report(tmp_path, resamples=RESAMPLES)
    every = analysis.to_baseline + analysis.to_controls
    assert len(analysis.to_baseline) == 4 * (6 + 3 + 6 + 6) and len(analysis.to_controls) == 72
    assert {each.verdict for each in every} == {"no difference"}
    turned = [each.gained + each.lost for each in every if each.gained is not None]
    assert any(turned) == (effect is chance)
    words = summarise(analysis).findings
    assert words[0] == "Against the baseline: no difference in any of 6 cells."
    assert words[1] == "Controls against the baseline: no difference in any of 15 controls."
    assert words[2].startswith("Against controls: no difference in any cell.")
    with (tmp_path / "report.csv").open() as file:
        assert {row["verdict"] for row in csv.DictReader(file)} == {"no difference"}
    page = (tmp_path / "report.html").read_text()
    assert ">no difference</td>" in page and ">better</td>" not in page


def test_a_planted_effect_is_found(found):
    folder, analysis = found
    verdicts = {(c.cell, c.task): c.verdict for c in analysis.to_baseline if c.metric == "acc"}
    for cell in analysis.run.cells[1:]:
        own = "no difference" if cell.control else "better"
        assert verdicts[cell.name, "sums"] == own
        assert verdicts[cell.name, "units"] == "no difference"
        assert verdicts[cell.name, ALL_TASKS] == own
    for each in analysis.to_controls:
        if each.metric == "acc":
            wanted = "no difference" if each.task == "units" else "better"
            assert each.verdict == wanted
    words = summarise(analysis).findings
    assert "2 of 2 cells differ: gamma=0.3 builder=sk better (+" in words[0]
    assert "Against controls: 12 of 24 better: gamma=0.3 builder=sk than random indices" in words[2]


def test_every_number_by_hand(found):
    """One comparison recomputed from the rows of the run; Holm over the cells that were asked."""
    folder, analysis = found
    run = read_run(folder)
    values = {
        index: {(o.task, o.document): o for o in record.outcomes if o.metric == "acc"}
        for index, record in run.records.items()
    }
    sums = [key for key in values[0] if key[0] == "sums"]
    one = next(
        c for c in analysis.to_baseline if c.cell.startswith("gamma=0.5") and c.task == "sums"
    )
    index = next(cell.index for cell in run.cells if cell.name == one.cell)
    d = numpy.array([values[index][key].value - values[0][key].value for key in sums])
    assert one.n == 80 and one.difference == pytest.approx(d.mean())
    assert (one.gained, one.lost) == ((d > 0).sum(), (d < 0).sum())
    assert one.p == pytest.approx(stats.binomtest(one.gained, one.gained + one.lost).pvalue)
    assert one.low == pytest.approx(d.mean() - 1.96 * d.std() / 80**0.5, abs=0.03)
    assert one.high == pytest.approx(d.mean() + 1.96 * d.std() / 80**0.5, abs=0.03)
    for controls in (False, True):
        family = [c for c in analysis.to_baseline if analysis.is_control(c.cell) == controls]
        assert [c.corrected for c in family] == pytest.approx(paired.holm([c.p for c in family]))
    text = next(c for c in analysis.to_baseline if c.cell == one.cell and c.metric == "nll")
    assert text.verdict == "worse" and text.difference > 0 and text.gained is None
    rows = [o for o in run.records[index].outcomes if o.metric == "nll"]
    nll = paired.weighted_mean([o.value for o in rows], [o.weight for o in rows])
    assert (text.value, text.value_error) == pytest.approx(nll)
    with (folder / "report.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(analysis.to_baseline) + len(analysis.to_controls)
    row = next(r for r in written if (r["cell"], r["task"]) == (one.cell, "sums"))
    assert row["family"] == "baseline" and float(row["corrected"]) == one.corrected
    assert int(row["gained"]) == one.gained and float(row["low"]) == one.low
    assert row["settings"].startswith("adaptive_gamma False, builder sk, scope token")


def test_the_report_says_how_it_was_measured(found):
    folder, analysis = found
    texts = [
        (folder / "report.md").read_text().replace("\\", ""),
        html.unescape((folder / "report.html").read_text()),
    ]
    detectable = next(d for d in analysis.detectable if d.task == "sums")
    effect = paired.minimum_detectable_effect(80, detectable.spread, 0.05 / 8)
    assert detectable.effect == effect
    for text in texts:
        for part in (
            "n = 80", "n = 160", "n = 12",
            "Holm's method over all 8 comparisons of cells",
            f"sums, acc: n = 80. The minimum detectable effect is {100 * effect:.1f} points (80 %",
            f"95 % paired bootstrap intervals ({RESAMPLES} samples",
            "token (loglikelihood) in 8 cells",
            "VPSConfig.seed 0; controls 0",
            "a/model",
            machine_facts()["torch"],
            machine_facts()["device"],
            "perplexity ",
            "↳ random indices",
        ):  # fmt: skip
            assert part in text, part
    assert "leak" not in texts[0]


def test_what_looks_ahead_is_said(tmp_path):
    values = {"cells": [{"scope": "sequence", "gamma": 0.3}], "controls": False}
    analysis = analyse(finished(tmp_path, nothing, values=values), resamples=RESAMPLES)
    words = summarise(analysis)
    scope = dict(words.conditions)["scope"]
    assert scope.startswith("sequence (loglikelihood) in 1 cells. Scopes other than token and")
    assert "No controls were run, as the grid asked" in " ".join(words.findings)


class Page(html.parser.HTMLParser):
    """Tags balance; text, attributes and tables are kept."""

    VOID = {"meta", "br", "img", "link"}
    LONE = {"line", "circle"}  # of SVG, closed in themselves

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.rows = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "action") or name.startswith("on"):
                self.links.append((tag, name, value))
        if tag == "tr":
            self.rows.append(0)
        if tag == "td":
            self.rows[-1] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.LONE

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)


def test_the_page_stands_alone_and_its_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>|`$x$'
    values = {"title": evil, "cells": [{"name": "=" + evil, "gamma": 0.3}]}
    grid = make_grid(values)
    settings = SETTINGS | {"model": "<b>|</b>"}
    ablate(grid, evaluator(planted), tmp_path / "x", settings, facts={"device": "<i>"})
    write_report(tmp_path / "x", tmp_path / "out", resamples=RESAMPLES)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    shown = " ".join(page.text)
    assert page.links == [] and text.count("<script>") == 1 and "http" not in shown
    assert f"={evil}" in shown and "<b>|</b>" in shown and "<i>" in shown
    assert 'name="viewport"' in text and "@media (max-width" in text and "url(" not in text
    cells = [count for count in page.rows if count]
    assert cells == [9] * 4 * 4 + [8] * 3 * 4
    markdown = (tmp_path / "out/report.md").read_text()
    assert not re.search(r"(?<!\\)<", markdown) and "\\|\\`" in markdown
    for line in markdown.splitlines():
        if line.startswith("| ") and "corrected p" in line:
            wanted = line.count("|")
        elif line.startswith("| ↳") or line.startswith("| ="):
            assert line.replace("\\|", "").count("|") in (wanted, 3)
    with (tmp_path / "out/report.csv").open() as file:
        assert next(csv.DictReader(file))["cell"].startswith("'=<script")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_table_sorts_in_a_browser(found, tmp_path):
    folder, analysis = found
    click = """<script>
      const heads = [...document.querySelectorAll("table:first-of-type thead button")];
      const head = heads.find(button => button.textContent === "difference");
      head.click(); window.up = order(); head.click();
      function order() {
        return [...document.querySelector("tbody").rows].map(row => row.cells[3].dataset.value);
      }
      document.title = JSON.stringify([window.up, order()]);
    </script>"""
    path = tmp_path / "page.html"
    text = (folder / "report.html").read_text()
    assert text.count("</body>") == 1
    path.write_text(text.replace("</body>", click + "</body>"))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    title = html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1])
    up, down = ([float(value) for value in each] for each in json.loads(title))
    wanted = [
        c.difference for c in analysis.to_baseline if (c.task, c.metric) == (ALL_TASKS, "acc")
    ]
    assert up == sorted(wanted) != wanted and down == sorted(wanted, reverse=True)


def test_pictures_hold_every_interval(found):
    from matplotlib import image

    folder, _ = found
    for name, colour in (("forest.png", (0.10, 0.50, 0.22)), ("cost.png", (0.10, 0.50, 0.22))):
        pixels = image.imread(folder / name)[..., :3]
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500
        assert (abs(pixels - colour).max(-1) < 0.02).sum() > 50, name  # the green of "better"


def test_cells_wait_for_their_controls(tmp_path):
    grid = make_grid({"grid": {"gamma": [0.3, 0.5]}})

    def interrupted(cell):
        if cell.index == 6:
            raise KeyboardInterrupt
        if cell.index == 4:
            raise ValueError("no noise")
        return evaluator(planted)(cell)

    with pytest.raises(KeyboardInterrupt):
        ablate(grid, interrupted, tmp_path, SETTINGS)
    run = read_run(tmp_path)
    analysis = analyse(run, resamples=RESAMPLES)
    assert analysis.to_baseline == ()
    words = summarise(analysis)
    assert words.findings == ["No cell can be compared with the baseline yet."]
    text = " ".join(words.missing)
    assert "5 of 9 cells of the grid are finished" in text
    assert "Held back until their controls are finished: gamma=0.3; gamma=0.5." in text
    name = run.cells[4].name
    assert f"Failed: {name} (ValueError: no noise)." in text and run.cells[8].name in text
    write_report(tmp_path, resamples=RESAMPLES)
    asked = analyse(run, without_controls=True, resamples=RESAMPLES)
    assert {c.cell for c in asked.to_baseline if not asked.is_control(c.cell)} == {
        "gamma=0.3", "gamma=0.5"
    }  # fmt: skip


def test_what_cannot_be_paired_is_refused(tmp_path):
    def other(cell):
        found = evaluator(nothing)(cell).outcomes
        return Evaluation(found[:-1] if cell.index == 1 else found)

    grid = make_grid({"cells": [{"gamma": 0.3}], "controls": False})
    ablate(grid, other, tmp_path / "x", SETTINGS)
    with pytest.raises(RunError, match="saw other documents of text: 11 and 12, 11 in common"):
        analyse(read_run(tmp_path / "x"))

    def without(cell):
        found = evaluator(nothing)(cell).outcomes
        return Evaluation([o for o in found if cell.index != 1 or o.task != "text"])

    ablate(grid, without, tmp_path / "y", SETTINGS)
    with pytest.raises(RunError, match=r"measured on other tasks: text \(nll\)"):
        analyse(read_run(tmp_path / "y"))

    with pytest.raises(RuntimeError):
        ablate(grid, lambda cell: Evaluation([]), tmp_path / "z", SETTINGS)
    with pytest.raises(RunError, match="baseline is not finished .ValueError: the evaluation gave"):
        analyse(read_run(tmp_path / "z"))

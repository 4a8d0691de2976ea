"""The page of reproduction has the findings of the results, and says what is not finished."""

import json
import re
import shutil

import numpy as np
import pytest
from processes import ROOT

from benchmarks.reproduce import cells
from benchmarks.reproduce.findings import CURVATURE, PLAIN
from benchmarks.reproduce.measures import ACCURACY, BEST, EXACT, LOSS
from benchmarks.reproduce.report import write_report
from benchmarks.study import again, page
from vps.evaluation.grid import BASELINE
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Evaluation, ablate

FACTS = {"cpu": "C", "instructions": "I", "threads": 1, "torch": "2", "commit": "abc"}
KINDS = ("arithmetic", "chains", "units")


def evaluate(part, cell):
    """Planted answers: sharpened cells lose a fifth of the right ones, controls none."""
    plain = np.random.default_rng(0)
    own = np.random.default_rng(1 + cell.index)
    sharpened = cell.name != BASELINE and cell.control is None
    found = []
    for kind in KINDS if part.questions or part.pool else ():
        for i in range(20):
            margin = round(float(plain.normal(0.1, 1)), 3)
            if sharpened and own.random() < 0.2:
                margin = -abs(margin)
            found.append(Outcome(kind, str(i), ACCURACY, float(margin > 0), margin))
            if part.pool:
                found.append(Outcome(kind, str(i), BEST, float(margin > 0), margin))
    for i in range(12 if part.paragraphs else 0):
        change = own.normal(0.01, 0.01) if cell.name != BASELINE else 0.0
        found.append(Outcome("prose", str(i), LOSS, float(plain.normal(3, 0.3) + change)))
    for i in range(30 if part.problems else 0):
        right = plain.random() < 0.5 and not (sharpened and own.random() < 0.2)
        found.append(Outcome("generated", str(i), EXACT, float(right)))
    return Evaluation(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of results with the cells of the whole study, on few planted answers."""
    path = tmp_path_factory.mktemp("results")
    for name in ("claims", "spinning"):
        shutil.copytree(ROOT / "benchmarks/results" / name, path / name)
    for name, part in cells.parts().items():
        ablate(
            part.grid, lambda cell, part=part: evaluate(part, cell), path / "reproduction" / name,
            {"seed": 3}, facts=FACTS,
        )  # fmt: skip
    write_report(path / "reproduction")
    return path


def test_tables_are_the_findings(folder):
    text = page.filled((ROOT / "docs/reproduction.md").read_text(), folder)
    assert "Not finished" not in text and "C, I, 1 thread, torch 2, commit abc, seed 3." in text
    parts = json.loads((folder / "reproduction/findings.json").read_text())["parts"]
    found = [
        each for part in ("main", "settings") for each in parts[part]["findings"]
        if (each["family"], each["comparison"]["metric"]) == (PLAIN, ACCURACY)
    ]  # fmt: skip
    tables = dict(re.findall(r"<!-- results: (\w+) -->\n(.*?)<!-- /results -->", text, re.S))
    rows = [line for line in tables["gain"].splitlines() if line.startswith("| ")][1:]
    assert len(found) == len(rows) == 10
    for each, row in zip(found, rows, strict=True):
        own = each["comparison"]
        assert f"| {own['cell']} | {own['n']} |" in row and each["verdict"] in row
        assert f"{100 * own['difference']:+.2f}".replace("-", "−") in row
        assert row.endswith(f"| {100 * each['detectable']:.2g} |")
    assert tables["guidance"].count("| random features |") == 2
    assert "24 comparisons" in tables["guidance"]
    assert tables["selection"].count("Gaussian noise on the margins") == 3
    assert "images/study.png" in tables["picture"]
    assert page.filled(text, folder) == text


def test_the_loop_is_described_and_not_tested(folder):
    text = (folder / "reproduction/report.md").read_text()
    loop = text.partition("## The paper's loop")[2]
    assert loop and "| p |" not in loop and "verdict" not in loop
    parts = json.loads((folder / "reproduction/findings.json").read_text())["parts"]
    for each in parts["loop"]["findings"]:
        assert not {"verdict", "equivalent"} & each.keys() and "p" not in each["comparison"]
    (own,) = (
        each["comparison"] for each in parts["loop"]["findings"]
        if (each["family"], each["comparison"]["metric"]) == (CURVATURE, ACCURACY)
    )  # fmt: skip
    assert (own["cell"], own["against"]) == ("paper, prompt", "no L-BFGS, prompt")


def test_what_is_not_finished_is_said(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    study = tmp_path / "reproduction"
    (study / "main/cells/3.json").unlink()
    shutil.rmtree(study / "generated")
    text = write_report(study)
    assert "Not finished: main, 10 of 11 cells." in text
    assert "Not finished: generated, no results here yet." in text
    filled = page.filled((ROOT / "docs/reproduction.md").read_text(), tmp_path)
    tables = dict(re.findall(r"<!-- results: (\w+) -->\n(.*?)<!-- /results -->", filled, re.S))
    assert "part main, 10 of 11 cells" in tables["gain"] and "γ = 0.1, token" in tables["gain"]
    assert tables["generated"].strip() == "*Not finished: part generated, no results here yet.*"
    assert "study.png" not in tables["picture"]
    shutil.rmtree(study)
    filled = page.filled((ROOT / "docs/reproduction.md").read_text(), tmp_path)
    assert filled.count("Not finished") > 10


def test_an_unknown_table_is_an_error(folder):
    with pytest.raises(KeyError, match="nonsense"):
        page.filled("<!-- results: nonsense -->\n<!-- /results -->", folder)


def test_answers_of_another_machine_are_compared(tmp_path):
    first = [
        Outcome("units", "0", ACCURACY, 1.0, 0.25), Outcome("units", "1", ACCURACY, 0.0, -0.1),
        Outcome("prose", "0", LOSS, 3.0),
    ]  # fmt: skip
    other = [
        Outcome("units", "0", ACCURACY, 0.0, -0.5), Outcome("units", "1", ACCURACY, 0.0, -0.1),
        Outcome("prose", "0", LOSS, 3.125),
    ]  # fmt: skip
    found = again.differences(first, other)
    assert list(found.values()) == [2, 1, 0.75, 1, 0.125]
    with pytest.raises(ValueError, match="1 questions are in one run alone"):
        again.differences(first, other[1:])
    assert page.again(tmp_path) == []
    (tmp_path / "reproduction").mkdir()
    values = {"found": found, "first": FACTS, "again": FACTS | {"cpu": "D"}}
    (tmp_path / "reproduction/again.json").write_text(json.dumps(values))
    (line,) = page.again(tmp_path)
    assert "2 questions once more: 1 are right on one machine alone" in line and "(D)" in line

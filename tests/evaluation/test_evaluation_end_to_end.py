"""vps ablate by lm-eval itself, on a tiny random Llama and tasks from a local file."""

import csv

import pytest

from vps import cli
from vps.evaluation.runs import read_run

pytest.importorskip("vps.evaluation.harness", reason="needs the lm-eval adapter")

GRID = """
fixed: {builder: sk, gamma: 0}
cells:
  - {name: one}
  - {name: queries alone, target_modules: [q_proj]}
  - {name: whole sequence, scope: sequence}
"""
MOVED = """
fixed: {builder: sk, gamma: 0.8}
cells: [{name: strong}, {name: strong in sequence, scope: sequence}]
"""


def run(capsys, tmp_path, folder, grid):
    (tmp_path / "g.yaml").write_text(grid)
    tasks = "local_choice,local_text,local_answer"
    arguments = ["ablate", tmp_path / "g.yaml", "--model", folder, "--include-path", folder,
                 "--tasks", tasks, "--limit", 6, "--out", tmp_path / "x"]  # fmt: skip
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    assert cli.main(["report", str(tmp_path / "x")]) == 0
    return read_run(tmp_path / "x"), capsys.readouterr().out


def test_gamma_0_is_the_baseline_in_every_cell(capsys, tmp_path, task_folder):
    found, said = run(capsys, tmp_path, task_folder, GRID)
    assert len(found.cells) == 13 and len(found.finished) == 13
    for record in found.records.values():
        assert record.outcomes == found.records[0].outcomes
    assert "Against the baseline: no difference in any of 3 cells." in said
    with (tmp_path / "x/report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {"acc", "acc_norm", "nll", "exact_match"}
    assert {row["verdict"] for row in rows} == {"no difference"}
    assert {float(row["difference"]) for row in rows} == {0.0}


def test_cells_run_under_their_own_scope(capsys, tmp_path, task_folder):
    found, said = run(capsys, tmp_path, task_folder, MOVED)
    nll = {
        cell.name: [o.value for o in found.records[cell.index].outcomes if o.metric == "nll"]
        for cell in found.cells
    }
    assert nll["strong"] != nll["baseline"] != nll["strong in sequence"] != nll["strong"]
    assert len({tuple(values) for values in nll.values()}) == len(found.cells)
    scopes = {cell.name: set(found.records[cell.index].scopes.values()) for cell in found.cells}
    assert scopes["strong"] == {"token"} and scopes["strong in sequence"] == {"sequence"}
    assert scopes["baseline"] == set()
    assert "late tokens shape the update of early ones" in (tmp_path / "x/report.md").read_text()

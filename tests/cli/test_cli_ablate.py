"""vps ablate and vps report, with a stand-in for lm-eval: what they ask, print and return."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import StubHarness

from vps.evaluation import harness
from vps.evaluation.grid import make_grid
from vps.evaluation.report import FILES
from vps.evaluation.runs import read_run
from vps.model.patching import sharpened_layers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(harness, "Harness", StubHarness)
    StubHarness.made = []
    return StubHarness.made


def test_the_harness_is_asked_for_each_cell(stub):
    evaluate = harness.evaluator(StubHarness("model", "tokenizer", ["t"]))
    grid = make_grid({"cells": [{"gamma": 0.3}], "draws": 2})
    for cell in grid.cells:
        assert len(evaluate(cell).outcomes) == 10
    config = grid.cells[1].config
    drawn = config.replace(builder="random")
    assert stub[0].calls == [
        (None, "baseline", 0),
        (config, "sharpened", 0),
        (drawn, "random_indices", 0),
        (drawn, "random_indices", 1),
        (config, "random_noise", 0),
        (config, "random_noise", 1),
        (config, "shuffled_selection", 0),
        (config, "shuffled_selection", 1),
    ]
    assert evaluate(grid.cells[1]).scopes == {"generate_until": "token"}


GRID = """
fixed: {builder: sk}
cells:
  - {name: nothing fits, target_modules: [fc1], gamma: 0.1}
grid: {gamma: [0.2, 0.3]}
controls: [random_noise]
"""


def ablation(tmp_path, folder, *arguments, grid=GRID):
    path = tmp_path / f"g{len(grid)}.yaml"
    path.write_text(grid)
    return ("ablate", path, "--model", folder, "--tasks", "t, u", "--limit", 10,
            "--out", tmp_path / "x", *arguments)  # fmt: skip


def test_ablate_and_report_by_command(run, refuse, tmp_path, folder, stub):
    code, out, err = run(*ablation(tmp_path, folder))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "7 cells: 7 evaluated, 0 failed, 0 finished before"
    assert stub[0].tasks == ["t", "u"]
    options = stub[0].options
    assert (options["limit"], options["batch_size"], options["scoring_scope"]) == (10, 1, "config")
    layers = sharpened_layers(stub[0].model)  # of the first cell that fits the model
    assert {layer.config.gamma for layer in layers.values()} == {0.2}
    made = read_run(tmp_path / "x")
    assert made.definition["tasks"] == ["t", "u"] and made.definition["weights"] is not None
    code, out, _ = run(*ablation(tmp_path, folder, "--json"))
    assert code == 0 and json.loads(out)["finished before"] == 7 and len(stub) == 1  # not loaded
    assert "limit is 10 there, 9 here" in refuse(*ablation(tmp_path, folder, "--limit", 9))
    code, out, _ = run("report", tmp_path / "x", "--out", tmp_path / "r")
    assert code == 0 and out.startswith("Against the baseline: ")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == sorted(FILES)
    code, out, _ = run("report", tmp_path / "x", "--json")
    values = json.loads(out)
    assert values["conditions"]["limit"] == "10" and len(values["files"]) == 5
    assert all(Path(name).is_file() for name in values["files"])


def test_command_errors(refuse, tmp_path, folder, stub):
    for arguments, message in (
        (ablation(tmp_path, folder, grid="grid: {gama: [1]}"), ".yaml: grid: .*no field 'gama'"),
        (ablation(tmp_path, tmp_path / "none"), "--model: no such model folder"),
        (ablation(tmp_path, folder, "--tasks", ","), "--tasks .*names none"),
        (ablation(tmp_path, folder, "--tasks", "nonsense"), "--tasks: .*no task 'nonsense'"),
        (ablation(tmp_path, folder, "--device", "cuda:99"), "--device cuda:99: not a usable"),
        (
            ablation(tmp_path, folder, grid="cells: [{target_modules: [fc1]}]"),
            "no cell of the grid fits the model: .*fc1.* match none",
        ),
        (("report", tmp_path / "none"), "none holds no run"),
    ):
        assert re.search(message, err := refuse(*arguments)), err
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_failed_cells_end_with_1(run, tmp_path, folder, stub, monkeypatch):
    ran = StubHarness.run

    def sometimes(self, config=None, variant="sharpened", seed=0):
        if variant == "random_noise" and config.gamma == 0.3:
            raise RuntimeError("out of memory")
        return ran(self, config, variant, seed)

    monkeypatch.setattr(StubHarness, "run", sometimes)
    code, out, err = run(*ablation(tmp_path, folder))
    assert code == 1 and "6 evaluated, 1 failed" in out
    assert "1 of 7 cells failed; see" in err and "table.md" in err
    assert "failed: RuntimeError: out of memory" in (tmp_path / "x/table.md").read_text()

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(StubHarness, "run", interrupted)
    code, out, err = run(*ablation(tmp_path, folder))
    assert code == 130 and "table.md holds what is finished; the same command goes on" in err


LAUNCHED = """
import sys
sys.path[:0] = {tests!r}
from cli_cases import StubHarness
from vps import cli
from vps.evaluation import harness
harness.Harness = StubHarness
sys.exit(cli.main(sys.argv[1:]))
"""


def test_torchrun_gives_what_one_process_gives(run, tmp_path, folder, stub):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(tests=[str(ROOT / "tests/cli"), str(ROOT / "tests")]))
    arguments = [str(a) for a in ablation(tmp_path, folder)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), *arguments], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 cells of process 1 of 2: 4 evaluated" in done.stdout
    assert "3 cells of process 2 of 2: 3 evaluated" in done.stdout
    two = read_run(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "two")
    assert run(*arguments)[0] == 0
    one = read_run(tmp_path / "x")
    assert one.cells == two.cells and one.definition == two.definition
    assert {i: (r.outcomes, r.scopes) for i, r in one.records.items()} == {
        i: (r.outcomes, r.scopes) for i, r in two.records.items()
    }
    assert len(list((tmp_path / "two/cells").iterdir())) == 7

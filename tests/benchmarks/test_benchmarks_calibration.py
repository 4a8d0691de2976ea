"""The study's cells, table and picture, without a model."""

import pytest
from tiny import tiny_llama

from benchmarks.study.calibration import CELLS, examples
from benchmarks.study.report import Cell, write_report
from vps import Calibration, VPSConfig
from vps.model.calibration import fingerprint
from vps.model.patching import sharpened_layers


def row(cell, against, task, difference, verdict):
    return {
        "cell": cell, "against": against, "task": task, "n": 40, "base": 2.0,
        "value": 2.0 + difference, "difference": difference, "low": difference - 0.1,
        "high": difference + 0.1, "verdict": verdict,
    }  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Save a finished cell with a held-out difference of sharpening; returns the folder."""
    model = tiny_llama()
    names = list(sharpened_layers(model))

    def save(cell, difference, verdict):
        controls = [form for form in ("scale", "static") if form not in cell.elsewhere]
        rows = [
            row(name, "plain", task, change, "better")
            for task, change in (("held-out examples", difference), ("other text", 0.25))
            for name in ("sharpening", *controls)
        ]
        report = {
            "forms": {
                "sharpening": {"numbers": 7, "step": 12, "learning_rate": 0.1},
                **dict.fromkeys(controls, {"numbers": 7, "step": 8, "learning_rate": 0.02}),
            },
            "comparisons": {
                "sharpening": [each for each in rows if each["cell"] == "sharpening"],
                "controls": [each for each in rows if each["cell"] != "sharpening"],
                "against controls": [
                    row("sharpening", name, "held-out examples", 0.125, verdict)
                    for name in controls
                ],
            },
        }
        Calibration(
            VPSConfig(), "tiny", "LlamaForCausalLM", fingerprint(model), "0",
            dict.fromkeys(names, 0.5), report=report,
        ).save(tmp_path / f"{cell.name}.json")  # fmt: skip
        return tmp_path

    return save


def test_table_and_picture(save):
    folder = save(Cell(), -0.5, "no difference")
    text = write_report(folder, CELLS)
    assert text == (folder / "report.md").read_text(encoding="utf-8")
    assert "| arithmetic-48-layer-token-sk-0 | plain | 0 | | | 2.000 |" in text
    assert "| sharpening | 7 | 0.1 | 12 | 1.500 | -0.500 [-0.600, -0.400] better | +0.250" in text
    assert "sharpening less output scale" in text and "+0.125 [+0.025, +0.225] no diff" in text
    assert (folder / "held-out.png").read_bytes().startswith(b"\x89PNG")


def test_overview_is_the_mean_over_seeds_with_the_verdicts_counted(save):
    for seed, (difference, verdict) in enumerate(
        ((-0.5, "worse"), (-0.7, "no difference"), (-0.9, "worse"))
    ):
        folder = save(Cell(seed=seed), difference, verdict)
    save(Cell(builder="sc"), -0.25, "better")
    lines = write_report(folder, CELLS).splitlines()
    assert lines[0] == "| | seeds | plain | sharpening | static features | output scale |"
    mean = "−0.70; +0.25"
    assert lines[2] == f"| 48 examples | 3 | 2.00 | {mean} | {mean} (+2) | {mean} (+2) |"
    own = "−0.25; +0.25"  # the output scale is that of the cell which differs in the builder
    assert lines[3] == f"| builder SC | 1 | 2.00 | {own} | {own} (−1) | −0.50; +0.25 |"


def test_nothing_finished_is_two_empty_tables(tmp_path):
    assert len(write_report(tmp_path, CELLS).splitlines()) == 5
    assert not (tmp_path / "held-out.png").exists()


@pytest.mark.parametrize("task", ["arithmetic", "text"])
def test_held_out_examples_are_those_of_no_size(task):
    if task != "text":
        pytest.importorskip("reasoning_gym")
    small, held = examples(task, 8, 10)
    large, same = examples(task, 256, 10)
    assert held == same and len(held) == 10 and len(large) == 256 and large[:8] == small
    assert not set(large) & set(held)


def test_cells_differ_from_the_first_in_one_thing():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 26
    for cell in CELLS:
        changed = sum(a != b for a, b in zip(cell[:-1], CELLS[0][:-1], strict=True))
        assert changed <= 1


def test_controls_are_fitted_once_where_scope_and_builder_do_not_touch_them():
    assert Cell().elsewhere == Cell(task="text", per="column", size=8).elsewhere == ()
    assert Cell(scope="sequence").elsewhere == Cell(builder="sc").elsewhere == ("scale", "lora")

"""The study's cells, table and picture, without a model."""

import pytest
from cases import tiny_llama

from benchmarks.calibration import CELLS, Cell, draw, examples, summary
from vps import Calibration, VPSConfig
from vps.calibration import fingerprint
from vps.patching import sharpened_layers


def row(cell, against, task, difference, verdict):
    return {
        "cell": cell, "against": against, "task": task, "n": 40, "base": 2.0,
        "value": 2.0 + difference, "difference": difference, "low": difference - 0.1,
        "high": difference + 0.1, "verdict": verdict,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    names = list(sharpened_layers(model))
    rows = [
        row(name, "plain", task, change, "better")
        for task, change in (("held-out examples", -0.5), ("other text", 0.25))
        for name in ("sharpening", "scale")
    ]
    report = {
        "forms": {
            "sharpening": {"numbers": 7, "step": 12, "learning_rate": 0.1},
            "scale": {"numbers": 7, "step": 8, "learning_rate": 0.02},
        },
        "comparisons": {
            "sharpening": rows[::2],
            "controls": rows[1::2],
            "against controls": [
                row("sharpening", "scale", "held-out examples", 0.125, "no difference")
            ],
        },
    }
    calibration = Calibration(
        VPSConfig(), "tiny", "LlamaForCausalLM", fingerprint(model), "0",
        dict.fromkeys(names, 0.5), report=report,
    )  # fmt: skip
    calibration.save(tmp_path / f"{Cell('arithmetic', 48, 'layer', 'token', 'sk', 0).name}.json")
    return tmp_path


def test_table_and_picture(folder):
    text = summary(folder)
    assert "| arithmetic-48-layer-token-sk-0 | plain | 0 | | | 2.000 |" in text
    assert "| sharpening | 7 | 0.1 | 12 | 1.500 | -0.500 [-0.600, -0.400] better | +0.250" in text
    assert "sharpening less output scale" in text and "+0.125 [+0.025, +0.225] no diff" in text
    draw(folder, folder / "x.png")
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


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

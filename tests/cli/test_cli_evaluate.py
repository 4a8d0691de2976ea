"""vps eval on a tiny random Llama and local JSONL tasks, and the table of its figures."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vps
from vps import VPSConfig
from vps.evaluation.comparison import table_rows
from vps.evaluation.harness import VARIANTS, Harness
from vps.evaluation.paired import Outcome
from vps.model.loading import load_model

ROOT = Path(__file__).parents[2]
SETTINGS = ["--set", "gamma=0.5", "--set", "scope=sequence"]
CONFIG = VPSConfig(gamma=0.5, adaptive_gamma=False)


@pytest.fixture(scope="module")
def folder(task_folder):
    return task_folder


@pytest.fixture
def common(folder):
    tasks = ("--include-path", folder, "--tasks", "local_choice,local_text")
    return ("eval", "--model", folder, *tasks)


def test_json_and_files(run, common, folder, tmp_path):
    out = tmp_path / "runs/x"
    code, text, err = run(
        *common, *SETTINGS, "--limit", 6, "--batch-size", 3, "--keep", 3, "--out", out, "--json"
    )
    assert (code, err) == (0, "")
    values = json.loads(text)
    model, own = load_model(str(folder))
    vps.patch(model, CONFIG)
    tasks = ["local_choice", "local_text"]
    harness = Harness(model, own, tasks, include_path=[folder], limit=6, batch_size=3)
    scores = {name: harness.run(variant=name) for name in values["variants"]}
    assert next(iter(scores)) == "baseline" and set(scores) == set(VARIANTS)
    for name, each in scores.items():
        assert values["variants"][name]["results"] == each.results
        assert values["variants"][name]["scopes"] == each.scopes
    rows = table_rows({name: each.outcomes for name, each in scores.items()})
    assert values["rows"] == json.loads(json.dumps(rows))
    assert VPSConfig.from_json(json.dumps(values["config"])) == CONFIG
    assert set(values["kept"]) == {"local_choice"}
    assert set(values["kept"]["local_choice"]) == set(VARIANTS) - {"baseline"}
    assert values["kept"]["local_choice"]["sharpened"]["kept"] == 3
    assert values["kept"]["local_choice"]["sharpened"]["order"] == "uncertain"
    assert json.loads((out / "scores.json").read_text()) == values
    lines = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    read = [(line.pop("variant"), Outcome(**line)) for line in lines]
    assert read == [(name, o) for name, each in scores.items() for o in each.outcomes]
    assert sorted(path.name for path in out.iterdir()) == ["outcomes.jsonl", "scores.json"]
    code, _, err = run(*common, "--out", out)
    assert code == 2 and f"--out {out}: holds outcomes.jsonl of another run" in err


def test_table(run, common):
    code, text, err = run(*common, *SETTINGS, "--limit", 5, "--keep", 2, "--keep-by", "hardest")
    assert (code, err) == (0, "")
    assert "local_choice, acc, 5 documents" in text and "local_text, nll, 5 documents" in text
    for variant in VARIANTS:
        assert len(re.findall(rf"^  {variant} +-?\d+\.\d{{4}}", text, re.MULTILINE)) == 3
    assert "ran: loglikelihood under scope token, loglikelihood_rolling under scope token" in text
    assert "local_choice, sharpened against the baseline:\n2 hardest of 5 documents" in text
    code, text, _ = run(
        *common, *SETTINGS, "--limit", 2, "--no-controls", "--tasks", "local_answer"
    )
    assert code == 0 and "sharpened" in text and "random" not in text
    assert "ran: generate_until under scope sequence" in text


def stand_in(path, name=None, **options):
    """A few rows of the form of ARC-Challenge or GSM8K, in place of the data set of that name."""
    datasets = pytest.importorskip("datasets")
    if path == "allenai/ai2_arc":
        assert name == "ARC-Challenge"
        rows = [
            {
                "id": f"q{i}",
                "question": f"What is {i} + {i}?",
                "choices": {"text": [str(2 * i + j) for j in range(4)], "label": labels},
                "answerKey": labels[i % 4],
            }
            for i, labels in enumerate([list("ABCD"), list("1234")] * 4)
        ]
    else:
        assert (path, name) == ("openai/gsm8k", "main")
        rows = [
            {"question": f"Tom has {i} + 3.", "answer": f"<<{i}+3>> So\n#### {i + 3}"}
            for i in range(8)
        ]
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
    )


def test_the_tasks_of_the_paper_run_by_name(run, folder, tmp_path, monkeypatch):
    """As lm-eval defines them, with rows of their form, and the paper's selection."""
    monkeypatch.setattr("datasets.load_dataset", stand_in)
    out = tmp_path / "paper"
    code, text, _ = run(
        "eval", "--model", folder, "--tasks", "arc_challenge,gsm8k", "--limit", 6,
        "--num-fewshot", 1, "--batch-size", 6, "--no-controls", *SETTINGS,
        "--keep", 3, "--keep-by", "uncertain", "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    values = json.loads(text)
    assert set(values["kept"]) == {"arc_challenge"}  # GSM8K has no options, so no margin
    kept = values["kept"]["arc_challenge"]["sharpened"]
    assert (kept["pool"], kept["kept"], kept["order"]) == (6, 3, "uncertain")
    assert kept["swap"]["interval"][0] <= kept["swap"]["mean"]
    lines = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    arc = [
        line for line in lines
        if (line["variant"], line["task"], line["metric"]) == ("baseline", "arc_challenge", "acc")
    ]  # fmt: skip
    assert len(arc) == 6 and all(line["value"] == (line["margin"] > 0) for line in arc)
    smallest = sorted(arc, key=lambda line: abs(line["margin"]))[:3]
    assert [tuple(each) for each in kept["documents"]] == [
        ("arc_challenge", line["document"]) for line in smallest
    ]
    metrics = {line["metric"] for line in lines if line["task"] == "gsm8k"}
    assert metrics == {"exact_match,strict-match", "exact_match,flexible-extract"}


def test_rows():
    def outcomes(*numbers):
        return [
            Outcome("t", str(i), metric, value, None, weight)
            for i, (metric, value, weight) in enumerate(numbers)
        ]

    both = {
        "baseline": outcomes(("acc", 1, 1), ("acc", 0, 1), ("nll", 2.0, 3), ("nll", 1.0, 1)),
        "sharpened": outcomes(("acc", 0, 1), ("acc", 1, 1), ("nll", 1.0, 3), ("nll", 1.0, 1)),
    }
    found = {(row["metric"], row["variant"]): row for row in table_rows(both)}
    assert found["acc", "sharpened"] == {
        "task": "t", "metric": "acc", "variant": "sharpened", "n": 2, "value": 0.5,
        "difference": 0.0, "gained": 1, "lost": 1,
    }  # fmt: skip
    assert found["nll", "baseline"]["value"] == 1.75
    assert math.isclose(found["nll", "sharpened"]["difference"], -0.75)
    assert found["nll", "sharpened"]["gained"] is None
    assert "difference" not in table_rows({"sharpened": both["sharpened"]})[0]
    both["sharpened"].pop()
    with pytest.raises(ValueError, match="'sharpened' and 'baseline' saw other .* 1 in common"):
        table_rows(both)
    both["baseline"].append(both["baseline"][0])
    with pytest.raises(ValueError, match="acc of document '0' of t comes twice"):
        table_rows(both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", " , "], "--tasks ' , ': expected names, separated by commas"),
        (["--num-fewshot", "-1"], "--num-fewshot -1: expected at least 0"),
        (["--include-path", "/nowhere"], "--include-path /nowhere: no such folder"),
        (["--limit", "3", "--keep", "4"], "--keep 4: local_choice has only 3 documents"),
        (["--tasks", "local_text", "--keep", "2"], "--keep 2: no task is multiple choice"),
        (["--model", "./nowhere"], "--model: no such model folder: ./nowhere"),
    ],
)
def test_mistakes_are_named(refuse, common, arguments, message):
    assert message in refuse(*common, *arguments)


def test_out_that_is_a_file(refuse, common, tmp_path):
    (tmp_path / "file").write_text("")
    err = refuse(*common, "--out", tmp_path / "file")
    assert f"--out {tmp_path / 'file'}: File exists" in err


def test_accelerate_gives_what_one_process_gives(run, folder, tmp_path):
    """Two processes, started as accelerate does by torchrun, share the documents."""
    arguments = ["eval", "--model", folder, "--include-path", folder, "--batch-size", 2,
                 "--tasks", "local_choice,local_answer", "--limit", 5, "--no-controls", *SETTINGS,
                 "--json", "--out"]  # fmt: skip
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "vps.cli"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments), str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # of one process alone
    code, text, _ = run(*arguments, tmp_path / "one")
    assert code == 0
    one = json.loads(text)
    assert set(one["variants"]) == set(two["variants"]) == {"baseline", "sharpened"}
    for name, variant in one["variants"].items():
        assert variant["scopes"] == two["variants"][name]["scopes"]
        for task, metrics in variant["results"].items():
            assert two["variants"][name]["results"][task] == pytest.approx(metrics)
    lines = [
        [json.loads(line) for line in (tmp_path / f"{which}/outcomes.jsonl").open()]
        for which in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) > 0
    for a, b in zip(*lines, strict=True):
        margins = a.pop("margin"), b.pop("margin")
        assert a == b and margins[0] == pytest.approx(margins[1], abs=1e-4)

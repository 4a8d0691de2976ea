"""vps refine on a tiny random Llama whose words are numbers: one prompt, and JSONL rows."""

import dataclasses
import importlib
import json

import pytest

import vps
from vps import VPSConfig
from vps.model.loading import load_model

REFINE = importlib.import_module("vps.refine")  # whose function hides it in vps
WEIGHTS = {"numeric": 1, "units": 0.5}  # as the fixture refine has them


def expected(folder, prompt, gold, **options):
    model, tokenizer = load_model(str(folder))
    vps.patch(model, options.pop("config", None))
    options = dict(max_new_tokens=5, weights=WEIGHTS) | options
    return json.loads(json.dumps(vps.refine(model, tokenizer, prompt, gold, **options).as_dict()))


def test_one_prompt(refine, folder, tmp_path):
    code, out, err = refine("--prompt", "1 2 3", "--gold", "60", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "") and result["used_labels"] is True and result["gold"] == "60"
    wanted = expected(folder, "1 2 3", "60")
    assert {name: result[name] for name in wanted} == wanted
    (tmp_path / "p.txt").write_text("1 2 3")
    code, out, _ = refine(
        "--prompt-file", tmp_path / "p.txt", "--gold", "60", "--iterations", 2,
        "--keep", "last", "--no-surrogate", "--set", "builder=sk", "--json",
    )  # fmt: skip
    wanted = expected(
        folder, "1 2 3", "60", iterations=2, keep="last", surrogate=False,
        config=VPSConfig(builder="sk"),
    )  # fmt: skip
    assert code == 0 and json.loads(out)["iterations"] == wanted["iterations"]
    assert json.loads(out)["chosen"] == 1


def test_text_says_whether_labels_were_used(refine, folder):
    code, out, _ = refine("--prompt", "1 2 3", "--gold", "60")
    wanted = expected(folder, "1 2 3", "60")
    assert code == 0 and "The gold answer was used" in out
    assert f"answer, of iteration {wanted['chosen']} (best):\n{wanted['answer']}\n" in out
    for entry in wanted["iterations"]:
        assert f"loss {entry['losses']['total']:.4g} (numeric" in out and entry["text"] in out
    assert "sc, ℋ" in out and "L-BFGS pairs" in out
    code, out, _ = refine("--prompt", "1 2 3")
    assert code == 0 and "No gold answer was used." in out and "iteration 1" not in out


def test_without_gold_by_samples(refine, folder):
    code, out, _ = refine("--prompt", "1 2 3", "--samples", 3, "--seed", 4, "--json")
    wanted = expected(folder, "1 2 3", None, samples=3, seed=4)
    result = json.loads(out)
    assert code == 0 and result["iterations"] == wanted["iterations"]
    assert result["used_labels"] is False and len(result["iterations"][2]["samples"]) == 3


ROWS = [
    {"prompt": "1 2 3", "gold": "60", "id": "first"},
    {"prompt": 5, "gold": "60"},
    {"prompt": "40 7"},
    {"question": "7"},
    {"prompt": "5 5 80", "gold": "12", "extra": [1]},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*lines[:3], "", "{cut", *lines[3:]]) + "\n")
    return path


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_rows_out(refine, folder, data, tmp_path):
    out = tmp_path / "out.jsonl"
    code, text, err = refine("--data", data, "--out", out)
    assert code == 1 and "3 refined, 3 failed, 0 skipped" in text and "gold answer was used" in text
    assert "3 of 6 rows failed" in err and err.count("\n") == 1
    found = records(out)
    assert [record["row"] for record in found] == [1, 2, 3, 5, 6, 7]
    assert [record["used_labels"] for record in found] == [True, False, False, False, False, True]
    assert [record.get("error") for record in found] == [
        None, "'prompt' must be a string, got int", None, "not a JSON object",
        "'prompt' must be a string, got nothing", None,
    ]  # fmt: skip
    assert found[0]["id"] == "first" and found[2]["id"] is None
    for record in (found[0], found[2], found[5]):
        wanted = expected(folder, record["prompt"], record["gold"])
        assert {name: record[name] for name in wanted} == wanted
        assert record["settings"]["config"] == json.loads(VPSConfig().to_json())


def test_a_run_is_continued(refine, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    refine("--data", data, "--out", out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    calls = []

    def counted(model, tokenizer, prompt, *arguments, **options):
        calls.append(prompt)
        return vps.refine(model, tokenizer, prompt, *arguments, **options)

    monkeypatch.setattr(REFINE, "refine", counted)
    for kept, cut, again in (
        (2, lines[2][:40], ["40 7", "5 5 80"]),
        (2, lines[2][:-1], ["5 5 80"]),  # whole, but for the end of its line
        (0, b'{"row', ["1 2 3", "40 7", "5 5 80"]),
        (5, lines[5][: lines[5].index(b"gold") + 9], ["5 5 80"]),
        (6, b"", []),
    ):
        calls.clear()
        out.write_bytes(b"".join(lines[:kept]) + cut)
        code, text, _ = refine("--data", data, "--out", out, "--json")
        assert calls == again
        assert out.read_bytes() == whole
        counts = json.loads(text)
        assert counts["refined"] == len(again) and counts["used_labels"] is True
        assert counts["refined"] + counts["failed"] + counts["skipped"] == 6


def test_an_output_of_an_earlier_version_is_continued(refine, data, tmp_path):
    """Which wrote out what a config was not given."""
    out = tmp_path / "out.jsonl"
    refine("--data", data, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        row["settings"]["config"] = dataclasses.asdict(VPSConfig())
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows[:4])
    out.write_text(text)
    code, _, _ = refine("--data", data, "--out", out)
    assert out.read_text().startswith(text) and len(out.read_text().splitlines()) == len(rows)


def test_an_output_of_another_run_is_refused(refine, data, tmp_path):
    out = tmp_path / "out.jsonl"
    refine("--data", data, "--out", out)
    whole = out.read_bytes()
    for arguments, message in (
        (("--iterations", 2), "iterations 3, not 2"),
        (("--set", "gamma=0.1"), "made with config"),
        (("--seed", 7), "seed 0, not 7"),
    ):
        code, _, err = refine("--data", data, "--out", out, *arguments)
        assert code == 2 and message in err and "--out" in err
    data.write_text(data.read_text().replace("1 2 3", "1 2 4"))
    code, _, err = refine("--data", data, "--out", out)
    assert code == 2 and "line 1 is not of a row of this input" in err
    assert out.read_bytes() == whole
    out.write_bytes(b"junk\n" + whole)
    code, _, err = refine("--data", data, "--out", out)
    assert code == 2 and "line 1 is no JSON object" in err


def test_a_failing_row_does_not_end_the_others(refine, data, tmp_path, monkeypatch):

    def failing(model, tokenizer, prompt, *arguments, **options):
        if prompt == "40 7":
            raise MemoryError("no room\nat all")
        return vps.refine(model, tokenizer, prompt, *arguments, **options)

    monkeypatch.setattr(REFINE, "refine", failing)
    out = tmp_path / "out.jsonl"
    assert refine("--data", data, "--out", out)[0] == 1
    found = records(out)
    assert found[2]["error"] == "MemoryError: no room at all" and len(found) == 6
    assert "error" not in found[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{data}"), "--data: needs --out"),
        (("--data", "missing.jsonl", "--out", "o"), "missing.jsonl"),
        (("--data", "{data}", "--out", "o", "--gold", "1"), "--gold: not with --data"),
        (("--data", "{empty}", "--out", "o"), "holds no row"),
        (("--data", "{data}", "--out", "{missing}/o.jsonl"), "--out: "),
        (("--prompt", "1", "--out", "o"), "--out: only with --data"),
        (("--prompt", "1", "--gold", " "), "--gold: expected an answer"),
        (("--prompt", "1", "--samples", "1"), "--samples 1: expected 0 or at least 2"),
        (("--prompt", "1", "--weights", '{"numbers": 1}'), "no part is named 'numbers'"),
        (("--prompt", "1", "--weights", "{"), "--weights {"),
        (("--prompt", " "), "the prompt is empty"),
    ],
)
def test_bad_usage(refuse, folder, data, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n\n")
    places = {"data": data, "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    given = [
        a.format(**places) if a[0] != "{" or "}" in a and ":" not in a else a for a in arguments
    ]
    assert message in refuse("refine", "--model", folder, *given)
    assert not (tmp_path / "o").exists()

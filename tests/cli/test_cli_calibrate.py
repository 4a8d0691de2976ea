"""vps calibrate and the --calibration of other commands, on a tiny random Llama."""

import json

import pytest
from cli_cases import FAST, rows, write

import vps
from vps import Calibration
from vps.model.generation import encode, generate
from vps.model.loading import load_model


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    """A calibration of few layers that moves the output whether or not it helps."""
    path = tmp_path_factory.mktemp("calibration") / "cal.json"
    model, tokenizer = load_model(str(folder))
    with pytest.warns(UserWarning, match="was not measured"):
        made = vps.calibrate(
            model, tokenizer, rows(12), held_out=[], controls=False,
            options=vps.fitting.Options(steps=4, batch_size=4, learning_rates=(0.1,)),
        )  # fmt: skip
    gamma = {name: 0.5 if "up_proj" in name else -0.5 for name in made.gamma}
    Calibration(**(vars(made) | {"gamma": gamma, "found": True})).save(path)
    return path


def test_calibrate(run, folder, tmp_path):
    data = write(tmp_path / "train.jsonl", rows(16))
    held = write(tmp_path / "test.jsonl", rows(8, seed=1))
    out = tmp_path / "cal.json"
    code, text, err = run(
        "calibrate", "--model", folder, "--data", data, "--out", out, "--held-out", held,
        "--no-controls", *FAST,
    )  # fmt: skip
    assert code == 0 and "held-out examples, nll per token in nats, 8 examples" in text
    made = Calibration.load(out)
    assert len(made.gamma) == 14 and made.report["examples"] == {
        "fit": 12, "stop": 4, "held_out": 8,
    }  # fmt: skip
    form = made.report["forms"]["sharpening"]
    last = form["step"] == made.report["options"]["steps"]
    assert (
        "Lowest at the last step, so more may lower it: sharpening, calibrated." in text
    ) == last
    assert "No controls" in text and ("nothing was found" in err) == (made.found is False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cal.json", "test.jsonl", "train.jsonl",
    ]  # fmt: skip


def test_gradient_only(run, folder, tmp_path):
    data = write(tmp_path / "train.jsonl", [{"text": row["prompt"]} for row in rows(4)])
    out = tmp_path / "gradient.json"
    code, text, err = run(
        "calibrate", "--model", folder, "--data", data, "--out", out, "--gradient-only"
    )
    assert (code, err) == (0, "")
    values = json.loads(out.read_text())
    assert len(values["layers"]) == 14 and values["layers"][0]["name"] in text
    sizes = [abs(layer["gradient"]) for layer in values["layers"]]
    assert sizes == sorted(sizes)[::-1]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_examples_that_cannot_be_used(run, folder, tmp_path):
    """The command goes on without them and says so, in words and in the file."""
    data = write(tmp_path / "train.jsonl", [{"text": "1"}, *rows(8), {"text": "2"}])
    common = ("calibrate", "--model", folder, "--data", data, *FAST)
    said = "vps: warning: 2 of 10 examples cannot be used and are left out: examples, number 1: "
    code, text, err = run(*common, "--out", tmp_path / "cal.json", "--no-controls")
    assert code == 0 and said in err and "Left out, since they cannot be used" in text
    assert len(Calibration.load(tmp_path / "cal.json").report["left_out"]) == 2
    code, _, err = run(*common, "--out", tmp_path / "gradient.json", "--gradient-only")
    values = json.loads((tmp_path / "gradient.json").read_text())
    assert code == 0 and said in err and values["examples"] == 8
    assert [each["number"] for each in values["left_out"]] == [1, 10]
    write(data, [{"text": "1"}] * 8)
    for more in ((), ("--gradient-only",)):
        code, _, err = run(*common, "--out", tmp_path / "none.json", *more)
        assert code == 1 and "8 of 8 examples cannot be used" in err and err.count("\n") == 1
    assert not (tmp_path / "none.json").exists()


def test_generate_with_a_calibration(run, refuse, folder, calibrated, tmp_path):
    common = ("generate", "--model", folder, "--prompt", "1 2 3", "--max-new-tokens", 12)
    code, out, err = run(*common, "--json", "--compare", "--calibration", calibrated)
    assert (code, err) == (0, "")
    result = json.loads(out)
    model, tokenizer = load_model(str(folder))
    Calibration.load(calibrated).apply(model)
    own = generate(model, tokenizer, encode(tokenizer, "1 2 3"), 12)
    assert result["sharpened"]["tokens"] == own.tokens
    assert result["calibration"] == str(calibrated)
    values = json.loads(calibrated.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values | {"weights": "0" * 64}))
    for arguments, message in (
        (("--calibration", calibrated, "--set", "rank=3"), "rank is 3, expected 2"),
        (("--calibration", other), "refused: weights are of version"),
        (("--calibration", tmp_path / "none.json"), "No such file"),
        (("--calibration", folder / "config.json"), "format"),
    ):
        assert message in refuse(*common, *arguments)
    other.write_text(json.dumps(values | {"found": False}))
    code, _, err = run(*common, "--calibration", other)
    assert code == 0 and "no improvement" in err


def test_refine_with_a_calibration(run, refuse, folder, calibrated, tmp_path):
    code, out, err = run(
        "refine", "--model", folder, "--prompt", "1 2 3", "--gold", "7", "--json",
        "--max-new-tokens", 6, "--iterations", 2, "--calibration", calibrated,
    )  # fmt: skip
    assert (code, err) == (0, "")
    iterations = json.loads(out)["iterations"]
    assert iterations[1]["gamma"] == pytest.approx((2 * 0.5 - 12 * 0.5) / 14)
    data = write(tmp_path / "in.jsonl", [{"prompt": "1 2", "gold": "7"}])
    common = (
        "refine", "--model", folder, "--data", data, "--out", tmp_path / "out.jsonl",
        "--max-new-tokens", 4, "--iterations", 2,
    )  # fmt: skip
    assert run(*common, "--calibration", calibrated)[0] == 0
    # An output with γ does not go on without.
    assert "was made with calibration" in refuse(*common)


def test_bad_usage(run, refuse, folder, tmp_path):
    data = write(tmp_path / "train.jsonl", rows(8))
    common = ("calibrate", "--model", folder)
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    for arguments, message in (
        (("--data", tmp_path / "none", "--out", tmp_path / "c"), "No such file"),
        (("--data", bad, "--out", tmp_path / "c"), "line 1: expected 'prompt' and 'answer'"),
        (("--data", tmp_path / "empty.jsonl", "--out", tmp_path / "c"), "holds no example"),
        (("--data", data, "--out", tmp_path / "no" / "c"), "a folder that exists"),
        (("--data", data, "--out", tmp_path / "c", "--learning-rate", "x"), "--learning-rate x"),
        (("--data", data, "--out", tmp_path / "c", "--learning-rate", "-1"), "--learning-rate"),
        (
            ("--data", data, "--out", tmp_path / "c", "--layers", "a", "--top-layers", 2),
            "not allowed",
        ),
    ):
        assert message in refuse(*common, *arguments)
    code, _, err = run(*common, "--data", data, "--held-out", data, "--out", tmp_path / "c", *FAST)
    assert code == 1 and "were used for fitting or stopping" in err
    assert not (tmp_path / "c").exists()


def test_eval_refuses_documents_that_were_fitted(run, refuse, folder, calibrated, tmp_path):
    pytest.importorskip("lm_eval")
    from vps.evaluation import tasks
    from vps.fitting import Example

    document = tasks.documents("arithmetic", 4)[3]
    used = Example(document["question"], document["answer"]).identity
    values = json.loads(calibrated.read_text()) | {"examples": [used]}
    (tmp_path / "cal.json").write_text(json.dumps(values))
    common = (
        "eval", "--model", folder, "--tasks", "vps_arithmetic_choice", "--no-controls", "--json",
        "--calibration", tmp_path / "cal.json",
    )  # fmt: skip
    code, out, err = run(*common, "--limit", 3)
    assert code == 0 and json.loads(out)["calibration"] == str(tmp_path / "cal.json"), err
    assert "fitted or stopped by" in refuse(*common, "--limit", 4)

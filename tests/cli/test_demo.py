"""The demo's comparison, statistics, heat maps and report, on a tiny random Llama."""

import json
import math
import re
import sys

import pytest
import torch
from tiny import number_llama

from vps import (
    Calibration,
    Iteration,
    RefineResult,
    VPSConfig,
    clear_calibration,
    cli,
    disabled,
    patch,
    set_config,
)
from vps.cli.demo import calibrated, comparison, heatmap
from vps.cli.demo.comparison import (
    CONFIG,
    Answer,
    DemoRun,
    compare,
    run_demo,
    write_report,
)
from vps.fitting import Example, check_apart
from vps.model.calibration import fingerprint
from vps.model.generation import Generation, changed_choices, encode, first_difference
from vps.model.patching import sharpened_layers
from vps.model.statistics import measure
from vps.verify import Losses


@pytest.fixture
def model():
    model = number_llama()
    patch(model, CONFIG)
    return model


def test_comparison_and_report(model, tokenizer, tmp_path):
    messages = []
    run = compare(model, tokenizer, tmp_path / "out", 6, messages.append)
    assert len(run.answers) == 3 and len(messages) == 5
    for answer in run.answers:
        assert answer.first_difference == first_difference(
            answer.plain.tokens, answer.sharpened.tokens
        )
    for rate, kind in ((run.plain_rate, "plain"), (run.sharpened_rate, "sharpened")):
        answers = [getattr(answer, kind) for answer in run.answers]
        total = sum(len(g.tokens) for g in answers) / sum(g.seconds for g in answers)
        assert math.isclose(rate, total)
    assert all(layer.config == CONFIG for layer in sharpened_layers(model).values())
    page = run.report.read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert (
        f"{run.changed:.1%}" in page and f"{run.plain_rate / run.sharpened_rate:.2f} times" in page
    )
    iterations = run.refined.iterations
    assert len(iterations) == 3 and run.refined.used_labels
    for entry in iterations:
        assert f"total {entry.losses.total:.4g}\n" in page and entry.text in page
    assert (tmp_path / "out/heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_changed_choices_are_those_of_the_greedy_steps(model, tokenizer):
    set_config(model, VPSConfig(scope="token", gamma=0.5, adaptive_gamma=False))
    inputs = encode(tokenizer, "1 2 3")
    ids = inputs["input_ids"]
    shares = []
    for text in torch.randint(4, 96, (12, 8)).tolist():  # several: one share may agree by chance
        changed = 0
        for n in range(len(text)):
            so_far = torch.cat([ids, torch.tensor([text[:n]], dtype=ids.dtype)], dim=1)
            with torch.inference_mode():
                sharpened = model(so_far).logits[0, -1].argmax()
                with disabled(model):
                    changed += int(model(so_far).logits[0, -1].argmax() != sharpened)
        shares.append(changed / len(text))
        assert changed_choices(model, inputs, text) == shares[-1]
    assert len(set(shares)) > 2
    set_config(model, VPSConfig(gamma=0, adaptive_gamma=False))
    assert changed_choices(model, inputs, text) == 0


@torch.inference_mode()
def test_statistics_are_those_of_the_layers(model, tokenizer):
    inputs = encode(tokenizer, "1 2 3 4")
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (m, x[0], y)}))
        for name, layer in sharpened_layers(model).items()
    ]
    statistics = measure(model, inputs)
    for handle in handles:
        handle.remove()
    assert [entry.name for entry in statistics] == list(seen) and len(statistics) == 14
    for entry in statistics:
        layer, x, y = seen[entry.name]
        H = x @ layer.weight.T
        together = torch.cat([x @ one.weight.T for one in layer.deciding()], dim=-1)
        assert math.isclose(entry.energy, float((together**2).mean()), rel_tol=1e-4)
        sigma = 1 - math.exp(-entry.energy)
        assert math.isclose(entry.gamma, 0.3 + 0.5 * sigma, rel_tol=1e-6)
        assert entry.rank == min(4, 1 + math.floor(3 * sigma + 2**-20))
        assert math.isclose(entry.relative_size, float((y - H).norm() / H.norm()), rel_tol=1e-3)
    assert not any(layer._forward_hooks for layer in sharpened_layers(model).values())


def test_columns_tell_the_layers_of_a_block_apart():
    llama = ["m.0.attn.q_proj", "m.0.mlp.up_proj", "m.1.attn.q_proj", "m.1.mlp.up_proj"]
    assert heatmap.column_names(llama) == ["q_proj", "up_proj"] * 2
    gpt2 = ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
    assert heatmap.column_names(gpt2) == ["attn.c_proj", "mlp.c_proj"]
    assert heatmap.column_names(["lm_head"]) == ["lm_head"]
    assert heatmap.column_names(["a.0.x", "a.0.x"]) == ["x", "x"]


def test_heat_maps_take_what_a_model_may_give(tmp_path):
    entries = [
        heatmap.LayerStatistics("m.0.q_proj", 0.0, 0.3, 1, 0.0, 0.0),
        heatmap.LayerStatistics("m.5.k_proj", 1.0, 0.8, 4, 1e9, math.nan),
    ]
    for number in (1, 2):
        heatmap.draw(entries[:number], tmp_path / "map.png")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_the_model_is_escaped_and_its_difference_marked(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG")
    hostile = "<script>alert(1)</script>"
    answer = Answer(
        "<b>why</b>",
        Generation(f"same {hostile}", [1, 2], 1.0),
        Generation("same & other", [1, 3], 2.0),
        1,
        hostile,
        "& other",
    )
    losses = Losses({"numeric": 4.0}, 4.0)
    first = Iteration(0, f"<i>how</i> {hostile}", 2, losses)
    refined = RefineResult(hostile, 0, "best", True, (first,))
    run = DemoRun([answer], 2.0, 1.0, 0.25, [], 7, refined, VPSConfig(), tmp_path / "report.html")
    write_report(run, picture)
    page = run.report.read_text()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert "total 4\nnumeric 4" in page
    assert "same <mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in page
    assert "same <mark>&amp; other</mark>" in page and "They part at token 2." in page
    assert "25.0% of 2" in page and re.search(r"\b2\.00 times", page)
    monkeypatch.setattr(comparison, "run_demo", lambda *_: run)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "refined, gold answer 7" in said and "loss 4" in said and str(run.report) in said


def test_demo_without_a_model_or_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected config.json or one .gguf file"):
        run_demo(tmp_path, tmp_path / "out", 4, lambda message: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"vps-kernels\[plots\]"):
        heatmap.draw([], tmp_path / "map.png")


def test_problems_are_answered_by_the_calibrated_model(model, tokenizer, tmp_path):
    layers = sharpened_layers(model)
    made = {
        "config": CONFIG, "model": "tiny", "architecture": "LlamaForCausalLM", "data": "0",
        "gamma": dict.fromkeys(layers, -0.5), "weights": fingerprint(model),
    }  # fmt: skip
    messages = []
    run = compare(model, tokenizer, tmp_path, 4, messages.append, Calibration(**made))
    assert messages[-1] == "held-out problems, calibrated"
    problems = run.calibrated.problems
    assert len(problems) == 10 and all(layer.gamma is None for layer in layers.values())
    first = problems[0]
    inputs = encode(tokenizer, first.question)
    Calibration(**made).apply(model)
    assert first.calibrated == calibrated.generate(model, tokenizer, inputs, 24).text
    with disabled(model):
        assert first.plain == calibrated.generate(model, tokenizer, inputs, 24).text
    page = run.report.read_text()
    assert str(run.calibrated) in page and "Calibrated" in page
    clear_calibration(model)
    other = Calibration(**(made | {"weights": "1"}))
    assert "refused: weights" in str(calibrated.solve(model, tokenizer, other))
    used = [Example(p["prompt"], p["answer"]) for p in json.loads(calibrated.PROBLEMS.read_text())]
    with pytest.raises(ValueError, match="1 of 10 held-out examples were used"):
        seen = Calibration(**made, examples=(used[4].identity,))
        calibrated.solve(model, tokenizer, seen)


def test_the_shipped_calibration_fits_the_demo():
    shipped = Calibration.load(calibrated.CALIBRATION)
    assert shipped.config == CONFIG and shipped.found and len(shipped.gamma) == 210
    given = json.loads(calibrated.PROBLEMS.read_text())
    assert len(given) == 10
    check_apart([Example(p["prompt"], p["answer"]) for p in given], shipped.examples)

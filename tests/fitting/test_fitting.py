"""Fitting γ: its gradient against finite differences, the descent, the split, the verdict."""

import itertools
import math
import random
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from fitting_cases import WORDS, every, learner, nll, pairs, texts

from vps import Calibration, VPSConfig, calibrate, disabled, fitting, patch, sensitivity, unpatch
from vps.fitting import Example, Options, descent
from vps.fitting.candidates import Sharpening
from vps.fitting.descent import fit, gradients, mean_nll
from vps.fitting.examples import check_apart, parse, read_examples, split
from vps.fitting.fitted_controls import Scale, frequent_features, lora, random_features
from vps.fitting.sensitivity import prepared
from vps.model.calibration import columns_of
from vps.model.patching import sharpened_layers

QUICK = Options(steps=8, batch_size=4, every=4, learning_rates=(0.1,))


def test_calibrate_improves_what_can_be_improved(tokenizer, tmp_path):
    model = learner(times=6)
    bits = {name: p.clone() for name, p in model.state_dict().items()}
    model.model.embed_tokens.weight.requires_grad_(False)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = calibrate(
            model, tokenizer, pairs(24), held_out=pairs(12, seed=9), other_texts=texts(4, seed=5),
            options=QUICK, chat=False, controls=["scale", "random-2", "static", "lora"],
            progress=lambda message, total: said.append(message),
        )  # fmt: skip
    assert not sharpened_layers(model) and model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad
    assert all(torch.equal(p, bits[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert found.found is True and any(value < 0 for value in found.gamma.values())
    forms = found.report["forms"]
    assert list(forms) == ["plain", "sharpening", "scale", "random-2", "static", "lora"]
    assert {forms[name]["numbers"] for name in list(forms)[1:]} == {14}
    assert "fitting: sharpening" in said and "measuring: lora" in said
    page = fitting.text(found)
    for name in ("plain output scale", "random features, draw 2", "static features", "LoRA"):
        assert name in page
    assert "Held-out examples improve." in page
    found.save(tmp_path / "cal.json")
    assert Calibration.load(tmp_path / "cal.json") == found

    # The report's figures are those of the calibrated model.
    found.apply(model)
    layers = sharpened_layers(model).values()
    for layer in layers:
        layer.config = layer.config.replace(scope="token")
    held = every(tokenizer, pairs(12, seed=9))
    tokens = sum(each.scored for each in held)
    with torch.no_grad():
        after = sum(float(nll(model, each)) for each in held) / tokens
        with disabled(model):
            plain = sum(float(nll(model, each)) for each in held) / tokens
    row = found.report["comparisons"]["sharpening"][0]
    assert abs(row["base"] - plain) < 1e-4 and abs(row["value"] - after) < 1e-4
    assert row["verdict"] == "better" and row["n"] == 12


def test_random_labels_find_nothing(tokenizer):
    """A model that knows nothing, and labels that say nothing: no change helps on others."""
    model = learner(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    rng = random.Random(0)
    labels = [(text, f"{rng.randrange(WORDS)} {rng.randrange(WORDS)}") for text in texts(60)]
    with pytest.warns(UserWarning, match="nothing was found"):
        found = calibrate(
            model, tokenizer, labels[:30], held_out=labels[30:], options=QUICK, chat=False,
            controls=False,
        )  # fmt: skip
    assert found.found is False
    rows = found.report["comparisons"]["sharpening"]
    assert all(row["verdict"] != "better" for row in rows if row["task"] == "held-out examples")
    assert "Nothing was found" in fitting.text(found) and "No controls" in fitting.text(found)
    with pytest.warns(UserWarning, match="no improvement"):
        found.apply(model)


@pytest.mark.filterwarnings("ignore:vps.calibrate")
def test_the_seed_decides(tokenizer):
    def run(seed):
        return calibrate(
            learner(), tokenizer, pairs(12), held_out=[], controls=False, chat=False, seed=seed,
            options=Options(steps=4, batch_size=3, every=2, seed=seed),
        )  # fmt: skip

    one, two, other = run(0), run(0), run(1)
    assert one.gamma == two.gamma and one.data == two.data
    assert one.gamma != other.gamma and one.found is None


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:vps.calibrate")
@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_run_goes_on(tokenizer, tmp_path, after):
    options = Options(steps=4, batch_size=2, every=2, learning_rates=(0.05, 0.1), patience=9)

    def run(path, count=None, seed=0):
        looks = itertools.count()

        def advance():
            if next(looks) == count:
                raise Interrupted

        return calibrate(
            learner(), tokenizer, pairs(12, seed), held_out=[], controls=["scale"], chat=False,
            options=options, resume=path, advance=advance,
        )  # fmt: skip

    path = tmp_path / "cal.json.partial"
    whole = run(None)
    with pytest.raises(Interrupted):
        run(path, after)
    assert path.exists()
    with pytest.raises(ValueError, match="with other data"):
        run(path, seed=4)
    again = run(path)
    assert again.gamma == whole.gamma and not path.exists()
    for name in ("sharpening", "scale"):
        one, two = whole.report["forms"][name], again.report["forms"][name]
        assert one["curves"] == two["curves"] and one["steps"] == two["steps"]


def test_gradients_without_fitting(tokenizer):
    model = learner()
    patch(model)
    found = sensitivity(model, tokenizer, pairs(8), chat=False)
    assert len(found) == 14 and not any(layer.gamma for layer in sharpened_layers(model).values())
    assert [abs(e.gradient) for e in found] == sorted(abs(e.gradient) for e in found)[::-1]
    examples = every(tokenizer, pairs(8))
    with prepared(model, None, "token"):
        form = Sharpening(model, list(sharpened_layers(model)), False)
        table = torch.stack([g[0] for g in gradients(model, form, examples)])
    for each in found:
        own = table[:, form.names.index(each.name)]
        assert math.isclose(each.gradient, float(own.mean()), rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(each.error, float(own.std() / 8**0.5), rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(each.halves[1], float(own[1::2].mean()), rel_tol=1e-6, abs_tol=1e-12)
    assert -1 <= fitting.agreement(found) <= 1


@pytest.mark.filterwarnings("ignore:vps.calibrate")
def test_layers_that_are_not_chosen_stay_plain(tokenizer):
    model = learner(times=6)
    options = Options(steps=2, batch_size=6, every=2, learning_rates=(0.1,))
    common = dict(held_out=[], controls=False, chat=False, options=options)
    found = calibrate(model, tokenizer, pairs(8), layers=["q_proj", "up_proj"], **common)
    top = calibrate(model, tokenizer, pairs(8), layers=3, **common)
    stepped = [found.report["forms"]["sharpening"]["step"] for found in (found, top)]
    assert all(stepped), "the data of this test were expected to be fitted"
    assert {n for n, v in found.gamma.items() if v} == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert sum(value != 0 for value in top.gamma.values()) == 3
    found.apply(model)
    x = torch.randn(1, 3, 16)
    layer = model.model.layers[0].mlp.gate_proj
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    with pytest.raises(ValueError, match="none of the model's 14 sharpened layers"):
        calibrate(model, tokenizer, pairs(8), layers=["nothing"], held_out=[], chat=False)


def test_controls_are_what_they_say(tokenizer):
    """LoRA computes what PEFT does, to the bit."""
    model = learner()
    patch(model)
    examples = every(tokenizer, pairs(4))
    names = list(sharpened_layers(model))
    with prepared(model, None, "token"):
        for by_column in (False, True):
            scale = Scale(model, names, by_column)
            scale.set_state([[0.25] * scale.count])
            layer = scale.layers[names[0]]
            x = torch.randn(1, 3, 16)
            with scale.applied():
                torch.testing.assert_close(layer(x), 1.25 * F.linear(x, layer.weight))
        form = Sharpening(model, names, False)
        drawn = [random_features(form, seed) for seed in (0, 0, 1)]
        for name in names:
            assert all(torch.equal(*p) for p in zip(drawn[0][name], drawn[1][name], strict=True))
        assert any(not torch.equal(drawn[0][n][0], drawn[2][n][0]) for n in names)
        with torch.no_grad(), form.counting() as counts, form.applied():
            for example in examples:
                nll(model, example)
        static = frequent_features(form, counts)
        tokens = sum(each.ids.shape[1] for each in examples)
        for name in names:
            r = columns_of(form.layers[name])
            for count, index in zip(counts[name], static[name], strict=True):
                assert int(count.sum()) == r * tokens
                assert count[index].tolist() == sorted(count.tolist())[::-1][:r]
        adapter = lora(model, names, 14, examples, 0)
        assert adapter.count == 14 == sum(int(mask.sum()) for mask in adapter.masks)
        before = mean_nll(model, adapter, examples)
        done = fit(model, adapter, examples, examples, QUICK, before)
        assert done.loss < before == done.plain
        moved = sum(int((B != 0).sum()) for _, B in adapter.factors.values())
        assert 0 < moved <= 14
        with torch.no_grad(), adapter.applied():
            found = model(examples[0].ids).logits
    unpatch(model)
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(adapter.factors))
    tuned = peft.tuners.lora.LoraModel(model, {"own": config}, "own").eval()
    for name, (A, B) in adapter.factors.items():
        own = model.get_submodule(name)
        own.lora_A["own"].weight.data, own.lora_B["own"].weight.data = A, B
    assert torch.equal(tuned(examples[0].ids).logits, found)


def test_columns_of_a_coupled_query():
    """Its update has no more columns than that of its key."""
    model = learner(heads=8)
    patch(model, VPSConfig(rank_bounds=(1, 4)))
    layers = sharpened_layers(model)
    assert columns_of(layers["model.layers.0.self_attn.q_proj"]) == 2
    assert columns_of(layers["model.layers.0.mlp.up_proj"]) == 4


def test_examples(tmp_path):
    same = [{"prompt": "a", "answer": "b"}, ("a", "b"), {"prompt": "a", "gold": "b", "id": 3}]
    assert len({parse(each) for each in same}) == 1
    assert parse({"text": "a"}) == parse("a") != parse(("a", "a"))
    assert Example("a", " b").identity == Example(" a", "b").identity
    assert Example("a", "b").identity != Example(None, "ab").identity
    for bad in (
        {"prompt": "a"}, {"prompt": "a", "answer": "b", "gold": "b"}, {"answer": "b"},
        {"prompt": "a", "answer": 3}, {"text": ""}, {"text": "a", "prompt": "b"}, ("a",), 3,
        {"prompt": "a", "answer": "b", "label": "c"},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="line 7"):
            parse(bad, "line 7")
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n{"prompt": "p", "answer": "b"}\n')
    assert read_examples(path) == [Example(None, "a"), Example("p", "b")]
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_examples(path)


def test_split_keeps_apart():
    examples = [parse(text) for text in texts(40)]
    for seed in range(3):
        parts = split(examples + examples[:7], None, seed)
        groups = [{each.identity for each in part} for part in vars(parts).values()]
        assert [len(group) for group in groups] == [20, 10, 10]
        assert len(set().union(*groups)) == 40
        assert parts == split(examples + examples[:7], None, seed)
    assert split(examples, None, 0).data != split(examples, None, 1).data
    with pytest.raises(ValueError, match="1 of 2 held-out examples were used"):
        split(examples, [examples[3], parse("other")], 0)
    with pytest.raises(ValueError, match="at least 4 different examples, got 1"):
        split(examples[:1] * 9, None, 0)
    with pytest.raises(ValueError, match="held-out"):
        check_apart(examples[:2], [examples[1].identity])


def test_bad_arguments(tokenizer):
    model = learner()
    for change, message in (
        ({"per": "head"}, "per"),
        ({"controls": ["magic"]}, "controls"),
        ({"layers": 99}, "layers"),
        ({"scope": "all"}, "scope"),
        ({"longest": 4}, "at most 4"),
        ({"held_out": [pairs(8)[1]]}, "were used for fitting or stopping"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, tokenizer, pairs(8), chat=False, **change)
        assert not sharpened_layers(model)
    for wrong in (None, "What is 2 + 2?", {"text": "4"}):
        with pytest.raises(TypeError, match="calibrate: examples must be a list .* got"):
            calibrate(model, tokenizer, wrong, chat=False)
    for change in ({"steps": 0}, {"learning_rates": ()}, {"learning_rates": (-1.0,)}):
        with pytest.raises(ValueError, match="calibrate: "):
            Options(**change)
    patch(model)
    with pytest.raises(ValueError, match="another config"):
        calibrate(model, tokenizer, pairs(8), config=VPSConfig(rank=3), chat=False)


def test_batches_go_through_all_examples():
    options = Options(batch_size=3, seed=5)
    rounds = [
        [each for step in steps for each in descent._batch(range(8), step, options)]
        for steps in (range(3), range(3, 6))
    ]
    assert [sorted(each) for each in rounds] == [list(range(8))] * 2 and rounds[0] != rounds[1]

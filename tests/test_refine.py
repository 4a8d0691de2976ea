"""The refinement loop on a tiny random Llama that speaks in numbers."""

import gc
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import number_llama, tiny

import vps
from vps import EntropyProcessor, VPSConfig, disabled, policy_state, refine, token_entropy
from vps.algorithm.lbfgs import CurvatureMemory
from vps.model.patching import sharpened_layers
from vps.model.statistics import measure
from vps.verify import CompositeVerifier

NUMERIC = {"numeric": 1.0}
PROMPTS = ("1 2 3", "40 7", "5 5 5 5 80")
GOLD = "3 14 15 9 2 6 5 35 8 97"


def talker(**settings):
    model = number_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # an entropy that leaves σ below 1
    vps.patch(model, VPSConfig(**settings))
    return model


def run(model, tokenizer, prompt=PROMPTS[0], gold=GOLD, **options):
    options = dict(weights=NUMERIC, max_new_tokens=6) | options
    return refine(model, tokenizer, prompt, gold, **options)


def everything(model):
    """All that a refinement must leave as it was; tensors by bits."""
    state = policy_state(model)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [{k: v for k, v in vars(layer).items() if k in ("config", "state", "gradient", "memory")}
         for layer in sharpened_layers(model).values()],
        (state.entropy, state.outcomes),
        (torch.get_rng_state(), torch.is_grad_enabled(), len(vps.masking.STATE.layouts)),
    )  # fmt: skip


def assert_unchanged(before, after):
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items())
    assert before[1:-1] == after[1:-1]
    assert torch.equal(before[-1][0], after[-1][0]) and before[-1][1:] == after[-1][1:]


def retain(outputs, layer, args, y):
    y.retain_grad()
    outputs.append(y)


def by_hand(model, tokenizer, prompt, gold, iterations, new_tokens):
    """SPEC §10 step by step: texts, losses, entropies and surrogate losses."""
    state, layers = policy_state(model), list(sharpened_layers(model).values())
    verifier = CompositeVerifier(NUMERIC)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs.input_ids.shape[1]

    def answer(**options):
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
                max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
        return tokenizer.decode(out[0, length:], skip_special_tokens=True)

    with disabled(model):
        texts = [answer()]
    losses = [verifier(texts[0], gold).total]
    memories = [CurvatureMemory() for _ in layers]
    entropies, surrogates = [], []
    for _ in range(1, iterations):
        state.set_entropy(None)
        with torch.no_grad():
            entropies.append(float(token_entropy(model(inputs.input_ids).logits[0, -1])))
        state.set_entropy(entropies[-1])

        outputs = []
        handles = [layer.register_forward_hook(partial(retain, outputs)) for layer in layers]
        tail = tokenizer(gold, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([inputs.input_ids, tail], 1)
        logp = model(ids).logits[0].log_softmax(-1)
        positions = range(ids.shape[1] - min(8, tail.shape[1]), ids.shape[1])
        loss = -sum(logp[p - 1, ids[0, p]] for p in positions) / len(positions)
        surrogates.append(float(loss.detach()))
        loss.backward()
        for handle in handles:
            handle.remove()
        for layer, memory, y in zip(layers, memories, outputs, strict=True):
            memory.record(y[0].mean(0), y.grad[0].mean(0))
            layer.gradient, layer.memory = True, memory
        model.zero_grad()

        texts.append(answer(logits_processor=[EntropyProcessor(model)]))
        losses.append(verifier(texts[-1], gold).total)
        state.record(losses[-1] < losses[-2])
        for layer in layers:
            layer.gradient = False
    return texts, losses, entropies, surrogates


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_loop_is_that_of_the_specification(tokenizer, prompt):
    result = run(talker(), tokenizer, prompt, iterations=4)
    texts, losses, entropies, surrogates = by_hand(talker(), tokenizer, prompt, GOLD, 4, 6)
    assert [entry.text for entry in result.iterations] == texts
    assert [entry.losses.total for entry in result.iterations] == losses
    assert [e.improved for e in result.iterations[1:]] == [
        new < old for old, new in zip(losses, losses[1:], strict=False)
    ]
    for entry, entropy, surrogate in zip(result.iterations[1:], entropies, surrogates, strict=True):
        assert math.isclose(entry.entropy, entropy, rel_tol=1e-5)
        assert math.isclose(entry.surrogate_loss, surrogate, rel_tol=1e-4)
        assert entry.builder == "sc"
    assert result.iterations[0].builder == "base" and result.iterations[0].gamma == 0
    assert result.chosen == losses.index(min(losses)) and result.answer == texts[result.chosen]
    assert result.used_labels
    assert result.iterations[1].pairs == 0
    if prompt == PROMPTS[0]:  # the others repeat themselves, which gives no pair
        assert result.iterations[3].pairs > result.iterations[2].pairs > 0


def test_what_the_policy_decided(tokenizer):
    """By the formula, from the energies of a pass without an entropy."""
    model = talker()
    with torch.no_grad():  # an entropy above some layers' σ and below others'
        model.lm_head.weight.mul_(4)
    entry = run(model, tokenizer, iterations=2).iterations[1]
    layers = measure(model, tokenizer(PROMPTS[0], return_tensors="pt"))
    sigmas = [max(1 - math.exp(-layer.energy), entry.entropy / 3) for layer in layers]
    gammas = [0.3 + 0.5 * sigma for sigma in sigmas]
    ranks = [1 + math.floor(3 * sigma + 2**-20) for sigma in sigmas]
    assert 14 > len({round(sigma, 6) for sigma in sigmas}) > 3
    for name, values in (("sigma", sigmas), ("gamma", gammas), ("rank", ranks)):
        assert math.isclose(getattr(entry, name), sum(values) / 14, rel_tol=1e-5), name


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    "settings", [dict(gamma_bounds=(0, 0)), dict(gamma=0, adaptive_gamma=False)]
)
def test_gamma_zero_is_the_baseline_every_time(tokenizer, settings, keep):
    model = talker(**settings)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        baseline = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        result = run(model, tokenizer, prompt, iterations=4, keep=keep, samples=2)
        assert {entry.text for entry in result.iterations} == {baseline} == {result.answer}
        assert len({entry.samples for entry in result.iterations}) == 1
        assert all(entry.gamma == 0 == entry.rank for entry in result.iterations)
        assert result.chosen == (0 if keep == "best" else 3)


def test_without_gold_or_iterations_the_plain_answer(tokenizer):
    model = talker()
    with disabled(model):
        baseline = run(model, tokenizer).iterations[0].text
    for options in (dict(gold=None), dict(gold=None, iterations=5), dict(iterations=1)):
        result = run(model, tokenizer, **options)
        assert result.answer == baseline and len(result.iterations) == 1
        assert not result.used_labels and result.iterations[0].losses is None


def test_without_gold_agreement_is_the_judge(tokenizer):
    model = talker()
    torch.manual_seed(3)
    before = everything(model)
    results = [
        run(model, tokenizer, gold=None, samples=3, seed=seed, weights=None) for seed in (1, 1, 2)
    ]
    assert_unchanged(before, everything(model))
    assert results[0] == results[1] != results[2] and not results[0].used_labels
    for entry in results[0].iterations:
        assert set(entry.losses.parts) == {"units", "self_consistency"}
        assert len(entry.samples) == 3
        assert entry.losses == CompositeVerifier(
            {"units": 0.5, "self_consistency": 0.3}
        )(entry.text, None, entry.samples)  # fmt: skip
        assert entry.surrogate_loss is None and entry.builder in ("base", "sk")
    assert results[0].iterations[1].samples != results[0].iterations[0].samples
    with pytest.raises(ValueError, match="without gold, weights must name one of"):
        run(model, tokenizer, gold=None, samples=2)


def test_all_four_parts_with_gold_and_samples(tokenizer):
    result = run(talker(), tokenizer, samples=2, weights=None, iterations=2)
    assert set(result.iterations[1].losses.parts) == {
        "numeric", "units", "self_consistency", "algebraic",
    }  # fmt: skip
    again = json.loads(json.dumps(result.as_dict()))
    assert again["iterations"][1]["losses"]["total"] == result.iterations[1].losses.total


def test_best_is_the_earliest_of_the_lowest(tokenizer, monkeypatch):
    totals = iter([3.0, 1.0, 2.0, 1.0])

    def verifier(*_):
        return vps.verify.Losses({"numeric": 0.0}, next(totals))

    monkeypatch.setattr(refine_module(), "CompositeVerifier", lambda *_, **__: verifier)
    result = run(talker(), tokenizer, iterations=4)
    assert result.chosen == 1 and result.answer == result.iterations[1].text
    assert [entry.improved for entry in result.iterations] == [None, True, False, True]


def refine_module():
    import importlib

    return importlib.import_module("vps.refine")


def marked(model):
    """A model in a state of its own, which a refinement has to keep."""
    state = policy_state(model)
    state.set_entropy(1.5)
    state.record(True)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    layer.gradient, layer.memory = True, CurvatureMemory()
    return model


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_comes_back_as_it_was(tokenizer, mode):
    model = marked(talker())
    torch.manual_seed(5)
    before = everything(model)
    with mode():
        result = run(model, tokenizer, iterations=3, samples=2)
        changed = run(model, tokenizer, iterations=3, config=VPSConfig(builder="sk", rank=1))
    assert_unchanged(before, everything(model))
    assert result.iterations == run(talker(), tokenizer, iterations=3, samples=2).iterations
    assert changed.iterations[1].builder == "sk"


@pytest.mark.parametrize("fails", ["generate", "verify", "surrogate", "backward", "samples"])
def test_an_exception_in_the_middle_leaves_nothing(tokenizer, monkeypatch, fails):
    model = marked(talker())
    torch.manual_seed(5)
    before = everything(model)
    module, calls = refine_module(), []

    class Failure(Exception):
        pass

    def failing(function, after):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                assert any(not p.requires_grad for p in model.parameters())
                raise Failure
            return function(*args, **kwargs)

        return call

    match fails:
        case "generate":
            monkeypatch.setattr(module, "generate", failing(module.generate, 2))
        case "samples":
            monkeypatch.setattr(module, "sample", failing(module.sample, 1))
        case "verify":
            monkeypatch.setattr(
                CompositeVerifier, "__call__", failing(lambda *_: vps.verify.Losses({}, 1.0), 2)
            )
        case "surrogate":
            monkeypatch.setattr(F, "cross_entropy", failing(F.cross_entropy, 1))
        case "backward":
            monkeypatch.setattr(torch.Tensor, "backward", failing(torch.Tensor.backward, 1))
    with pytest.raises(Failure):
        run(model, tokenizer, iterations=4, samples=2)
    assert_unchanged(before, everything(model))


def test_without_the_surrogate_or_lbfgs(tokenizer):
    model = talker()
    plain = run(model, tokenizer, iterations=3, surrogate=False)
    assert all(e.surrogate_loss is None and e.pairs == 0 for e in plain.iterations)
    assert plain.iterations[1].builder == "sk" and plain.used_labels
    full = run(model, tokenizer, iterations=3)
    off = run(model, tokenizer, iterations=3, config=VPSConfig(lbfgs=False))
    assert full.iterations[:2] == off.iterations[:2]
    assert full.iterations[2].pairs > 0 == off.iterations[2].pairs
    assert off.iterations[2].builder == "sc"
    assert off.iterations[1].text != plain.iterations[1].text


def test_a_backend_that_cannot_is_named_before_the_work(tokenizer, monkeypatch):
    model, said = talker(), []
    monkeypatch.setattr(vps.backends.dispatch.STATE, "backends", ["cpp"])
    with pytest.raises(RuntimeError, match="lbfgs=False"):
        run(model, tokenizer, iterations=3, progress=said.append)
    assert said == []
    monkeypatch.setattr(vps.backends.dispatch.STATE, "backends", ["torch"])
    assert run(model, tokenizer, iterations=3, progress=said.append).used_labels
    assert said == ["answering, plain", "iteration 1 of 2", "iteration 2 of 2"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(prompt=3), TypeError, "prompt must be a str, got int"),
        (dict(prompt=" "), ValueError, "prompt must hold text"),
        (dict(gold=7), TypeError, "gold must be a str, got int"),
        (dict(gold=""), ValueError, "gold must hold text"),
        (dict(iterations=0), ValueError, "iterations must be an integer ≥ 1, got 0"),
        (dict(samples=1), ValueError, "samples must be 0 or at least 2"),
        (dict(samples=-2), ValueError, "samples must be an integer ≥ 0"),
        (dict(keep="first"), ValueError, "keep must be one of"),
        (dict(temperature=0), ValueError, "temperature must be positive"),
        (dict(weights={"numbers": 1}), ValueError, "no part is named 'numbers'"),
        (dict(config=VPSConfig(target_modules=("q_proj",))), ValueError, "target_modules differs"),
    ],
)
def test_bad_arguments(tokenizer, options, error, message):
    model = talker()
    before = everything(model)
    with pytest.raises(error, match=message):
        run(model, tokenizer, **options)
    assert_unchanged(before, everything(model))


def test_a_compiled_model(tokenizer):
    """Compiled on the way it is refined like any other; compiled before, it may refuse."""
    wanted = run(talker(), tokenizer, iterations=2)
    torch.compiler.reset()
    model = talker()
    model.compile(backend="eager")
    found = run(model, tokenizer, iterations=2)
    assert [entry.text for entry in found.iterations] == [e.text for e in wanted.iterations]
    assert found.iterations[1].builder == "sc"
    assert math.isclose(found.iterations[1].sigma, wanted.iterations[1].sigma, rel_tol=1e-5)
    with pytest.raises(RuntimeError, match="no sharpened layer was seen"):
        with vps.model.statistics.observe(model):
            pass
    assert not any(layer._forward_hooks for layer in sharpened_layers(model).values())


def test_refining_again_and_again_holds_no_memory(tokenizer):
    model = talker()

    def tensors():
        gc.collect()
        return sum(torch.is_tensor(item) for item in gc.get_objects())

    run(model, tokenizer)
    before = tensors()
    for _ in range(3):
        run(model, tokenizer)
    assert tensors() <= before


def test_other_families(tokenizer):
    """Transposed weights, and a model without an argument logits_to_keep."""
    model = tiny("gpt2", torch.float32, times=1)
    vps.patch(model, VPSConfig(target_modules=("c_attn", "c_fc")))
    result = run(model, tokenizer, iterations=3)
    assert [entry.builder for entry in result.iterations] == ["base", "sc", "sc"]
    with pytest.raises(ValueError, match=r"vps\.refine: the model holds no sharpened layer"):
        vps.unpatch(model)
        run(model, tokenizer)

"""∂L/∂γ against finite differences, what it keeps, and what it is the gradient of."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from fitting_cases import every, learner, nll, pairs, texts

import vps
from vps import Calibration, VPSConfig, patch
from vps.algorithm import policy, selection
from vps.algorithm.flow import Given, Layer
from vps.algorithm.weight import Matrix
from vps.evaluation import controls
from vps.fitting import candidates, descent
from vps.fitting.candidates import Sharpening
from vps.fitting.descent import BUNDLE_TOKENS, bundles, each_nll, gradients, mean_nll
from vps.fitting.examples import encoded, parse
from vps.fitting.fitted_controls import random_features
from vps.fitting.sensitivity import prepared
from vps.model.patching import sharpened_layers

FORMS = [
    {},
    {"builder": "sc"},
    {"order": 2},
    {"order": 2, "builder": "sc", "clip": "spectral"},
    {"clamp": 0.02},
    {"clamp": 0.02, "order": 2},
    {"tau": None, "adaptive_rank": False, "rank": 3},
    {"builder": "random"},
    {"qk_coupling": False},
]


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("settings", FORMS)
def test_gradient_is_the_finite_difference(tokenizer, settings, scope, by_column):
    """In float64, selections held: ∂L/∂γ of every layer and column to 1e-6."""
    model = learner(torch.float64)
    patch(model, VPSConfig(**settings))
    examples = [encoded(tokenizer, parse(p), chat=False, longest=64) for p in pairs(2)]
    with prepared(model, None, scope):
        form = Sharpening(model, list(sharpened_layers(model)), by_column)
        generator = torch.Generator().manual_seed(1)
        start = torch.rand(form.count, generator=generator, dtype=torch.float64) - 0.5
        form.set_state([start.tolist()])
        exact = torch.stack([g[0] for g in gradients(model, form, examples)]).sum(0)
        held = Held(form)
        held.loss(model, examples)
        epsilon = 1e-5
        for index in range(0, form.count, 1 + form.count // 6):
            losses = []
            for sign in (1, -1):
                moved = start.clone()
                moved[index] += sign * epsilon
                form.set_state([moved.tolist()])
                losses.append(held.loss(model, examples))
            numeric = (losses[0] - losses[1]) / (2 * epsilon)
            assert abs(numeric - float(exact[index])) <= 1e-6 * max(1, abs(numeric)), index


class Held:
    """The loss by the selections, energies and mixings of the first pass."""

    def __init__(self, form):
        self.form, self.seen, self.mixings = form, {}, []

    def decide(self, layers, x, *arguments):
        key = (tuple(map(id, layers)), self.example)
        if key not in self.seen:
            self.seen[key] = controls.decide(layers, x, *arguments)
        return self.seen[key]._replace(products=[one.base_product(x) for one in layers])

    def loss(self, model, examples):
        place = itertools.count()
        build = selection.coupling

        def mixing(*arguments):
            at = next(place)
            if at == len(self.mixings):
                self.mixings.append(build(*arguments))
            return self.mixings[at]

        total = 0.0
        with pytest.MonkeyPatch.context() as patched, self.form.applied():
            patched.setattr(candidates, "decide", self.decide)
            patched.setattr(selection, "coupling", mixing)
            for example in examples:
                self.example = tuple(example.ids.flatten().tolist())
                total += nll(model, example).item() / example.scored
        return total


def calibration_of(model, gamma, **changes):
    layer = next(iter(sharpened_layers(model).values()))
    values = {
        "config": layer.config, "model": "tiny", "architecture": type(model).__name__,
        "weights": vps.model.calibration.fingerprint(model), "data": "0", "gamma": gamma,
    }  # fmt: skip
    return Calibration(**(values | changes))


@pytest.mark.parametrize("settings", [{}, {"builder": "sc", "order": 2}, {"clamp": 0.05}])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpp", "reference"])
def test_the_form_is_the_calibrated_model(tokenizer, settings, by_column, backend):
    model = learner()
    patch(model, VPSConfig(scope="token", **settings))
    examples = every(tokenizer, pairs(3))
    form = Sharpening(model, list(sharpened_layers(model)), by_column)
    generator = torch.Generator().manual_seed(3)
    form.set_state([(torch.rand(form.count, generator=generator) - 0.5).tolist()])
    with prepared(model, None, "token"):
        fitted = mean_nll(model, form, examples)
    calibration_of(model, form.gammas()).apply(model)
    with torch.no_grad(), vps.backend(backend):
        total = sum(float(nll(model, each)) for each in examples)
    assert abs(fitted - total / sum(e.scored for e in examples)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("settings", FORMS)
def test_what_is_looked_at_is_what_is_fitted(tokenizer, settings, fixed, by_column, dtype):
    """Without a gradient the operator computes, with one the differentiable form."""
    model = learner(dtype)
    patch(model, VPSConfig(**settings))
    names = list(sharpened_layers(model))
    example = encoded(tokenizer, parse(pairs(1)[0]), chat=False, longest=64)
    with prepared(model, None, "token"):
        form = Sharpening(model, names, by_column)
        if fixed:
            form = Sharpening(model, names, by_column, random_features(form, 0), "random-1")
        generator = torch.Generator().manual_seed(5)
        start = torch.rand(form.count, generator=generator) - 0.5
        form.set_state([start.tolist()])
        with form.applied():
            with_gradient = nll(model, example)
        looked_at = each_nll(model, form, [example])[0]
        form.set_state([[0.0] * form.count])
        plain = each_nll(model, form, [example])[0]
    assert with_gradient.requires_grad
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    assert abs(looked_at - with_gradient.item()) <= bound * looked_at
    assert abs(looked_at - plain) > 10 * bound * plain


@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
@pytest.mark.parametrize("settings", [{}, {"order": 2, "clamp": 0.05}, {"qk_coupling": False}])
def test_examples_of_one_pass_are_as_they_are_alone(tokenizer, scope, settings):
    """Of different lengths, in float64: the losses, and the gradient of a step."""
    torch.manual_seed(0)
    model = learner(torch.float64, heads=2)
    patch(model, VPSConfig(**settings))
    given = [(text, "7 8"[: 1 + 2 * (i % 2)]) for i, text in enumerate(texts(5))]
    given = [
        (" ".join(prompt.split()[: 3 + i]), answer) for i, (prompt, answer) in enumerate(given)
    ]
    examples = every(tokenizer, [*given, *texts(2, seed=4)])
    assert len({each.ids.shape[1] for each in examples}) > 3
    with prepared(model, None, scope):
        form = Sharpening(model, list(sharpened_layers(model)), False)
        form.set_state([[0.2 - 0.03 * i for i in range(form.count)]])
        places = bundles(examples, scope)
        assert sorted(sum(places, [])) == list(range(7))
        assert len(places) == (7 if scope == "batch" else 1)
        together = each_nll(model, form, examples)
        with torch.no_grad(), form.applied():
            alone = [float(nll(model, each)) for each in examples]
        assert together == pytest.approx(alone, rel=1e-12)
        optimizer = torch.optim.SGD(form.parameters, lr=0.0)
        share = [each.scored / sum(e.scored for e in examples) for each in examples]
        own = [g[0] * s for g, s in zip(gradients(model, form, examples), share, strict=True)]
        descent._step(model, form, optimizer, examples)
        torch.testing.assert_close(form.values.grad, sum(own), rtol=1e-9, atol=1e-12)


def test_a_pass_has_no_more_tokens_than_its_limit(tokenizer):
    examples = every(tokenizer, texts(130, length=9))
    places = bundles(examples, "token")
    assert sum(map(len, places)) == 130
    assert max(len(each) for each in places) == BUNDLE_TOKENS // examples[0].ids.shape[1]
    long = [dataclasses.replace(examples[0], ids=torch.ones(1, BUNDLE_TOKENS + 1).long())] * 2
    assert bundles(long, "token") == [[0], [1]]


def test_nothing_wide_is_kept_for_the_backward_pass():
    """Of a sharpened layer ``[N, r]`` and smaller, beside its weight."""
    torch.manual_seed(0)
    G, r, d_in, d_out = 32, 4, 50, 300
    W = torch.randn(d_out, d_in)
    x = torch.randn(G, 1, d_in, requires_grad=True)
    settings = policy.settings(VPSConfig(), False, d_in, d_out, True)
    numbers = torch.tensor(policy.bounds(VPSConfig(), 1.0), dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 50, (G, r))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer = Layer(Matrix(W), None, settings, numbers)
        given = Given(index, index, torch.ones(G))
        candidates.differentiable(x, layer, None, None, given, F.linear(x, W))
    assert kept and all(t.data_ptr() == W.data_ptr() or t.numel() <= G * r for t in kept)


def test_checkpoints_change_nothing_and_leave_nothing(tokenizer, monkeypatch):
    """Few tokens do without, more run the blocks again."""
    model = learner()
    patch(model)
    examples = every(tokenizer, pairs(2))
    with prepared(model, None, "token"):
        form = Sharpening(model, list(sharpened_layers(model)), False)
        found = [g[0] for g in gradients(model, form, examples)]
        before = {name: dict(vars(m)) for name, m in model.named_modules()}
        runs = []
        block = model.model.layers[0].mlp
        handle = block.register_forward_pre_hook(lambda *_: runs.append(block.training))
        optimizer = torch.optim.SGD(form.parameters, lr=0.0)
        for kept_tokens in (descent.KEPT_TOKENS, 0):
            monkeypatch.setattr(descent, "KEPT_TOKENS", kept_tokens)
            descent._step(model, form, optimizer, examples[:1])
            torch.testing.assert_close(form.values.grad, found[0])
        handle.remove()
        assert runs == [False] * 3  # once more in the backward pass, nothing dropping out
        for name, module in model.named_modules():
            assert set(vars(module)) == set(before[name]), name
            assert module.training is before[name]["training"]

"""Fitting γ: its gradient against finite differences, the descent, the split, the verdict."""

import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from vps import VPSConfig, patch
from vps.fitting import update
from vps.fitting.calibrate import prepared
from vps.fitting.descent import gradients
from vps.fitting.examples import encoded, parse
from vps.fitting.forms import Sharpening
from vps.fitting.loss import nll
from vps.patching import sharpened_layers

WORDS = 40


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny(dtype=torch.float32, heads=2, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 4, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=1, max_position_embeddings=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for module in list(model.modules()):  # those of transformers compute in float32
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                setattr(module, name, torch.nn.RMSNorm(16, eps=1e-6))
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.dim() > 1 else 1)
    return model


def texts(count, seed=0, length=9):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(length)) for _ in range(count)]


def pairs(count, seed=0):
    return [(text, "w7 w8 w9") for text in texts(count, seed)]


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
    model = tiny(torch.float64)
    patch(model, VPSConfig(**settings))
    examples = [encoded(tokenizer, parse(p), chat=False, longest=64) for p in pairs(2)]
    with prepared(model, None, scope):
        form = Sharpening(model, list(sharpened_layers(model)), by_column)
        generator = torch.Generator().manual_seed(1)
        start = torch.rand(form.count, generator=generator, dtype=torch.float64) - 0.5
        form.set_state([start.tolist()])
        exact = torch.stack([g[0] for g in gradients(model, form, examples)]).sum(0)
        held = Held(form)
        held.record(model, examples)
        epsilon = 1e-5
        for index in range(0, form.count, 1 + form.count // 12):
            losses = []
            for sign in (1, -1):
                moved = start.clone()
                moved[index] += sign * epsilon
                form.set_state([moved.tolist()])
                losses.append(held.loss(model, examples))
            numeric = (losses[0] - losses[1]) / (2 * epsilon)
            assert abs(numeric - float(exact[index])) <= 1e-6 * max(1, abs(numeric)), index


class Held:
    """Selections, energies and mixings of the first pass, used in every later one."""

    def __init__(self, form):
        self.form = form
        self.seen = {}
        self.replay = False

    def record(self, model, examples):
        original = self.form._selected
        build = update.torch_backend.selection.coupling

        def selected(layer, x, W, mask, settings):
            key = (id(layer), tuple(self.example))
            if not self.replay:
                found = original(layer, x, W, mask, settings)
                self.seen[key] = found._replace(energy=found.energy.clone())
                return found
            held = self.seen[key]
            return held._replace(H=F.linear(x, W), energy=held.energy.clone())

        calls = iter(())

        def mixing(*arguments):
            nonlocal calls
            if not self.replay:
                found = build(*arguments)
                self.mixings.append(found)
                return found
            return self.mixings[self.place.pop(0)]

        self.mixings = []
        self.form._selected = selected
        self.patched = update.torch_backend.selection
        self.original = build
        self.mixing = mixing
        self.loss(model, examples)
        self.replay = True

    @torch.no_grad()
    def loss(self, model, examples):
        self.place = list(range(len(self.mixings)))
        total = 0.0
        self.patched.coupling = self.mixing
        try:
            with self.form.applied():
                for example in examples:
                    self.example = example.ids.flatten().tolist()
                    total += float(nll(model, example)) / example.scored
        finally:
            self.patched.coupling = self.original
        return total

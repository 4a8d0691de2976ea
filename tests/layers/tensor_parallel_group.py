"""Groups of ranks that run a model split over them beside the whole one, and compare the two.

Ranks are forks of one process, which imports everything once.
"""

import contextlib
import json
import os
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import vps
from vps.algorithm import flow
from vps.algorithm.weight import Matrix
from vps.backends import torch_backend

HIDDEN, VOCABULARY = 32, 64
RANKS = (2, 4)
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=4, initializer_range=0.2,
    tie_word_embeddings=False,
)  # fmt: skip
CASES = {ranks: {} for ranks in RANKS}


def case(*ranks):
    """Run the function in groups of so many ranks."""

    def register(function):
        for number in ranks:
            CASES[number][function.__name__] = function
        return function

    return register


class Group:
    """The models of one launch: ``plain`` in this process, ``split`` over the ranks."""

    def __init__(self, folder):
        self.folder, self.models = folder, {}
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def pair(self, name, dtype=torch.float32):
        """The unsharpened plain and split model of a family."""
        if (name, dtype) not in self.models:
            torch.manual_seed(0)
            if name == "qwen2":
                plain = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_hidden_layers": 1}))
            else:
                # narrow: fewer features than ranks times r, and none at all on the last of four
                width = {"intermediate_size": 6} if name == "narrow" else {}
                depth = {} if name == "llama" else {"num_hidden_layers": 1}
                sizes = SIZES | width | depth
                plain = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
            for parameter in plain.parameters():
                if parameter.dim() == 1:  # biases, and scales of the norms
                    parameter.data += 0.1 * torch.randn_like(parameter)
            plain = plain.to(dtype).eval()
            path = self.folder / f"{name}-{dtype}"
            if self.rank == 0:
                plain.save_pretrained(path)
            dist.barrier()
            split = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=dtype).eval()
            self.models[name, dtype] = plain, split
        return self.models[name, dtype]


@contextlib.contextmanager
def sharpened(models, config, entropy=None, outcomes=()):
    """Both models sharpened alike."""
    for model in models:
        vps.patch(model, config)
        state = vps.policy_state(model)
        state.set_entropy(entropy)
        for improved in outcomes:
            state.record(improved)
    try:
        yield
    finally:
        for model in models:
            vps.unpatch(model)


def tokens(rows=2, length=7):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def embedded():
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x.requires_grad_()


@contextlib.contextmanager
def recorded():
    """Selections, γ and columns in use of every layer, of the plain and of the split model."""
    plain, split = [], []

    def keeping(function):
        def wrapped(x, layers, mask, entropy, heads, given, **options):
            outcomes, I_in = function(x, layers, mask, entropy, heads, given, **options)
            kept = plain if isinstance(layers[0].weight, Matrix) else split
            if given.core is not None:  # decided by a prompt
                return outcomes, I_in
            for out in outcomes:
                used = (out.core.matrix != 0).any(1)
                numbers = (I_in, out.I_out, out.core.gamma, used)
                kept.append([each.tolist() for each in numbers])
            return outcomes, I_in

        return wrapped

    with (
        vps.backend("torch"),
        mock.patch.object(torch_backend, "_is_short", lambda call: False),
        mock.patch.object(flow, "sharpen", keeping(flow.sharpen)),
    ):
        yield plain, split


def differences(plain, split):
    """Layers whose indices or columns in use differ, and the largest difference of γ."""
    assert len(plain) == len(split) > 0
    unequal = sum(a[:2] != b[:2] or a[3] != b[3] for a, b in zip(plain, split, strict=True))
    gammas = [
        abs(x - y)
        for a, b in zip(plain, split, strict=True)
        for x, y in zip(a[2], b[2], strict=True)
    ]
    return {"unequal": unequal, "gamma": max(gammas)}


def error(a, b):
    return float((a.double() - b.double()).abs().max())


def compared(models, **inputs):
    """Logits and selections of one forward pass of both models."""
    with torch.no_grad(), recorded() as records:
        expected, got = (model(**inputs).logits for model in models)
    with torch.no_grad(), vps.disabled(models[0]):
        moved = error(models[0](**inputs).logits, expected)
    return {"error": error(expected, got), "moved": moved, **differences(*records)}


def decoded(models, ids, **inputs):
    """The same for a prefill and two cached steps, each with the tokens of the plain model."""
    with torch.no_grad(), recorded() as records:
        outs = [model(ids, use_cache=True, **inputs) for model in models]
        worst = error(outs[0].logits, outs[1].logits)
        mask = inputs.get("attention_mask")
        for _ in range(2):
            chosen = outs[0].logits[:, -1:].argmax(-1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(chosen)], 1)
            outs = [
                model(chosen, past_key_values=out.past_key_values, attention_mask=mask)
                for model, out in zip(models, outs, strict=True)
            ]
            worst = max(worst, error(outs[0].logits, outs[1].logits))
        result = differences(*records)
    return {"error": worst, **result}


def run(rank, ranks, folder, names):
    """One rank; its results go to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group, results = Group(folder), {}
    for name in names or CASES[ranks]:
        results[name] = CASES[ranks][name](group)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()

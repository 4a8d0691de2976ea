"""A tiny random Llama and examples for it, shared by the tests of fitting."""

import random

import torch
from tiny import tiny

from vps.fitting.descent import nlls
from vps.fitting.examples import encoded, parse

WORDS = 40  # of the tokenizer's, that examples are made of


def learner(dtype=torch.float32, heads=2, seed=0, times=12):
    """Make a plain model whose norms compute in its dtype; those of transformers do in float32."""
    model = tiny(
        dtype=dtype, times=times, seed=seed, vocab_size=WORDS + 4, hidden_size=16,
        intermediate_size=24, num_attention_heads=heads, num_key_value_heads=1,
        head_dim=16 // heads, pad_token_id=None,
    )  # fmt: skip
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                setattr(module, name, torch.nn.RMSNorm(16, eps=1e-6, dtype=dtype))
    return model


def texts(count, seed=0, length=9):
    rng = random.Random(seed)
    return [" ".join(str(rng.randrange(WORDS)) for _ in range(length)) for _ in range(count)]


def pairs(count, seed=0):
    return [(text, "7 8 9") for text in texts(count, seed)]


def every(tokenizer, examples):
    return [encoded(tokenizer, parse(each), chat=False, longest=64) for each in examples]


def nll(model, example):
    """Sum over the scored tokens, without dims."""
    return nlls(model, [example])[0]

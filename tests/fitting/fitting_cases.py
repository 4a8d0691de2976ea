"""A tiny random Llama and examples for it, shared by the tests of fitting."""

import random

import torch
import transformers

from vps.fitting.descent import nlls
from vps.fitting.examples import encoded, parse

WORDS = 40  # of the tokenizer's, that examples are made of


def tiny(dtype=torch.float32, heads=2, seed=0, size=12):
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
            parameter.mul_(size if parameter.dim() > 1 else 1)
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

"""Models under ``scope="prompt"``, and their passes with a cache and without."""

import inspect
import warnings

import torch
import transformers
from tiny import draw, settings, tiny

import vps

FORWARD = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"
EXACT = dict(rtol=1e-10, atol=1e-10)
IDS = draw(3, 14)
PROMPT = 7


def patched(family="llama", dtype=torch.float64, sizes=None, **changes):
    model = tiny(family, dtype, **(sizes or {})).requires_grad_(False)
    vps.patch(model, settings(family, scope="prompt", **changes))
    model.generation_config.eos_token_id = None
    return model


def marked(ids, prompt=PROMPT):
    marks = torch.zeros_like(ids, dtype=torch.bool)
    marks[:, :prompt] = True
    return vps.prompt(marks)


def one_pass(model, ids, prompt=PROMPT, **kwargs):
    with marked(ids, prompt):
        return model(ids, use_cache=False, **kwargs).logits


def filled(model, ids=IDS[:, :PROMPT], **kwargs):
    """The output of the prompt, and its cache."""
    out = model(ids, use_cache=True, **kwargs)
    return out.logits, out[CACHE]


def step(model, ids, cache, **kwargs):
    return model(ids, **{CACHE: cache}, **kwargs).logits


def cached(model, ids, steps, cache=None):
    """The logits of all tokens, by a prompt and then by chunks of so many tokens."""
    given = {} if cache is None else {CACHE: cache}
    first, cache = filled(model, ids[:, : ids.shape[1] - sum(steps)], **given)
    outputs = [first]
    for chunk in ids[:, first.shape[1] :].split(steps, 1):
        outputs.append(step(model, chunk, cache))
    return torch.cat(outputs, 1)


def generated(model, ids=IDS, mask=None, new=8, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            **kwargs,
        )  # fmt: skip

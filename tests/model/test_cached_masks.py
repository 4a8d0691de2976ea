"""Masks over a cache: whichever kind it is, the same tokens count as without one."""

import inspect

import pytest
import torch
import transformers
from tiny import draw, tiny
from torch import nn

import vps
from vps import VPSConfig

WINDOW = 6
SLIDING = dict(sliding_window=WINDOW)
QWEN = SLIDING | dict(use_sliding_window=True, max_window_layers=0)
FAMILIES = {
    "mistral": SLIDING,
    "phi3": SLIDING,
    "starcoder2": SLIDING,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "ministral": SLIDING,
    "cohere2": SLIDING | dict(layer_types=["sliding_attention"] * 2),
    "gemma3_text": SLIDING | dict(layer_types=["sliding_attention"] * 2),
    "mixtral": SLIDING,
    # One layer slides, the other does not, in either order; and none does.
    "qwen2 mixed": QWEN | dict(max_window_layers=1),
    "gemma3_text mixed": SLIDING | dict(layer_types=["sliding_attention", "full_attention"]),
    "llama": {},
}


def made(family):
    return tiny(family.split()[0], **FAMILIES[family])


def left_padded(ids, more):
    none = torch.zeros(len(ids), more, dtype=ids.dtype)
    return torch.cat([none, ids], 1), torch.cat([none, torch.ones_like(ids)], 1)


def generated(model, ids, mask, new=8, **kwargs):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **kwargs,
    )  # fmt: skip


def assert_same(found, expected, columns=0):
    assert torch.equal(found.sequences[:, columns:], expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["sequence", "token"])
@torch.no_grad()
def test_a_static_cache_gives_what_a_dynamic_one_gives(family, scope):
    model, ids = made(family), draw(2, 9)
    mask = torch.ones_like(ids)
    plain = generated(model, ids, mask)
    vps.patch(model, VPSConfig(target_modules="all-linear", scope=scope))
    expected = generated(model, ids, mask)
    static = dict(cache_implementation="static", disable_compile=True)
    assert_same(generated(model, ids, mask, **static), expected)
    with vps.disabled(model):
        assert_same(generated(model, ids, mask, **static), plain)
    assert any(
        not torch.allclose(one, other)
        for one, other in zip(plain.logits, expected.logits, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@torch.no_grad()
def test_padding_does_not_count_once_the_window_is_full(family, cache):
    model, ids = made(family), draw(2, 9)
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    expected = generated(model, ids, torch.ones_like(ids))
    kwargs = dict(cache_implementation=cache, disable_compile=True) if cache == "static" else {}
    for more in (1, 5, 11):
        assert_same(generated(model, *left_padded(ids, more), **kwargs), expected, more)


def named(function):
    """What the cache is called: past_key_values before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(3, 2, 4), (6, 5), (9, 1, 1, 4)])
@torch.no_grad()
def test_chunks_count_alike_into_every_cache(family, sizes):
    """Masks [B, 1, T, K] as transformers makes them for compiled decoding."""
    model = made(family)
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    ids, mask = left_padded(draw(2, sum(sizes) - 2), 2)
    mask[0, :2] = 1  # one row padded, the other not
    create = transformers.masking_utils.create_masks_for_generate

    def run(cache, four_d):
        logits, start = [], 0
        for size in sizes:
            chunk = ids[:, start : start + size]
            given = mask[:, : start + size]
            if four_d:
                embeds = model.get_input_embeddings()(chunk)
                config = model.config.get_text_config()
                given = create(
                    config=config, inputs_embeds=embeds, attention_mask=given,
                    **{named(create): cache},
                )  # fmt: skip
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start : start + size]
            given = dict(attention_mask=given, position_ids=positions, **{keyword: cache})
            logits.append(model(chunk, **given).logits)
            start += size
        return torch.cat(logits, 1)[mask.bool()]

    config = model.config
    keyword = named(model.forward)
    expected = run(transformers.DynamicCache(config=config), False)
    for cache in (
        transformers.DynamicCache(config=config),
        transformers.StaticCache(config=config, max_cache_len=24),
    ):
        torch.testing.assert_close(run(cache, True), expected, rtol=1e-6, atol=1e-6)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj = nn.Embedding(96, 8), nn.Linear(8, 8)
        self.double()

    def forward(self, input_ids, attention_mask=None):
        return self.proj(self.embed(input_ids))


@torch.no_grad()
def test_the_mask_of_the_layers_that_have_one():
    """Linear layers may have none, whichever kind comes first."""
    model, ids = OneLayer(), draw(2, 6)
    vps.patch(model, VPSConfig(target_modules=("proj",)))
    counted = torch.arange(6) < torch.tensor([[4], [6]])
    sliding = (counted[:, None] & torch.ones(6, 6).tril().bool())[:, None]
    found = model(ids, attention_mask={"linear_attention": None, "sliding_attention": sliding})
    with vps.token_mask(counted):
        expected = model.proj(model.embed(ids))
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(ids))


@torch.no_grad()
def test_a_full_window_compiles():
    model, ids = tiny("mistral", num_hidden_layers=1, **SLIDING), draw(2, 9)
    vps.patch(model, VPSConfig())
    expected = generated(model, ids, torch.ones_like(ids), new=4)
    kwargs = dict(cache_implementation="static", disable_compile=True)
    model.forward = torch.compile(model.forward, backend="eager")
    assert_same(generated(model, ids, torch.ones_like(ids), new=4, **kwargs), expected)

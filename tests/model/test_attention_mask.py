"""Masks of models with more than one set of tokens: encoder-decoders and vision towers."""

import pytest
import torch
import transformers
from tiny import BART, T5, draw, made
from torch import nn

import vps
from vps import VPSConfig, masking


def plain(family, layers=2):
    auto = transformers.AutoModelForSeq2SeqLM
    if family == "t5":
        return made(auto, family, T5 | dict(num_layers=layers), times=1)
    return made(auto, family, BART | dict(encoder_layers=layers, decoder_layers=layers))


def encoder_decoder(family, layers=2):
    model = plain(family, layers)
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    return model


def padded(ids, to):
    """ids ``[B, T]`` with padding to the right, and their mask."""
    more = to - ids.shape[1]
    mask = torch.ones_like(ids)
    return nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))


class Tower(nn.Module):
    """As a vision model of transformers: takes no token ids."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, pixel_values):
        return self.proj(pixel_values)


class Multimodal(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = Tower()
        self.proj = nn.Linear(8, 8)

    def forward(self, input_ids, pixel_values, attention_mask=None):
        words = nn.functional.one_hot(input_ids, 8).to(pixel_values.dtype)
        return self.tower(pixel_values), self.proj(words)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("decoded", [5, 9])  # 9: as many tokens as the padded encoder has
@torch.no_grad()
def test_cross_attention_takes_the_mask_of_the_encoder(family, decoded):
    model, ids, answer = encoder_decoder(family), draw(2, 6), draw(2, decoded, seed=1)
    expected = model(ids, attention_mask=torch.ones_like(ids), decoder_input_ids=answer).logits
    more, mask = padded(ids, 9)
    found = model(more, attention_mask=mask, decoder_input_ids=answer).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not masking.STATE.layouts


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_padding_of_the_decoder_leaves_the_encoder_alone(family):
    model, ids, answer = encoder_decoder(family), draw(2, 8), draw(2, 5)
    expected = model(ids, decoder_input_ids=answer).logits
    more, mask = padded(answer, 8)  # as many tokens as the encoder has, of which all count
    found = model(ids, decoder_input_ids=more, decoder_attention_mask=mask).logits
    torch.testing.assert_close(found[:, :5], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_generation_is_that_of_unpadded_input(family):
    model, ids = encoder_decoder(family), draw(2, 6)
    vps.set_config(model, VPSConfig(target_modules="all-linear", scope="token"))
    more, mask = padded(ids, 9)
    kwargs = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    assert torch.equal(model.generate(more, attention_mask=mask, **kwargs), expected)
    found = model.generate(more, attention_mask=mask, use_cache=False, **kwargs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["argument", "token_mask", "of another shape"])
@torch.no_grad()
def test_where_the_mask_of_the_encoder_comes_from(how):
    decoder, ids = encoder_decoder("t5").get_decoder(), draw(2, 9)
    key = decoder.block[0].layer[1].EncDecAttention.k
    states, mask = torch.randn(2, 9, 32, dtype=torch.float64), padded(draw(2, 6), 9)[1].bool()
    with vps.token_mask(mask):
        expected = key(states)
    seen = []
    key.register_forward_hook(lambda module, args, y: seen.append(y))
    if how == "token_mask":
        with vps.token_mask(mask):
            decoder(ids, encoder_hidden_states=states)
    elif how == "argument":
        decoder(ids, encoder_hidden_states=states, encoder_attention_mask=mask.long())
    else:  # each decoder token has its own, which says nothing of the states: all count
        by_token = mask[:, None, None].expand(2, 1, 9, 9)
        decoder(ids, encoder_hidden_states=states, encoder_attention_mask=by_token)
        assert not torch.equal(expected, key(states))
        expected = seen.pop()
    assert torch.equal(seen[0], expected)


def test_means_over_encoder_states_count_their_tokens():
    model, ids, answer = encoder_decoder("t5"), draw(2, 6), draw(2, 9)
    more, mask = padded(ids, 9)
    name = "decoder.block.0.layer.1.EncDecAttention.k"
    with vps.capture(model, tensors=True) as captured:
        model(more, attention_mask=mask, decoder_input_ids=answer).logits.sum().backward()
        outputs = captured[name].outputs[0]
        expected = outputs[mask.bool()].mean(0)
        torch.testing.assert_close(captured[name].output_mean, expected, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(expected, outputs.mean((0, 1)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_see_the_mask_of_the_encoder(reentrant):
    model, ids, answer = encoder_decoder("t5").train(), draw(2, 6), draw(2, 9)
    more, mask = padded(ids, 9)

    def gradients():
        model.zero_grad()
        model(more, attention_mask=mask, labels=answer, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_cross_attention_compiles():
    model, ids, answer = encoder_decoder("t5", layers=1), draw(2, 6), draw(2, 9)
    more, mask = padded(ids, 9)
    kwargs = dict(attention_mask=mask, decoder_input_ids=answer, use_cache=False)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(more, **kwargs).logits, model(more, **kwargs).logits)


@torch.no_grad()
def test_a_compiled_model_is_patched():
    model, ids = plain("t5", layers=1), draw(2, 6)
    kwargs = dict(attention_mask=torch.ones_like(ids), decoder_input_ids=draw(2, 5))
    compiled = torch.compile(model, backend="eager")
    before = compiled(ids, **kwargs).logits
    vps.patch(compiled, VPSConfig(target_modules="all-linear"))
    sharpened = compiled(ids, **kwargs).logits
    assert not torch.allclose(sharpened, before)
    torch.testing.assert_close(sharpened, model(ids, **kwargs).logits)


@torch.no_grad()
def test_a_traced_model_takes_other_masks():
    torch.manual_seed(0)
    model = Multimodal().double()
    vps.patch(model, VPSConfig(target_modules=("proj",)))
    ids, pixels = torch.randint(0, 8, (2, 6)), torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.long)
    traced = torch.jit.trace(model, (ids, pixels, mask), check_trace=False)
    mask[:, 3:] = 0
    torch.testing.assert_close(traced(ids, pixels, mask), model(ids, pixels, mask))


@torch.no_grad()
def test_a_tower_with_as_many_tokens_as_the_text_counts_its_own():
    torch.manual_seed(0)
    model = Multimodal()
    vps.patch(model, VPSConfig(target_modules=("proj",)))
    ids, pixels = torch.randint(0, 8, (2, 6)), torch.randn(2, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[:, 3:] = 0
    image, text = model(ids, pixels, attention_mask=mask)
    assert torch.equal(image, model.tower(pixels))
    assert not torch.equal(text, model(ids, pixels)[1])
    with vps.token_mask(mask.bool()):  # what is said by hand reaches a tower called alone
        assert not torch.equal(image, model.tower(pixels))

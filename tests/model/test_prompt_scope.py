"""``scope="prompt"``: the prompt decides once, for all that follows (SPEC §11)."""

import pytest
import torch
import transformers
from prompt_cases import (
    CACHE,
    EXACT,
    IDS,
    cached,
    filled,
    generated,
    marked,
    one_pass,
    patched,
    step,
)
from tiny import BART, SIZES, T5, draw, made, tiny

import vps
from vps import VPSConfig
from vps.model.patching import sharpened_layers

SETTINGS = {
    "default": {},
    "sk": dict(builder="sk"),
    "sc": dict(builder="sc"),
    "order 2": dict(order=2, builder="sc"),
    "adaptive order": dict(adaptive_order=True),
    "spectral": dict(clip="spectral"),
    "no clip": dict(tau=None),
    "clamp": dict(clamp=0.02),
    "uncoupled": dict(qk_coupling=False),
    "random": dict(builder="random"),
    "fixed": dict(rank=3, gamma=0.7),
}
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=4),
    "qwen2": {},
    "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": {},
    "opt": {},
    "phi": {},
    "gpt_neox": {},
}
MLA = SIZES | dict(
    head_dim=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
    v_head_dim=8, first_k_dense_replace=2, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, num_key_value_heads=4,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8,
    patch_size=4, projection_dim=32, model_type="clip_vision_model",
)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@torch.no_grad()
def test_cached_decoding_equals_one_pass(backend, name):
    model = patched(**SETTINGS[name])
    with vps.backend(backend):
        whole = one_pass(model, IDS)
        torch.testing.assert_close(cached(model, IDS, [1, 3, 1, 2]), whole, **EXACT)
    with vps.disabled(model):
        assert (model(IDS).logits - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_cpp_equals_one_pass_of_torch(name):
    if vps.backends()["cpp"] is not None:
        pytest.skip(vps.backends()["cpp"])
    model = patched(dtype=torch.float32, sizes=dict(), **SETTINGS[name])
    with vps.backend("torch"):
        whole = one_pass(model, IDS)
    with vps.backend("cpp"):
        torch.testing.assert_close(cached(model, IDS, [1, 3, 1, 2]), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_families_and_caches(family, static):
    model = patched(family, sizes=FAMILIES[family])
    cache = transformers.StaticCache(config=model.config, max_cache_len=20) if static else None
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4], cache), one_pass(model, IDS), **EXACT)


@torch.no_grad()
def test_an_output_head_decides_by_the_tokens_it_gets():
    model = patched(target_modules=("q_proj", "lm_head"))
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)
    _, cache = filled(model, logits_to_keep=1)
    assert step(model, IDS[:, 7:8], cache).isfinite().all()
    kept = torch.tensor([2, 6, 9])
    found = one_pass(model, IDS, logits_to_keep=kept)
    x = [None]
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: x.insert(0, args[0]))
    one_pass(model, IDS, logits_to_keep=kept)
    handle.remove()
    with marked(IDS[:, :3], 2):  # of which two are of the prompt
        torch.testing.assert_close(model.lm_head(x[0]), found, **EXACT)


@torch.no_grad()
def test_a_layer_that_is_applied_to_all_that_is_cached():
    model = made(transformers.AutoModelForCausalLM, "deepseek_v3", MLA).requires_grad_(False)
    vps.patch(model, VPSConfig(scope="prompt", target_modules=["kv_b_proj"]))
    whole = one_pass(model, IDS)
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), whole, **EXACT)
    assert (whole - model(IDS, use_cache=False).logits).abs().max() > 1e-3
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = model(IDS[:1, 3:], use_cache=False).logits
    torch.testing.assert_close(padded[:1, 3:], alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_features_of_an_image_are_no_tokens_of_the_text():
    sizes = dict(
        vision_config=VISION, text_config=SIZES | {"model_type": "llama"}, image_token_index=95,
        image_seq_length=4,
    )  # fmt: skip
    model = made(transformers.AutoModelForImageTextToText, "llava", sizes).requires_grad_(False)
    vps.patch(model, VPSConfig(scope="prompt", target_modules="all-linear"))
    text, image = draw(1, 12) % 90 + 3, torch.full((1, 4), 95)
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    ids = torch.cat([text[:, :2], image, text[:, 2:]], 1)
    whole = one_pass(model, ids, 9, pixel_values=pixels)
    first, cache = filled(model, ids[:, :9], pixel_values=pixels)
    later = step(model, ids[:, 9:], cache)
    torch.testing.assert_close(torch.cat([first, later], 1), whole, rtol=1e-6, atol=1e-6)
    _, cache = filled(model, text)  # an image in the second turn alone
    more = torch.cat([image, text[:, :3]], 1)
    assert step(model, more, cache, pixel_values=pixels).isfinite().all()


@torch.no_grad()
def test_padding_and_batch_mates_do_not_matter():
    model, mask = patched(), torch.ones_like(IDS)
    mask[0, :5], mask[2, :1] = 0, 0
    together = generated(model, IDS, mask)[:, IDS.shape[1] :]
    for row, padding in enumerate((5, 0, 1)):
        alone = generated(model, IDS[row : row + 1, padding:])
        assert torch.equal(alone[0, IDS.shape[1] - padding :], together[row])


@torch.no_grad()
def test_generate_equals_passes_without_a_cache():
    model, ids = patched(), IDS
    for _ in range(8):
        best = one_pass(model, ids, IDS.shape[1])[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    assert torch.equal(generated(model), ids)
    assert torch.equal(generated(model, cache_implementation="static"), ids)


@torch.inference_mode()
def test_inference_mode():
    model = patched()
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)


@torch.no_grad()
def test_beams():
    model = patched()
    beams = generated(model, num_beams=3, num_return_sequences=2)
    for row in range(3):
        alone = generated(model, IDS[row : row + 1], num_beams=3, num_return_sequences=2)
        assert torch.equal(alone, beams[2 * row : 2 * row + 2])


@pytest.mark.parametrize("family", ["llama", "bloom"])
@torch.no_grad()
def test_assisted_decoding_does_not_look_at_its_candidates(family):
    model, ids = patched(family), IDS[:1, :10]
    plain = generated(model, ids)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), plain)
    assistant = tiny(seed=1, dtype=torch.float64)
    assert torch.equal(generated(model, ids, assistant_model=assistant), plain)
    assert torch.equal(generated(model, ids, assistant_model=model), plain)
    cache = transformers.DynamicCache(config=model.config)
    generated(model, ids, prompt_lookup_num_tokens=3, **{CACHE: cache})
    cache.crop(-cache.get_seq_length())  # a longer prompt is all of the prompt again
    logits, _ = filled(model, IDS[:1], **{CACHE: cache})
    torch.testing.assert_close(logits, model(IDS[:1]).logits, **EXACT)


@torch.no_grad()
def test_a_prompt_for_a_bare_layer():
    layer = vps.VPSLinear(12, 9, config=VPSConfig(scope="prompt")).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    marks = torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 2 + [False] * 3])
    with vps.prompt(marks):
        y = layer(x)
        with vps.token_mask(torch.ones_like(marks).index_fill(1, torch.tensor([2]), False)):
            fewer = layer(x)
    config = layer.config
    for prompt, found in ((marks, y), (marks & (torch.arange(6) != 2), fewer)):
        expected = vps.reference.vps_linear(
            x, layer.weight, layer.bias, config=config, prompt=prompt
        ).y
        torch.testing.assert_close(found, expected, **EXACT)
    whole = vps.reference.vps_linear(x, layer.weight, layer.bias, config=config).y
    torch.testing.assert_close(layer(x), whole, **EXACT)
    with vps.prompt(torch.zeros_like(marks)):
        torch.testing.assert_close(layer(x), layer.plain_output(x), **EXACT)
    with vps.prompt(marks[:, :5]), pytest.raises(ValueError, match=r"vps.prompt: mask must have"):
        layer(x)
    with pytest.raises(TypeError, match=r"vps.prompt: mask must be a bool tensor.*int64"):
        with vps.prompt(marks.long()):
            pass


@torch.no_grad()
def test_marks_that_do_not_fit_the_model():
    model = patched()
    with pytest.raises(ValueError, match=r"vps.prompt: mask must have.*\(3, 14\).*\(3, 7\)"):
        with marked(IDS[:, :7]):
            model(IDS)


@torch.no_grad()
def test_a_partner_that_is_plain_stays_plain():
    model = patched()
    for block in model.model.layers:
        block.self_attn.q_proj.gamma = vps.algorithm.policy.LayerGamma(0.0)
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)


@torch.no_grad()
def test_other_scopes_do_not_read_the_prompt():
    model = tiny()
    vps.patch(model, VPSConfig())
    with marked(IDS):
        inside = model(IDS).logits
    assert torch.equal(inside, model(IDS).logits)


@torch.no_grad()
def test_packed_rows_have_a_prompt_for_each_sequence():
    model = patched()
    row = torch.cat([IDS[0, :9], IDS[1, :5]])[None]
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    marks = (positions < 4).bool()
    with vps.prompt(marks):
        got = model(row, position_ids=positions, use_cache=False).logits
    for start, ids in ((0, IDS[:1, :9]), (9, IDS[1:2, :5])):
        end = start + ids.shape[1]
        expected = one_pass(model, ids, 4)
        torch.testing.assert_close(got[:, start:end], expected, **EXACT)


@pytest.mark.parametrize("length", [8, 5], ids=["as long", "shorter"])
@pytest.mark.parametrize("family, sizes", [("t5", T5), ("bart", BART)])
@torch.no_grad()
def test_encoder_decoder(family, sizes, length):
    model = made(transformers.AutoModelForSeq2SeqLM, family, sizes).requires_grad_(False)
    vps.patch(model, VPSConfig(scope="prompt", target_modules="all-linear"))
    source, decoded = draw(3, length, seed=3), IDS[:, :8]
    with marked(decoded, 4):
        whole = model(input_ids=source, decoder_input_ids=decoded, use_cache=False).logits
    first = model(input_ids=source, decoder_input_ids=decoded[:, :4])
    states = transformers.modeling_outputs.BaseModelOutput(first.encoder_last_hidden_state)
    found = [first.logits]
    for chunk in decoded[:, 4:].split([1, 3], 1):
        given = {CACHE: first[CACHE]}
        found.append(model(encoder_outputs=states, decoder_input_ids=chunk, **given).logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, **EXACT)
    beams = generated(model, source, num_beams=2, new=4)
    alone = [generated(model, row[None], num_beams=2, new=4) for row in source]
    assert torch.equal(torch.cat(alone), beams)


def test_gradients_of_a_cached_call():
    model = patched()
    embed = model.get_input_embeddings()
    with torch.no_grad():
        _, cache = filled(model)
    late = embed(IDS[:, 7:9]).detach().requires_grad_()
    logits = model(inputs_embeds=late, **{CACHE: cache}).logits
    (found,) = torch.autograd.grad(logits.square().sum(), late)
    whole = embed(IDS[:, :9]).detach().requires_grad_()
    with marked(IDS[:, :9]):
        logits = model(inputs_embeds=whole, use_cache=False).logits
    (expected,) = torch.autograd.grad(logits[:, 7:].square().sum(), whole)
    torch.testing.assert_close(found, expected[:, 7:], **EXACT)


def test_the_gradient_of_a_weight_does_not_see_the_update():
    model = patched().requires_grad_(True)
    layer, seen = model.model.layers[1].mlp.down_proj, []
    with torch.no_grad():
        _, cache = filled(model)
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.register_forward_hook(lambda module, args, y: y.register_hook(seen.append) and None)
    step(model, IDS[:, 7:9], cache).square().sum().backward(inputs=[layer.weight])
    x, g = (each.flatten(0, 1) for each in seen)
    torch.testing.assert_close(layer.weight.grad, g.t() @ x, **EXACT)


@torch.no_grad()
def test_scopes_beside_each_other():
    model = patched()
    layers = list(sharpened_layers(model).values())
    for layer in layers[::2]:
        layer.config = layer.config.replace(scope="token")
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)

"""``scope="prompt"``: the prompt decides once, and its decision lives with the cache (SPEC §11)."""

import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import transformers
from tiny import BART, SIZES, SPECIAL, T5, draw, made, settings, tiny
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import vps
from vps import VPSConfig
from vps.model.patching import sharpened_layers

FORWARD = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"
EXACT = dict(rtol=1e-10, atol=1e-10)
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
def test_a_cache_takes_its_decisions_along():
    model = patched()
    token = IDS[:, 7:8]
    right = step(model, token, filled(model)[1])
    order = torch.tensor([2, 0, 0])

    def after(change, rows):
        _, cache = filled(model)
        change(cache)
        torch.testing.assert_close(step(model, token[rows], cache), right[rows], **EXACT)

    after(lambda cache: cache.reorder_cache(order), order)
    after(lambda cache: cache.batch_select_indices(order[:1]), order[:1])
    after(lambda cache: cache.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2))
    _, cache = filled(model)
    step(model, IDS[:, 7:10], cache)
    cache.crop(-3)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    copies[0].reorder_cache(order)  # a copy has decisions of its own
    torch.testing.assert_close(step(model, token[order], copies[0]), right[order], **EXACT)
    for one in (cache, copies[1]):
        assert isinstance(one, transformers.DynamicCache)
        torch.testing.assert_close(step(model, token, one), right, **EXACT)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_an_emptied_cache_takes_a_new_prompt(static):
    model = patched()
    cache = transformers.StaticCache(config=model.config, max_cache_len=20) if static else None
    _, cache = filled(model, **({CACHE: cache} if static else {}))
    empties = [cache.reset] if static else [cache.reset, lambda: cache.crop(-PROMPT - 1)]
    for empty in empties:
        empty()
        if not static and cache.get_seq_length():  # as reset leaves it in transformers 5.17
            cache = transformers.DynamicCache(config=model.config)
        other = draw(3, PROMPT, seed=5)
        torch.testing.assert_close(filled(model, other, **{CACHE: cache})[0], model(other).logits)
        right = step(model, IDS[:, 7:8], filled(model, other)[1])
        torch.testing.assert_close(step(model, IDS[:, 7:8], cache), right, **EXACT)


@torch.no_grad()
def test_a_static_cache_keeps_its_tensors():
    """A captured graph reads the decision of the next prompt at the same address."""
    model = patched()
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)

    def addresses():
        updates = cache.vps_held.updates.values()
        return [tensor.data_ptr() for update in updates for tensor in update.tensors()]

    filled(model, **{CACHE: cache})
    before = addresses()
    cache.reset()
    filled(model, draw(3, 9, seed=4), **{CACHE: cache})
    assert addresses() == before


@torch.no_grad()
def test_conversations_at_once():
    model = patched()
    rights = [generated(model, IDS[row : row + 1]) for row in range(3)]
    outputs = [filled(model, IDS[row : row + 1]) for row in range(3)]
    tokens = [[logits[0, -1].argmax().item()] for logits, _ in outputs]
    for _ in range(7):
        for row, (_, cache) in enumerate(outputs):
            logits = step(model, torch.tensor([tokens[row][-1:]]), cache)
            tokens[row].append(logits[0, -1].argmax().item())
    assert tokens == [right[0, IDS.shape[1] :].tolist() for right in rights]
    found = {}

    def run(row):
        with torch.no_grad():
            found[row] = generated(model, IDS[row : row + 1])

    threads = [threading.Thread(target=run, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[row], rights[row]) for row in range(3))


@torch.no_grad()
def test_nothing_is_kept_alive_by_a_freed_cache():
    model = patched()
    _, cache = filled(model)
    update = next(iter(cache.vps_held.updates.values()))
    references = [weakref.ref(each) for each in (cache.vps_held, *update.tensors())]
    step(model, IDS[:, 7:8], cache)
    del cache, update
    gc.collect()
    assert all(reference() is None for reference in references)


@torch.no_grad()
def test_plain_where_sharpening_is_off():
    plain, ids = tiny(), IDS
    expected = cached(plain, ids, [1, 6])
    assert torch.equal(cached(patched(gamma=0), ids, [1, 6]), expected)
    model = patched()
    with vps.disabled(model):
        assert torch.equal(cached(model, ids, [1, 6]), expected)
    vps.unpatch(model)
    assert torch.equal(cached(model, ids, [1, 6]), expected)
    assert "_get_candidate_generator" not in vars(model)


class Foreign:
    """A cache of another party."""

    def __init__(self):
        self.inner = transformers.DynamicCache()

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


@torch.no_grad()
def test_what_cannot_be_followed_is_refused_by_name():
    model, token = patched(), IDS[:, 7:8]

    def refused(match, cache, ids=token):
        with pytest.raises(ValueError, match=match):
            step(model, ids, cache)

    with vps.disabled(model):
        _, cache = filled(model)
    refused("already has tokens without one.*vps.disabled", cache)
    refused("already has tokens", filled(tiny())[1])
    _, cache = filled(model)
    refused("what 3 prompts decided, got a call of 1 sequences", cache, token[:1])
    vps.patch(model, next(iter(sharpened_layers(model).values())).config)
    refused("holds none for a layer of widths", cache)
    refused("cannot follow the sequences of a Foreign", Foreign())
    cache = filled(model)[1]
    cache.reset()
    filled(patched(), **{CACHE: cache} if not cache.get_seq_length() else {})
    refused("holds none for a layer|already has tokens", cache)
    family = dict(SPECIAL, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    other = made(transformers.AutoModelForCausalLM, "rwkv", family).requires_grad_(False)
    vps.patch(other, VPSConfig(scope="prompt", target_modules="all-linear"))
    with pytest.raises(ValueError, match="cannot follow the sequences of a list"):
        other(token[:1], state=other(IDS[:1], use_cache=True).state)
    shared = patched()
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    _, cache = filled(shared)
    with pytest.raises(ValueError, match="called several times in a pass"):
        step(shared, token, cache)


@torch.no_grad()
def test_a_call_that_fails_leaves_no_decision():
    model = patched()
    cache = transformers.DynamicCache(config=model.config)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled(model, **{CACHE: cache})
    handle.remove()
    assert not hasattr(cache, "vps_held")


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
def test_a_filled_cache_does_not_read_the_marks():
    model = patched()
    expected = cached(model, IDS, [1, 3, 3])
    with marked(IDS[:, :PROMPT], PROMPT):
        torch.testing.assert_close(cached(model, IDS, [1, 3, 3]), expected, **EXACT)


@torch.no_grad()
def test_a_partner_that_is_plain_stays_plain():
    model = patched()
    for block in model.model.layers:
        block.self_attn.q_proj.gamma = vps.algorithm.policy.LayerGamma(0.0)
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)


@torch.no_grad()
def test_a_model_that_is_converted_after_the_prompt():
    model = patched(dtype=torch.float32)
    _, cache = filled(model)
    expected = step(model, IDS[:, 7:8], copy.deepcopy(cache))
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, IDS[:, 7:8], copy.deepcopy(cache))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
def test_a_static_cache_drops_what_its_prompt_did_not_decide():
    model = patched()
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    config = next(iter(sharpened_layers(model).values())).config
    for _ in range(3):
        filled(model, **{CACHE: cache})
        assert len(cache.vps_held.updates) == 14
        cache.reset()
        vps.patch(model, config)


@torch.no_grad()
def test_other_scopes_do_not_read_the_prompt():
    model = tiny()
    vps.patch(model, VPSConfig())
    with marked(IDS):
        assert torch.equal(model(IDS).logits, model(IDS).logits)
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


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_later_token_reads_no_score_norm_or_policy():
    model = patched()
    layer = model.model.layers[0].mlp.up_proj
    _, cache = filled(model)
    with Operators() as seen, vps.backend("torch"):
        layer_ops, forward = set(), layer.forward

        def watched(x):
            before = set(seen.names)
            seen.names = set()
            y = forward(x)
            layer_ops.update(seen.names)
            seen.names = before
            return y

        layer.forward = watched
        step(model, IDS[:, 7:8], cache)
        del layer.forward
    allowed = {"view", "_unsafe_view", "expand", "transpose", "unsqueeze", "t", "alias", "detach"}
    assert layer_ops - allowed <= {"bmm", "mm", "addmm", "matmul", "linear", "scatter_add"}
    assert "scatter_add" in layer_ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["torch", "native"])
@torch.no_grad()
def test_one_graph_for_every_token_and_prompt(dtype):
    torch.compiler.reset()
    model = patched(dtype=dtype)
    count = CompileCounter()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    for seed in range(2):
        ids = draw(3, 14, seed=seed)
        expected = cached(model, ids, [1] * 7)
        filled(model, ids[:, :PROMPT], **{CACHE: cache})
        for at in range(PROMPT, 14):
            positions = torch.full((3, 1), at)
            got = step(compiled, ids[:, at : at + 1], cache, position_ids=positions)
            torch.testing.assert_close(got, expected[:, at : at + 1], rtol=1e-4, atol=1e-4)
        cache.reset()
    assert count.frame_count == 1


@torch.no_grad()
def test_a_compiled_prompt():
    torch.compiler.reset()
    model = patched()
    expected = cached(model, IDS, [1, 6])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(cached(compiled, IDS, [1, 6]), expected, **EXACT)


@torch.no_grad()
def test_models_with_decisions_are_copied_and_pickled():
    model = patched()
    expected = generated(model, IDS[:1, :10], prompt_lookup_num_tokens=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generated(other, IDS[:1, :10], prompt_lookup_num_tokens=2), expected)
        _, cache = filled(model)
        step(other, IDS[:, 7:8], cache)  # the same layers


@torch.no_grad()
def test_scopes_beside_each_other():
    model = patched()
    layers = list(sharpened_layers(model).values())
    for layer in layers[::2]:
        layer.config = layer.config.replace(scope="token")
    torch.testing.assert_close(cached(model, IDS, [1, 2, 4]), one_pass(model, IDS), **EXACT)


def test_layers_outside_a_model_have_no_cache():
    layer = vps.VPSLinear(4, 3, config=VPSConfig(scope="prompt"))
    assert isinstance(layer, nn.Linear) and layer(torch.randn(2, 5, 4)).shape == (2, 5, 3)

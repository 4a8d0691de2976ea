"""What a prompt decided lives with the cache of its sequences (SPEC §11)."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from prompt_cases import (
    CACHE,
    EXACT,
    IDS,
    PROMPT,
    cached,
    filled,
    generated,
    marked,
    patched,
    step,
)
from tiny import SPECIAL, draw, made, tiny
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import vps
from vps import VPSConfig
from vps.model.patching import sharpened_layers


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
def test_a_filled_cache_does_not_read_the_marks():
    model = patched()
    expected = cached(model, IDS, [1, 3, 3])
    with marked(IDS[:, :PROMPT], PROMPT):
        torch.testing.assert_close(cached(model, IDS, [1, 3, 3]), expected, **EXACT)


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
    close = EXACT if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
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
            torch.testing.assert_close(got, expected[:, at : at + 1], **close)
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
def test_a_token_sees_what_changed_since_the_token_before():
    """A later token goes a shorter way (``Held.later``), which must see every change."""
    model, token = patched(), IDS[:, 7:8]
    layers = list(sharpened_layers(model).values())

    def fresh(ready=14):
        """A cache whose layers have had a later token."""
        _, cache = filled(model)
        step(model, IDS[:, 8:9], cache)
        cache.crop(-1)
        assert len(cache.vps_held.ready) == ready
        return cache

    right = step(model, token, filled(model)[1])
    torch.testing.assert_close(step(model, token, fresh()), right, **EXACT)
    cache = fresh()
    with vps.disabled(model):
        off = step(model, token, cache)
    assert (off - right).abs().max() > 1e-3
    for name, ready in (("reference", 0), ("torch", 14)):
        cache = fresh()  # made ready before another backend is asked for
        with vps.backend(name):
            torch.testing.assert_close(step(model, token, cache), right, **EXACT)
            assert len(cache.vps_held.ready) == ready
            torch.testing.assert_close(step(model, token, fresh(ready)), right, **EXACT)
    cache, config = fresh(), layers[0].config
    vps.set_config(model, config.replace(gamma=0))
    assert torch.equal(step(model, token, copy.deepcopy(cache)), off)
    vps.set_config(model, config.replace(clamp=1e-6))
    clamped = step(model, token, cache)
    assert (clamped - off).abs().max() < 1e-3 < (clamped - right).abs().max()
    vps.set_config(model, config)
    cache, W = fresh(), layers[0].weight
    layers[0].weight = torch.nn.Parameter(2 * W, requires_grad=False)
    assert (step(model, token, cache) - right).abs().max() > 1e-3
    layers[0].weight = W
    cache = fresh()
    with torch.enable_grad():
        x = model.get_input_embeddings()(token).detach().requires_grad_()
        model(inputs_embeds=x, **{CACHE: cache}).logits.sum().backward()
    assert x.grad.abs().max() > 0
    cache = fresh()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        x = model.get_input_embeddings()(token)
        model(inputs_embeds=forward_ad.make_dual(x, x), **{CACHE: cache})

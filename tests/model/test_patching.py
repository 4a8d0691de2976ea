"""patch, unpatch and friends on tiny random models of every supported family."""

import copy

import pytest
import torch
from cases import in_threads
from tiny import draw, settings, tiny
from torch import nn

import vps
from vps import VPSConfig

MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = {
    "llama": 14, "qwen2": 14, "qwen3": 14, "mistral": 14, "gemma2": 14, "gemma3_text": 14,
    "phi3": 8, "gpt2": 8, "gpt_neox": 8, "opt": 12, "mixtral": 8,
}  # fmt: skip


@pytest.fixture
def ids():
    return draw(2, 7, seed=1)


@pytest.mark.parametrize("family", LAYERS)
@torch.no_grad()
def test_family(family, ids):
    model = tiny(family)
    before = model(ids).logits
    keys = list(model.state_dict())
    report = vps.patch(model, settings(family))
    assert len(report.patched) == LAYERS[family]
    assert ("expert" in str(report)) == (family == "mixtral")
    assert list(model.state_dict()) == keys
    sharpened = model(ids).logits
    assert not torch.allclose(sharpened, before)
    with vps.disabled(model):
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, sharpened)

    # Eager attention takes its softmax in float32, whatever the dtype of the model.
    error = 1e-6 if model.config._attn_implementation == "eager" else 1e-10
    # One sequence alone, with a batch-mate, and padded on either side.
    alone = model(ids[:1]).logits
    assert torch.allclose(sharpened[:1], alone, rtol=0, atol=error)
    pad = torch.zeros(2, 3, dtype=ids.dtype)
    real, none = torch.ones_like(ids), torch.zeros_like(pad)
    right_ids, right_mask = torch.cat([ids, pad], 1), torch.cat([real, none], 1)
    right = model(right_ids, attention_mask=right_mask).logits
    assert torch.allclose(right[:, :7], sharpened, rtol=0, atol=error)
    with vps.token_mask(right_mask.bool()):  # as lm-eval pads, without an attention mask
        said = model(right_ids).logits
        assert torch.equal(model(ids).logits, sharpened)  # other token dims: not its mask
        with vps.token_mask(torch.zeros(2, 10, dtype=torch.bool)):  # an attention mask goes first
            assert torch.equal(model(right_ids, attention_mask=right_mask).logits, right)
    assert torch.allclose(said[:, :7], sharpened, rtol=0, atol=error)
    assert not torch.allclose(model(right_ids).logits[:, :7], sharpened, rtol=0, atol=1e-3)
    left_mask = torch.cat([none, real], 1)
    left_inputs = dict(
        input_ids=torch.cat([pad, ids], 1),
        attention_mask=left_mask,
        position_ids=(left_mask.cumsum(1) - 1).clamp(min=0),
    )
    with vps.disabled(model):
        plain_left = model(**left_inputs).logits[:, 3:]
    if plain_left.isfinite().all():  # plain Gemma 2 gives NaN for left padding in float64
        assert torch.allclose(plain_left, before, rtol=0, atol=error)
        left = model(**left_inputs).logits[:, 3:]
        assert torch.allclose(left, sharpened, rtol=0, atol=error)
    else:
        assert family == "gemma2"

    vps.unpatch(model)
    assert not vps.model.patching.sharpened_layers(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_token_scope_is_causal(family, ids):
    model = tiny(family)
    vps.patch(model, settings(family, scope="token"))
    kwargs = dict(max_new_tokens=6, do_sample=False, min_new_tokens=6)
    cached = model.generate(ids, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **kwargs))
    pad, mask = torch.zeros(2, 3, dtype=ids.dtype), torch.ones(2, 10, dtype=ids.dtype)
    mask[:, :3] = 0
    left = model.generate(torch.cat([pad, ids], 1), attention_mask=mask, **kwargs)
    assert torch.equal(left[:, 3:], cached)


def test_gradient_checkpointing_sees_the_mask(ids):
    model = tiny("llama").train()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def gradient():
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, attention_mask=mask).logits.square().sum().backward()
        return embeds.grad

    vps.patch(model)
    plain = gradient()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert torch.allclose(gradient(), plain, rtol=1e-10, atol=1e-12)
    assert not vps.masking.STATE.layouts


@torch.no_grad()
def test_whole_model_compiles(ids):
    torch._dynamo.reset()
    model = tiny("llama", torch.float32)
    vps.patch(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    actual = compiled(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(actual[1], expected[1], atol=1e-4)
    assert torch.allclose(actual[0, 3:], expected[0, 3:], atol=1e-4)


@torch.no_grad()
def test_threads_share_a_model(ids):
    model = tiny("llama")
    vps.patch(model)
    batches = [ids + shift for shift in range(3)]
    expected = [model(batch).logits for batch in batches]
    with vps.disabled(model):
        plain = model(ids).logits

    @torch.no_grad()
    def same(index):
        if index == 3:
            with vps.disabled(model):
                return torch.equal(model(ids).logits, plain)
        return torch.equal(model(batches[index]).logits, expected[index])

    assert in_threads(lambda index: all(same(index) for _ in range(10)), range(4))


@torch.no_grad()
def test_patching_again_changes_the_config(ids):
    model = tiny("llama")
    plain = model(ids).logits
    vps.patch(model)
    vps.policy_state(model).record(True)
    report = vps.patch(model, VPSConfig(target_modules=["up_proj"], gamma=0.2))
    assert len(report.patched) == 2 and len(vps.model.patching.sharpened_layers(model)) == 2
    assert vps.policy_state(model).outcomes == (True,)
    assert sum(bool(m._forward_pre_hooks) for m in model.modules()) == 2
    vps.set_config(model, VPSConfig(target_modules=["up_proj"], gamma=0, adaptive_gamma=False))
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="call vps.patch"):
        vps.set_config(model, VPSConfig())


def test_matching_follows_peft():
    names = {
        (): VPSConfig(target_modules="all-linear"),
        (1,): VPSConfig(target_modules=r".*\.mlp\..*", layers_to_transform=[1]),
    }
    model = tiny("llama")
    report = vps.patch(model, names[()])
    assert len(report.patched) == 14 and "lm_head" not in report.patched
    report = vps.patch(model, names[(1,)])
    assert report.patched == tuple(f"model.layers.1.mlp.{name}" for name in MLP)
    report = vps.patch(model, VPSConfig(exclude_modules=["self_attn.q_proj", "down_proj"]))
    assert len(report.patched) == 10


def test_nothing_to_patch_is_an_error_and_changes_nothing():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="c_attn, c_fc, c_proj"):
        vps.patch(model)
    with pytest.raises(ValueError, match="no linear layer"):
        vps.patch(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no sharpened layer"):
        vps.unpatch(model)
    with pytest.raises(TypeError, match="nn.Module, got str"):
        vps.patch("llama")
    report = vps.patch(tiny("llama"))
    with pytest.raises(TypeError, match="got PatchReport; vps.patch returns a report and changes"):
        vps.unpatch(report)
    with pytest.raises(TypeError, match="VPSConfig, got dict"):
        vps.patch(model, {})
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"meta device.*\(a Linear\)"):
        vps.patch(empty, VPSConfig(target_modules=["0"]))


def test_layers_that_are_no_linear_map_are_refused():
    class Rectified(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class QuantLinear(nn.Module):  # GPTQ's, which is no nn.Linear
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

    layers = nn.Linear(4, 4), Rectified(4, 4), nn.Linear(4, 4), QuantLinear(), Projection()
    model = nn.Sequential(*layers)
    model[2].forward = lambda x: x
    with pytest.warns(UserWarning, match="4 layers were refused"):
        report = vps.patch(model, VPSConfig(target_modules=["0", "1", "2", "3", "4"]))
    assert report.patched == ("0",) and set(report.refused) == {"1", "2", "3", "4"}
    assert "not a linear map" in report.refused["1"]
    assert "replaced on the instance" in report.refused["2"]
    assert report.refused["3"] == "its type is QuantLinear, which is no supported layer"
    assert "3: its type is QuantLinear" in str(report)
    assert "its type is Projection" in report.refused["4"]
    with pytest.raises(ValueError, match="3: its type is QuantLinear"):
        vps.patch(model, VPSConfig(target_modules=["3"]))
    assert not hasattr(model[1], "_sharpened") and "forward" not in vars(model[1])


@torch.no_grad()
def test_layers_that_torch_reads_past_their_forward_are_refused():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(block, nn.Linear(16, 16))
    with pytest.warns(UserWarning, match="3 layers were refused"):
        report = vps.patch(model, VPSConfig(target_modules="all-linear"))
    assert report.patched == ("1",)
    assert "MultiheadAttention reads its weight" in report.refused["0.self_attn.out_proj"]
    for name in ("0.linear1", "0.linear2"):
        assert "TransformerEncoderLayer reads its weight" in report.refused[name]
    x = torch.randn(2, 5, 16)
    assert not torch.equal(model(x), nn.functional.linear(block(x), *model[1].parameters()))


@torch.no_grad()
def test_tied_layers():
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    vps.patch(model, VPSConfig(target_modules=["lm_head"]))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def test_copies_and_hooks_survive(ids):
    model = tiny("llama")
    calls = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    vps.patch(model)
    expected = model(ids).logits
    assert calls
    twin = copy.deepcopy(model)
    assert vps.policy_state(twin) is not vps.policy_state(model)
    assert torch.equal(twin(ids).logits, expected)
    handle.remove()
    calls.clear()
    model(ids)
    assert not calls


@torch.no_grad()
def test_save_and_load(tmp_path, ids):
    model = tiny("llama")
    vps.patch(model, VPSConfig(rank=1, adaptive_rank=False))
    vps.policy_state(model).set_entropy(1.5)
    vps.policy_state(model).record(True)
    vps.save(model, tmp_path / "vps.json")
    fresh = tiny("llama")
    vps.load(fresh, tmp_path / "vps.json")
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    text = (tmp_path / "vps.json").read_text()
    (tmp_path / "cut.json").write_text(text[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        vps.load(tiny("llama"), tmp_path / "cut.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of vps.save"):
        vps.load(tiny("llama"), tmp_path / "other.json")
    with pytest.raises(FileNotFoundError):
        vps.load(tiny("llama"), tmp_path / "missing.json")


def test_policy_state_checks():
    state = vps.PolicyState()
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="at least 0"):
            state.set_entropy(bad)
    with pytest.raises(TypeError, match="number, got str"):
        state.set_entropy("1")
    with pytest.raises(TypeError, match="bool, got int"):
        state.record(1)
    for improved in [True] + [False] * 5:
        state.record(improved)
    assert state.outcomes == (False,) * 5 and state.factor() == 0.7


@torch.no_grad()
def test_nothing_holds_activations(ids):
    import gc
    import weakref

    model = tiny("llama")
    vps.patch(model)
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, a, o: seen.extend(map(weakref.ref, (a[0], o))))
    model(ids, use_cache=False)
    gc.collect()
    assert seen and all(reference() is None for reference in seen)

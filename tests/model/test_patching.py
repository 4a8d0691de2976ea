"""patch, unpatch and friends on tiny random models of every supported family."""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import vps
from vps import VPSConfig, VPSLinear

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": (SIZES, None, 14),
    "qwen2": (SIZES, None, 14),
    "qwen3": (SIZES, None, 14),
    "mistral": (SIZES, None, 14),
    "gemma2": (SIZES, None, 14),
    "gemma3_text": (SIZES, None, 14),
    "phi3": (SIZES, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), 8),
    "gpt2": (
        dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
             bos_token_id=1, eos_token_id=2),
        ("c_attn", "c_proj", "c_fc"),
        8,
    ),
    "gpt_neox": (SIZES, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), 8),
    "opt": (
        SIZES | dict(ffn_dim=48, word_embed_proj_dim=32),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        12,
    ),
    "mixtral": (SIZES | dict(num_local_experts=2, num_experts_per_tok=1), ATTENTION, 8),
}  # fmt: skip


def tiny(family, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = FAMILIES[family][0]
    config = transformers.AutoConfig.for_model(family, **sizes)
    config._experts_implementation = "eager"  # the grouped one has no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # larger weights than initialised, so that sharpening shows
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def settings(family, **changes):
    targets = FAMILIES[family][1]
    return (
        VPSConfig(**changes) if targets is None else (VPSConfig(target_modules=targets, **changes))
    )


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family(family, ids):
    model = tiny(family)
    before = model(ids).logits
    keys = list(model.state_dict())
    report = vps.patch(model, settings(family))
    assert len(report.patched) == FAMILIES[family][2]
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


@torch.no_grad()
def test_padding_does_not_matter_in_cached_decoding(ids):
    model = tiny("llama")
    vps.patch(model)
    kwargs = dict(max_new_tokens=5, do_sample=False, min_new_tokens=5)
    plain = model.generate(ids, **kwargs)
    mask = torch.ones(2, 10, dtype=ids.dtype)
    mask[:, :3] = 0
    padded_ids = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
    padded = model.generate(padded_ids, attention_mask=mask, **kwargs)
    assert torch.equal(padded[:, 3:], plain)
    static = model.generate(
        padded_ids, attention_mask=mask, cache_implementation="static", **kwargs
    )
    assert torch.equal(static, padded)


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
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(10):
                if index == 3:
                    with vps.disabled(model):
                        same = torch.equal(model(ids).logits, plain)
                else:
                    same = torch.equal(model(batches[index]).logits, expected[index])
                if not same:
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
    with pytest.raises(TypeError, match="VPSConfig, got dict"):
        vps.patch(model, {})
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="meta device"):
        vps.patch(empty, VPSConfig(target_modules=["0"]))


def test_layers_that_are_no_linear_map_are_refused():
    class Rectified(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

    model = nn.Sequential(nn.Linear(4, 4), Rectified(4, 4), nn.Linear(4, 4), Projection())
    model[2].forward = lambda x: x
    with pytest.warns(UserWarning, match="3 layers were refused"):
        report = vps.patch(model, VPSConfig(target_modules=["0", "1", "2", "3"]))
    assert report.patched == ("0",) and set(report.refused) == {"1", "2", "3"}
    assert "not a linear map" in report.refused["1"]
    assert "replaced on the instance" in report.refused["2"]
    assert "its type is Projection" in report.refused["3"]
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
def test_shared_and_tied_layers():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    vps.patch(model, VPSConfig(target_modules=["a", "c"]))
    assert isinstance(model["a"], VPSLinear) and model["a"] is model["b"][0]
    vps.unpatch(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0]

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

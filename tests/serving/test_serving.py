"""What the plugin of vLLM computes and refuses, without vLLM (its own tests: make test-vllm)."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vps
from vps import VPSConfig, reference
from vps.serving import limits, requests
from vps.serving.requests import Run, runs, sharpen

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HEADS, KV_HEADS, SIZE, D_IN = 6, 2, 5, 37
QKV = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
PROMPTS = [7, 1, 1, 4, 1]  # tokens of each request


@pytest.fixture
def qkv():
    """Input, weight and bias of a fused layer."""
    generator = torch.Generator().manual_seed(0)
    d_out = sum(QKV)
    shapes = [(sum(PROMPTS), D_IN), (d_out, D_IN), (d_out,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_part(x, weight, bias, config):
    """The literal algorithm for each part of one request alone."""
    rows = torch.arange(len(weight)).split(QKV)
    layers = [(weight[row], bias[row]) for row in rows]
    query, key = (reference.Projection(*layer) for layer in layers[:2])
    options = dict(heads=HEADS, kv_heads=KV_HEADS, config=config)
    pair = reference.coupled_vps_linear(x, query, key, **options)
    return [*pair, reference.vps_linear(x, *layers[2], config=config)]


def by_request(x, weight, bias, config):
    """The literal algorithm for each request and each part alone."""
    parts = [by_part(piece, weight, bias, config) for piece in x.split(PROMPTS)]
    return torch.cat([torch.cat([part.y for part in own], -1) for own in parts])


def later(x, decided, weight, bias, config):
    """The literal algorithm for tokens whose prompt gave the results ``decided``."""
    outputs = []
    for row, result in zip(torch.arange(len(weight)).split(QKV), decided, strict=True):
        (group,) = result.groups
        chosen = group.I_in[: group.rank], group.I_out[: group.rank], group.core, group.gamma
        outputs.append(
            reference.held_vps_linear(x, weight[row], bias[row], *chosen, clamp=config.clamp)
        )
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_requests_of_a_batch_are_apart(qkv, scope, builder):
    config = VPSConfig(scope=scope, builder=builder, gamma=1.5, adaptive_gamma=False)
    fused = requests.split("attn.qkv_proj", QKV, PACKED, config)
    fused = requests.couple(fused, HEADS, KV_HEADS)
    starts = [0, *torch.tensor(PROMPTS).cumsum(0).tolist()]
    grouping = None if scope == "token" else runs(starts)
    y = sharpen(*qkv, fused, grouping)
    torch.testing.assert_close(y, by_request(*qkv, config), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(y, F.linear(*qkv), atol=1e-3)
    other = sharpen(*qkv, fused, [Run(1, len(qkv[0]))])
    assert torch.allclose(y, other, atol=1e-3) == (scope == "token")  # else groups matter here


@pytest.mark.parametrize("options", [{}, dict(builder="sc"), dict(clamp=0.1)])
def test_a_prompt_decides_until_its_request_finishes(qkv, options):
    x, weight, bias = qkv
    config = VPSConfig(scope="prompt", **(dict(gamma=1.5, adaptive_gamma=False) | options))
    fused = requests.couple(requests.split("attn.qkv_proj", QKV, PACKED, config), HEADS, KV_HEADS)
    decisions, decided, stacked = requests.Decisions(), {}, []
    steps = [  # tokens of each request; those in capitals start
        {"A": 5, "B": 5},
        {"a": 1, "b": 1, "C": 3},
        {"b": 1, "a": 1, "c": 1},
        {"b": 1, "a": 1, "c": 1},
        {"b": 1, "a": 7, "c": 4},  # a was stopped, c has drafts
    ]
    for step in steps:
        tokens = {name.lower(): length for name, length in step.items()}
        x = torch.randn(sum(tokens.values()), D_IN, dtype=torch.float64)
        grouping = decisions.runs(tokens, tokens, {name.lower() for name in step if name.isupper()})
        stacked.append(grouping[0].decision)
        want = []
        for name, piece in zip(step, x.split(list(tokens.values())), strict=True):
            if name.isupper():
                decided[name.lower()] = by_part(piece, weight, bias, config)
                want.append(torch.cat([part.y for part in decided[name.lower()]], -1))
            else:
                want.append(later(piece, decided[name], weight, bias, config))
        y = sharpen(x, weight, bias, fused, grouping)
        torch.testing.assert_close(y, torch.cat(want), rtol=1e-9, atol=1e-9)
    assert stacked[3] is stacked[2] is not stacked[1]  # put together once
    with pytest.raises(RuntimeError, match="a part of a prompt"):
        decisions.runs(["d"], {"d": 2}, {"e"})
    decisions.finish({"a", "unknown"})
    assert set(decisions.of) == {"b", "c"}
    assert decisions.runs(["a"], {"a": 2}, {"a"})[0].decision == {}
    decisions.finish({"a", "b", "c"})
    assert decisions.of == decisions.stacked == {}


def test_a_layer_decides_once(qkv):
    config = VPSConfig(scope="prompt")
    fused = requests.split("attn.qkv_proj", QKV, PACKED, config)
    assert fused.name == "attn.qkv_proj"
    grouping = requests.Decisions().runs("a", {"a": len(qkv[0])}, {"a"})
    sharpen(*qkv, fused, grouping)
    with pytest.raises(RuntimeError, match="attn.qkv_proj is called several times"):
        sharpen(*qkv, fused, grouping)


def test_decisions_in_both_forms(qkv):
    """A prompt whose edited x would round too much keeps the form of SPEC 4, with others."""
    x, weight, bias = qkv
    config = VPSConfig(scope="prompt", gamma=1.5, adaptive_gamma=False)
    fused = requests.split("attn.qkv_proj", QKV, PACKED, config)
    decisions = requests.Decisions()
    sharpen(x, weight, bias, fused, decisions.runs("ab", dict(a=7, b=7), {"a", "b"}))

    def both():
        return sharpen(x[:2], weight, bias, fused, decisions.runs("ab", dict(a=1, b=1), set()))

    want = both()
    layer = decisions.of["a"][fused.name]
    layer[:] = [part._replace(through=None) for part in layer]
    decisions.stacked.clear()
    torch.testing.assert_close(both(), want, rtol=1e-9, atol=1e-9)


def test_parts_that_are_not_named_stay_plain(qkv):
    x, weight, bias = qkv
    config = VPSConfig(target_modules=["k_proj"], scope="token", gamma=1.0, adaptive_gamma=False)
    fused = requests.split("attn.qkv_proj", QKV, PACKED, config)
    got = sharpen(x, weight, bias, fused, None).split(QKV, -1)
    rows = torch.arange(len(weight)).split(QKV)
    for index in (0, 2):
        plain = F.linear(x.unsqueeze(1), weight[rows[index]], bias[rows[index]]).squeeze(1)
        assert torch.equal(got[index], plain)
    k = vps.vps_linear(x, weight[rows[1]], bias[rows[1]], config)
    torch.testing.assert_close(got[1], k)


def test_no_tokens(qkv):
    x, weight, bias = qkv
    fused = requests.split("attn.qkv_proj", QKV, PACKED, VPSConfig())
    for grouping in (None, []):
        assert sharpen(x[:0], weight, bias, fused, grouping).shape == (0, sum(QKV))
    with pytest.raises(RuntimeError, match="14 tokens came for requests of 12 tokens"):
        sharpen(x, weight, bias, fused, [Run(3, 4)])


def test_runs():
    assert runs([0, 7, 8, 9, 13, 14]) == [Run(1, 7), Run(2, 1), Run(1, 4), Run(1, 1)]
    assert runs([0, 1, 2, 3, 3, 3]) == [Run(3, 1)]
    assert runs([0, 4, 8]) == [Run(2, 4)]
    assert runs([0]) == []


def test_split():
    config = VPSConfig(target_modules=["q_proj", "k_proj", "up_proj", "o_proj", "qkv_proj"])

    def split(name, sizes, packed=PACKED):
        fused = requests.split(name, sizes, packed, config)
        return fused and [(part.start, part.stop, part.sharpened) for part in fused.parts]

    assert split("m.0.qkv_proj", [8, 4, 4]) == [(0, 8, True), (8, 12, True), (12, 16, False)]
    assert split("m.0.gate_up_proj", [6, 6]) == [(0, 6, False), (6, 12, True)]
    assert split("m.0.o_proj", [8]) == [(0, 8, True)]
    assert split("m.0.down_proj", [8]) is None
    # One layer in the model's own files, as in Phi-3.
    assert split("m.0.qkv_proj", [8, 4, 4], {"qkv_proj": ["qkv_proj"]}) == [(0, 16, True)]
    assert split("o_proj", [3]) == [(0, 3, True)]
    with pytest.raises(ValueError, match="cannot sharpen m.0.qkv_proj: it is made of 3 layers, q_"):
        split("m.0.qkv_proj", [8, 8])
    assert split("m.0.other", [1, 2], {"other": ["a", "b", "c"]}) is None


def test_layers_and_exclusions_by_the_names_of_the_parts():
    config = VPSConfig(
        target_modules=r"m\.\d\.(q|v)_proj", exclude_modules=["1.v_proj"], layers_to_transform=[1]
    )
    assert requests.split("m.0.qkv_proj", [2, 2, 2], PACKED, config) is None
    fused = requests.split("m.1.qkv_proj", [2, 2, 2], PACKED, config)
    assert [part.sharpened for part in fused.parts] == [True, False, False]


def test_couple():
    fused = requests.split("qkv_proj", QKV, PACKED, VPSConfig())
    coupled = requests.couple(fused, HEADS, KV_HEADS)
    assert coupled.heads == (HEADS, KV_HEADS) and coupled.parts == fused.parts
    assert "one size" in requests.couple(fused, HEADS, 1)
    only_v = requests.split("qkv_proj", QKV, PACKED, VPSConfig(target_modules=["v_proj"]))
    assert "not both sharpened" in requests.couple(only_v, HEADS, KV_HEADS)
    assert "not made of separate" in requests.couple(
        requests.split("qkv_proj", QKV, {}, VPSConfig(target_modules=["qkv_proj"])), HEADS, KV_HEADS
    )


def test_fused_as_text():
    config = VPSConfig(tau=None, clamp=0.25, layers_to_transform=[0, 1], rank_bounds=(2, 3))
    fused = requests.couple(requests.split("m.1.qkv_proj", QKV, PACKED, config), HEADS, KV_HEADS)
    again = requests.Fused.from_json(fused.to_json())
    assert again == fused and again.config == config
    assert requests.Fused.from_json(fused.to_json()) is again  # made once


def test_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("VPS_CONFIG", raising=False)
    assert limits.config_from_environment() == VPSConfig()
    monkeypatch.setenv("VPS_CONFIG", '{"gamma": 0.25, "scope": "token"}')
    assert limits.config_from_environment() == VPSConfig(gamma=0.25, scope="token")
    file = tmp_path / "settings.json"
    monkeypatch.setenv("VPS_CONFIG", str(file))
    file.write_text(VPSConfig(rank=3).to_json())
    assert limits.config_from_environment() == VPSConfig(rank=3)
    model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(3, 3)})
    vps.patch(model, VPSConfig(rank=5))
    vps.save(model, file)
    assert limits.config_from_environment() == VPSConfig(rank=5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object, got list"),
        ('{"gama": 1}', "unknown key 'gama'; did you mean 'gamma'"),
        ('{"gamma": "x"}', "VPSConfig.gamma is 'x', expected a finite number"),
        ('{"rank": 0}', "VPSConfig.rank is 0, expected 1 to 64"),
        ('{"scope": "batch"}', "scope='batch' would let the requests"),
        (
            '{"format": "vps-settings-1", "config": {}, "entropy": 1.0, "outcomes": []}',
            "an entropy or outcomes",
        ),
    ],
)
def test_bad_settings(monkeypatch, tmp_path, text, said):
    file = tmp_path / "settings.json"
    file.write_text(text)
    monkeypatch.setenv("VPS_CONFIG", str(file))
    with pytest.raises(ValueError) as caught:
        limits.config_from_environment()
    assert str(caught.value).startswith(f"VPS_CONFIG={file}: ") and said in str(caught.value)
    if text.startswith("{"):
        monkeypatch.setenv("VPS_CONFIG", text)
        with pytest.raises(ValueError) as caught:
            limits.config_from_environment()
        assert str(caught.value).startswith("VPS_CONFIG: ") and said in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_settings_that_cannot_be_read(monkeypatch, tmp_path, content):
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("VPS_CONFIG", str(file))
    with pytest.raises(ValueError, match="expected the path of a JSON file, or a JSON object"):
        limits.config_from_environment()


def engine(**changes):
    """What the checks read of a VllmConfig, as it is by default."""
    values = dict(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        use_ubatching=False,
        is_multimodal_model=False,
        is_encoder_decoder=False,
        runner_type="generate",
        cudagraph_mode=SimpleNamespace(name="NONE"),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
    )
    everything = SimpleNamespace(**(values | changes))
    for name in ("parallel_config", "model_config", "compilation_config"):
        setattr(everything, name, everything)
    return everything


ALWAYS = {
    "--tensor-parallel-size": dict(tensor_parallel_size=2),
    "--pipeline-parallel-size": dict(pipeline_parallel_size=2),
    "--enable-lora": dict(lora_config=object()),
}
WITH_SEQUENCES = {
    "speculative decoding": dict(speculative_config=SimpleNamespace(method="eagle")),
    "--kv-transfer-config": dict(kv_transfer_config=object()),
    "context parallelism": dict(prefill_context_parallel_size=2),
    "--enable-dbo": dict(use_ubatching=True),
    "only text generation": dict(is_multimodal_model=True),
    "by a decoder": dict(runner_type="pooling"),
    "--enforce-eager": dict(cudagraph_mode=SimpleNamespace(name="PIECEWISE")),
}


@pytest.mark.parametrize("said", [*ALWAYS, *WITH_SEQUENCES])
def test_engines_that_are_refused(said):
    changed = engine(**(ALWAYS | WITH_SEQUENCES)[said])
    with pytest.raises(ValueError, match="vps cannot sharpen this engine") as caught:
        limits.check(changed, VPSConfig(), True)
    assert said in str(caught.value)
    if said in WITH_SEQUENCES:
        assert "scope='sequence'" in str(caught.value)
        with pytest.raises(ValueError, match=f"scope='prompt': [^;]*{said}"):
            limits.check(changed, VPSConfig(scope="prompt"), True)
        limits.check(changed, VPSConfig(scope="token"), False)
    else:
        with pytest.raises(ValueError, match=said):
            limits.check(changed, VPSConfig(scope="token"), False)


def test_engines_that_are_accepted():
    limits.check(engine(), VPSConfig(), True)
    limits.check(engine(), VPSConfig(scope="token"), False)
    with pytest.raises(ValueError, match=f"--scheduler-cls {limits.SCHEDULER}"):
        limits.check(engine(), VPSConfig(), False)


def test_engines_that_a_prompt_scope_tells_apart():
    prompt = VPSConfig(scope="prompt")
    ngram = dict(speculative_config=SimpleNamespace(method="ngram"))
    limits.check(engine(**ngram), prompt, True)
    with pytest.raises(ValueError, match="several tokens of an answer"):
        limits.check(engine(**ngram), VPSConfig(), True)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        limits.check(engine(use_v2_model_runner=True), prompt, True)
    limits.check(engine(use_v2_model_runner=True), VPSConfig(), True)
    with pytest.raises(ValueError, match=f"scope='prompt': [^;]*{limits.SCHEDULER}"):
        limits.check(engine(), prompt, False)


@pytest.mark.parametrize(
    ("concurrency", "wanted", "running"),
    [(None, 8, 8), (100.5, 8, 8), (3.25, 8, 3), (3.0, 8, 2), (8.0, 8, 7), (1.0, 8, 1), (0.5, 8, 1)],
)
def test_running_requests(concurrency, wanted, running):
    """Block 0 stays unused: with room for exactly three, one block is missing for the third."""
    assert limits.running_requests(concurrency, wanted) == running

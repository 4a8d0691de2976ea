"""Heads have one token a sequence; layers whose sequences are not known are refused (SPEC §2)."""

import importlib

import pytest
import torch
import transformers
from tiny import BART, BERT, CLOSE, SPECIAL, T5, draw, made, seeded
from torch import nn

import vps
from vps import VPSConfig, masking

VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8,
    patch_size=4,
)  # fmt: skip
CLASSIFIERS = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": dict(SPECIAL, dim=32, hidden_dim=48, n_layers=1, n_heads=4),
    "fnet": BERT,  # takes no attention mask
    "xlnet": dict(SPECIAL, d_model=32, n_layer=1, n_head=4, d_inner=48),  # tokens [T, B]
    "bart": BART,  # whose head runs while the tokens of the decoder are not known
    "t5": T5,
}


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("scope", ["sequence", "token"])
@torch.no_grad()
def test_heads_of_a_batch_give_what_they_give_alone(family, scope):
    auto = transformers.AutoModelForSequenceClassification
    model, ids = made(auto, family, CLASSIFIERS[family]), draw(3, 7)
    ids[:, -1] = 2
    plain = model(ids).logits
    vps.patch(model, VPSConfig(target_modules="all-linear", scope=scope))
    found = model(ids).logits
    assert not torch.allclose(found, plain)
    expected = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(found, expected, **CLOSE)
    if family in ("bert", "distilbert", "roberta"):
        more, mask = nn.functional.pad(ids, (0, 2)), nn.functional.pad(ids * 0 + 1, (0, 2))
        padded = model(more, attention_mask=mask).logits
        torch.testing.assert_close(padded, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["vit", "dinov2", "beit"])
@torch.no_grad()
def test_heads_of_images(family):
    model = made(transformers.AutoModelForImageClassification, family, VISION)
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=seeded())
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    expected = torch.cat([model(pixel_values=one[None]).logits for one in pixels])
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, **CLOSE)


@torch.no_grad()
def test_heads_of_fewer_images_than_texts():
    sizes = dict(text_config=BERT, vision_config=VISION, projection_dim=16)
    model = made(transformers.AutoModel, "clip", sizes)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded())
    ids = draw(3, 7)
    ids[:, -1] = 95  # where text is pooled
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    found = model(input_ids=ids, pixel_values=pixels).logits_per_text
    expected = [
        [model(input_ids=text[None], pixel_values=one[None]).logits_per_text for one in pixels]
        for text in ids
    ]
    expected = torch.cat([torch.cat(row, 1) for row in expected])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


PATCHES = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=2)
TOWERS = {
    "qwen2_5_vl": dict(out_hidden_size=32, window_size=8, fullatt_block_indexes=[1]),
    "qwen3_vl": dict(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]),
}
# transformers 5.17 has no AutoModel of the first.
TOWER_CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
}


@pytest.mark.parametrize("family", TOWERS)
@torch.no_grad()
def test_images_of_one_row_of_patches(family):
    """Their tower is given ``[n, d]``, merges four patches to one, and may order them anew."""
    sizes = PATCHES | TOWERS[family]
    whole = transformers.AutoConfig.for_model(family, vision_config=sizes).vision_config
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    tower = made(getattr(modeling, TOWER_CLASSES[family]), None, whole)
    grid = torch.tensor([[1, 4, 6], [1, 8, 4], [2, 4, 4]])
    sizes = grid.prod(1).tolist()
    patches = torch.randn(sum(sizes), 24, dtype=torch.float64, generator=seeded())
    vps.patch(tower, VPSConfig(target_modules="all-linear"))

    def merged(patches, grid):
        return tower(patches, grid_thw=grid).pooler_output

    expected = [merged(*one) for one in zip(patches.split(sizes), grid[:, None], strict=True)]
    torch.testing.assert_close(merged(patches, grid), torch.cat(expected), **CLOSE)


class TimeFirst(nn.Module):
    """Gives its layer tokens [T, B], as XLNet, FSMT and Longformer do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj = nn.Embedding(96, 8), nn.Linear(8, 8)
        self.double()

    def forward(self, input_ids, attention_mask=None):
        return self.proj(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_tokens_before_rows(rows):
    model, ids = TimeFirst(), draw(rows, 6)
    config = VPSConfig(target_modules=("proj",))
    vps.patch(model, config)
    more, mask = nn.functional.pad(ids, (0, 3)), nn.functional.pad(ids * 0 + 1, (0, 3))
    x = model.embed(ids)
    torch.testing.assert_close(model(more, attention_mask=mask)[:, :6], model.proj(x), **CLOSE)
    with vps.capture(model) as captured:
        y = model(more, attention_mask=mask)[mask.bool()]
        torch.testing.assert_close(captured["proj"].output_mean, y.mean(0), **CLOSE)
    vps.set_config(model, config.replace(scope="batch"))
    found = model(more, attention_mask=mask)[:, :6]
    torch.testing.assert_close(found, model.proj(x.flatten(0, 1)).view(x.shape), **CLOSE)


@torch.no_grad()
def test_a_compiled_head():
    auto = transformers.AutoModelForSequenceClassification
    model = made(auto, "bert", BERT | dict(num_hidden_layers=1))
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    ids = draw(3, 7)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)


# Layers whose tokens' sequences cannot be known.


class Routed(nn.Module):
    """A mixture in the style of models with remote code; ``how`` says what holds its experts."""

    def __init__(self, how):
        super().__init__()
        made_ = [nn.Sequential() for _ in range(2)]
        for one in made_:
            one.add_module("up_proj", nn.Linear(8, 8))
        self.gate = nn.Linear(8, 2)
        self.shared_experts = nn.ModuleList([nn.Linear(8, 8)])
        if how == "numbered":
            self.expert_0, self.expert_1 = made_
        elif how == "dict":
            self.local_experts = nn.ModuleDict({"a": made_[0], "b": made_[1]})
        else:
            setattr(self, how, nn.ModuleList(made_))
        self.held = lambda: made_

    def forward(self, x):
        flat = x.reshape(-1, 8)
        best = self.gate(flat).argmax(-1)
        y = self.shared_experts[0](flat)
        for number, expert in enumerate(self.held()):
            chosen = (best == number).nonzero().view(-1)
            y = y.index_add(0, chosen, expert(flat[chosen]))
        return y.view(x.shape)


class SparseMoE(Routed):
    pass


class Mixture(nn.Module):
    def __init__(self, how="experts", cls=Routed):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": cls(how), "q_proj": nn.Linear(8, 8)})])
        self.double()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.layers[0]["mlp"](self.layers[0]["q_proj"](x))


HOW = [("experts", Routed), ("dict", Routed), ("numbered", Routed), ("mlps", SparseMoE)]


@pytest.mark.parametrize("how, cls", HOW)
@pytest.mark.parametrize("scope", ["sequence", "batch"])
@torch.no_grad()
def test_experts_are_refused_by_name(how, cls, scope):
    model, ids = Mixture(how, cls), draw(2, 9)
    config = VPSConfig(target_modules="all-linear", scope=scope)
    with pytest.warns(UserWarning, match="2 layers were refused: .*an expert, whose tokens"):
        report = vps.patch(model, config)
    assert len(report.refused) == 2 and all(
        "scope='token'" in why for why in report.refused.values()
    )
    names = ["layers.0.mlp.gate", "layers.0.mlp.shared_experts.0", "layers.0.q_proj"]
    assert sorted(report.patched) == names
    if scope == "sequence":
        more, mask = nn.functional.pad(ids, (0, 3)), nn.functional.pad(ids * 0 + 1, (0, 3))
        torch.testing.assert_close(model(more, attention_mask=mask)[:, :9], model(ids), **CLOSE)
        torch.testing.assert_close(model(ids)[:1], model(ids[:1]), **CLOSE)


@pytest.mark.parametrize("how, cls", HOW)
@torch.no_grad()
def test_experts_are_sharpened_under_scope_token(how, cls):
    model, ids = Mixture(how, cls), draw(2, 9)
    config = VPSConfig(target_modules="all-linear", scope="token")
    report = vps.patch(model, config)
    assert not report.refused and len(report.patched) == 5
    before = model(ids)
    torch.testing.assert_close(before[1:], model(ids[1:]), **CLOSE)
    with pytest.raises(ValueError, match=r"scope must be 'token' while layers.0.mlp.\w+.* is shar"):
        vps.set_config(model, config.replace(scope="sequence"))
    assert torch.equal(model(ids), before)
    with pytest.warns(UserWarning, match="refused"):
        vps.patch(model, config.replace(scope="sequence"))
    vps.set_config(model, config)  # the experts stay plain
    assert len(vps.model.patching.sharpened_layers(model)) == 3


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
@torch.no_grad()
def test_mixtures_of_transformers(family):
    if family == "nllb-moe":
        sizes = BART | dict(num_experts=4, expert_capacity=64, encoder_sparse_step=1)
        sizes |= dict(decoder_sparse_step=1, router_jitter_noise=0.0)
    else:
        sizes = T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
        sizes |= dict(num_decoder_layers=1, router_jitter_noise=0.0)
    model = made(transformers.AutoModelForSeq2SeqLM, family, sizes)
    for module in model.modules():
        if type(module).__name__.endswith("Router"):  # in float32 orders of sums would show
            module.dtype = torch.float64
    with pytest.warns(UserWarning, match="an expert, whose tokens"):
        report = vps.patch(model, VPSConfig(target_modules="all-linear"))
    assert all("experts.expert_" in name for name in report.refused)
    assert not any("experts.expert_" in name for name in report.patched)
    ids, answer = draw(3, 7), draw(3, 5)
    found = model(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits
    expected = [
        model(input_ids=i[None], decoder_input_ids=a[None], use_cache=False).logits
        for i, a in zip(ids, answer, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_an_evaluation_keeps_experts_to_scope_token():
    from vps.evaluation.controls import configured
    from vps.evaluation.lm import scoped

    model = Mixture()
    config = VPSConfig(target_modules="all-linear", scope="token")
    vps.patch(model, config)
    with pytest.raises(ValueError, match="evaluation: scope must be 'token'"):
        with scoped(model, "sequence"):
            pass
    with pytest.warns(UserWarning, match="refused"):
        with configured(model, config.replace(scope="sequence")):  # without them
            assert len(vps.model.patching.sharpened_layers(model)) == 3
            with scoped(model, "token"):
                assert len(vps.model.patching.sharpened_layers(model)) == 3
    assert len(vps.model.patching.sharpened_layers(model)) == 5


class Gathered(nn.Module):
    """Gives its layer some of the tokens, under a name that does not tell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj = nn.Embedding(96, 8), nn.Linear(8, 8)
        self.double()

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.proj(self.embed(input_ids)[input_ids > 20])


@torch.no_grad()
def test_tokens_gathered_from_several_sequences_raise():
    model, ids = Gathered(), draw(2, 9)
    ids[0, :5] = 3
    vps.patch(model, VPSConfig(target_modules=("proj",)))
    with pytest.raises(
        ValueError, match=r"x must show which of its tokens .* Gathered, which runs"
    ):
        model(ids)
    assert not masking.STATE.layouts
    with pytest.raises(ValueError, match="got scope='sequence'"):  # two sequences in one row
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    alone = model(ids[:1])  # one sequence
    with vps.disabled(model):
        plain = model(ids)
    assert not torch.allclose(alone, plain[: len(alone)])
    vps.set_config(model, VPSConfig(target_modules=("proj",), scope="token"))
    torch.testing.assert_close(model(ids)[: len(alone)], model(ids[:1]), **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_heads_of_several_choices(count):
    model = made(transformers.AutoModelForMultipleChoice, "bert", BERT)
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    ids = draw(count, 3, 7)
    found = model(ids, attention_mask=torch.ones_like(ids)).logits.flatten()
    alone = torch.cat([model(each[None, None]).logits.flatten() for each in ids.flatten(0, 1)])
    torch.testing.assert_close(found, alone, **CLOSE)


class Wrapper(nn.Module):
    """A model of somebody's, whose arguments have names of their own."""

    def __init__(self):
        super().__init__()
        self.encoder = made(transformers.AutoModel, "bert", BERT)
        self.head = nn.Linear(32, 5).double()

    def forward(self, batch):
        return self.head(self.encoder(**batch).last_hidden_state[:, 0])


@torch.no_grad()
def test_heads_of_a_module_around_a_model():
    model = Wrapper().eval()
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    ids = draw(3, 7)
    found = model({"input_ids": ids})
    alone = torch.cat([model({"input_ids": row[None]}) for row in ids])
    torch.testing.assert_close(found, alone, **CLOSE)
    vps.unpatch(model)
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize(
    ("kind", "key"), [("TinyMoE", "decoder_layers"), ("Net", "expert_heads"), ("Experts", "stacks")]
)
def test_a_stack_of_blocks_is_no_list_of_experts(kind, key):
    model = type(kind, (nn.Module,), {})()
    setattr(model, key, nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
    assert len(vps.patch(model, VPSConfig(target_modules="all-linear")).patched) == 2

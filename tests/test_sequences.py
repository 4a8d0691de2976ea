"""What a sequence is inside a patched model (SPEC §2): packed rows, heads and experts."""

import pytest
import torch
import transformers
from torch import nn

import vps
from vps import VPSConfig, capture, masking, statistics
from vps.evaluation import controls

SPECIAL = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
BERT = dict(
    SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
BART = dict(
    SPECIAL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    SPECIAL, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
LENGTHS = (5, 3, 7)
CLOSE = dict(rtol=1e-9, atol=1e-10)


def made(auto, family, sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = auto.from_config(config).double().eval()
    with torch.no_grad():  # larger weights than initialised, so that sharpening shows
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def llama(**settings):
    model = made(transformers.AutoModelForCausalLM, "llama", LLAMA)
    vps.patch(model, VPSConfig(**settings))
    return model


def draw(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(sum(shape)))


def sequences(lengths=LENGTHS):
    return [draw(1, length) for length in lengths]


def packed(rows, **more):
    """One row of all, with positions that start again."""
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    return dict(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False, **more)


def alone(model, rows):
    return torch.cat([model(row, use_cache=False).logits for row in rows], 1)


# Rows packed from several sequences.


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1), (9, 1), (2, 30, 1, 1, 8)])
@pytest.mark.parametrize("builder", ["sk", "sc", "random"])
@torch.no_grad()
def test_a_packed_row_gives_what_its_sequences_give_alone(lengths, builder):
    model, rows = llama(builder=builder, target_modules="all-linear"), sequences(lengths)
    found = model(**packed(rows)).logits
    torch.testing.assert_close(found, alone(model, rows), **CLOSE)
    assert not masking.STATE.layouts


@pytest.mark.parametrize("changes", [dict(qk_coupling=False), dict(scope="token"), dict(clamp=0.1)])
@torch.no_grad()
def test_of_every_setting(changes):
    model, rows = llama(**changes), sequences()
    torch.testing.assert_close(model(**packed(rows)).logits, alone(model, rows), **CLOSE)


@torch.no_grad()
def test_the_batch_scope_takes_all_together():
    model, rows = llama(scope="batch"), sequences()
    layer = model.model.layers[0].self_attn.v_proj
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(**packed(rows))
    torch.testing.assert_close(layer(seen[0][0]), seen[0][1], **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@torch.no_grad()
def test_by_every_backend(backend):
    if vps.backends()[backend] is not None:
        pytest.skip(vps.backends()[backend])
    model, rows = llama().float(), sequences()
    with vps.backend("reference"):
        expected = alone(model, rows)
    with vps.backend(backend):
        torch.testing.assert_close(model(**packed(rows)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("said", ["cu_seq_lens_q", "cu_seqlens", "list", "seq_idx"])
@torch.no_grad()
def test_other_ways_to_say_it(said):
    """The attention is that of the mask; each token sees its own sequence."""
    model, rows = llama(), sequences()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    own = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    allowed = (own[:, None] == own) & torch.ones(15, 15).tril().bool()
    given = packed(rows, attention_mask=allowed[None, None])
    given["position_ids"] = given["position_ids"] + 4 * own  # do not start again
    expected = torch.cat(
        [
            model(
                row, position_ids=torch.arange(row.shape[1])[None] + 4 * i, use_cache=False
            ).logits
            for i, row in enumerate(rows)
        ],
        1,
    )
    shifted = expected
    names = {"list": ("cu_seq_lens_q", ends.tolist()), "seq_idx": ("seq_idx", own[None].int())}
    name, value = names.get(said, (said, ends.int()))
    found = model(**given, **{name: value}).logits
    torch.testing.assert_close(found, shifted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bounds", [[0, 9, 5, 15], [1, 15], [0, 16], []])
@torch.no_grad()
def test_bounds_that_do_not_fit(bounds):
    model = llama()
    with pytest.raises(ValueError, match="cu_seq_lens must rise from 0 to at most 15"):
        model(**packed(sequences()), cu_seq_lens_q=torch.tensor(bounds))
    vps.set_config(model, VPSConfig(scope="token"))  # asks for none
    model(**packed(sequences()), cu_seq_lens_q=torch.tensor(bounds))


@torch.no_grad()
def test_two_packed_rows_one_of_which_is_padded():
    model, rows = llama(), sequences((5, 3, 4, 3))
    expected = [alone(model, rows[:2]), alone(model, rows[2:])]
    positions = [packed(two)["position_ids"] for two in (rows[:2], rows[2:])]
    pad = torch.zeros(1, 1, dtype=torch.int64)
    ids = torch.cat([torch.cat(rows[:2], 1), torch.cat([*rows[2:], pad], 1)])
    positions = torch.cat([positions[0], torch.cat([positions[1], pad], 1)])
    found = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found[:1], expected[0], **CLOSE)
    torch.testing.assert_close(found[1:, :-1], expected[1], **CLOSE)


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_splits_nothing(side, fill):
    """Positions of padding may repeat or be any."""
    model, ids = llama(), draw(2, 6)
    expected = model(ids).logits
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 1)}[side]
    mask = nn.functional.pad(torch.ones_like(ids), (left, right))
    positions = (mask.cumsum(1) - 1).clamp(min=0).masked_fill(mask == 0, fill)
    given = nn.functional.pad(ids, (left, right))
    found = model(given, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:, left : left + 6], expected, **CLOSE)


@torch.no_grad()
def test_a_token_left_out_in_the_middle_splits_nothing():
    model, ids = llama(), draw(1, 6)
    mask = torch.tensor([[1, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    layer, seen = model.model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(ids, attention_mask=mask, position_ids=positions)
    with vps.token_mask(mask.bool()):
        torch.testing.assert_close(layer(seen[0][0]), seen[0][1], **CLOSE)


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_positions_of_images_split_nothing(first):
    """Qwen-VL: [3, B, T], or the text's before them."""
    model, rows = llama(), sequences()
    text = packed(rows)["position_ids"]
    layer, seen = model.model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.layer(model.model.embed_tokens(input_ids))

    outer = Outer()
    vps.attention_mask.attach(outer)
    ids = torch.cat(rows, 1)
    outer(ids, position_ids=text.expand(3 + first, 1, 15))
    x, y = seen[0]
    expected = layer(x)
    if first:
        expected = torch.cat([layer(part) for part in x.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize("checkpoint", [None, True, False])
def test_gradients_of_a_packed_row(checkpoint):
    model, rows = llama().train(), sequences()
    embeds = [model.get_input_embeddings()(row).detach().requires_grad_() for row in rows]

    def gradients(ys):
        model.zero_grad()
        loss = sum((y * y).sum() for y in ys)
        found = torch.autograd.grad(loss, [*embeds, *model.parameters()], allow_unused=True)
        return [g for g in found if g is not None]

    expected = gradients([model(inputs_embeds=e, use_cache=False).logits for e in embeds])
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    given = packed(rows)
    del given["input_ids"]
    ys = model(inputs_embeds=torch.cat(embeds, 1), **given).logits.split(LENGTHS, 1)
    if checkpoint:  # reentrant ones work with backward alone
        model.zero_grad()
        sum((y * y).sum() for y in ys).backward()
        found = [*(e.grad for e in embeds), *(p.grad for p in model.parameters())]
        found = [g for g in found if g is not None]
    else:
        found = gradients(ys)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["weight norm", "lora"])
def test_layers_without_a_plain_weight(kind):
    model = made(transformers.AutoModelForCausalLM, "llama", LLAMA)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(
            target_modules=["q_proj", "k_proj", "up_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(model, lora).double().eval()
    else:
        for layer in (one for one in model.modules() if isinstance(one, nn.Linear)):
            nn.utils.parametrizations.weight_norm(layer)
    report = vps.patch(model)
    assert any(form.startswith("opaque") for form in report.forms.values())
    rows = sequences()
    ys = [model(row, use_cache=False).logits for row in rows]
    found = model(**packed(rows)).logits
    torch.testing.assert_close(found, torch.cat(ys, 1), rtol=1e-8, atol=1e-9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum((y * y).sum() for y in ys), parameters, allow_unused=True)
    gradients = torch.autograd.grad((found * found).sum(), parameters, allow_unused=True)
    for one, other in zip(gradients, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["random_indices", "random_noise", "shuffled_selection"])
@torch.no_grad()
def test_controls_keep_packed_sequences_apart(name):
    model, rows = llama(), sequences()
    with controls.control(model, name, seed=3):
        torch.testing.assert_close(model(**packed(rows)).logits, alone(model, rows), **CLOSE)


@torch.no_grad()
def test_statistics_and_means_of_a_packed_row():
    model, rows = llama(), sequences()

    def seen(*calls):
        with statistics.observe(model) as observed, capture(model) as captured:
            for given in calls:
                model(**given)
            means = {name: one.output_mean for name, one in captured.items()}
            energies = {}
            for one in observed:
                energies.setdefault(one.name, []).append(one.energy)
            return {name: torch.cat(parts).sort().values for name, parts in energies.items()}, means

    found = seen(packed(rows))
    expected = seen(*(dict(input_ids=row, use_cache=False) for row in rows))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_fitted_forms_keep_packed_sequences_apart():
    from vps.fitting.forms import Sharpening

    model, rows = llama(scope="sequence"), sequences()
    form = Sharpening(model, list(vps.patching.sharpened_layers(model)), False)
    form.values.fill_(0.4)
    with form.applied():
        torch.testing.assert_close(model(**packed(rows)).logits, alone(model, rows), **CLOSE)
        with torch.enable_grad():
            found = model(**packed(rows)).logits
        torch.testing.assert_close(found.detach(), alone(model, rows), **CLOSE)


@torch.no_grad()
def test_positions_are_read_once_a_call(monkeypatch):
    from vps import packing

    made_, read = [], packing.Packed._from_positions
    monkeypatch.setattr(
        packing.Packed, "_from_positions", lambda self, ids: (made_.append(1), read(self, ids))[1]
    )
    model = llama()
    model(**packed(sequences()))
    assert len(made_) == 1
    with vps.disabled(model):
        model(**packed(sequences()))
    vps.set_config(model, VPSConfig(scope="token"))
    model(**packed(sequences()))
    assert len(made_) == 1  # nobody asks


@torch.no_grad()
def test_a_compiler_reads_no_positions_but_says_so_of_bounds():
    model, rows = llama(), sequences()
    expected = model(**packed(rows)).logits
    compiled = torch.compile(model, backend="eager")
    padded = dict(input_ids=draw(2, 6), position_ids=torch.arange(6)[None], use_cache=False)
    torch.testing.assert_close(compiled(**padded).logits, model(**padded).logits, **CLOSE)
    with pytest.raises(Exception, match="cannot be read inside torch.compile"):
        compiled(**packed(rows), cu_seq_lens_q=torch.tensor([0, 5, 8, 15]))
    torch.testing.assert_close(model(**packed(rows)).logits, expected)
    assert not masking.STATE.layouts


@pytest.mark.parametrize("scope", ["sequence", "token"])
@torch.no_grad()
def test_continuous_batching_keeps_requests_apart(scope):
    if not hasattr(transformers.GenerationMixin, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    model = made(transformers.AutoModelForCausalLM, "llama", LLAMA).float()
    vps.patch(model, VPSConfig(scope=scope))
    rows = sequences()
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(row, **settings)[0, row.shape[1] :].tolist() for row in rows]
    answers = model.generate_batch(
        inputs=[row[0].tolist() for row in rows],
        generation_config=transformers.GenerationConfig(**settings),
        progress_bar=False,
    )
    found = [answers[name].generated_tokens for name in sorted(answers)]
    assert found == expected


# Poolers and heads, which are given one vector a row.

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
    pixels = torch.randn(
        3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    expected = torch.cat([model(pixel_values=one[None]).logits for one in pixels])
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, **CLOSE)


@torch.no_grad()
def test_heads_of_fewer_images_than_texts():
    sizes = dict(text_config=BERT, vision_config=VISION, projection_dim=16)
    model = made(transformers.AutoModel, "clip", sizes)
    pixels = torch.randn(
        2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    ids = draw(3, 7)
    ids[:, -1] = 63  # where text is pooled
    vps.patch(model, VPSConfig(target_modules="all-linear"))
    found = model(input_ids=ids, pixel_values=pixels).logits_per_text
    expected = [
        [model(input_ids=text[None], pixel_values=one[None]).logits_per_text for one in pixels]
        for text in ids
    ]
    expected = torch.cat([torch.cat(row, 1) for row in expected])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_compiled_head():
    model = made(transformers.AutoModelForSequenceClassification, "bert", BERT)
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
        self.embed = nn.Embedding(64, 8)
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
    assert len(vps.patching.sharpened_layers(model)) == 3


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
    from vps.evaluation.harness import _configured
    from vps.evaluation.lm import scoped

    model = Mixture()
    config = VPSConfig(target_modules="all-linear", scope="token")
    vps.patch(model, config)
    with pytest.raises(ValueError, match="evaluation: scope must be 'token'"):
        with scoped(model, "sequence"):
            pass
    with pytest.warns(UserWarning, match="refused"):
        with _configured(model, config.replace(scope="sequence")):  # without them
            assert len(vps.patching.sharpened_layers(model)) == 3
            with scoped(model, "token"):
                assert len(vps.patching.sharpened_layers(model)) == 3
    assert len(vps.patching.sharpened_layers(model)) == 5


class Gathered(nn.Module):
    """Gives its layer some of the tokens, under a name that does not tell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj = nn.Embedding(64, 8), nn.Linear(8, 8)
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

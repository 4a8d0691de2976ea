"""Rows packed from several sequences give what each gives alone (SPEC §2)."""

import inspect

import pytest
import torch
import transformers
from tiny import CLOSE, draw, tiny
from torch import nn

import vps
from vps import VPSConfig, capture, masking
from vps.evaluation import controls
from vps.model import statistics

LENGTHS = (5, 3, 7)


def llama(layers=2, **settings):
    model = tiny(num_hidden_layers=layers)
    vps.patch(model, VPSConfig(**settings))
    return model


def sequences(lengths=LENGTHS):
    return [draw(1, length, seed=i) for i, length in enumerate(lengths)]


def packed(rows, **more):
    """One row of all, with positions that start again."""
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    return dict(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False, **more)


def alone(model, rows):
    return torch.cat([model(row, use_cache=False).logits for row in rows], 1)


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


@pytest.mark.parametrize("bounds", [False, True])
@torch.no_grad()
def test_as_transformers_packs(bounds):
    model, rows = llama(), sequences()
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=bounds)
    given = collator([dict(input_ids=row[0].tolist()) for row in rows], return_tensors="pt")
    del given["labels"]
    found = model(**given, use_cache=False).logits
    torch.testing.assert_close(found, alone(model, rows), **CLOSE)


@torch.no_grad()
def test_a_token_mask_over_a_packed_row():
    model, rows = llama(), sequences()
    masks = [torch.arange(length)[None] != length - 2 for length in LENGTHS]
    expected = []
    for row, mask in zip(rows, masks, strict=True):
        with vps.token_mask(mask):
            expected.append(model(row, use_cache=False).logits)
    with vps.token_mask(torch.cat(masks, 1)):
        found = model(**packed(rows)).logits
    torch.testing.assert_close(found, torch.cat(expected, 1), **CLOSE)
    assert not torch.allclose(found, model(**packed(rows)).logits)


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
    vps.model.attention_mask.attach(outer)
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
    model = tiny()
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
    from vps.fitting.candidates import Sharpening

    model, rows = llama(scope="sequence"), sequences()
    form = Sharpening(model, list(vps.model.patching.sharpened_layers(model)), False)
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
    model, rows = llama(layers=1), sequences()
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
    model = tiny(dtype=torch.float32)
    vps.patch(model, VPSConfig(scope=scope))
    rows = sequences()
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(row, **settings)[0, row.shape[1] :].tolist() for row in rows]
    layer, bounds, seen = model.model.layers[0].mlp.up_proj, [], []
    layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))

    def before(module, args, kwargs):
        bounds.append(kwargs["cu_seq_lens_q"].tolist())

    model.register_forward_pre_hook(before, with_kwargs=True)
    cache = {}  # else of nearly all the memory there is, which takes half a minute to make
    if "continuous_batching_config" in inspect.signature(model.generate_batch).parameters:
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        cache["continuous_batching_config"] = small
    answers = model.generate_batch(
        inputs=[row[0].tolist() for row in rows],
        generation_config=transformers.GenerationConfig(**settings),
        progress_bar=False, **cache,
    )  # fmt: skip
    found = [answers[name].generated_tokens for name in sorted(answers)]
    assert found == expected
    (x, y), edges = seen[0], bounds[0]
    assert x.shape[:2] == (1, 15) and len(edges) == 4
    lengths = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    parts = [layer(part) for part in x.split(lengths, 1)]
    torch.testing.assert_close(y, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)

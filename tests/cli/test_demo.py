"""The demo's comparison, statistics, heat maps and page, on a tiny random Llama."""

import json
import math
import re
import statistics
import sys

import pytest
import torch
from tiny import number_llama

from vps import (
    Calibration,
    Iteration,
    RefineResult,
    VPSConfig,
    clear_calibration,
    cli,
    disabled,
    patch,
    set_config,
)
from vps.cli.demo import calibrated, comparison, heatmap, refinements, speed
from vps.cli.demo.comparison import (
    ANSWERING,
    CONFIG,
    Answer,
    DemoRun,
    Piece,
    compare,
    pieces,
    run_demo,
)
from vps.cli.demo.page import colour, heat_map, write_page
from vps.cli.demo.refinements import Refinement
from vps.cli.demo.speed import Speed, Timed, measure_speed
from vps.fitting import Example, check_apart
from vps.model.calibration import fingerprint
from vps.model.generation import (
    Generation,
    changed_choices,
    encode,
    first_difference,
    generate,
    next_choices,
)
from vps.model.patching import sharpened_layers
from vps.model.statistics import LayerStatistics, measure
from vps.verify import Losses


@pytest.fixture
def model():
    model = number_llama()
    patch(model, CONFIG)
    return model


def check_alone(page):
    """The page asks for nothing from elsewhere and runs nothing."""
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe| src=| on\w+=", page)
    assert "default-src 'none'" in page


def test_comparison_and_page(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    messages = []
    run = compare(model, tokenizer, tmp_path / "out", 6, messages.append)
    assert len(run.answers) == 3 and [each[0] for each in messages] == list("2345679")
    for answer in run.answers:
        assert answer.first_difference == first_difference(
            answer.plain.tokens, answer.sharpened.tokens
        )
        for generation, cut in (
            (answer.plain, answer.plain_pieces), (answer.sharpened, answer.sharpened_pieces)
        ):  # fmt: skip
            assert "".join(piece.text for piece in cut) == generation.text
    assert all(layer.config == CONFIG for layer in sharpened_layers(model).values())
    page = run.report.read_text()
    check_alone(page)
    assert f"{run.changed:.1%}" in page and page.count("<rect") == len(run.statistics) == 14
    for timed in run.speed.models:
        assert timed.name in page and f"{timed.rate:.1f} <small>" in page
    assert [each.expected for each in run.refinements] == ["comes right", "stays wrong"]
    for each in run.refinements:
        assert each.result.used_labels and len(each.result.iterations) == 2
        other = f"chosen it as one that {each.expected}; on this machine it {each.found}." in page
        assert other is (each.found != each.expected)
        for entry in each.result.iterations:
            assert f"loss {entry.losses.total:.3g}" in page and entry.text in page
    assert (tmp_path / "out/heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_shows_what_the_other_model_would_choose(model, tokenizer):
    """Along the sharpened model's own answer its choices are its tokens: the prompt decides."""
    set_config(model, ANSWERING.replace(gamma=0.6))
    inputs = encode(tokenizer, "1 2 3")
    own = generate(model, tokenizer, inputs, 9)
    plain, sharpened = next_choices(model, inputs, own.tokens)
    assert sharpened == own.tokens and plain != own.tokens
    with disabled(model):
        expected = next_choices(model, inputs, own.tokens)
    assert expected == (plain, plain)
    cut = pieces(tokenizer, own.tokens, plain)
    assert "".join(piece.text for piece in cut) == own.text
    assert [piece.other for piece in cut] == [
        None if a == b else "end" if a in tokenizer.all_special_ids else tokenizer.decode([a])
        for a, b in zip(plain, own.tokens, strict=True)
    ]


def test_pieces_show_what_has_no_letters(tokenizer):
    end = tokenizer.eos_token_id
    assert pieces(tokenizer, [10, end], [end, 11]) == (
        Piece(tokenizer.decode([10]), "end"), Piece("", tokenizer.decode([11])),
    )  # fmt: skip
    for text, parts in (
        (" so", (" ", "so", "")), ("\n\n", ("", "↵", "\n\n")), ("", ("", "end", "")),
        (" ", ("", "space", " ")), ("a ", ("", "a", " ")),
    ):  # fmt: skip
        piece = Piece(text, "x")
        assert (piece.before, piece.core, piece.after) == parts
    assert Piece("", None).core == ""


def test_speed_is_measured_in_turn_and_leaves_the_model_as_it_was(model, tokenizer, monkeypatch):
    inputs = encode(tokenizer, "1 2 3")
    before = generate(model, tokenizer, inputs, 5).tokens
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    names = []
    monkeypatch.setattr(
        speed, "generate", lambda model, *rest: (names.append(model), generate(model, *rest))[1]
    )
    configs = {"a": CONFIG, "b": ANSWERING}
    found = measure_speed(model, tokenizer, inputs, configs, tokens=5, rounds=2)
    assert [each.name for each in found.models] == ["plain", "a", "b", "LoRA, r = 4"]
    assert len(names) == 12 and len({id(each) for each in names}) == 2
    for each in found.models:
        assert len(each.rates) == 2 and each.rate == statistics.median(each.rates) > 0
    plain = found.models[0]
    assert plain.ratio == 1 and found.missing is None
    lora = found.models[-1]
    assert math.isclose(
        lora.ratio,
        statistics.median(a / b for a, b in zip(plain.rates, lora.rates, strict=True)),
    )
    assert generate(model, tokenizer, inputs, 5).tokens == before
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())


def test_the_lora_beside_it_shares_the_weights_and_is_plain_at_first(model, tokenizer):
    twin = speed.lora_beside(model)
    inputs = encode(tokenizer, "1 2 3")
    with disabled(model):
        plain = generate(model, tokenizer, inputs, 8).tokens
    assert generate(twin, tokenizer, inputs, 8).tokens == plain
    own = {each.data_ptr() for each in model.parameters()}
    added = [each for name, each in twin.named_parameters() if "lora_" in name]
    assert len(added) == 2 * 14 and len(own) == len(list(model.parameters()))
    assert {each.data_ptr() for each in twin.parameters()} - {e.data_ptr() for e in added} == own


def test_without_peft_the_page_says_why_lora_is_missing(model, tokenizer, monkeypatch):
    monkeypatch.setattr(speed.util, "find_spec", lambda name: None)
    found = measure_speed(
        model, tokenizer, encode(tokenizer, "1"), {"a": CONFIG}, tokens=2, rounds=1
    )
    assert [each.name for each in found.models] == ["plain", "a"]
    assert "pip install 'vps-kernels[engines]'" in found.missing


def test_the_demo_needs_no_extra_but_hf(model, tokenizer, tmp_path, monkeypatch):
    find = speed.util.find_spec
    missing = ("peft", "matplotlib")
    monkeypatch.setattr(
        speed.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest)
    )
    for name in (*missing, "pint", "math_verify", "lm_eval", "reasoning_gym"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    run = compare(model, tokenizer, tmp_path / "out", 4, lambda message: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "LoRA was not timed" in run.report.read_text()


def refined(texts, chosen, gold="7"):
    entries = tuple(Iteration(n, text, 2, Losses({}, 0.0)) for n, text in enumerate(texts))
    return Refinement("", "p", gold, RefineResult(texts[chosen], chosen, "best", True, entries))


@pytest.mark.parametrize(
    ("texts", "chosen", "found"),
    [
        (["it is 8", "it is 7"], 1, "comes right"),
        (["it is 8", "it is 7"], 0, "stays wrong"),
        (["it is 7", "it is 9"], 1, "turns wrong"),
        (["it is 7", "it is 7"], 0, "is right from the start"),
        # The verifier calculates what a reader would call the question.
        (["it is 8", "what is 3 + 4"], 1, "is read in two ways"),
    ],
)
def test_what_a_refinement_comes_to(texts, chosen, found):
    assert refined(texts, chosen).found == found


def test_problems_to_refine_are_chosen_by_the_rule(monkeypatch):
    found = ["is right from the start", "stays wrong", "stays wrong", "comes right", "comes right"]
    asked = []

    class Found:
        def __init__(self, model, tokenizer, place, expected):
            asked.append(place)
            self.found = found[place]

    monkeypatch.setattr(refinements, "refine_one", Found)
    assert refinements.choose(None, None) == {"stays wrong": 1, "comes right": 3}
    assert asked == [0, 1, 2, 3]
    assert {*refinements.CHOSEN} == {"comes right", "stays wrong"}
    assert all(place < len(refinements.problems()) for place in refinements.CHOSEN.values())


@pytest.mark.parametrize(
    ("text", "answer", "stated"),
    [
        ("so 9 * 4 = 36", "36", True),
        ("to calculate 9 * 4, multiply 9 by 4", "36", False),
        ("it is -7.", "-7", True),
        ("0 - 7 = 7", "-7", False),
        ("1,234 in all", "1234", True),
        ("none", "0", False),
        ("x9", "9", False),
        ("3.50", "3.5", True),
    ],
)
def test_the_last_number_that_is_written(text, answer, stated):
    assert calibrated.states(text, answer) is stated


def test_the_map_has_a_cell_for_every_layer():
    entries = [
        LayerStatistics(f"m.{block}.{name}", 1.0, 0.5, 2, 1.0, size)
        for block, name, size in (
            (0, "q_proj", 0.01), (0, "k_proj", 0.05), (7, "q_proj", math.nan), (7, "k_proj", 0.03)
        )
    ]  # fmt: skip
    made = heat_map(entries)
    assert (made.blocks, made.projections, made.low, made.high) == (
        (0, 7), ("q_proj", "k_proj"), 1.0, 5.0
    )  # fmt: skip
    assert {(cell.x, cell.y) for cell in made.cells} == {(0, 0), (0, 20), (20, 0), (20, 20)}
    assert [cell.colour for cell in made.cells] == [colour(0), colour(1), "none", colour(0.5)]
    assert made.cells[1].words == "block 0, k_proj: 5.0 %, γ 0.50, rank 2"
    assert colour(0.5) == "#21918c" and colour(2) == colour(1) == "#fde725"
    assert heat_map(entries[:1]).cells[0].colour == colour(0)


def test_changed_choices_are_those_of_the_greedy_steps(model, tokenizer):
    set_config(model, VPSConfig(scope="token", gamma=0.5, adaptive_gamma=False))
    inputs = encode(tokenizer, "1 2 3")
    ids = inputs["input_ids"]
    shares = []
    for text in torch.randint(4, 96, (12, 8)).tolist():  # several: one share may agree by chance
        changed = 0
        for n in range(len(text)):
            so_far = torch.cat([ids, torch.tensor([text[:n]], dtype=ids.dtype)], dim=1)
            with torch.inference_mode():
                sharpened = model(so_far).logits[0, -1].argmax()
                with disabled(model):
                    changed += int(model(so_far).logits[0, -1].argmax() != sharpened)
        shares.append(changed / len(text))
        assert changed_choices(model, inputs, text) == shares[-1]
    assert len(set(shares)) > 2
    set_config(model, VPSConfig(gamma=0, adaptive_gamma=False))
    assert changed_choices(model, inputs, text) == 0


@torch.inference_mode()
def test_statistics_are_those_of_the_layers(model, tokenizer):
    inputs = encode(tokenizer, "1 2 3 4")
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (m, x[0], y)}))
        for name, layer in sharpened_layers(model).items()
    ]
    statistics = measure(model, inputs)
    for handle in handles:
        handle.remove()
    assert [entry.name for entry in statistics] == list(seen) and len(statistics) == 14
    for entry in statistics:
        layer, x, y = seen[entry.name]
        H = x @ layer.weight.T
        together = torch.cat([x @ one.weight.T for one in layer.deciding()], dim=-1)
        assert math.isclose(entry.energy, float((together**2).mean()), rel_tol=1e-4)
        sigma = 1 - math.exp(-entry.energy)
        assert math.isclose(entry.gamma, 0.3 + 0.5 * sigma, rel_tol=1e-6)
        assert entry.rank == min(4, 1 + math.floor(3 * sigma + 2**-20))
        assert math.isclose(entry.relative_size, float((y - H).norm() / H.norm()), rel_tol=1e-3)
    assert not any(layer._forward_hooks for layer in sharpened_layers(model).values())


def test_columns_tell_the_layers_of_a_block_apart():
    llama = ["m.0.attn.q_proj", "m.0.mlp.up_proj", "m.1.attn.q_proj", "m.1.mlp.up_proj"]
    assert heatmap.column_names(llama) == ["q_proj", "up_proj"] * 2
    gpt2 = ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
    assert heatmap.column_names(gpt2) == ["attn.c_proj", "mlp.c_proj"]
    assert heatmap.column_names(["lm_head"]) == ["lm_head"]
    assert heatmap.column_names(["a.0.x", "a.0.x"]) == ["x", "x"]


def test_heat_maps_take_what_a_model_may_give(tmp_path):
    entries = [
        heatmap.LayerStatistics("m.0.q_proj", 0.0, 0.3, 1, 0.0, 0.0),
        heatmap.LayerStatistics("m.5.k_proj", 1.0, 0.8, 4, 1e9, math.nan),
    ]
    for number in (1, 2):
        heatmap.draw(entries[:number], tmp_path / "map.png")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_the_model_is_escaped_and_its_difference_marked(tmp_path, monkeypatch, capsys):
    hostile = "<script>alert(1)</script>"
    answer = Answer(
        "<b>why</b>",
        Generation(f"same {hostile}", [1, 2], 1.0),
        Generation("same & other", [1, 3], 2.0),
        1,
        (Piece("same"), Piece(f" {hostile}", "& <i>")),
        (Piece("same"), Piece(" & other", hostile)),
    )
    timed = (Timed("plain", (2.0,), 1.0), Timed(hostile, (1.0,), 2.0))
    losses = Losses({"numeric": 4.0}, 4.0)
    first = Iteration(0, f"<i>how</i> {hostile}", 2, losses)
    result = RefineResult(hostile, 0, "best", True, (first,))
    run = DemoRun(
        [answer], 0.25, 2, 48, Speed(timed, 2, 16, "<b>no LoRA</b>"), [
            LayerStatistics("m.0.<b>", 1.0, 1.0, 1, 1.0, 0.1)
        ], 7, [Refinement("<u>", "<b>p</b>", "7", result)], VPSConfig(), {"<b>": "<b>"}, 9.0,
        tmp_path / "report.html",
    )  # fmt: skip
    write_page(run)
    page = run.report.read_text()
    check_alone(page)
    for tag in ("<b>w", "<b>p", "<b>n", "<i>", "<u>", "m.0.<"):
        assert tag not in page
    assert "loss 4" in page and "at token 2;" in page and "25.0%" in page and "2.00 ×" in page
    assert "same <ruby" in page and ">&amp; other<rp>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;<rp>" in page and "&amp; &lt;i&gt;</rt>" in page
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(comparison, "run_demo", lambda *_: run)
    assert cli.main(["demo", "--model-dir", str(tmp_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "refined, gold answer 7" in said and "loss 4" in said and str(run.report) in said
    assert "2.0 tokens/s" in said and "<b>no LoRA</b>" in said


def test_demo_without_a_model_or_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected config.json or one .gguf file"):
        run_demo(tmp_path, tmp_path / "out", 4, lambda message: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"vps-kernels\[plots\]"):
        heatmap.draw([], tmp_path / "map.png")


def test_problems_are_answered_by_the_calibrated_model(model, tokenizer, tmp_path, monkeypatch):
    layers = sharpened_layers(model)
    made = {
        "config": CONFIG, "model": "tiny", "architecture": "LlamaForCausalLM", "data": "0",
        "gamma": dict.fromkeys(layers, -0.5), "weights": fingerprint(model),
    }  # fmt: skip
    messages = []
    monkeypatch.setattr(speed, "ROUNDS", 1)
    run = compare(model, tokenizer, tmp_path, 4, messages.append, Calibration(**made))
    assert messages[-2].endswith("calibrated")
    problems = run.calibrated.problems
    assert len(problems) == 10 and all(layer.gamma is None for layer in layers.values())
    first = problems[0]
    inputs = encode(tokenizer, first.question)
    Calibration(**made).apply(model)
    assert first.calibrated == generate(model, tokenizer, inputs, 20).text
    with disabled(model):
        assert first.plain == generate(model, tokenizer, inputs, 20).text
    page = run.report.read_text()
    assert str(run.calibrated) in page and "Calibrated" in page
    clear_calibration(model)
    other = Calibration(**(made | {"weights": "1"}))
    assert "refused: weights" in str(calibrated.solve(model, tokenizer, other))
    used = [Example(p["prompt"], p["answer"]) for p in json.loads(calibrated.PROBLEMS.read_text())]
    with pytest.raises(ValueError, match="1 of 10 held-out examples were used"):
        seen = Calibration(**made, examples=(used[4].identity,))
        calibrated.solve(model, tokenizer, seen)


def test_the_shipped_calibration_fits_the_demo():
    shipped = Calibration.load(calibrated.CALIBRATION)
    assert shipped.config == CONFIG and shipped.found and len(shipped.gamma) == 210
    given = json.loads(calibrated.PROBLEMS.read_text())
    assert len(given) == 10
    check_apart([Example(p["prompt"], p["answer"]) for p in given], shipped.examples)

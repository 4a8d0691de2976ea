"""Layers, blocks, models, memory and scaling at tiny sizes: checked, timed, or left out."""

import pytest
import torch
from torch import nn

import vps
from benchmarks import baselines, checks, common, shapes, variants
from benchmarks.models import backward, block, layer, memory, model, scaling, whole
from benchmarks.results import AGAIN
from vps import VPSConfig
from vps.backends import operator

TINY = shapes.Model(64, 4, 2, 16, 96, 2, 100)
HERE = [name for name in ("torch", "cpp") if vps.backends()[name] is None]
TIMED = {"nn.Linear", "nn.Linear" + AGAIN, "peft lora r=4", *(f"vps {name}" for name in HERE)}
SLOW = {variants.COMPILED, variants.AUTHOR, variants.REFERENCE}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny model, few weights, and nothing compiled (which takes ten seconds)."""
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr(shapes, "WEIGHT_BYTES", {"cpu": 2**19, "cuda": 2**19})
    monkeypatch.setattr(variants, "compiled_formula", lambda: baselines.clean_formula)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def measured(case):
    return {name for name, row in case["rows"].items() if "ratio_q1" in row}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "tokens"), [(1, 1), (1, 20), (3, 1)])
def test_layer(dtype, groups, tokens):
    seven = tuple(TINY.projections().values())
    cell = layer.Cell("7 linears of tiny", seven, groups, tokens, dtype, False)
    case = layer.measure(cell, "cpu", 0.05)["layer"]
    assert measured(case) == TIMED | (SLOW if groups == 1 else SLOW - {variants.AUTHOR})
    assert not common.failures({"cases": {"case": case}})
    assert case["rows"][baselines.GEMV]["empty"] and case["rows"][variants.GEMM]["empty"]
    if groups > 1:
        assert "shares one selection" in case["rows"][variants.AUTHOR]["empty"]


def test_the_inputs_of_a_block_are_shared():
    """q, k and v read one x, gate and up another; blocks repeat."""
    work = variants.random_workload(
        tuple(TINY.projections().values()), 1, 2, torch.float32, "cpu", 2**19
    )
    q, k, v, o, gate, up, down = work.inputs[:7]
    assert q is k is v and gate is up and len({id(x) for x in (q, o, gate, down)}) == 4
    assert len(work.linears) % 7 == 0 and len(work.linears) > 7
    assert sum(w.weight.numel() * 4 for w in work.linears) >= 2**19


@pytest.mark.parametrize("name", [*HERE, "author", "clean"])
def test_a_wrong_layer_is_seen(monkeypatch, name):
    work = variants.random_workload(((64, 96),), 1, 4, torch.float32, "cpu", 1)
    right = variants.of_layers(work)

    def other(forward):
        return lambda *arguments, **named: forward(*arguments, **named) * 1.001

    if name == "author":
        monkeypatch.setattr(baselines.AuthorStyle, "forward", other(baselines.AuthorStyle.forward))
        key = variants.AUTHOR
    elif name == "clean":
        monkeypatch.setattr(variants, "compiled_formula", lambda: other(baselines.clean_formula))
        key = variants.COMPILED
    else:
        monkeypatch.setattr(vps.VPSLinear, "forward", other(vps.VPSLinear.forward))
        key = f"vps {name}"
    assert isinstance(right[key], common.Variant)
    assert variants.of_layers(work)[key].startswith("wrong: AssertionError")


def test_every_case_has_a_clear_selection():
    """Also for many groups and ranks, on which draws are made group by group."""
    linear = checks.linear(48, 80, torch.bfloat16, "cpu")
    for rank in (1, 8):
        config = VPSConfig(rank=rank, adaptive_rank=False)
        clear = checks.clear_case(linear, 9, 3, config)
        assert clear.x.shape == (9, 3, 48) and clear.y.shape == (9, 3, 80)
        assert clear.I_in.shape == clear.I_out.shape == (9, rank)


def test_a_tie_is_not_clear():
    linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.eye(8))
    linear.weight[1] = linear.weight[0]
    linear.weight[2:] = 0
    with pytest.raises(AssertionError, match="no clear selection"):
        checks.clear_case(linear, 1, 1, VPSConfig())


def test_lora_of_the_same_rank():
    linear = checks.linear(40, 60, torch.float32, "cpu")
    assert baselines.rank(VPSConfig(), linear) == 4
    assert baselines.rank(VPSConfig(rank=7, adaptive_rank=False), linear) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block(dtype):
    blocks = whole.Variants(whole.random_model("tiny", dtype, "cpu", 1, 64))
    for tokens in (1, 12):
        case = block.measure(blocks, 1, tokens, dtype, "cpu", 0.05)["block"]
        expected = {name.replace("nn.Linear", "plain") for name in TIMED}
        assert measured(case) == expected | {variants.AUTHOR}
        assert not common.failures({"cases": {"case": case}})


def test_a_wrong_block_is_seen(monkeypatch):
    blocks = whole.Variants(whole.random_model("tiny", torch.float32, "cpu", 1, 64))
    forward = vps.VPSLinear.forward
    monkeypatch.setattr(vps.VPSLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    case = block.measure(blocks, 1, 8, torch.float32, "cpu", 0.01)["block"]
    failed = common.failures({"cases": {"case": case}})
    assert len(failed) == 1 + len(HERE) and "not bit-identical" in failed[0]


def test_model():
    plain = whole.random_model("tiny", torch.float32, "cpu")
    weights = {p.data_ptr() for p in plain.parameters()}
    found = model.measure(plain, torch.float32, 0.1, new_tokens=3, prefill=10)
    prefill, answer, batch = found.values()
    titles = "prefill of 10 tokens", "3 greedy tokens after 10", "batch of 8, 1 greedy tokens"
    assert list(found) == [f"{title}, float32" for title in titles]
    prompted = {f"vps {name}{whole.PROMPT}" for name in HERE}
    assert prompted < measured(answer) and prompted < measured(batch)
    assert variants.AUTHOR in measured(prefill) and variants.AUTHOR not in measured(answer)
    assert {f"vps {name}" for name in HERE} < measured(answer)
    assert {p.data_ptr() for p in whole.Variants(plain).sharpened.parameters()} == weights


def test_backward(monkeypatch):
    runnable = whole.Variants(whole.random_model("tiny", torch.float32, "cpu"))
    case = backward.measure(runnable, 12, torch.float32, 0.05)
    assert {f"vps {name}" for name in HERE} | {whole.PLAIN} < measured(case)
    right = operator._of_input
    monkeypatch.setattr(operator, "_of_input", lambda *arguments: 100 * right(*arguments))
    if "cpp" in HERE:
        case = backward.measure(runnable, 12, torch.float32, 0.05)
        assert "cosine" in common.failures({"cases": {"case": case}})[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU allocates")
def test_memory():
    plain = whole.random_model("tiny", torch.float32, "cpu", 1, 64)
    found = memory.measure(plain, 16, torch.float32, "cpu")
    assert list(found) == list(memory.PASSES)
    patching, forward, backward = (case["rows"] for case in found.values())
    for name in HERE:
        assert patching[f"vps {name}"]["bytes"] < patching["peft lora r=4"]["bytes"]
        assert forward[f"vps {name}"]["bytes"] < forward[variants.AUTHOR]["bytes"]
    for name in ("plain", *(f"vps {name}" for name in HERE)):
        assert 0 < forward[name]["bytes"] < backward[name]["bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU allocates")
def test_peak_is_of_what_lives_at_once():
    def call():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b + 1

    assert 8000 <= memory.peak(call) < 8400


@pytest.mark.parametrize("point", [
    scaling.Point("a", "N", 64, 1, 5, None),
    scaling.Point("b", "rank", 64, 1, 5, 8),
    scaling.Point("c", "sequences", 64, 9, 2, None),
])  # fmt: skip
def test_scaling(point):
    peaks = {"copy": 1e10, "gemm float32": 1e11}
    case = scaling.measure(point, torch.float32, "cpu", 0.05, peaks)
    lora = f"peft lora r={point.rank or 4}"
    assert measured(case) == (TIMED - {"peft lora r=4"}) | {lora}
    assert case["rows"][scaling.LIMIT]["ratio"] > 1


def test_scaling_limit():
    """Moving W alone bounds one token; there the update moves 4 vectors to its two and W."""
    peaks = {"copy": 1e10, "gemm float32": 1e13}
    limit = scaling.limit(scaling.Point("a", "d", 1000, 1, 1, None), torch.float32, peaks)
    assert limit == pytest.approx(1 + 4 * 1000 / (1000**2 + 2 * 1000))
    every = list(scaling.points("cpu"))
    assert len({point.title() for point in every}) == len(every)
    assert {point.d for point in every} >= {512, 16384}
    assert {point.tokens for point in every} >= {1, 8192}
    assert any(scaling.why_not(point, "cpu") for point in every)
    assert not any(scaling.why_not(point, "cuda") for point in scaling.points("cuda"))


def test_sections_without_time(monkeypatch):
    """Every cell is there, empty, with the reason."""
    for run in (layer.run, block.run, scaling.run):
        monkeypatch.setattr(scaling.roofline, "measure_peaks", lambda device: {})
        monkeypatch.setattr(common.machine, "device", lambda: "cpu")
        found = run(0)
        section = found if "cases" in found else next(iter(found.values()))
        rows = [row for case in section["cases"].values() for row in case["rows"].values()]
        assert rows and all(row["empty"].startswith("not measured: ") for row in rows)


@pytest.mark.parametrize("seconds, replays", [(1e-5, 5), (0.4e-3, 3), (2.0, 1)])
def test_a_short_graph_is_replayed_several_times(monkeypatch, seconds, replays):
    """Between two events, so that the launch of the first replay hides; a long one is not."""
    done = []
    monkeypatch.setattr(common, "graph_of", lambda call: call)
    monkeypatch.setattr(common, "timed", lambda call: seconds)
    found = common.captured(common.Variant(lambda: done.append(1), 0.5))
    found.call()
    assert len(done) == replays and found.share == 0.5 * replays


def test_what_cannot_be_captured_is_left_out(monkeypatch):
    monkeypatch.setattr(common, "timed", lambda call: 1.0)

    def captured(call):
        if call() == 1:
            raise RuntimeError("operation not permitted\nwhen capturing")
        if call() == 2:
            raise AssertionError("the replay differs")
        return call

    monkeypatch.setattr(common, "graph_of", captured)
    calls = {name: common.Variant(lambda n=n: n, 0.5) for n, name in enumerate("abc")}
    found = variants.in_graphs({**calls, variants.REFERENCE: calls["a"], "d": "no reason"})
    assert found["a"].share == 0.5 and found["d"] == "no reason"
    assert found["b"] == "not captured: operation not permitted"
    assert found["c"].startswith("wrong: ") and found[variants.REFERENCE] == variants.WAITS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_in_graphs():
    seven = tuple(TINY.projections().values())
    cell = layer.Cell("7 linears of tiny", seven, 1, 1, torch.bfloat16, False)
    found = layer.measure(cell, "cuda", 0.5)
    assert not common.failures({"cases": found})
    assert {"vps torch", "vps triton", "peft lora r=4", baselines.GEMV} <= measured(found["layer"])
    assert found["layer"]["rows"][variants.REFERENCE]["empty"] == variants.WAITS
    assert variants.REFERENCE in measured(found["layer, eager"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_what_was_captured():
    x = torch.randn(8, 8, device="cuda")
    y = torch.empty_like(x)
    common.graph_of(lambda: torch.mul(x, 2, out=y))()
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * x)

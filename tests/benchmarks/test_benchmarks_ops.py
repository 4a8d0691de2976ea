"""The benchmarks of the ops: their checks pass, see what is wrong, and guard the timing."""

from pathlib import Path

import pytest
import torch
from processes import execute

import vps
from benchmarks import common, shapes
from benchmarks.baselines import GEMV
from benchmarks.ops import __main__ as ops
from benchmarks.ops import linear, roofline
from benchmarks.results import AGAIN
from benchmarks.variants import BACKENDS
from vps.backends.call import Outputs

ROOT = Path(__file__).parents[2]


def problem(dtype, device):
    return ops.Problem(40, 60, 20, 300, 4, dtype, device)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checks_pass(device, dtype):
    """Of every op and implementation that can run here, the Triton kernels among them."""
    cases = ops.cases(problem(dtype, device))
    assert len(cases) == 10
    checked = set()
    for case in cases:
        for name, call in case.calls.items():
            if not isinstance(call, str):
                ops.check(case, name)
                checked.add(name)
    assert {"torch", "triton", GEMV} <= checked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checks_see_a_wrong_result(dtype):
    """A result 10 % off, or of other features."""
    for case in ops.cases(problem(dtype, "cpu")):
        if case.verify is not None:
            continue

        def wrong(*arguments, case=case):
            y = case.calls["torch"](*arguments)
            return y * 1.1 if y.is_floating_point() else y.flip(-1)

        broken = case._replace(calls={"torch": wrong})
        assert "relative error" in ops.why_not(broken, "torch", "cpu") or "indices" in ops.why_not(
            broken, "torch", "cpu"
        )


@pytest.mark.parametrize("broken", ["y", "I_in", "I_out"])
def test_the_operators_check_compares_output_and_features(monkeypatch, broken):
    forward = linear._forward("torch")

    def other(inputs, settings):
        out = forward(inputs, settings)
        value = getattr(out, broken)
        value = value * 1.1 if value.is_floating_point() else value.flip(-1)
        return Outputs(**out._asdict() | {broken: value})

    monkeypatch.setattr(linear, "_forward", lambda backend: other)
    case = linear.linear(problem(torch.float32, "cpu"))
    assert ops.why_not(case, "torch", "cpu").startswith("wrong: AssertionError")


def test_what_is_not_written_is_seen():
    case = ops.cases(problem(torch.float32, "cpu"))[0]
    broken = case._replace(calls={"torch": lambda H: torch.empty(1, H.shape[-1])})
    assert "relative error nan" in ops.why_not(broken, "torch", "cpu")


def test_measure(capsys):
    """Rows with medians and quartiles, the A/A band, reasons, and the roofline."""
    peaks = {"copy": 1e10, "gemm float32": 1e11}
    case = next(c for c in ops.cases(problem(torch.float32, "cpu")) if "decode" in c.name)
    found = ops.measure(case, "cpu", 0.01, peaks)
    rows = found["rows"]
    assert rows["product alone"]["ratio"] == 1
    assert rows["torch"]["ratio_q1"] <= rows["torch"]["ratio"] <= rows["torch"]["ratio_q3"]
    assert rows["torch"]["rounds"] >= 7 and "product alone" + AGAIN in rows
    assert rows["triton"]["empty"] and rows[GEMV]["empty"]
    roof = found["roofline"]
    least = max(roof["bytes"] / 1e10, roof["operations"] / 1e11)
    assert roof["share"]["torch"] == pytest.approx(least / rows["torch"]["seconds"])
    text = roofline.table({"decode": found, "other": {"base": "x", "rows": {}}}, peaks)
    assert "| other | | | | not measured |" in text and "copy 10 GB/s" in text
    common.show("decode", found)
    assert "(noise " in capsys.readouterr().out


def test_a_failed_capture_leaves_its_cell_empty(monkeypatch):
    """On a GPU; the rest of the case is measured."""

    def capture(call):
        if call.args[0] is not case.calls["torch"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    case = ops.cases(problem(torch.float32, "cpu"))[0]
    case = case._replace(calls={"torch": case.calls["torch"], "other": lambda H: H.abs().sum(1)})
    monkeypatch.setattr(ops, "why_not", lambda *_: None)
    monkeypatch.setitem(ops.BYTES, "cuda", 2**10)
    monkeypatch.setattr(common, "graph_of", capture)
    rows = ops.measure(case, "cuda", 0.01, {"copy": 1e10, "gemm float32": 1e11})["rows"]
    assert rows["torch"]["ratio"] == 1
    assert rows["other"]["empty"].startswith("not captured: operation not permitted")


def test_a_wrong_variant_is_never_timed(monkeypatch):
    case = ops.cases(problem(torch.float32, "cpu"))[0]
    calls = {"torch": case.calls["torch"], "other": lambda H: H.sum(1)}
    found = ops.measure(
        case._replace(calls=calls), "cpu", 0.01, {"copy": 1e10, "gemm float32": 1e11}
    )
    assert found["rows"]["other"]["empty"].startswith("wrong: ")
    failed = common.failures({"cases": {"scores": found}})
    assert len(failed) == 1 and failed[0].startswith("scores: other: wrong: ")


def test_peaks(monkeypatch):
    """Those of float32 also where no layer is run in it: scores are."""
    monkeypatch.setitem(shapes.DTYPES, "cpu", (torch.bfloat16,))
    peaks = roofline.measure_peaks("cpu", scale=0.001)
    assert set(peaks) == {"copy", "gemm float32", "gemm bfloat16"}
    assert all(value > 0 for value in peaks.values())


def test_pytest_benchmark_finds_every_op():
    """By ``pytest benchmarks``; ``pytest`` alone collects the tests only."""
    options = ["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    run = execute(*options, "benchmarks")
    assert run.returncode == 0, run.stdout
    named = "scores select couple factors delta edited entropy decode linear"
    for name in named.split():
        assert f"test_op[{name}" in run.stdout
    assert "test_op[" not in execute(*options, "tests/test_config.py").stdout


def test_every_backend_is_a_variant():
    assert {*BACKENDS, "reference"} == set(vps.backends())

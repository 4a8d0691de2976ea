"""The benchmark of the kernels: its checks pass, and see a kernel that is wrong."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import benchmarks.kernels

    return benchmarks.kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checks(device, kernels, dtype, poison):
    found = list(kernels.cases(40, 30, 20, 300, 4, dtype, device))
    assert len(found) == 6
    for case in found:
        kernels.check(case)
        wrong = case._replace(kernel=lambda *a, case=case: case.kernel(*a) * 1.1)
        if "select" not in case.name:
            with pytest.raises(AssertionError):
                kernels.check(wrong)


def test_refuses_to_time_the_interpreter(kernels, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["kernels"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        kernels.main()

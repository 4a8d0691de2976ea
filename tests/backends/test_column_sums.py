"""Sums of |values|, and the memory that they keep while a patched model runs."""

import threading

import pytest
import torch
from cases import tiny_llama

import vps
from vps import masking
from vps.backends import column_sums


@pytest.fixture(autouse=True)
def keep_small_ones_too(monkeypatch):
    monkeypatch.setattr(column_sums, "SMALL", 0)


@pytest.fixture
def inside_a_model(monkeypatch):
    layout = masking.TokenLayout((1, 1), None, torch.nn.Identity())
    monkeypatch.setattr(masking.STATE, "layouts", [layout])
    yield
    masking.STATE.layouts.clear()
    column_sums.release()


def is_right(values):
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = column_sums.of_absolute(values, wide)
    expected = values.double().abs().sum(0)
    assert sums.dtype == wide and sums.shape == expected.shape
    return torch.allclose(sums.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 7, 300])
@pytest.mark.parametrize("block", [1, 1000, 2**19])
def test_sums(dtype, tokens, block, inside_a_model, monkeypatch):
    monkeypatch.setattr(column_sums, "BLOCK", block)
    threads = torch.get_num_threads()
    values = torch.randn(tokens, 190).to(dtype)
    strided = torch.randn(190, 2 * tokens).to(dtype).t()[::2]
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            for each in (values, strided, values[:, :50]):
                assert is_right(each)
                assert is_right(each.float())  # memory of another dtype
    finally:
        torch.set_num_threads(threads)
    assert (column_sums._KEPT.buffer is None) == (block == 1)


def test_small_blocks_keep_nothing(inside_a_model, monkeypatch):
    monkeypatch.setattr(column_sums, "SMALL", 6 * 50)
    assert is_right(torch.randn(6, 49)) and column_sums._KEPT.buffer is None
    assert is_right(torch.randn(6, 50)) and column_sums._KEPT.buffer is not None


def test_nothing_is_kept_outside_a_model():
    assert is_right(torch.randn(300, 190))
    assert column_sums._KEPT.buffer is None and not column_sums._KEPT.views


def test_memory_lives_as_long_as_the_forward_of_the_model():
    model = tiny_llama()
    seen = []

    def look(module, args, output):
        seen.append(column_sums._KEPT.buffer)
        if len(seen) > 1:
            raise RuntimeError("stop here")

    model.model.layers[-1].mlp.down_proj.register_forward_hook(look)
    ids = torch.arange(12).view(1, 12)
    with vps.backend("torch"), torch.no_grad():
        model(ids)
        assert column_sums._KEPT.buffer is None and not column_sums._KEPT.views
        with pytest.raises(RuntimeError, match="stop here"):
            model(ids)
    assert column_sums._KEPT.buffer is None and not column_sums._KEPT.views
    assert len(seen) == 2 and all(buffer is not None for buffer in seen)


def test_each_thread_has_its_own(inside_a_model):
    column_sums.of_absolute(torch.randn(5, 6), torch.float32)
    found = []
    thread = threading.Thread(target=lambda: found.append(column_sums._KEPT.buffer))
    thread.start()
    thread.join()
    assert found == [None] and column_sums._KEPT.buffer is not None

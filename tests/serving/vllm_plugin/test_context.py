"""What the operator takes from vLLM's forward context, and what it refuses in it."""

from types import SimpleNamespace

import pytest
import torch

from vps.serving.linear_method import _runs
from vps.serving.requests import Run


def context(starts, seq_lens, kind=SimpleNamespace):
    metadata = kind(query_start_loc=torch.tensor(starts), seq_lens=torch.tensor(seq_lens))
    return SimpleNamespace(attn_metadata={"layer": metadata}, additional_kwargs={})


def test_whole_prompts_and_single_tokens():
    batch = context([0, 5, 6, 7], [5, 9, 1])
    assert _runs(batch) == [Run(1, 5), Run(2, 1)]
    assert _runs(batch) is _runs(batch)
    batch.attn_metadata = context([0, 2], [2]).attn_metadata
    assert _runs(batch) == [Run(1, 2)]  # the next batch, though the rest stayed


def test_a_pass_without_requests():
    assert _runs(SimpleNamespace(attn_metadata=None, additional_kwargs={})) is None
    assert _runs(SimpleNamespace(attn_metadata={}, additional_kwargs={})) is None


def test_part_of_a_prompt():
    with pytest.raises(RuntimeError, match="a part of a prompt"):
        _runs(context([0, 5, 6], [7, 1]))


def test_an_attention_backend_that_does_not_say():
    batch = SimpleNamespace(attn_metadata={"layer": object()}, additional_kwargs={})
    with pytest.raises(RuntimeError, match="which object does not say"):
        _runs(batch)

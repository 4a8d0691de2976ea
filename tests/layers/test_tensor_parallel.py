"""Tensor parallelism of transformers on 2 and 4 gloo ranks against one process.

The ranks run ``tensor_parallel_cases.py``, whose results every test here judges.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_cases  # noqa: F401  # its cases
import torch
from tensor_parallel_group import CASES, HIDDEN, RANKS
from torch import nn

import vps
from vps.layers.shards import sharding, tensor_parallel

ROOT = Path(__file__).parents[2]
WHOLE = 5e-15  # of logits of about 4, in float64


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Results by number of ranks: one mapping from case to result for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    path = map(str, (ROOT, ROOT / "tests", ROOT / "tests/evaluation"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment.pop("VPS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/layers/tensor_parallel_cases.py"), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return {
        ranks: [json.loads((folder / f"{ranks}/{rank}.json").read_text()) for rank in range(ranks)]
        for ranks in RANKS
    }


@pytest.fixture(params=RANKS)
def group(request, launched):
    return launched[request.param]


def judged(results, name, tolerance):
    """Every rank selects what one process does, and is as near to it as ``tolerance``."""
    for rank, result in enumerate(results):
        for label, found in result[name].items():
            where = f"{name}, {label}, rank {rank}: {found}"
            assert found["error"] <= tolerance, where
            assert found.get("unequal", 0) == 0 and found.get("gamma", 0) <= 1e-6, where
            assert found.get("moved", 1) > 1e-3, where


def test_matrix_of_builder_scope_prefill_decode_and_generation(group):
    judged(group, "matrix", 1e-5)
    labels = set(group[0]["matrix"])
    for builder in ("sk", "sc"):
        for kind in ("prefill", "decode"):
            assert {f"qwen2 {builder} sequence {kind}"} <= labels
            for scope in ("sequence", "batch", "token"):
                assert f"llama {builder} {scope} {kind}" in labels


@pytest.mark.parametrize(
    "name",
    [
        "every_setting",
        "entropy_and_history",
        "masks",
        "hybrid_turns_to_sc",
        "other_styles",
        "calibrated",
        "statistics",
    ],
)
def test_in_float64(launched, name):
    judged(launched[2], name, WHOLE)


@pytest.mark.parametrize("name", ["more_columns_than_a_rank_holds", "gradients"])
def test_in_float64_on_all_groups(group, name):
    judged(group, name, WHOLE)


def test_a_rank_that_holds_nothing(launched):
    held = [result["held"] for result in launched[4]]
    assert [each["down_proj"] for each in held] == [2, 2, 2, 0]


def test_ties_go_to_the_lower_index_across_ranks(group):
    judged(group, "ties_across_ranks", 1e-6)


def test_broken_numbers_of_one_rank(group):
    for result in group:
        for label, found in result["broken_numbers"].items():
            assert found["finite"] == 0 and found["error"] <= 5e-6, (label, found)
    assert all(found["some"] > 0 for found in group[0]["broken_numbers"].values())


def test_ranks_agree_in_bfloat16(group):
    """Where rounding decides other than in one process, it does so on every rank."""
    for result in group:
        for label, found in result["bfloat16"].items():
            assert found["ranks"] == 0, label
            assert found["error"] < found["size"], label


def test_leaves_no_trace(launched):
    for result in launched[2]:
        found = result["leaves_no_trace"]
        for name in ("disabled", "zero", "off", "again", "keys", "classes"):
            assert found[name] == 0, name
        assert found["on"] > 0 and found["saved"] == [] and found["leftovers"] == []
        assert found["report"].splitlines() == [
            "14 layers sharpened, query and key coupled in 2 attention blocks",
            "forms: 10 tensor parallel (column-wise), 4 tensor parallel (row-wise)",
        ]


def numbers_in(values):
    """All numbers of nested results, in order, and all else."""
    if isinstance(values, dict):
        values = [item for pair in values.items() for item in pair]
    if not isinstance(values, list):
        number = isinstance(values, int | float) and not isinstance(values, bool)
        return ([values], []) if number else ([], [values])
    found = [numbers_in(item) for item in values]
    return sum((n for n, _ in found), []), sum((o for _, o in found), [])


def test_refinement(launched):
    """Without L-BFGS, as one process refines; the second answer by SC."""
    for result in launched[2]:
        plain, split = (numbers_in(result["refinement"][name]) for name in ("plain", "split"))
        assert plain[1] == split[1] and "sc" in plain[1]
        assert split[0] == pytest.approx(plain[0], rel=1e-4, abs=1e-5) and len(plain[0]) > 5


def test_refusals_name_the_reason(launched):
    for result in launched[2]:
        found = result["refusals"]
        for name, text in {
            "sequence_parallel": "q_proj: its tensor-parallel style is SequenceParallel, expected",
            "replicate": "its tensor-parallel style is TensorParallelLayer, expected",
            "packed_colwise": "its tensor-parallel style is PackedColwiseParallel, expected",
            "scattered": "RowwiseParallel gives S(1), expected a whole output",
            "split input": "ColwiseParallel takes S(1), expected a whole input",
            "dtensors": "gives DTensors, expected plain tensors",
            "replicated weight": "its weight is R, expected Shard(dim=0)",
            "wrong dim": "its weight is S(0), expected Shard(dim=1)",
            "plain weight": "its weight is a Tensor, expected a DTensor",
            "hooked": "its tensor-parallel style is TensorParallelLayer, expected",
            "backend": "vps backend 'reference' cannot run this layer: its weight is",
            "control": "layers.0.self_attn.q_proj is split over ranks, of which each holds a part",
            "adapter": "an adapter around a sharpened TensorParallelLinear is not supported",
            "adapted": "the layer in it is split over ranks: tensor parallel (column-wise)",
            "memory": "holds L-BFGS pairs, which it cannot compute with; set lbfgs=False",
        }.items():
            assert text in found[name], (name, found[name])


ROWS, LENGTH, R = 2, 7, 4
TOKENS = ROWS * LENGTH


@pytest.mark.parametrize(
    ("name", "groups", "gram_A", "gram_B", "crossing", "selected"),
    [
        ("sk", ROWS, False, False, False, False),
        ("sk token", TOKENS, False, False, False, False),
        ("sk uncoupled", ROWS, False, False, False, False),
        ("sc", ROWS, True, False, False, True),
        ("sc token", TOKENS, True, False, False, True),
        ("sc no clip", ROWS, None, False, False, True),
        ("spectral order 2", ROWS, True, True, True, False),
    ],
)
def test_communication(group, name, groups, gram_A, gram_B, crossing, selected):
    """Candidates, ``tokens · r`` values and numbers of the core; nothing else but B and, for the
    clip of SC, the selected rows."""
    columns, square = groups * R, groups * R * R
    of_A = 0 if gram_A is None else square if gram_A else columns
    of_B = 0 if gram_A is None else square if gram_B else columns
    core = of_A + of_B + square * crossing
    coupled = name != "sk uncoupled"
    for result in group:
        found = result["communication"][name]
        assert set(found) == {
            "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            *(() if coupled else ("self_attn.k_proj",)),
        }  # fmt: skip
        for layer, kinds in found.items():
            pair = 2 if layer == "self_attn.q_proj" and coupled else 1
            if layer in ("self_attn.o_proj", "mlp.down_proj"):
                assert kinds["all_gather"] == [2 * columns], layer
                own, *rest = kinds["all_reduce"]
                riding = (own - TOKENS * HIDDEN) / HIDDEN
                assert riding == int(riding) and 1 <= riding <= columns, layer
                small = of_A + TOKENS * R * selected
                assert rest == ([small] if small else []), layer
            else:
                assert kinds["all_gather"] == [(1 + pair) * columns], layer
                assert kinds["all_reduce"] == [groups + pair * (TOKENS * R + core)], layer
    for layer in group[0]["communication"][name]:
        calls = [
            result["communication"][name][layer].get("all_to_all_single", []) for result in group
        ]
        if not gram_A or layer in ("self_attn.o_proj", "mlp.down_proj"):
            assert not any(calls), layer
            continue
        assert all(len(sent) == 1 for sent in calls), layer
        rows = sum(sent for (sent,) in calls) / HIDDEN  # distinct ones, which leave once each
        outputs = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 40, "up_proj": 40}
        names = ("q_proj", "k_proj") if layer == "self_attn.q_proj" and coupled else (layer,)
        most = sum(min(columns, outputs[name.split(".")[-1]]) for name in names)
        assert rows == int(rows) and len(names) <= rows <= most, layer


def test_every_case_is_judged():
    judged_here = Path(__file__).read_text()
    for cases in CASES.values():
        for name in cases:
            assert f'"{name}"' in judged_here, name


def test_parts_of_a_dim():
    assert sharding.split_evenly(6, 4) == (0, 2, 4, 6, 6)
    assert sharding.split_evenly(2, 4) == (0, 1, 2, 2, 2)
    for features in range(1, 20):
        for ranks in range(1, 6):
            chunks = torch.arange(features).chunk(ranks)
            bounds = sharding.split_evenly(features, ranks)
            for rank, chunk in enumerate(chunks):
                assert bounds[rank : rank + 2] == (int(chunk[0]), int(chunk[-1]) + 1)
            assert set(bounds[len(chunks) :]) == {features}


def test_plain_layers_are_none_of_tensor_parallelism():
    layer = nn.Linear(3, 4)
    assert not tensor_parallel.is_tensor_parallel(layer)
    model = nn.Module()
    model.q_proj = layer
    layer.forward = lambda x: x  # as accelerate does
    with pytest.raises(ValueError, match="its forward is replaced on the instance"):
        vps.patch(model)

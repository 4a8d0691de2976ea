"""Sectors of 32 bytes that prefill kernels touch, from their addresses and from their layouts."""

import json
import os
import re
from collections import defaultdict

import numpy
import pytest
import torch
from processes import python

pytest.importorskip("triton")
from vps.kernels import columns, scores, tuning
from vps.kernels.prefill import core, delta, factors, features

SECTOR = 32
BF16 = torch.bfloat16


@pytest.fixture
def traffic(monkeypatch):
    """Useful bytes and bytes of sectors of the block accesses of the interpreter, by kernel."""
    if torch.cuda.is_available():
        pytest.skip("counts in Triton's interpreter")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found, kernel = defaultdict(lambda: [0, 0]), [None]

    def count(pointers, mask):
        if pointers.data.size == 1:  # one number that all threads share
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        kept = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)]
        addresses = numpy.unique(kept.astype(numpy.uint64))
        found[kernel[0]][0] += addresses.size * size
        found[kernel[0]][1] += numpy.unique(addresses // SECTOR).size * SECTOR

    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        access = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *others, access=access, at=at):
            count(pointers, others[at - 1])
            return access(self, pointers, *others)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    run = GridExecutor.__call__

    def launch(executor, *arguments, **options):
        kernel[0] = executor.fn.__name__
        return run(executor, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    return found


def layer(groups, tokens, d_in, d_out):
    H, W = torch.randn(groups, tokens, d_out).to(BF16), torch.randn(d_out, d_in).to(BF16)
    I_in, I_out = (
        torch.stack([torch.randperm(d)[:4] for _ in range(groups)]) for d in (d_in, d_out)
    )
    return H, W, I_in, I_out


def ratio(traffic, name):
    useful, moved = traffic[name]
    return moved / useful


def test_an_update_moves_what_it_needs(traffic, monkeypatch):
    """With its gathered outputs, of which each takes a sector: 6 % of the bytes of a row."""
    tile = tuning.delta(2048, 3584, 4, 2)
    assert tile["ROWS"] == 64
    monkeypatch.setattr(tuning, "delta", lambda *_: tile)
    H, W, I_in, I_out = layer(1, 128, 64, 1024)
    found = columns.launch(W, I_in)
    delta.launch(H, None, found, I_out, torch.eye(4)[None], torch.ones(1), None, None)
    assert ratio(traffic, "delta_kernel") <= 1.2
    assert traffic["delta_kernel"][1] <= 1.2 * 2 * H.numel() * 2


def test_a_column_is_gathered_once(traffic):
    """An element of a column takes a sector, a tile of W transposed nearly nothing."""
    _, W, I_in, _ = layer(1, 1, 64, 1024)
    columns.launch(W, I_in)
    assert traffic["gather_kernel"][1] == 4 * 1024 * (SECTOR + 2)
    _, W, I_in, _ = layer(200, 1, 128, 256)
    columns.launch(W, I_in)
    assert ratio(traffic, "transpose_kernel") <= 1.2


def test_scores_move_what_they_need(traffic):
    H, W, I_in, I_out = layer(1, 128, 512, 1024)
    features.rank(H, None, 4, True)
    scores.launch(H, None, True)
    for name in ("partial_kernel", "rank_kernel", "combine_kernel"):
        assert ratio(traffic, name) <= 1.2, name
    policy = torch.tensor([1.0, 0.5, 0.5, 4, 4, 32, 32, 1, 1], dtype=torch.float64)
    found = columns.launch(W, I_in)
    factors.launch(W, found, I_out, None, policy, None, None, 0.8, None)
    assert ratio(traffic, "factors_kernel") <= 1.2
    x = torch.randn(1, 128, 512).to(BF16)
    core.launch(x, H, W, found, I_out, policy, None, None, None, None, False, 0.8, True)
    assert ratio(traffic, "gram_kernel") <= 1.2  # of rows and columns


LAYOUTS = """
import json
from benchmarks import aot

prompts = aot.Prefill(3584, 3584, 2048), aot.Prefill(3584, 512, 20, 8, groups=600)
compiled = aot.compiled("sm_90", lambda _: [("", prompt.launch) for prompt in prompts])
print(json.dumps([(name, kernel.asm["ttgir"]) for name, kernel in compiled]))
"""
ENCODING = re.compile(
    r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
    r"warpsPerCTA = \[([\d, ]+)\], order = \[([\d, ]+)\]"
)
ACCESS = re.compile(r"tt\.(load|store) .*tensor<(\d+)x(\d+)x!tt\.ptr<(\w+)>, (#\w+)>")


def sectors_of_a_warp(size, threads, order, shape, width):
    """Bytes of an access of one warp, and of its sectors, where ``order[0]`` is contiguous."""
    along, across = order[0], order[1]
    span = min(size[along] * threads[along], shape[along]) * width
    rows = min(size[across] * threads[across], shape[across])
    return rows * span, rows * -(-span // SECTOR) * SECTOR


@pytest.mark.aot
def test_warps_read_and_write_whole_sectors(tmp_path):
    """By the layouts that Triton chose for the blocks of two dimensions, 16 bytes a thread."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = python(LAYOUTS, **environment)
    assert run.returncode == 0, run.stderr
    checked = defaultdict(int)
    for name, ttgir in json.loads(run.stdout.splitlines()[-1]):
        encodings = {
            found[0]: [[int(n) for n in part.split(",")] for part in found[1:]]
            for found in ENCODING.findall(ttgir)
        }
        for _, *shape, dtype, encoding in ACCESS.findall(ttgir):
            size, threads, _, order = encodings[encoding]
            width = int(re.sub(r"\D", "", dtype)) // 8
            shape = [int(n) for n in shape]
            useful, moved = sectors_of_a_warp(size, threads, order, shape, width)
            kernel = name.split()[-1]
            if kernel in ("delta_kernel", "partial_kernel", "transpose_kernel"):
                assert moved <= 1.2 * useful, (name, shape, encodings[encoding])
                assert size[order[0]] * width == 16, (name, shape, encodings[encoding])
                checked[kernel] += 1
    assert (
        checked["delta_kernel"] >= 4 and checked["partial_kernel"] and checked["transpose_kernel"]
    )

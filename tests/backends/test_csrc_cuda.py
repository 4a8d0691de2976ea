"""csrc/cuda: compiles for every architecture without spills; on a GPU, right and repeatable."""

import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from processes import python
from torch import nn

import vps
from vps import VPSConfig, VPSLinear
from vps.backends import cuda_build

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
@pytest.mark.aot
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_spills(architecture, tmp_path):
    line = cuda_build.command(
        architecture, "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "cubin")
    )
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(spills) == 3 and set(spills) == {("0", "0")}, run.stderr


@needs_nvcc
@pytest.mark.aot
def test_its_symbols_are_found_where_torch_is_loaded(tmp_path):
    """All that is registered as it loads; a CPU build of torch lacks what asks for the stream."""
    library = tmp_path / "library.so"
    line = cuda_build.command("sm_90", *cuda_build.linked(library))
    built = subprocess.run(line, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    code = (
        "import ctypes, sys, os, torch, vps\n"
        "ctypes.CDLL(sys.argv[1], os.RTLD_LAZY)\n"
        "torch.ops.vps.cooperative_decode.default\n"
    )
    loaded = python(code, library)
    assert loaded.returncode == 0, loaded.stderr


def test_why_it_is_missing_is_said():
    if not torch.cuda.is_available():
        assert vps.backends()["cuda"] == "no CUDA device"
        with pytest.raises(RuntimeError, match="no CUDA device"), vps.backend("cuda"):
            pass
        with pytest.raises(RuntimeError, match="name an architecture"):
            cuda_build.build()


def layer_and_input(dtype, d_in, d_out, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, device="cuda", dtype=dtype).requires_grad_(False)
    return VPSLinear.from_linear(linear, VPSConfig(**settings)), torch.randn(
        1, 1, d_in, device="cuda", dtype=dtype
    )


@pytest.fixture
def built():
    reason = vps.backends()["cuda"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3584, 3584), (1536, 8960), (577, 33), (8, 1), (18944, 3584)])
@pytest.mark.parametrize("settings", [{}, {"tau": None, "clamp": 0.05}, {"adaptive_rank": False}])
@torch.no_grad()
def test_equals_the_reference(built, dtype, shape, settings):
    layer, x = layer_and_input(dtype, *shape, **settings)
    with vps.backend("cuda"):
        y = layer(x)
        again = layer(x.clone())
    with vps.backend("reference"):
        expected = layer(x)
    tolerance = {torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert torch.equal(y, again)
    assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.cuda
@pytest.mark.parametrize("counts", [True, False])
@torch.no_grad()
def test_under_a_mask(built, counts):
    layer, x = layer_and_input(torch.float32, 577, 96)
    plain = F.linear(x, layer.weight, layer.bias)
    with vps.backend("cuda"):
        expected = layer(x) if counts else plain
        with vps.token_mask(torch.full((1, 1), counts, device="cuda")):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@torch.no_grad()
def test_soak_in_a_graph(built):
    """1000 replays bitwise equal; 10⁵ of them are asked for before it becomes a default."""
    layer, x = layer_and_input(torch.bfloat16, 3584, 3584)
    with vps.backend("cuda"):
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
    for _ in range(1000):
        graph.replay()
        assert torch.equal(y, expected)

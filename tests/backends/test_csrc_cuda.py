"""csrc/cuda: compiles for every architecture without spills; on a GPU, right and repeatable."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import python
from torch import nn

import vps
from vps import VPSConfig, VPSLinear
from vps.backends import cuda_build

ROOT = Path(__file__).parents[2]
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
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    assert len(registers) == 3 and max(registers) <= 64  # two blocks of 512 threads a processor


@needs_nvcc
@pytest.mark.aot
def test_compiles_with_the_headers_of_the_oldest_torch(tmp_path):
    """Those of the environment that ``make test-oldest`` installs."""
    folders = list(ROOT.glob(".cache/oldest/lib/python3*/site-packages/torch/include"))
    if not folders:
        pytest.skip("make test-oldest has not installed it")
    line = cuda_build.command("sm_90", "-cubin", "-o", str(tmp_path / "cubin"))
    own = f"-I{Path(torch.__file__).parent / 'include'}"
    line = [f"-I{folders[0]}" if part == own else part for part in line]
    run = subprocess.run(line, capture_output=True, text=True)
    assert f"-I{folders[0]}" in line and run.returncode == 0, run.stderr


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


@pytest.mark.parametrize("clamp", [None, 0.05])
def test_a_tracer_sees_its_shapes(clamp):
    """On fake tensors of a GPU; the schema is that of decode.cu."""
    source = (ROOT / "csrc/cuda/decode.cu").read_text()
    schema = "".join(re.findall(r'"(.*)"', source[source.index("m.def(") :].split(";")[0]))
    code = (
        "import sys, torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from vps import VPSConfig\n"
        "from vps.algorithm import policy\n"
        "from vps.backends import cuda\n"
        "torch.ops.load_library = torch.library.Library('vps', 'FRAGMENT').define\n"
        "torch.cuda.is_available, cuda.LIBRARY = (lambda: True), Schema(sys.argv[1])\n"
        "assert cuda.why_missing() is None\n"
        f"settings = policy.settings(VPSConfig(clamp={clamp}), False, 24, 40)\n"
        "with FakeTensorMode(), torch.device('cuda'):\n"
        "    x, W = torch.empty(1, 1, 24).half(), torch.empty(40, 24).half()\n"
        "    policy = torch.empty(9, dtype=torch.float64)\n"
        "    found = torch.ops.vps.cooperative_decode(\n"
        "        x, W, None, None, None, None, policy, None, *settings.packed())\n"
        "print([(list(each.shape), each.dtype, each.device.type) for each in found])\n"
    ).replace("Schema(", "type('Schema', (str,), {'is_file': lambda _: True})(")
    done = python(code, schema)
    assert done.returncode == 0, done.stderr
    half, single, t = torch.float16, torch.float32, [0] if clamp is None else [1, 1, 4]
    shapes = ([1, 1, 40], half), ([1, 2, 4], torch.int64), ([1, 4, 4], single), ([1], single)
    assert done.stdout.strip() == str([(*each, "cuda") for each in (*shapes, (t, half))])


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
    """10⁵ replays, each compared with the first on the device, and one look at the end."""
    layer, x = layer_and_input(torch.bfloat16, 3584, 3584)
    with vps.backend("cuda"):
        expected = layer(x)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                wrong += (layer(x) != expected).any()
    for _ in range(10_000):
        graph.replay()
    assert wrong.item() == 0

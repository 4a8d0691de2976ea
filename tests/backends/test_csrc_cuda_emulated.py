"""The logic of csrc/cuda/decode.cuh on a CPU: emulated threads and blocks, watched for data races.

It says nothing of speed or of the compiler for GPUs; tests/backends/test_csrc_cuda.py runs there.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.shapes import MODELS
from vps import VPSConfig, reference
from vps.algorithm import policy

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("emulator")
PROCESSORS = 132  # of the GPU in emulator.h


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A function that compiles a program of the emulator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    folder = tmp_path_factory.mktemp("emulator")

    def compile(name, **changes):
        for file in ("decode.cuh", "plan.h"):
            source = (ROOT / "csrc/cuda" / file).read_text()
            for old, new in changes.get(file.split(".")[0], ()):
                assert source.count(old) == 1
                source = source.replace(old, new)
            (folder / file).write_text(source)
        line = [compiler, "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-Wno-tsan", "-pthread"]
        line += [f"-I{path}" for path in (folder, ROOT / "csrc/cuda", EMULATOR)]
        program = folder / name
        line += [str(EMULATOR / f"{name}.cpp"), "-o", str(program)]
        built = subprocess.run(line, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return program

    return compile


@pytest.fixture(scope="session")
def program(compiled):
    shared = "extern __shared__ float shared[];", "float* const shared = emulated_shared;"
    threads = "constexpr int kThreads = 512;", "constexpr int kThreads = kEmulatedThreads;"
    return compiled("run", decode=[shared], plan=[threads])


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor is not None else b""


def run(
    program,
    x,
    W,
    b,
    config,
    blocks,
    entropy=None,
    I_in=None,
    I_out=None,
    columns=None,
    counted=None,
    seed=0,
):
    d_out, d_in = W.shape
    settings = policy.settings(config, False, d_in, d_out)
    rows = -(-d_out // blocks)
    header = struct.pack(
        "15i2f",
        x.element_size(), x.dtype == torch.bfloat16, blocks, rows, d_in, d_out, settings.r,
        settings.adaptive, b is not None, I_in is not None, I_out is not None, entropy is not None,
        columns is not None, counted is not None, seed,
        -1.0 if config.tau is None else config.tau, -1.0 if config.clamp is None else config.clamp,
    )  # fmt: skip
    numbers = torch.tensor(policy.bounds(config), dtype=torch.float64)
    if columns is not None:  # γ itself is 1 then
        numbers = policy.LayerGamma(columns).in_policy(numbers, settings.r)
        numbers, columns = numbers[: policy.NUMBERS], numbers[policy.NUMBERS :]
    ticks = None if entropy is None else torch.tensor([entropy, 1.3], dtype=torch.float64)
    parts = [x.reshape(-1), W, b, I_in, I_out, numbers, ticks, columns, counted]
    done = subprocess.run(
        [program], input=header + b"".join(map(bytes_of, parts)), capture_output=True, timeout=120
    )
    assert done.returncode == 0 and b"WARNING" not in done.stderr, done.stderr.decode()
    r, at = settings.r, 0

    def take(count, dtype):
        nonlocal at
        size = count * dtype.itemsize
        at += size
        return torch.frombuffer(bytearray(done.stdout[at - size : at]), dtype=dtype)

    y, features = take(d_out, x.dtype), take(2 * r, torch.int64).view(2, r)
    return y, features, take(r * r, torch.float32).view(r, r), take(1, torch.float32)


CASES = [
    (dict(), 33, 40, 3),
    (dict(tau=None, clamp=0.05), 64, 17, 1),
    (dict(adaptive_rank=False, rank=8, adaptive_gamma=False), 100, 9, 2),
    (dict(gamma_bounds=(0.1, 3.0), tau=0.1), 8, 70, 4),
]


@pytest.mark.parametrize("settings, d_in, d_out, blocks", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(program, settings, d_in, d_out, blocks, dtype):
    config = VPSConfig(**settings)
    generator = torch.Generator().manual_seed(d_in)
    # Small integers keep H exact in every dtype and full of ties.
    x = torch.randint(-2, 3, (1, 1, d_in), generator=generator).double()
    W = torch.randint(-1, 2, (d_out, d_in), generator=generator).double()
    b = torch.randint(-3, 4, (d_out,), generator=generator).double()
    for bias, entropy in ((b, 0.7), (None, None))[: 1 if settings else 2]:
        outcomes = () if entropy is None else (True,)
        expected = reference.vps_linear(
            x, W, bias, config=config, entropy=entropy, outcomes=outcomes
        )
        group = expected.groups[0]
        narrow = [None if t is None else t.to(dtype) for t in (x, W, bias)]
        y, features, core, gamma = run(program, *narrow, config, blocks, entropy)
        assert features[0, : group.rank].tolist() == group.I_in[: group.rank].tolist()
        assert features[1, : group.rank].tolist() == group.I_out[: group.rank].tolist()
        assert abs(gamma.item() - group.gamma) < 1e-6
        diagonal = torch.zeros(len(core), dtype=torch.float64)
        diagonal[: group.rank] = 1 / group.scale
        assert torch.allclose(core.double(), diagonal.diag(), rtol=1e-5)
        error = (y.double() - expected.y.flatten()).norm() / expected.y.norm()
        assert error <= max(1e-6, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("settings", [{}, {"clamp": 0.05}])
def test_a_token_that_does_not_count(program, settings):
    """H + b, whatever its update would be; one that counts is as without a mask."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(size, generator=generator) for size in ((1, 1, 24), (30, 24), (30,)))
    config = VPSConfig(**settings)
    counting = run(program, x, W, b, config, 3, counted=torch.tensor([True]))
    for one, other in zip(counting, run(program, x, W, b, config, 3), strict=True):
        assert torch.equal(one, other)
    y, _, core, gamma = run(program, x, W, b, config, 3, counted=torch.tensor([False]))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, b).flatten())
    assert gamma.item() == 0 and not core.any()


@pytest.mark.parametrize("clamp", [None, 0.05])
def test_gamma_a_column(program, clamp):
    """Of either sign, and 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 24, generator=generator)
    W = torch.randn(30, 24, generator=generator)
    config, gamma = VPSConfig(clamp=clamp), [0.5, -1.25, 0.0, 0.25]
    expected = reference.vps_linear(x.double(), W.double(), config=config, gamma=gamma)
    y, _, core, scale = run(program, x, W, None, config, 3, columns=gamma)
    error = (y.double() - expected.y.flatten()).norm() / expected.y.norm()
    assert error <= 1e-6 and scale.item() == 1
    rank = expected.groups[0].rank
    factors = torch.tensor(gamma[:rank], dtype=torch.float64) / expected.groups[0].scale
    assert torch.allclose(core.double().diagonal()[:rank], factors, rtol=1e-5)


def test_given_features_are_used(program):
    x, W = torch.randn(1, 1, 24), torch.randn(30, 24)
    I_in, I_out = torch.tensor([5, 0, 23, 7]), torch.tensor([29, 3, 11, 0])
    config = VPSConfig(adaptive_rank=False, rank=4, adaptive_gamma=False, tau=None)
    y, features, _, _ = run(program, x, W, None, config, 3, I_in=I_in, I_out=I_out)
    H = x.double().flatten() @ W.double().T
    expected = H + 0.5 * H[I_out] @ W.double()[:, I_in].T
    assert features.tolist() == [I_in.tolist(), I_out.tolist()]
    assert numpy.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_non_finite_outputs_are_never_preferred(program):
    x = torch.ones(1, 1, 4)
    W = torch.eye(6, 4)
    x[0, 0, 2] = float("inf")
    y, features, _, gamma = run(program, x, W, None, VPSConfig(tau=None), 2)
    assert features[0].tolist()[:3] == [0, 1, 3] and gamma.isfinite()
    assert not y.isfinite().any()  # every output reads inf or inf · 0


@pytest.mark.parametrize("settings", [{}, {"adaptive_rank": False, "rank": 8}])
def test_no_order_of_the_blocks_changes_a_bit(program, settings):
    """With ties between blocks; r up to 8, where warps merge more than one record a lane."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 1, 40), generator=generator).float()
    W = torch.randint(-1, 2, (80, 40), generator=generator).float()
    config = VPSConfig(**settings)
    expected = reference.vps_linear(x.double(), W.double(), config=config)
    rank, first = expected.groups[0].rank, None
    for seed, blocks in ((1, 5), (2, 5), (3, 12)):
        found = run(program, x, W, None, config, blocks, seed=seed)
        if blocks == 5:
            first = first or found
            assert all(map(torch.equal, found, first))
        assert found[1][1, :rank].tolist() == expected.groups[0].I_out[:rank].tolist()
        assert (found[0] - expected.y.flatten()).norm() <= 1e-6 * expected.y.norm()


@pytest.fixture(scope="session")
def plans(compiled):
    """A function that plans shapes ``(registers, d_in, d_out, r)`` for an H100, by two threads."""
    program = compiled("plan")

    def plan(shapes):
        lines = "\n".join(" ".join(map(str, shape)) for shape in shapes)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return plan


def test_every_processor_has_its_share_of_the_rows(plans):
    """Two blocks run on each where x fits twice into its shared memory."""
    shapes = {shape for model in MODELS.values() for shape in model.projections().values()}
    asked = [(64, *shape, r) for shape in sorted(shapes) for r in (1, 4, 8)]
    for (_, d_in, d_out, r), (blocks, rows, size) in zip(asked, plans(asked), strict=True):
        assert (blocks - 1) * rows < d_out <= blocks * rows and blocks * r <= 5 * 512
        together = -(-blocks // PROCESSORS)
        assert together == 2 or 8 * d_in + 3 * 2**12 > 228 * 2**10 or d_out < 1000
        assert -(-d_out // PROCESSORS) / (together * rows) >= 0.9
        if d_out > 1000:
            assert d_out / (PROCESSORS * together * rows) >= 0.9
        assert size == 4 * (d_in + rows * (3 + r))


def test_registers_for_one_block_alone_are_told(plans):
    """What 72 registers would do: half as many threads on each processor."""
    (two, *_), (one, *_) = plans([(64, 3584, 3584, 4), (72, 3584, 3584, 4)])
    assert two == 256 and one == 128

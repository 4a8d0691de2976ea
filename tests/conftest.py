"""Without a GPU the Triton kernels run in Triton's interpreter; ``poison`` fills fresh tensors."""

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


def repair_interpreter():
    """Make it round and multiply as a device does.

    It cuts float32 off to bfloat16 instead of rounding to nearest even, multiplies matrices of
    bfloat16 as integers, and leaves those of float32 to a BLAS, where the order of a row's sum
    depends on the row's place.
    """
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return truncate(self, src, dst_type)
        values = torch.from_numpy(numpy.array(src.data, dtype=numpy.float32))
        bits = values.bfloat16().view(torch.int16).numpy().view(numpy.uint16)
        return TensorHandle(bits.reshape(numpy.shape(src.data)), tl.bfloat16)

    def create_dot(self, a, b, d, *precision):
        a, b = (
            (
                self.create_fp_ext(operand, tl.float32) if operand.dtype == tl.bfloat16 else operand
            ).data.astype(d.data.dtype)
            for operand in (a, b)
        )
        product = (a[..., None] * b[..., None, :, :]).sum(-2)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
    InterpreterBuilder.create_dot = create_dot


if INTERPRETED and find_spec("triton") is not None:
    repair_interpreter()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where kernels run: interpreted on a CPU, compiled on a GPU, never both in one process."""
    pytest.importorskip("triton", reason="triton is not installed")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels of this process are compiled for the GPU")
    return request.param


@pytest.fixture
def poison(monkeypatch):
    """``torch.empty`` full of NaN, or of a huge number where there is none."""
    allocate = torch.empty

    def empty(*shape, **options):
        fresh = allocate(*shape, **options)
        if fresh.dtype.is_floating_point:
            return fresh.fill_(float("nan"))
        return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

    monkeypatch.setattr(torch, "empty", empty)


def why_missing(name):
    """The reason why tests with a parameter ``backend`` of that name cannot run, or ``None``."""
    import vps  # after TRITON_INTERPRET is set

    return vps.backends().get(name)


@pytest.fixture(autouse=True)
def only_where_it_runs(request):
    """Skip a test whose parameter ``backend`` names one that is missing here."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("backend") if callspec else None
    if name is not None and (reason := why_missing(name)) is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request, only_where_it_runs):
    """The name of a backend that is in use."""
    import vps

    with vps.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of numbers; a test that changes one makes its own."""
    from tiny import number_tokenizer  # which imports Triton

    return number_tokenizer()


@pytest.fixture
def run(capsys):
    """Exit code, standard output and standard error of the command vps with these arguments."""

    from vps import cli

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """A folder with a tiny model that reads characters, and tasks of lm-eval for it."""
    import evaluation_cases

    path = tmp_path_factory.mktemp("tasks")
    evaluation_cases.write_tasks(path)
    evaluation_cases.tokenizer().save_pretrained(path)
    evaluation_cases.plain_model().save_pretrained(path)
    return path

"""Memory for tensors of more than 2^31 elements, fixed seeds, and the rounding of a GPU."""

import numpy
import pytest
import torch
from cases import FAR


@pytest.fixture(autouse=True)
def seeded():
    """Draw the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def rounds_as_a_gpu(monkeypatch):
    """Let the interpreter's float32 division and square root err as a GPU's do.

    These are ``div.full`` and ``sqrt.approx``, right to 2 ulp: here a number of ulp that follows
    from the bits, and none where the result is exact.
    """
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    divide, root = builder.create_fdiv, builder.create_sqrt

    def erring(result, exact):
        if result.data.dtype == numpy.float32:
            bits = numpy.ascontiguousarray(result.data).view(numpy.int32)
            ulp = (bits * numpy.int32(-1640531527) >> 29) % 5 - 2  # of Fibonacci hashing
            moved = (bits + ulp).astype(numpy.int32).view(numpy.float32).reshape(exact.shape)
            plain = exact | ~(numpy.isfinite(result.data) & (abs(result.data) > 1e-37))
            result.data = numpy.where(plain, result.data, moved)
        return result

    def create_fdiv(self, left, right):
        found = divide(self, left, right)
        with numpy.errstate(all="ignore"):
            return erring(found, found.data.astype(float) * right.data == left.data)

    def create_sqrt(self, value):
        found = root(self, value)
        with numpy.errstate(all="ignore"):
            return erring(found, numpy.square(found.data, dtype=float) == value.data)

    monkeypatch.setattr(builder, "create_fdiv", create_fdiv)
    monkeypatch.setattr(builder, "create_sqrt", create_sqrt)


@pytest.fixture
def sparse(device, tmp_path):
    """Numbers for five rows that lie FAR apart, in a file of which few pages are ever touched."""
    if device == "cuda":
        pytest.skip("a sparse file stands for the memory")
    return torch.from_file(str(tmp_path / "sparse"), True, 5 * FAR, dtype=torch.float16)

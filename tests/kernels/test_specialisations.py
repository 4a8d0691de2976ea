"""How many kernels a layer compiles for prompts of all lengths, counted as Triton does."""

import inspect
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import vps

pytest.importorskip("triton")
from vps.backends import triton_backend

pytestmark = pytest.mark.skipif(
    vps.backends()["triton"] is not None or torch.cuda.is_available(),
    reason="counts in Triton's interpreter",
)
LENGTHS = {*range(1, 20), *range(120, 140), *range(1, 4097, 61), 16, 512, 1024, 1025, 4096}


def key_of(kernel, arguments, options):
    """What Triton compiles a kernel for: constants, dtypes, and which numbers are 1 or 16·n."""
    free = kernel.kwargs.get("do_not_specialize") or ()
    key = [kernel.fn.__name__, options.pop("num_warps")]
    options = {name: value for name, value in options.items() if name in kernel.arg_names}
    for name, value in inspect.signature(kernel.fn).bind(*arguments, **options).arguments.items():
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and "constexpr" not in str(kernel.fn.__annotations__.get(name)):
            kind = "" if name in free else "1" if value == 1 else "16" if value % 16 == 0 else ""
            key.append((name, kind, abs(value) >= 2**31))
        else:
            key.append((name, str(value)))
    return tuple(key)


@pytest.fixture
def keys(monkeypatch):
    """The keys of all launches, of which nothing is run."""
    from triton.runtime.interpreter import InterpretedFunction

    found = set()

    def launch(kernel, *arguments, grid, warmup, **options):
        found.add(key_of(kernel, arguments, options))

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    return found


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_few_for_all_lengths_of_a_prompt(keys, masked, monkeypatch):
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(torch.empty(18944, 3584, dtype=torch.bfloat16))
    layer = vps.VPSLinear.from_linear(linear.requires_grad_(False), vps.VPSConfig())
    y = torch.empty(4096 * 18944, dtype=torch.bfloat16)
    product = SimpleNamespace(linear=lambda x, W: y[: x.shape[1] * 18944].view(1, -1, 18944))
    monkeypatch.setattr(triton_backend, "F", product)
    with vps.backend("triton"):
        for tokens in LENGTHS:
            x = torch.empty(1, 1, 3584, dtype=torch.bfloat16).expand(1, tokens, 3584)
            mask = torch.arange(tokens)[None] < tokens - 1
            with vps.token_mask(mask) if masked else nullcontext():
                layer(x)
    counts = Counter(key[0] for key in keys)
    assert len(keys) <= 20, counts
    assert set(counts) >= {"delta_kernel", "factors_kernel", "rank_kernel", "gemv_kernel"}


@torch.no_grad()
def test_few_for_all_sizes_of_a_batch(keys):
    layer = vps.VPSLinear.from_linear(
        torch.nn.Linear(256, 512, bias=False, dtype=torch.bfloat16), vps.VPSConfig()
    )
    with vps.backend("triton"):
        for sequences in range(1, 17):
            layer(torch.zeros(sequences, 300, 256, dtype=torch.bfloat16))
    assert len(keys) <= 8, Counter(key[0] for key in keys)

"""Check on a GPU what no other machine can: results, bits, captures, streams, waiting.

Each check is named and goes on after another fails; on a CPU those that need a GPU say so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import vps
from benchmarks import checks, common, machine, results, variants
from benchmarks.ops import __main__ as ops
from benchmarks.ops.problem import Problem
from vps import VPSLinear, reference
from vps.algorithm.policy import LayerGamma
from vps.functional import Projection, coupled_vps_linear
from vps.kernels import tuning

Check = tuple[str, Callable[[], object]]
BACKENDS = ("triton", "cuda")


def problem(device: str, tokens: int) -> Problem:
    """Return the layer that is checked."""
    if device == "cpu":
        return Problem(64, 112, min(tokens, 24), 300, 4, torch.float32, device)
    return Problem(3584, 3584, tokens, 152064, 4, torch.bfloat16, device)


def of_ops(device: str) -> Iterator[Check]:
    """Yield a check of every kernel and of the operator, selected features included."""
    for tokens in (64, 2048) if device == "cuda" else (24,):
        for case in ops.cases(problem(device, tokens)):
            for name in BACKENDS:
                if not isinstance(case.calls.get(name, ""), str):
                    yield f"{case.name}: {name}", partial(ops.check, case, name)


def of_layers(device: str) -> Iterator[Check]:
    """Yield checks of a few sequences, against the oracle."""
    own = problem(device, 1)
    for groups in (1, 3, 16):

        def layers(groups: int, backend: str) -> None:
            shape = ((own.d_in, own.d_out),)
            work = variants.random_workload(shape, groups, 1, own.dtype, device, 1)
            found = variants.of_backend(backend, work, variants.CONFIG)
            if isinstance(found, str):
                raise AssertionError(found)

        for backend in BACKENDS if device == "cuda" and groups == 1 else ():
            if vps.backends()[backend] is None:
                yield f"layer of {groups}: {backend}", partial(layers, groups, backend)
        if device == "cuda" and groups > 1:
            yield f"layer of {groups}: triton", partial(layers, groups, "triton")


def a_pair(device: str) -> None:
    """Compare a query and a key with the reference in float32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    for tokens in (1, 40):
        x = torch.randn(2, tokens, 256, device=device) / 4
        both = [Projection(torch.randn(n, 256, device=device) / 16) for n in (256, 128)]
        ys = coupled_vps_linear(x, *both, 4, 2, variants.CONFIG)
        wide = [reference.Projection(one.weight.double().cpu()) for one in both]  # type: ignore[union-attr]
        right = reference.coupled_vps_linear(
            x.double().cpu(), *wide, heads=4, kv_heads=2, config=variants.CONFIG
        )
        for y, result in zip(ys, right, strict=True):
            checks.check("pair", y.cpu(), result.y)


def layer_of(device: str, tokens: int) -> tuple[VPSLinear, Tensor]:
    """Return a sharpened layer and an input."""
    own = problem(device, tokens)
    linear = checks.linear(own.d_in, own.d_out, own.dtype, device)
    x = checks.activations(1, own.tokens, own.d_in, own.dtype, device)
    return VPSLinear.from_linear(linear, variants.CONFIG), x


def twice(device: str, tokens: int, backend: str) -> None:
    """Require equal bits of two calls."""
    layer, x = layer_of(device, tokens)
    with vps.backend(backend):
        assert torch.equal(layer(x), layer(x.clone())), "two calls differ"


def launched_early(device: str, tokens: int, backend: str) -> None:
    """Require the same bits where a kernel may start before the last one ends, replayed too."""
    layer, x = layer_of(device, tokens)
    inputs = [x, *(checks.activations(*x.shape, x.dtype, device) for _ in range(31))]
    with vps.backend(backend):
        expected = [layer(z) for z in inputs]
        found: list[Tensor] = []

        def call() -> Tensor:
            found[:] = [layer(z) for z in inputs]
            return found[-1]

        with mock.patch.object(tuning, "PDL", True):
            replay = common.graph_of(call)
        replay()
        torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected)), "an early launch is another"


def without_waiting(device: str, tokens: int, backend: str) -> None:
    """Require that nothing waits for the device, also after a change of the policy."""
    layer, x = layer_of(device, tokens)
    layer.gamma = LayerGamma([0.4, 0.3, 0.2, 0.1], x.device)
    with vps.backend(backend):
        layer(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            nats = torch.ones((), device=device)
            for change in (lambda: None, lambda: layer.state.set_entropy(nats)):
                change()
                layer(x.clone())
            layer.state.record(True)
            layer(x.clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")


def a_replay(device: str, tokens: int, backend: str) -> None:
    """Require that a captured layer follows its input, entropy, history and γ to the bit."""
    layer, x = layer_of(device, tokens)
    gamma = LayerGamma([0.4, 0.3, 0.2, 0.1], x.device)
    layer.gamma = gamma
    output = torch.empty(0)

    def call() -> Tensor:
        nonlocal output
        output = layer(x)
        return output

    with vps.backend(backend):
        replay = common.graph_of(call)
        static = output
        changes: tuple[Callable[[], object], ...] = (
            lambda: x.copy_(checks.activations(*x.shape, x.dtype, device)),
            lambda: layer.state.set_entropy(2.5),
            lambda: layer.state.record(True),
            lambda: gamma.set([-0.3, 0.2, 0.5, -0.1]),
            layer.state.reset,
        )
        for number, change in enumerate(changes):
            change()
            replay()
            assert torch.equal(static, layer(x.clone())), f"replay {number} is another"


def on_two_streams(device: str, tokens: int, backend: str) -> None:
    """Require equal bits of calls that overlap."""
    layer, x = layer_of(device, tokens)
    inputs = [checks.activations(*x.shape, x.dtype, device) for _ in range(32)]
    with vps.backend(backend):
        expected = [layer(z) for z in inputs]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for number, z in enumerate(inputs):
            with torch.cuda.stream(streams[number % 2]):
                found.append(layer(z))
        torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected)), "a call on two streams is another"


def runs(backend: str) -> None:
    """Require that a backend can run."""
    assert vps.backends()[backend] is None, vps.backends()[backend]


def plan(device: str) -> Iterator[Check]:
    """Yield all checks, the simplest first."""
    if device == "cuda":
        yield "triton runs", partial(runs, "triton")
    yield from of_ops(device)
    yield from of_layers(device)
    yield "pair", partial(a_pair, device)
    tests = (twice, without_waiting, a_replay, on_two_streams) if device == "cuda" else (twice,)
    for tokens in (1, 64):
        for test in tests:
            for backend in BACKENDS if tokens == 1 else BACKENDS[:1]:
                if vps.backends()[backend] is None:
                    name = f"{test.__name__.replace('_', ' ')}, N = {tokens}: {backend}"
                    yield name, partial(test, device, tokens, backend)
    if device == "cuda":
        yield "launched early, N = 1: triton", partial(launched_early, device, 1, "triton")


def run(out: Path) -> list[str]:
    """Run all checks, saving after each; return what failed."""
    device, wrong, right = machine.device(), [], 0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, test in plan(device):
            reason = checks.why_wrong(test)
            if reason is None:
                right += 1
            else:
                wrong.append(f"{name}: {reason}")
                print(wrong[-1], flush=True)
            lines = [f"{right} right, {len(wrong)} wrong; {vps.backends()}", *wrong[:20]]
            found = {"machine": machine.facts(), "lines": lines, "wrong": wrong}
            results.save(out / "gpu.json", "right", found, results.VISIT)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    sys.exit("\n".join(run(parser.parse_args().out)) or None)

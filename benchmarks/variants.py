"""Run a list of linear layers in every way: plain, ours by backend, and what a user might take.

Each is checked against the float64 oracle on a fresh input of every shape before it may be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import vps
from benchmarks import baselines, checks, common
from benchmarks.baselines import GEMV, NO_GEMV_IN_CPP
from benchmarks.common import Budget, Variant
from benchmarks.results import Case
from vps import VPSConfig, VPSLinear, reference
from vps.backends import sharing
from vps.kernels import tuning
from vps.masking import STATE, TokenLayout

BASE = "nn.Linear"
CONFIG = VPSConfig()
BACKENDS = ("torch", "cpp", "triton", "cuda")
GEMM = "our GEMM without VPS"
COMPILED = "clean formula, compiled"
AUTHOR, REFERENCE = "published form, eager", "eager reference"
WAITS = "not captured: it waits for the device"
FEW = 8  # slow variants run an eighth of the layers

Layer = Callable[[Tensor], Tensor]


@dataclass
class Workload:
    """Hold layers with an input each: ``linears[i]`` takes ``inputs[i]``, which several may share.

    Shapes repeat after ``period`` layers; ``clear`` keeps what :meth:`clear_cases` made.
    """

    linears: list[nn.Linear]
    inputs: list[Tensor]
    period: int
    clear: dict[tuple[int, ...], checks.Clear] = field(default_factory=dict)

    def clear_cases(self, config: VPSConfig) -> Iterator[tuple[nn.Linear, checks.Clear]]:
        """Yield one layer of every shape with a fresh input and its right output, made once."""
        groups, tokens = self.inputs[0].shape[:2]
        first = {tuple(layer.weight.shape): layer for layer in self.linears[: self.period][::-1]}
        for shape, layer in first.items():
            if shape not in self.clear:
                self.clear[shape] = checks.clear_case(layer, groups, tokens, config)
            yield layer, self.clear[shape]


def random_workload(
    shapes: Sequence[tuple[int, int]],
    groups: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    weight_bytes: int,
) -> Workload:
    """Make layers of these shapes, again and again, until their weights have so many bytes.

    A layer that follows one of the same ``d_in`` takes the same input where ``shapes`` are the
    projections of a block: q, k and v share one, gate and up another.
    """
    once = sum(d_in * d_out for d_in, d_out in shapes) * dtype.itemsize
    linears, inputs = [], []
    for _ in range(max(1, -(-weight_bytes // once))):
        for number, (d_in, d_out) in enumerate(shapes):
            shared = len(shapes) == 7 and number in (1, 2, 5)
            linears.append(checks.linear(d_in, d_out, dtype, device))
            fresh = (
                inputs[-1] if shared else checks.activations(groups, tokens, d_in, dtype, device)
            )
            inputs.append(fresh)
    return Workload(linears, inputs, len(shapes))


def of_layers(work: Workload, *, config: VPSConfig = CONFIG) -> dict[str, Variant | str]:
    """Make every variant, checked; a string where it cannot run, with the reason."""
    groups = len(work.inputs[0])
    found = usual(work, config)
    found[GEMV] = our_gemv(work)
    found[GEMM] = "no such form: VPS takes the GEMM of torch (cuBLAS, oneDNN, MKL)"
    found[COMPILED] = _made(work, config, _compiled(config))
    blocks = len(work.linears) // work.period
    kept = max(1, blocks // FEW)
    few = Workload(
        work.linears[: kept * work.period],
        work.inputs[: kept * work.period],
        work.period,
        work.clear,
    )
    share = kept / blocks
    if groups == 1:
        author = _made(few, config, lambda layer: baselines.AuthorStyle(layer, config))
    else:
        author = "no such form: the published code shares one selection over the batch"
    eager = _made(few, config, lambda layer: partial(_reference, layer, config))
    for name, variant in ((AUTHOR, author), (REFERENCE, eager)):
        found[name] = variant._replace(share=share) if isinstance(variant, Variant) else variant
    return found


def usual(work: Workload, config: VPSConfig) -> dict[str, Variant | str]:
    """Make ``nn.Linear``, LoRA of the same rank, and ours by backend."""
    r = baselines.rank(config, work.linears[0])
    found: dict[str, Variant | str] = {BASE: Variant(partial(_run, work.linears, work.inputs))}
    found[f"peft lora r={r}"] = _lora(work, r)
    for name in BACKENDS:
        found[f"vps {name}"] = of_backend(name, work, config)
    return found


def of_backend(name: str, work: Workload, config: VPSConfig) -> Variant | str:
    """Make ``VPSLinear`` with one backend."""
    reason = why_not(name, work.inputs[0])
    if reason is not None:
        return reason

    state = vps.PolicyState()

    def layer(linear: nn.Linear) -> Layer:
        return VPSLinear.from_linear(linear, config, state)

    with vps.backend(name):
        made = _made(work, config, layer)
    if not isinstance(made, Variant):
        return made

    def call() -> object:
        with vps.backend(name), as_a_model(work.inputs[0]):
            return made.call()

    return Variant(call)


@contextmanager
def as_a_model(x: Tensor) -> Iterator[None]:
    """Let layers run as in the forward of a model: on a GPU those of one x share launches."""
    if not x.is_cuda:
        yield
        return
    STATE.layouts.append(TokenLayout(tuple(x.shape[:-1]), None, owner=x, rows=(x.shape[0],)))
    try:
        yield
    finally:
        STATE.layouts.pop()
        if STATE.readings:
            STATE.readings[-1].end()


def launched_early(variant: Variant | str) -> Variant | str:
    """Let kernels of a step start before the one before them ends (``tuning.PDL``)."""
    if not isinstance(variant, Variant):
        return variant

    def call() -> object:
        with mock.patch.object(tuning, "PDL", True):
            return variant.call()

    return Variant(call)


def why_not(name: str, x: Tensor) -> str | None:
    """Say why a backend is not timed on such an input, or ``None``."""
    if (reason := vps.backends()[name]) is not None:
        return f"not here: {reason}"
    if name == "triton" and not x.is_cuda:
        return "not here: Triton's interpreter on a CPU says nothing of its speed"
    if name == "cpp" and x.is_cuda:
        return "for CPUs"
    if name == "cuda" and x.shape[:2] != (1, 1):
        return "takes one token; the rest goes to vps triton"
    return None


def in_both_forms(
    name: str, found: dict[str, Variant | str], base: str, device: str, budget: Budget, work: int
) -> dict[str, Case]:
    """Time as ``name`` call by call, on a GPU as CUDA graphs, and call by call as another form."""
    if device == "cpu":
        return {name: common.measure(found, base, budget.left(), work=work)}
    graphs = common.measure(in_graphs(found), base, budget.part(2), work=work)
    # Call by call the host takes most of the time, and far more of it.
    eager = common.measure(found, base, budget.left(), work=work, least=10)
    return {name: graphs, f"{name}, eager": eager}


def in_graphs(variants: dict[str, Variant | str]) -> dict[str, Variant | str]:
    """Turn variants into replays of CUDA graphs."""
    found: dict[str, Variant | str] = {}
    for name, variant in variants.items():
        if not isinstance(variant, Variant):
            found[name] = variant
        elif name in (AUTHOR, REFERENCE):
            found[name] = WAITS
        else:
            found[name] = common.captured(variant)
    return found


def _made(work: Workload, config: VPSConfig, make: Callable[[nn.Linear], Layer]) -> Variant | str:
    """Make layers of the linear ones, checked against the oracle and ready to run."""

    def test() -> None:
        for linear, clear in work.clear_cases(config):
            sharing.forget()
            checks.check(str(tuple(linear.weight.shape)), make(linear)(clear.x), clear.y)

    if (reason := checks.why_wrong(test)) is not None:
        return reason
    return Variant(partial(_run, [make(linear) for linear in work.linears], work.inputs))


def _lora(work: Workload, r: int) -> Variant | str:
    try:
        layers = [baselines.lora(linear, r) for linear in work.linears]
    except ImportError:
        return "not here: peft is not installed"

    def test() -> None:
        """``(W + B A) x`` with the factors that it holds."""
        for number in range(min(7, len(layers))):
            layer, linear, x = layers[number], work.linears[number], work.inputs[number]
            A, B = (getattr(layer, f"lora_{side}")["default"].weight.double() for side in "AB")
            update = (layer.scaling["default"] * B) @ A
            checks.check("peft lora", layer(x), x.double() @ (linear.weight.double() + update).T)

    reason = checks.why_wrong(test)
    return Variant(partial(_run, layers, work.inputs)) if reason is None else reason


def our_gemv(work: Workload) -> Variant | str:
    """Make our GEMV without VPS."""
    x = work.inputs[0]
    if not x.is_cuda:
        return NO_GEMV_IN_CPP
    if vps.backends()["triton"] is not None:
        return f"not here: {vps.backends()['triton']}"
    if (reason := baselines.why_no_gemv(x, work.linears[0].weight)) is not None:
        return reason

    def test() -> None:
        for linear, x in zip(work.linears[:7], work.inputs, strict=False):
            checks.check(
                "GEMV", baselines.gemv(x, linear.weight), x.double() @ linear.weight.double().T
            )

    if (reason := checks.why_wrong(test)) is not None:
        return reason
    calls = [partial(baselines.gemv, weight=linear.weight) for linear in work.linears]
    return Variant(partial(_run, calls, work.inputs))


def _compiled(config: VPSConfig) -> Callable[[nn.Linear], Layer]:
    formula = compiled_formula()
    return lambda linear: lambda x: formula(x, linear.weight, linear.bias, config)


_COMPILED: list[Callable[..., Tensor]] = []


def compiled_formula() -> Callable[..., Tensor]:
    """Compile the clean formula once: later shapes share its dynamic code."""
    if not _COMPILED:
        torch._dynamo.config.recompile_limit = 64
        _COMPILED.append(torch.compile(baselines.clean_formula, dynamic=True))
    return _COMPILED[0]


def _reference(linear: nn.Linear, config: VPSConfig, x: Tensor) -> Tensor:
    return reference.vps_linear(x, linear.weight, linear.bias, config=config).y


def _run(layers: Sequence[Layer], inputs: Sequence[Tensor]) -> Tensor:
    """Run every layer on its input, and return the last output."""
    sharing.forget()  # of the last round, else the first layer would find its selection made
    for layer, x in zip(layers, inputs, strict=True):
        y = layer(x)
    return y

"""Measure peak bytes beyond what was there, for patching, forward, and forward and backward.

On a GPU the allocator's own peak. On a CPU the allocations that torch's profiler records, added up
in order: exact for tensors; scratch that C++ takes with malloc (csrc/workspace.h) is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import vps
from benchmarks import baselines, checks, common, machine, results
from benchmarks.models import block, layer, whole
from benchmarks.results import Case, Row, Section
from benchmarks.variants import AUTHOR, BACKENDS, CONFIG, why_not

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints two lines a pass
HERE = {
    "cpu": (("Qwen2.5-0.5B", torch.float32, 256),),
    "cuda": (("Qwen2.5-7B", torch.bfloat16, 1), ("Qwen2.5-7B", torch.bfloat16, 2048)),
}
PASSES = ("patching", "forward", "forward and backward")


def run(seconds: float) -> Section:
    """Measure the section ``memory`` in some seconds, whatever ``seconds`` says."""
    device = machine.device()
    before = machine.clocks()
    found: dict[str, Case] = {}
    for name, dtype, tokens in HERE[device]:
        torch.manual_seed(0)
        plain = whole.random_model(name, dtype, device, layers=1, vocabulary=64)
        for title, case in measure(plain, tokens, dtype, device).items():
            title = f"{title}, block of {name}, {layer.title(1, tokens, dtype)}"
            found[title] = case
            common.show(title, case)
    return common.section(found, before)


def measure(plain: Any, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Case]:
    """Measure peak bytes: a case for each pass, with a row for each variant.

    The backward pass is that of the mean of the output with respect to the input, and of LoRA's
    factors, which alone are trained.
    """
    hidden = plain.config.hidden_size
    x = checks.activations(1, tokens, hidden, dtype, device)
    cases: dict[str, dict[str, Row]] = {title: {} for title in PASSES}
    for name, make, backend in _variants(plain, x):
        if isinstance(make, str):
            for rows in cases.values():
                rows[name] = results.empty(make)
            continue
        for title, most in _peaks(whole.shared_copy(plain), make, backend, x).items():
            cases[title][name] = {"bytes": most}
    return {title: results.case(whole.PLAIN, rows) for title, rows in cases.items()}


def _peaks(
    copy: Any, make: Callable[[Any], nn.Module], backend: str | None, x: Tensor
) -> dict[str, int]:
    made: list[nn.Module] = []
    found = {PASSES[0]: peak(lambda: made.append(make(copy)))}
    for title in PASSES[1:]:
        call = _pass(made[0], x, backward="backward" in title)
        with vps.backend(backend) if backend else nullcontext():
            call()  # what is made once and kept is no part of a pass
            found[title] = peak(call)
    return found


def peak(call: Callable[[], object]) -> int:
    """Return the most bytes allocated at once during ``call``, beyond those before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    kineto = profiler.profiler.kineto_results
    changes = [event for event in kineto.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _variants(
    plain: Any, x: Tensor
) -> list[tuple[str, Callable[[Any], nn.Module] | str, str | None]]:
    """List names, how a copy of the model is patched, and the backend to run it with."""
    first = next(m for m in plain.modules() if isinstance(m, nn.Linear))
    r = baselines.rank(CONFIG, first)

    def sharpen(model: Any) -> nn.Module:
        vps.patch(model, CONFIG)
        return model

    found: list[tuple[str, Callable[[Any], nn.Module] | str, str | None]] = [
        (whole.PLAIN, lambda model: model, None),
        (f"peft lora r={r}", lambda model: baselines.lora_in_place(model, r), None),
    ]
    for name in BACKENDS:
        reason = why_not(name, x)
        found.append((f"vps {name}", reason or sharpen, None if reason else name))
    found.append((AUTHOR, lambda model: baselines.author_in_place(model, CONFIG), None))
    return found


def _pass(model: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    def call() -> None:
        given = x.clone().requires_grad_() if backward else x
        with torch.set_grad_enabled(backward):
            y = block.inner(model)(inputs_embeds=given, use_cache=False).last_hidden_state
            if backward:
                y.float().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


if __name__ == "__main__":
    common.command("memory", run, __doc__, seconds=30)

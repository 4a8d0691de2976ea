"""Time the backward pass of a whole frozen model, to the embeddings, by every variant.

The forward pass is made once a variant and its graph kept; the backward pass alone is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vps
from benchmarks import common, machine, results, shapes, variants
from benchmarks.common import Budget, Variant
from benchmarks.models import model, whole
from benchmarks.results import Case, Section

TOKENS = {"cpu": (64, 256), "cuda": (256, 2048)}
HERE = {"cpu": whole.SMOLLM2, "cuda": "Qwen2.5-1.5B"}
ALIKE = {torch.float32: 0.999, torch.bfloat16: 0.99}


def run(seconds: float, model_dir: Path) -> Section:
    """Measure the section ``backward``."""
    device = machine.device()
    before = machine.clocks()
    budget = Budget(seconds)
    name = HERE[device]
    plain, dtype = model.load(name, device, model_dir)
    runnable = whole.Variants(plain)
    found: dict[str, Case] = {}
    for number, tokens in enumerate(TOKENS[device]):
        title = f"{name}, backward of {tokens} tokens, {shapes.title(dtype)}"
        if budget.left() <= 0:
            found[title] = results.unmeasured(whole.PLAIN, common.TIME_WAS_UP)
            continue
        part = budget.part(len(TOKENS[device]) - number)
        found[title] = measure(runnable, tokens, dtype, part)
        common.show(title, found[title])
    return common.section(found, before)


def measure(runnable: whole.Variants, tokens: int, dtype: torch.dtype, seconds: float) -> Case:
    """Time the backward pass of every variant whose gradient is right."""
    plain = runnable.plain
    torch.manual_seed(0)
    device = next(plain.parameters()).device
    ids = torch.randint(0, plain.config.vocab_size, (1, tokens), device=device)
    embedded = plain.get_input_embeddings()(ids).detach()
    oracle = _graph(runnable.sharpened, embedded, ids, "torch")[1]()
    probe = torch.empty(1, tokens, 0, device=device)
    ready: dict[str, Variant | str] = {whole.PLAIN: Variant(_graph(plain, embedded, ids, None)[0])}
    lora = runnable.lora
    ready[runnable.lora_name] = (
        lora if isinstance(lora, str) else Variant(_graph(lora, embedded, ids, None)[0])
    )
    for name in variants.BACKENDS:
        reason = variants.why_not(name, probe)
        if reason is None:
            backward, gradient = _graph(runnable.sharpened, embedded, ids, name)
            likeness = float(cosine_similarity(gradient().flatten(), oracle.flatten(), 0))
            if likeness < ALIKE[dtype]:
                reason = f"wrong: the cosine of its gradient with that of torch is {likeness:.6f}"
        ready[f"vps {name}"] = reason or Variant(backward)
    return common.measure(ready, whole.PLAIN, seconds)


def _graph(
    module: Any, embedded: Tensor, ids: Tensor, backend: str | None
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """Return a call of the backward pass, and one that returns its gradient."""
    given = embedded.clone().requires_grad_()
    with torch.enable_grad(), vps.backend(backend) if backend else nullcontext():
        loss = module(inputs_embeds=given, labels=ids, use_cache=False).loss

    def backward() -> None:
        given.grad = None
        loss.backward(retain_graph=True)

    def gradient() -> Tensor:
        backward()
        assert given.grad is not None
        return given.grad.double()

    return backward, gradient


if __name__ == "__main__":
    common.command("backward", run, __doc__, 120, model.options)

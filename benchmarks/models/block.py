"""Time decoder blocks with random weights, by every variant: linears, attention, norms and all.

Enough blocks of a model to exceed the cache, called with embeddings and without a KV cache; times
are of one block, in which the final norm has its share. On a GPU in CUDA graphs, and as a second
table call by call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, common, machine, results, shapes, variants
from benchmarks.common import Budget
from benchmarks.models import layer, whole
from benchmarks.results import Case, Section

HERE = {
    "cpu": ("SmolLM2-135M", "Qwen2.5-0.5B"),
    "cuda": ("Qwen2.5-7B", "Qwen2.5-1.5B", "Llama-3-8B", "Llama-3-70B"),
}
TOKENS = {"cpu": ((1, 1), (1, 256)), "cuda": ((1, 1), (1, 2048))}


def run(seconds: float) -> dict[str, Section]:
    """Measure the sections ``block`` and, on a GPU, ``block, eager``."""
    device = machine.device()
    before = machine.clocks()
    budget = Budget(seconds)
    forms: dict[str, dict[str, Case]] = {"block": {}}
    if device == "cuda":
        forms["block, eager"] = {}
    todo = [(name, dtype) for name in HERE[device] for dtype in shapes.DTYPES[device]]
    left = len(todo) * len(TOKENS[device])
    with torch.no_grad():
        for name, dtype in todo:
            blocks = None
            for groups, tokens in TOKENS[device]:
                title = f"block of {name}, {layer.title(groups, tokens, dtype)}"
                part, left = budget.part(left), left - 1
                if part > 0:
                    blocks = blocks or make(name, dtype, device)
                    found = measure(blocks, groups, tokens, dtype, device, part)
                else:
                    empty = results.unmeasured(whole.PLAIN, common.TIME_WAS_UP)
                    found = dict.fromkeys(forms, empty)
                for form, case in found.items():
                    forms[form][title] = case
                    common.show(f"{form}: {title}", case)
    return {form: common.section(cases, before) for form, cases in forms.items()}


def make(name: str, dtype: torch.dtype, device: str) -> whole.Variants:
    """Make a model of as many blocks as exceed the cache."""
    sizes = shapes.MODELS[name]
    weights = sum(d_in * d_out for d_in, d_out in sizes.projections().values())
    count = -(-shapes.WEIGHT_BYTES[device] // (weights * dtype.itemsize))
    torch.manual_seed(0)
    return whole.Variants(
        whole.random_model(name, dtype, device, layers=min(sizes.layers, count), vocabulary=64)
    )


def measure(
    blocks: whole.Variants,
    groups: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    seconds: float,
) -> dict[str, Case]:
    """Time blocks on random embeddings, in every form."""
    config = blocks.plain.config
    x = checks.activations(groups, tokens, config.hidden_size, dtype, device)

    def forward(model: Any) -> Tensor:
        return inner(model)(inputs_embeds=x, use_cache=False).last_hidden_state

    budget = Budget(seconds)
    found = blocks.runs(forward, x, blocks.check(forward, dtype))
    return variants.in_both_forms(
        "block", found, whole.PLAIN, device, budget, config.num_hidden_layers
    )


def inner(model: Any) -> Any:
    """Return the decoder without its head, also inside PEFT."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


if __name__ == "__main__":
    common.command("block", run, __doc__, seconds=90)

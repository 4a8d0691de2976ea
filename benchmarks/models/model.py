"""Time greedy tokens and a prefill of whole models, by every variant.

On a CPU SmolLM2-135M; on a GPU random weights in the sizes of Qwen2.5-1.5B and 7B, with a static
cache, not compiled.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, machine, results, shapes
from benchmarks.common import Budget
from benchmarks.models import whole
from benchmarks.results import Case, Section

PROMPT, PREFILL = 32, 512
NEW_TOKENS = {"cpu": 64, "cuda": 16}
HERE = {"cpu": (whole.SMOLLM2,), "cuda": ("Qwen2.5-1.5B", "Qwen2.5-7B")}
TOO_SLOW = "left out: several times slower; see the prefill"


def run(seconds: float, model_dir: Path) -> Section:
    """Measure the section ``model``."""
    device = machine.device()
    before = machine.clocks()
    budget = Budget(seconds)
    found: dict[str, Case] = {}
    names = HERE[device]
    with torch.no_grad():
        for number, name in enumerate(names):
            if budget.left() <= 0:
                found[name] = results.unmeasured(whole.PLAIN, common.TIME_WAS_UP)
                continue
            plain, dtype = load(name, device, model_dir)
            part = budget.part(len(names) - number)
            for title, case in measure(plain, dtype, part, NEW_TOKENS[device]).items():
                found[f"{name}, {title}"] = case
                common.show(f"{name}, {title}", case)
            del plain
    return common.section(found, before)


def load(name: str, device: str, model_dir: Path) -> tuple[Any, torch.dtype]:
    """Load a model, and return it with its dtype."""
    if name == whole.SMOLLM2:
        return whole.smollm2(model_dir).to(device), torch.float32
    torch.manual_seed(0)
    return whole.random_model(name, torch.bfloat16, device), torch.bfloat16


def measure(
    plain: Any,
    dtype: torch.dtype,
    seconds: float,
    new_tokens: int,
    prefill: int = PREFILL,
) -> dict[str, Case]:
    """Time prefill and generation, checked first on 64 tokens."""
    budget = Budget(seconds)
    model = whole.Variants(plain)
    device = next(plain.parameters()).device
    torch.manual_seed(0)
    ids = torch.randint(0, plain.config.vocab_size, (1, prefill), device=device)

    rows = torch.randint(0, plain.config.vocab_size, (8, min(PROMPT, prefill)), device=device)

    def logits(module: Any) -> Tensor:
        return module(ids, use_cache=False).logits

    def answer(module: Any) -> Tensor:
        return generate(module, ids[:, :PROMPT], new_tokens)

    def answers(module: Any) -> Tensor:
        return generate(module, rows, few)

    wrong = model.check(lambda module: module(ids[:, :64], use_cache=False).logits, dtype)
    kind, few = shapes.title(dtype), max(1, new_tokens // 4)
    found = {}
    for title, call, part, author in (
        (f"prefill of {prefill} tokens, {kind}", logits, 4, None),
        (f"{new_tokens} greedy tokens after {min(PROMPT, prefill)}, {kind}", answer, 2, TOO_SLOW),
        (f"batch of 8, {few} greedy tokens, {kind}", answers, 1, TOO_SLOW),
    ):
        probe = torch.empty(1, 1, 0, device=device)
        calls = model.runs(call, probe, wrong, author, prompted=call is not logits)
        found[title] = common.measure(calls, whole.PLAIN, budget.part(part), least=5)
    return found


def generate(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Generate exactly so many greedy tokens, with a static cache on a GPU."""
    options: dict[str, Any] = {}
    if prompt.is_cuda:
        options = {"cache_implementation": "static", "disable_compile": True}
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def options(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where SmolLM2 is."""
    parser.add_argument("--model-dir", type=Path, default=Path(".cache/smollm2"))


if __name__ == "__main__":
    common.command("model", run, __doc__, 240, options)

"""SmolLM2-135M on a CPU: 64 greedy tokens and a 512-token prefill, sharpened against plain.

``plain again`` is the A/A band: what differs there is noise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import vps
from benchmarks.common import interleave, ratios, write
from vps.loading import load_model

T = TypeVar("T")


def main() -> None:
    """Check, time, write ``<out>/model.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    files = sorted(arguments.model_dir.glob("*.gguf"))
    plain, tokenizer = load_model(str(files[0] if files else arguments.model_dir))
    sharpened = copy.deepcopy(plain)
    vps.patch(sharpened)
    models = {"plain": plain, "plain again": plain, "peft lora r=2": _with_lora(plain)}
    names = [name for name in ("torch", "cpp") if vps.backends()[name] is None]
    text = "The quick brown fox jumps over the lazy dog. " * 80
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]

    def variants(run: Callable[[torch.nn.Module], object]) -> dict[str, Callable[[], object]]:
        calls = {name: lambda model=model: run(model) for name, model in models.items()}
        return calls | {
            f"vps {name}": lambda name=name: _with(name, run, sharpened) for name in names
        }

    with torch.no_grad():
        with vps.disabled(sharpened):
            assert torch.equal(sharpened(ids).logits, plain(ids).logits)
        logits = [_with(name, lambda model: model(ids).logits, sharpened) for name in names]
        for other in logits[1:]:
            torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-2)
        prefill = interleave(variants(lambda model: model(ids)), arguments.rounds * 2)
        generate = interleave(variants(lambda model: _generate(model, ids)), arguments.rounds)
    rows = {
        "generate 64 tokens after 32": ratios(generate, "plain"),
        "prefill 512 tokens": ratios(prefill, "plain"),
    }
    write(arguments.out, "model", rows)


def _with(backend: str, run: Callable[[torch.nn.Module], T], model: torch.nn.Module) -> T:
    with vps.backend(backend):
        return run(model)


def _with_lora(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=list(vps.VPSConfig().target_modules))
    return get_peft_model(copy.deepcopy(model), config).eval()


def _generate(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    prompt = ids[:, :32]
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()

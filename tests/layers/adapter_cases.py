"""Tiny models with adapters as training leaves them, and the oracle with merged weights."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import draw, tiny

import vps

IDS = draw(2, 7, seed=1)
TARGETS = ["q_proj", "v_proj"]


def lora(**changes):
    return LoraConfig(**(dict(target_modules=TARGETS, r=3, lora_alpha=7) | changes))


def fill(model, seed=5):
    """Adapters as training leaves them: PEFT's own start changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "ia3" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
    return model.eval()


def adapted(order, config, adapter=None, family="llama"):
    adapter = lora() if adapter is None else adapter
    model = tiny(family)
    if order == "before":
        model = fill(get_peft_model(model, adapter))
        vps.patch(model, config)
        return model
    vps.patch(model, config)
    return fill(get_peft_model(model, adapter))


def merged(config, adapter=None, seed=5, family="llama"):
    """The oracle: no adapter is left when this one is patched."""
    model = fill(get_peft_model(tiny(family), lora() if adapter is None else adapter), seed)
    model = model.merge_and_unload()
    vps.patch(model, config)
    return model


def same(model, expected, ids=IDS, bound=1e-9):
    logits = model(ids).logits
    return bool((logits - expected).abs().max() <= bound)

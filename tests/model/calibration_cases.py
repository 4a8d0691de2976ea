"""A calibration of a tiny model, made without fitting."""

from vps import Calibration
from vps.model.calibration import fingerprint
from vps.model.patching import sharpened_layers


def made(model, gamma=0.25, **changes):
    layers = sharpened_layers(model)
    values = {
        "config": next(iter(layers.values())).config,
        "model": "tiny",
        "architecture": "LlamaForCausalLM",
        "weights": fingerprint(model),
        "data": "d" * 64,
        "gamma": gamma if isinstance(gamma, dict) else dict.fromkeys(layers, gamma),
        "examples": ("e1", "e2"),
        "found": True,
        "report": {"forms": {}},
    }
    return Calibration(**(values | changes))

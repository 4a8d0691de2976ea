"""A layer that is known by its forward alone, and an attention block of such."""

import torch
import torch.nn.functional as F
from torch import nn

import vps
from vps import token_mask
from vps.layers.opaque_layer import sharpened_by


class Hidden(nn.Linear):
    """A linear layer that shows its map in its forward alone, as other libraries' do."""

    def __init__(self, W, b=None):
        super().__init__(W.shape[1], W.shape[0], b is not None, dtype=W.dtype)
        self.hidden = nn.Parameter(W.clone(), requires_grad=False)
        self.weight = None
        self.calls = []
        if b is not None:
            self.bias = nn.Parameter(b.clone(), requires_grad=False)

    @property
    def weight(self):
        return nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)

    @weight.setter
    def weight(self, value):
        pass

    def register_parameter(self, name, parameter):
        if name != "weight":
            super().register_parameter(name, parameter)

    def reset_parameters(self):
        pass

    def forward(self, x):
        self.calls.append(len(x) if x.dim() > 1 else 1)
        return F.linear(x, self.hidden, self.bias)


class Quantized(nn.Linear):
    """Of 8-bit integers, as they are."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(
            torch.randint(-9, 9, (d_in * d_out,), dtype=torch.int8), requires_grad=False
        )

    def forward(self, x):
        W = self.weight.view(self.out_features, self.in_features).float()
        return F.linear(x, W, self.bias)


def opaque(W, b, config, *, state=None, gradient=False, memory=None):
    """A sharpened layer of that W, as a patched model holds it."""
    model = nn.Sequential(Hidden(W, b))
    report = vps.patch(model, config.replace(target_modules=["0"]))
    assert report.forms == {"0": "opaque (Hidden)"}
    layer = sharpened_by(model[0])
    assert layer.matrix() is None
    layer.gradient, layer.memory = gradient, memory
    if state is not None:
        layer.state = state
    model[0].calls.clear()
    return model


class Block(nn.Module):
    """An attention block that calls its query and key layer."""

    def __init__(self, case, hidden, first):
        super().__init__()
        for name, W, b, is_hidden in zip(
            ("q_proj", "k_proj"), case["weights"], case["bias"], hidden, strict=True
        ):
            if is_hidden:
                layer = Hidden(W, b)
            else:
                layer = nn.Linear(W.shape[1], W.shape[0], b is not None, dtype=W.dtype)
                with torch.no_grad():
                    layer.weight.copy_(W)
                    if b is not None:
                        layer.bias.copy_(b)
            setattr(self, name, layer)
        self.head_dim = case["weights"][0].shape[0] // case["heads"][0]
        self.first = first

    def forward(self, x):
        if self.first == "q_proj":
            return self.q_proj(x), self.k_proj(x)
        key = self.k_proj(x)
        return self.q_proj(x), key


def applied(model, case):
    """The output for the x of a case, under its mask."""
    if case["mask"] is None:
        return model(case["x"])
    with token_mask(case["mask"]):
        return model(case["x"])

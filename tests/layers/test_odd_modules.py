"""What is not sharpened cannot stop a patch, whatever its forward, attributes or weights may be."""

import functools

import pytest
import torch
from torch import nn

import vps
from vps import VPSConfig, VPSLinear


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def with_forward(forward):
    module = nn.Module()
    module.__dict__["forward"] = forward
    return module


class Builtin(nn.Module):
    forward = torch.relu  # has no signature


class Missing(nn.Module):
    @property
    def forward(self):
        raise AttributeError("made later")


class Failing(nn.Module):
    @property
    def forward(self):
        raise RuntimeError("made later")


class Nothing(nn.Module):
    forward = None


class Stern(nn.Module):
    """Knows its own attributes alone."""

    def forward(self, x):
        return x

    def __getattr__(self, name):
        if name in ("_parameters", "_buffers", "_modules"):
            return super().__getattr__(name)
        raise RuntimeError(f"no {name}")


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.LazyConv1d(3, 1)


class Lying(nn.Module):
    @property
    def __signature__(self):
        raise TypeError("none")

    def __call__(self, x):
        return x


MODULES = {
    "scripted": lambda: torch.jit.script(nn.GELU()),
    "scripted linear": lambda: torch.jit.script(Inner()),
    "traced": lambda: torch.jit.trace(Inner(), torch.randn(2, 4)),
    "fx": lambda: torch.fx.symbolic_trace(Inner()),
    "exported": lambda: torch.export.export(Inner(), (torch.randn(2, 4),)).module(),
    "compiled": lambda: torch.compile(nn.GELU()),
    "builtin": Builtin,
    "builtin on the instance": lambda: with_forward(torch.relu),
    "partial": lambda: with_forward(functools.partial(torch.relu)),
    "object": lambda: with_forward(Lying()),
    "number": lambda: with_forward(3),
    "missing": Missing,
    "failing": Failing,
    "none": Nothing,
    "stern": Stern,
    "lazy": Lazy,
    "container": lambda: nn.ModuleList([nn.Identity()]),
    "parameters": lambda: nn.ParameterDict({"experts": nn.Parameter(torch.zeros(2))}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_module_that_is_not_sharpened_stops_no_patch(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"other": MODULES[name](), "linear": nn.Linear(4, 4)})
    x = torch.randn(2, 3, 4)
    plain = model["linear"](x)
    for _ in range(2):  # again is allowed
        report = vps.patch(model, VPSConfig(target_modules=["linear"], gamma=0.5))
    assert report.patched == ("linear",) and isinstance(model["linear"], VPSLinear)
    assert not torch.equal(model["linear"](x), plain)
    with vps.disabled(model):
        assert torch.equal(model["linear"](x), plain)
    vps.unpatch(model)
    assert type(model["linear"]) is nn.Linear and torch.equal(model["linear"](x), plain)


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, RuntimeError])
def test_a_model_without_an_output_head(error):
    class Model(Inner):
        def get_output_embeddings(self):
            raise error("none")

    assert vps.patch(Model(), VPSConfig(target_modules="all-linear")).patched == ("inner",)


class Encoder(nn.Module):
    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor):
        return inputs_embeds


class Ambiguous:
    def get_text_config(self):
        raise ValueError("several")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    @property
    def head_dim(self):
        raise RuntimeError("made later")


@pytest.mark.parametrize("spoil", ["scripted", "config", "block"])
def test_what_goes_with_a_patch_asks_no_more_than_it_is_told(spoil):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "block": nn.Sequential(nn.Linear(4, 4))})
    if spoil == "scripted":
        model["other"] = torch.jit.script(Encoder())
    elif spoil == "config":
        model.config = Ambiguous()
    else:
        model["block"] = Block()
    targets = ["linear", "q_proj", "k_proj"]
    assert "linear" in vps.patch(model, VPSConfig(target_modules=targets)).patched
    vps.unpatch(model)

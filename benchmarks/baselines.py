"""Provide what a user might run instead: published form, compiled formula, LoRA, bare GEMV."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps import VPSConfig
from vps.algorithm import policy
from vps.algorithm.policy import FLOOR_GUARD

GEMV = "our GEMV without VPS"
NO_GEMV_IN_CPP = "no such form: the C++ GEMV is not reachable without the update"


class AuthorStyle(nn.Module):
    """Sharpen as the published code does: dense U and V, ``A = WᵀV`` and ``B = WU`` each call.

    The policy decides with Python numbers. Where the published code differs from SPEC (energy with
    the bias in it, a rank by ``round``), it follows SPEC, so that the oracle can check it.
    """

    def __init__(self, base: nn.Linear, config: VPSConfig) -> None:
        super().__init__()
        self.base, self.config = base, config

    def forward(self, x: Tensor) -> Tensor:
        config, weight = self.config, self.base.weight
        y = self.base(x)
        x2d, h2d = x.flatten(0, -2), y.flatten(0, -2)
        if self.base.bias is not None:
            h2d = h2d - self.base.bias
        sigma = 1 - math.exp(-h2d.float().square().mean().item())
        low, high = config.rank_bounds
        rank = low + math.floor((high - low) * sigma + FLOOR_GUARD)
        low_gamma, high_gamma = config.gamma_bounds
        gamma = low_gamma + (high_gamma - low_gamma) * sigma

        U = self._selector(x2d, config.topk, rank)
        V = self._selector(h2d, config.topk, rank)
        A, B = weight.t() @ V, weight @ U
        product = A.float().norm(dim=0) * B.float().norm(dim=0)
        scale = (product / config.tau).clamp(min=1).sqrt().to(A.dtype)
        delta = (x2d @ (A / scale)) @ (B / scale).t()
        return y + gamma * delta.view_as(y)

    @staticmethod
    def _selector(values: Tensor, topk: int, rank: int) -> Tensor:
        pool = values.float().abs().mean(0).topk(min(topk, values.shape[1])).indices
        selector = torch.zeros(values.shape[1], rank, dtype=values.dtype, device=values.device)
        for column in range(rank):
            selector[pool[column], column] = 1
        return selector


def clean_formula(x: Tensor, weight: Tensor, bias: Tensor | None, config: VPSConfig) -> Tensor:
    """Sharpen by the reference's formula without its loops and waits, for a compiler.

    For the default settings (SK, order 1, component clip) and x ``[G, T, d_in]``. ``x A`` is
    multiplied as SPEC §4 writes it, ``A`` and ``B`` are gathered.
    """
    most = config.rank_bounds[1]
    H = F.linear(x, weight)
    I_in = x.abs().float().mean(1).topk(most).indices
    I_out = H.abs().float().mean(1).topk(most).indices
    sigma = 1 - torch.exp(-H.float().square().mean((1, 2)))
    low, high = config.rank_bounds
    rank = low + torch.floor((high - low) * sigma + FLOOR_GUARD)
    low, high = config.gamma_bounds
    gamma = low + (high - low) * sigma
    A, B = weight[I_out], weight.t()[I_in]  # [G, r, d_in], [G, r, d_out]
    scale = A.float().norm(dim=-1) * B.float().norm(dim=-1) / config.tau
    active = torch.arange(most, device=x.device) < rank[:, None]
    factor = torch.where(active, gamma[:, None] / scale.clamp(min=1), 0.0)
    delta = ((x @ A.mT) * factor[:, None].to(x.dtype)) @ B
    return H + delta if bias is None else H + bias + delta


def rank(config: VPSConfig, layer: nn.Linear) -> int:
    """Return the columns that VPS computes with, the most that the policy can ask for."""
    settings = policy.settings(config, False, layer.in_features, layer.out_features)
    assert settings is not None
    return settings.r


def lora(layer: nn.Linear, r: int) -> nn.Module:
    """Wrap ``layer`` in PEFT's LoRA, not merged, with random factors."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    return Linear(layer, "default", LoraConfig(r=r, init_lora_weights=False), r=r).eval()


def lora_in_place(model: nn.Module, r: int) -> nn.Module:
    """Put PEFT's LoRA on the layers of ``model`` that VPS sharpens by default."""
    from peft import LoraConfig, get_peft_model

    names = list(VPSConfig().target_modules)
    config = LoraConfig(r=r, target_modules=names, init_lora_weights=False)
    return get_peft_model(model, config).eval()


def author_in_place(model: nn.Module, config: VPSConfig) -> nn.Module:
    """Patch ``model`` by the names of its layers, as the published code does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name in config.target_modules:
                setattr(parent, name, AuthorStyle(child, config))
    return model


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x Wᵀ`` by the kernel that decodes, with everything of VPS left out of it.

    Args:
        x: ``[N, 1, d_in]``, N from 1 to 16.
        weight: ``[d_out, d_in]``.

    Raises:
        ValueError: shapes that the kernel does not take.
    """
    from vps.kernels.decode import gemv

    if (reason := why_no_gemv(x, weight)) is not None:
        raise ValueError(f"gemv: {reason}")
    return gemv.launch(x, [weight], None, None, 1, False, False, False).of(0).unsqueeze(1)


def why_no_gemv(x: Tensor, weight: Tensor) -> str | None:
    """Say why the kernel does not take this product, or ``None``."""
    from vps.kernels.decode import decode

    return decode.refusal(x, weight, 1)

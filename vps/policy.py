"""The adaptive policy: how strongly a group of tokens is sharpened (SPEC §5).

``σ = 1 − exp(−E)``, raised by the next-token entropy and moved by the improvement history, then
``rank = r_lo + ⌊(r_hi − r_lo)σ + 2⁻²⁰⌋`` and ``γ = γ_lo + (γ_hi − γ_lo)σ``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vps.config import VPSConfig

HISTORY = 5
FLOOR_GUARD = 2.0**-20


class PolicyState:
    """Entropy and improvement history, one object for all layers of a model.

    Set it between forward passes; the layers read it without a copy from the device.
    """

    def __init__(self) -> None:
        self.entropy: Tensor | None = None
        self.outcomes: tuple[bool, ...] = ()

    def set_entropy(self, nats: float | Tensor | None) -> None:
        """Set ℋ of the next-token softmax.

        Args:
            nats: entropy in nats, at least 0, as a number or a tensor of one element (which
                stays on its device, unchecked); ``None`` forgets it.

        Raises:
            TypeError: neither a number nor a tensor.
            ValueError: negative or not finite, or a tensor of several elements.
        """
        if nats is None:
            self.entropy = None
            return
        if isinstance(nats, Tensor):
            if nats.numel() != 1:
                raise ValueError(
                    f"set_entropy: nats must hold one element, got shape {tuple(nats.shape)}"
                )
            self.entropy = nats.detach().reshape(()).clone()
            return
        if isinstance(nats, bool) or not isinstance(nats, (int, float)):
            raise TypeError(f"set_entropy: nats must be a number, got {type(nats).__name__}")
        if not 0 <= nats < float("inf"):
            raise ValueError(f"set_entropy: nats must be finite and at least 0, got {nats!r}")
        self.entropy = torch.tensor(float(nats), dtype=torch.float64)

    def record(self, improved: bool) -> None:
        """Append one outcome; the last five are kept.

        Raises:
            TypeError: not a bool.
        """
        if not isinstance(improved, bool):
            raise TypeError(f"record: improved must be a bool, got {type(improved).__name__}")
        self.outcomes = (*self.outcomes, improved)[-HISTORY:]

    def reset(self) -> None:
        """Forget entropy and history, as before a new prompt."""
        self.entropy = None
        self.outcomes = ()

    def factor(self) -> float:
        """What the history multiplies σ by: 1.3, 0.7 or 1."""
        if not self.outcomes:
            return 1.0
        if sum(self.outcomes) / len(self.outcomes) >= 3 / 5:
            return 1.3
        return 0.7 if len(self.outcomes) == HISTORY and not any(self.outcomes) else 1.0


@dataclass(frozen=True)
class Decision:
    """What the policy chose for G groups.

    Args:
        gamma: γ, a number or a tensor ``[G]``.
        inactive: bool ``[G, r]``, the columns left out; ``None`` when all are in use.
        second_order: whether the second-order term applies: a bool, or a bool tensor ``[G]``.
    """

    gamma: float | Tensor
    inactive: Tensor | None
    second_order: bool | Tensor


def largest_rank(config: VPSConfig, d_in: int, d_out: int) -> int:
    """The most columns the policy can ask for in a layer of this shape."""
    rank = config.rank_bounds[1] if config.adaptive_rank else config.rank
    topk = config.topk_bounds[1] if config.adaptive_topk else config.topk
    return min(rank, topk, d_in, d_out)


def is_off(config: VPSConfig) -> bool:
    """Whether γ is 0 whatever the input."""
    return (config.gamma_bounds[1] if config.adaptive_gamma else config.gamma) == 0


def needs_energy(config: VPSConfig) -> bool:
    """Whether anything is adaptive."""
    return bool(
        config.adaptive_rank
        or config.adaptive_gamma
        or config.adaptive_topk
        or config.adaptive_order
    )


def decide(config: VPSConfig, energy: Tensor | None, state: PolicyState | None, r: int) -> Decision:
    """Choose γ, rank and order of every group, without leaving the device.

    Args:
        config: the settings.
        energy: ``E`` per group, ``[G]`` in the accumulation dtype; may be overwritten. ``None``
            when nothing is adaptive.
        state: entropy and history, or ``None``.
        r: columns of the selection, :func:`largest_rank`.

    Source: SPEC §5; the paper, algorithm 5.
    """
    if energy is None:
        return Decision(config.gamma, None, config.order == 2)
    sigma = energy.neg_().expm1_().neg_()
    if state is not None:
        if state.entropy is not None:
            floor = (state.entropy.to(sigma.device, sigma.dtype) / 3).clamp_(max=1)
            sigma = torch.maximum(sigma, floor)
        factor = state.factor()
        if factor != 1.0:
            sigma = (sigma * factor).clamp_(max=1)

    gamma: float | Tensor = config.gamma
    if config.adaptive_gamma:
        low, high = config.gamma_bounds
        gamma = sigma * (high - low) + low
    inactive = _beyond(sigma, config.rank_bounds, r) if config.adaptive_rank else None
    if config.adaptive_topk and config.topk_bounds[0] < r:
        pool = _beyond(sigma, config.topk_bounds, r)
        inactive = pool if inactive is None else inactive | pool
    second_order: bool | Tensor = config.order == 2
    if config.adaptive_order:
        low_order, high_order = config.order_bounds
        second_order = high_order == 2
        if low_order != high_order:
            second_order = sigma + FLOOR_GUARD >= 1
    return Decision(gamma, inactive, second_order)


def _beyond(sigma: Tensor, bounds: tuple[int, int], r: int) -> Tensor | None:
    """Whether column c is not below ``low + ⌊(high − low)σ + 2⁻²⁰⌋``, bool ``[G, r]``.

    ``⌊z⌋ < m`` is ``z < m`` for an integer m, so no floor is needed.
    """
    low, high = bounds
    if low >= r:
        return None
    needed = torch.arange(
        1 - low - FLOOR_GUARD, r + 0.5 - low, dtype=sigma.dtype, device=sigma.device
    )
    return sigma.unsqueeze(-1) * (high - low) < needed

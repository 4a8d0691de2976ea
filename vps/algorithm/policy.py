"""Decide how strongly a group of tokens is sharpened: the adaptive policy (SPEC §5).

``σ = 1 − exp(−E)``, raised by the next-token entropy and moved by the improvement history, then
``rank = r_lo + ⌊(r_hi − r_lo)σ + 2⁻²⁰⌋`` and ``γ = γ_lo + (γ_hi − γ_lo)σ``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vps.algorithm import constants, selection
from vps.algorithm.constants import constant
from vps.config import VPSConfig

NUMBERS = 9  # numbers of the policy; factors of the columns may follow them
HISTORY = 5
FLOOR_GUARD = 2.0**-20
# The clips that compiled backends know, by their numbers in csrc/settings.h.
CLIPS = ("component", "spectral")


class PolicyState:
    """The entropy and improvement history that all layers of a model share.

    Set it between forward passes; the layers read it without a copy from the device.
    """

    def __init__(self) -> None:
        self.entropy: Tensor | None = None
        self.outcomes: tuple[bool, ...] = ()

    def set_entropy(self, nats: float | Tensor | None) -> None:
        """Set ℋ, the entropy of the next-token softmax.

        Args:
            nats: entropy in nats, at least 0, as a number or a tensor of one element. A tensor
                stays on its device, unchecked. ``None`` forgets the entropy.

        Raises:
            TypeError: ``nats`` is neither a number nor a tensor.
            ValueError: a negative or infinite number, NaN, or a tensor of several elements.
        """
        if nats is None:
            self.entropy = None
            return
        if isinstance(nats, Tensor):
            if nats.numel() != 1:
                raise ValueError(
                    f"set_entropy: nats must hold one element, got shape {tuple(nats.shape)}"
                )
            with torch.inference_mode(False):  # a tensor of that mode is of no use outside it
                self.entropy = nats.detach().reshape(()).clone()
            return
        if isinstance(nats, bool) or not isinstance(nats, (int, float)):
            raise TypeError(f"set_entropy: nats must be a number, got {type(nats).__name__}")
        if not 0 <= nats < float("inf"):
            raise ValueError(f"set_entropy: nats must be finite and at least 0, got {nats!r}")
        self.entropy = torch.tensor(float(nats), dtype=torch.float64)

    def entropy_on(self, device: torch.device) -> Tensor | None:
        """Return the entropy on ``device``; it is moved there once."""
        if self.entropy is not None and self.entropy.device != device:
            self.entropy = self.entropy.to(device)
        return self.entropy

    def record(self, improved: bool) -> None:
        """Append one outcome; the last five are kept.

        Raises:
            TypeError: ``improved`` is no bool.
        """
        if not isinstance(improved, bool):
            raise TypeError(f"record: improved must be a bool, got {type(improved).__name__}")
        self.outcomes = (*self.outcomes, improved)[-HISTORY:]

    def reset(self) -> None:
        """Forget entropy and history, as before a new prompt."""
        self.entropy = None
        self.outcomes = ()

    def factor(self) -> float:
        """Return the factor by which the history multiplies σ: 1.3, 0.7 or 1."""
        if not self.outcomes:
            return 1.0
        if sum(self.outcomes) / len(self.outcomes) >= 3 / 5:
            return 1.3
        return 0.7 if len(self.outcomes) == HISTORY and not any(self.outcomes) else 1.0


@dataclass(frozen=True)
class Decision:
    """What the policy chose for G groups.

    Args:
        gamma: γ, ``[G]`` in the accumulation dtype.
        inactive: bool ``[G, r]``, the columns left out; ``None`` when all are in use.
        second_order: bool ``[G]``, whether the second-order term applies; ``None`` for never.
    """

    gamma: Tensor
    inactive: Tensor | None
    second_order: Tensor | None


class LayerGamma:
    """γ of one layer in place of its config's, of either sign: one number, or one for each column.

    Numbers for columns scale the columns of ``Ũ``, after the clip and inside the clamp, while γ
    itself is 1: ``y = H + b + clamp((x Ã)(I + ½ Γ Mᵀ) Γ B̃ᵀ)``, where order 1 leaves out the term
    with M. The norm of the update is at most ``max|γ_c| · r · τ``.

    Args:
        values: a number or a tensor without dims, or a list or a tensor ``[r]`` with one number for
            each column. The numbers in a tensor are not checked.
        device: where to keep the numbers; by default a tensor's own device, or the CPU.

    Raises:
        TypeError: ``values`` are neither numbers nor a floating-point tensor.
        ValueError: a number is not finite.
    """

    def __init__(
        self, values: float | Sequence[float] | Tensor, device: torch.device | None = None
    ) -> None:
        if isinstance(values, Tensor):
            if not values.is_floating_point() or values.dim() > 1 or not values.numel():
                raise TypeError(
                    "gamma must be a floating-point tensor without dims or [r], got "
                    f"{values.dtype} {tuple(values.shape)}"
                )
            numbers = values.detach().reshape(-1).to(device=device, dtype=torch.float64)
            self.by_column, self.is_zero = values.dim() == 1, False
        else:
            self.by_column = not isinstance(values, (int, float))
            found = list(values) if isinstance(values, Sequence) else [values]
            if not found or any(
                isinstance(value, bool) or not isinstance(value, (int, float)) for value in found
            ):
                raise TypeError(f"gamma must be a number or a list of numbers, got {values!r}")
            if not all(math.isfinite(value) for value in found):
                raise ValueError(f"gamma must be finite, got {values!r}")
            with torch.inference_mode(False):
                numbers = torch.tensor(found, dtype=torch.float64, device=device)
            self.is_zero = not any(found)
        self.numbers: Tensor = numbers
        self._of: Tensor | None = None
        self._result: Tensor | None = None

    def plain(self) -> float | list[float]:
        """Return the number, or the list of numbers."""
        numbers: list[float] = self.numbers.tolist()
        return numbers if self.by_column else numbers[0]

    def in_policy(self, policy: Tensor, r: int) -> Tensor:
        """Return ``policy`` ``[9]`` with this γ in place of its bounds.

        With a number for each column it is ``[9 + r]``. The tensor made for one policy is kept,
        because the layer's next call passes the same policy.

        Raises:
            ValueError: the columns have not r numbers.
        """
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if not traced and self._of is policy and self._result is not None:
            return self._result
        if self.by_column and len(self.numbers) != r:
            raise ValueError(
                f"gamma must be one number or hold r = {r} of them, got {len(self.numbers)}"
            )
        if traced or policy.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._combined(policy)  # a graph computes it anew at each replay
        with torch.inference_mode(False):  # a tensor of that mode is of no use outside it
            self._of, self._result = policy, self._combined(policy)
        return self._result

    def _combined(self, policy: Tensor) -> Tensor:
        numbers = self.numbers.to(policy.device)
        if self.by_column:
            return torch.cat([policy[:1], constant((1.0, 1.0), policy), policy[3:], numbers])
        return torch.cat([policy[:1], numbers, numbers, policy[3:]])


class Settings(NamedTuple):
    """The choices of a layer that shape the code of the operator, which takes them packed.

    Args:
        r: columns of the selection, as many as the policy can ask for.
        adaptive: whether anything depends on the energy.
        coupled: SC instead of SK.
        second_order: whether the order may be 2.
        alpha: ridge of SC.
        tau: bound of the clip, or ``None``.
        clip: which rule bounds the update, as in the config.
        clamp: bound of δ, or ``None``.
    """

    r: int
    adaptive: bool
    coupled: bool
    second_order: bool
    alpha: float
    tau: float | None
    clip: str
    clamp: float | None

    @property
    def is_plain(self) -> bool:
        """Return whether C is the diagonal of the component clip: SK of the first order."""
        return not (self.coupled or self.second_order) and self.clip == "component"

    def packed(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return ``rules`` and ``numbers`` as every operator takes them (csrc/settings.h)."""
        r, adaptive, coupled, second_order, alpha, tau, clip, clamp = self
        clips, clamps = tau is not None, clamp is not None
        return (
            (r, +adaptive, +coupled, +second_order, CLIPS.index(clip), +clips, +clamps),
            (alpha, tau if clips else 0.0, clamp if clamps else 0.0),  # type: ignore[return-value]
        )

    def bare(self) -> Settings:
        """Return settings that need no product but t, for an update whose core is given."""
        return self._replace(adaptive=False, coupled=False, second_order=False, tau=None)

    @classmethod
    def unpacked(cls, rules: Sequence[int], numbers: Sequence[float]) -> Settings:
        """Return the settings that :meth:`packed` turned into ``rules`` and ``numbers``."""
        r, adaptive, coupled, second_order, clip, clips, clamps = rules
        alpha, tau, clamp = numbers
        return cls(
            r,
            bool(adaptive),
            bool(coupled),
            bool(second_order),
            alpha,
            tau if clips else None,
            CLIPS[clip],
            clamp if clamps else None,
        )


def settings(
    config: VPSConfig, gradient: bool, d_in: int, d_out: int, calibrated: bool = False
) -> Settings | None:
    """Return the settings of a layer of this shape; ``None`` when γ is 0 whatever the input.

    ``gradient`` says that the layer holds a gradient, which turns the hybrid builder into SC;
    ``calibrated`` says that it has a γ of its own, which replaces the config's.
    """
    if not calibrated and config.is_off:
        return None
    rank = config.rank_bounds[1] if config.adaptive_rank else config.rank
    topk = config.topk_bounds[1] if config.adaptive_topk else config.topk
    return Settings(
        r=min(rank, topk, d_in, d_out),
        adaptive=bool(
            config.adaptive_rank
            or config.adaptive_gamma
            or config.adaptive_topk
            or config.adaptive_order
        ),
        coupled=config.builder == "sc" or (config.builder == "hybrid" and gradient),
        second_order=(config.order_bounds[1] if config.adaptive_order else config.order) == 2,
        alpha=config.alpha,
        tau=config.tau,
        clip=config.clip,
        clamp=config.clamp,
    )


def bounds(config: VPSConfig, factor: float) -> tuple[float, ...]:
    """Return the nine numbers by which the operator decides.

    These are ``factor``, then low and high of γ, rank, topk and order, equal where one is fixed.
    """
    values = [factor]
    for name in ("gamma", "rank", "topk", "order"):
        fixed = getattr(config, name)
        adaptive = getattr(config, f"adaptive_{name}")
        values += getattr(config, f"{name}_bounds") if adaptive else (fixed, fixed)
    return tuple(float(value) for value in values)


def sigma(energy: Tensor, entropy: Tensor | None, factor: float | Tensor) -> Tensor:
    """Return ``σ`` ``[G]`` for energies ``[G]``, which are overwritten (SPEC §5)."""
    strength = energy.neg_().expm1_().neg_()
    if entropy is not None:
        strength = torch.maximum(strength, (entropy.to(strength.dtype) / 3).clamp_(max=1))
    return (strength * factor).clamp_(max=1)


def decide(
    policy: Tensor, energy: Tensor | None, entropy: Tensor | None, groups: int, settings: Settings
) -> Decision:
    """Choose γ, rank and order of every group, without leaving the device.

    Args:
        policy: what :func:`bounds` returns, ``[9]``; numbers after these are not read.
        energy: ``E`` per group, ``[G]`` in the accumulation dtype, overwritten; ``None`` when
            nothing is adaptive.
        entropy: ℋ in nats, one element, or ``None``.
        groups: G.
        settings: the settings of the layer.

    Source: SPEC §5; the paper, algorithm 5.
    """
    low, high = policy[1:NUMBERS:2], policy[2:NUMBERS:2]
    if energy is None:
        second = (low[3:] >= 2).expand(groups) if settings.second_order else None
        return Decision(low[0].expand(groups), None, second)
    strength = sigma(energy, entropy, policy[0])
    levels = torch.lerp(low, high, strength.unsqueeze(-1))  # [G, 4]: γ, rank, topk, order
    needed = tuple(column + 1 - FLOOR_GUARD for column in range(settings.r))
    # ⌊z⌋ < m is z < m for an integer m, so no floor is needed.
    inactive = levels[:, 1:3].amin(1, keepdim=True) < constant(needed, strength)
    second = levels[:, 3] >= 2 - FLOOR_GUARD if settings.second_order else None
    return Decision(levels[:, 0], inactive, second)


class Settled(NamedTuple):
    """What is settled for one layer before the input comes."""

    settings: Settings
    bounds: Tensor  # the policy, float64 [9]
    drawn: tuple[Tensor, Tensor] | None  # I_in and I_out [r] of the random builder

    def numbers(self, gamma: LayerGamma | None) -> Tensor:
        """Return the policy ``[9]``, or with a layer's own γ ``[9]`` or ``[9 + r]``."""
        return self.bounds if gamma is None else gamma.in_policy(self.bounds, self.settings.r)


@constants.kept
def plan_for(
    config: VPSConfig,
    gradient: bool,
    factor: float,
    d_out: int,
    d_in: int,
    device: torch.device,
    calibrated: bool = False,
) -> Settled | None:
    """Return what is settled for a layer of this shape; ``None`` when γ is 0 for any input."""
    own = settings(config, gradient, d_in, d_out, calibrated)
    if own is None:
        return None
    drawn = None
    if config.builder == "random":
        features = selection.random_features(config.seed, d_in, d_out, own.r)
        I_in, I_out = (constants.vector(index, torch.int64, device) for index in features)
        drawn = I_in, I_out
    numbers = constants.vector(bounds(config, factor), torch.float64, device)
    return Settled(own, numbers, drawn)


def own_gamma(
    gamma: LayerGamma | float | Sequence[float] | Tensor | None,
) -> LayerGamma | None:
    """Return ``gamma`` as a :class:`LayerGamma`, or ``None``."""
    if gamma is None or isinstance(gamma, LayerGamma):
        return gamma
    return LayerGamma(gamma)

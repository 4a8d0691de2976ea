"""Decide how strongly a group of tokens is sharpened: the adaptive policy (SPEC §5).

``σ = 1 − exp(−E)``, raised by the next-token entropy and moved by the improvement history, then
``rank = r_lo + ⌊(r_hi − r_lo)σ + 2⁻²⁰⌋`` and ``γ = γ_lo + (γ_hi − γ_lo)σ``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vps import constants
from vps.algorithm import selection, tracing
from vps.algorithm.settings import Settings, bounds, settings
from vps.config import VPSConfig
from vps.constants import constant

NUMBERS = 9  # numbers of the policy; factors of the columns may follow them
HISTORY = 5
FLOOR_GUARD = 2.0**-20
NO_ENTROPY = -1.0  # below every σ, so it raises none
_CPU = torch.device("cpu")


class PolicyState:
    """The entropy and improvement history that all layers of a model share.

    On each device the layers read both in one small tensor (:meth:`signals`). It is written in
    place, in the order of the current stream, and never replaced: setting either waits for nothing,
    and a captured CUDA graph replays with the present values.
    """

    def __init__(self) -> None:
        self._outcomes: tuple[bool, ...] = ()
        self._nats: float | None = NO_ENTROPY  # None where only a device knows it
        self._home = _CPU  # where it was set
        self._is_elsewhere = False  # than on the CPU
        self.is_idle = True  # as if there were no state
        self._signals: dict[torch.device, Tensor] = {}

    @property
    def entropy(self) -> Tensor | None:
        """ℋ in nats, a copy in float64 where it was set, or ``None``."""
        if self._nats is None:
            return self._signals[self._home][0].clone()
        return None if self._nats < 0 else torch.tensor(self._nats, dtype=torch.float64)

    @entropy.setter
    def entropy(self, nats: float | Tensor | None) -> None:
        self.set_entropy(nats)

    @property
    def outcomes(self) -> tuple[bool, ...]:
        """The last five outcomes, oldest first."""
        return self._outcomes

    @outcomes.setter
    def outcomes(self, outcomes: tuple[bool, ...]) -> None:
        self._outcomes = outcomes[-HISTORY:]
        factor = self.factor()
        for signals in list(self._signals.values()):
            signals[1].fill_(factor)
        self._settle()

    def set_entropy(self, nats: float | Tensor | None) -> None:
        """Set ℋ, the entropy of the next-token softmax.

        Args:
            nats: entropy in nats, at least 0, as a number or a tensor of one element. A tensor
                is not checked, and one on a GPU is not waited for. ``None`` forgets the entropy.

        Raises:
            TypeError: ``nats`` is neither a number nor a tensor.
            ValueError: a negative or infinite number, NaN, or a tensor of several elements.
        """
        found: float | Tensor
        if nats is None:
            found = NO_ENTROPY
        elif isinstance(nats, Tensor):
            if nats.numel() != 1:
                raise ValueError(
                    f"set_entropy: nats must hold one element, got shape {tuple(nats.shape)}"
                )
            found = float(nats) if nats.is_cpu else nats.detach().reshape(())
        elif isinstance(nats, bool) or not isinstance(nats, (int, float)):
            raise TypeError(f"set_entropy: nats must be a number, got {type(nats).__name__}")
        elif not 0 <= nats < float("inf"):
            raise ValueError(f"set_entropy: nats must be finite and at least 0, got {nats!r}")
        else:
            found = float(nats)
        if isinstance(found, Tensor):
            self.signals(found.device)
            self._nats, self._home, self._is_elsewhere = None, found.device, True
            for device, signals in list(self._signals.items()):
                if device != _CPU:  # which would wait for it; it gets ℋ when a layer there asks
                    signals[0].copy_(found)
        else:
            self._nats, self._home, self._is_elsewhere = found, _CPU, False
            for signals in list(self._signals.values()):
                signals[0].fill_(found)
        self._settle()

    def _settle(self) -> None:
        """Note whether anything is set; if so, make its place on the CPU, before a compiler can."""
        self.is_idle = self._nats == NO_ENTROPY and self.factor() == 1
        if not self.is_idle and not self._is_elsewhere:
            self.signals(_CPU)

    def signals(self, device: torch.device) -> Tensor:
        """Return ℋ in nats, or −1 where none is set, and :meth:`factor`: float64 ``[2]``.

        It is the same tensor at each call; never write to it.
        """
        found = self._signals.get(device)
        is_late = device.type == "cpu" and self._is_elsewhere
        if found is not None and not is_late and not tracing.is_exporting():
            return found
        if not constants.is_kept():  # they would belong to a tracer
            if self._nats is None:
                return self._signals[self._home].to(device)
            return constants.vector((self._nats, self.factor()), torch.float64, device)
        with constants.apart():
            if self._nats is None:
                values = self._signals[self._home].to(device, copy=True)
            else:
                numbers = self._nats, self.factor()
                values = torch.tensor(numbers, dtype=torch.float64, device=device)
        if is_late:
            self._nats, self._home, self._is_elsewhere = float(values[0]), _CPU, False
        if found is None:
            found = self._signals.setdefault(device, values)
        else:
            found.copy_(values)
        return found

    def record(self, improved: bool) -> None:
        """Append one outcome; the last five are kept.

        Args:
            improved: whether the loss fell.

        Raises:
            TypeError: ``improved`` is no bool.
        """
        if not isinstance(improved, bool):
            raise TypeError(f"record: improved must be a bool, got {type(improved).__name__}")
        self.outcomes = (*self._outcomes, improved)

    def reset(self) -> None:
        """Forget entropy and history, as before a new prompt."""
        self.set_entropy(None)
        self.outcomes = ()

    def factor(self) -> float:
        """Return the factor by which the history multiplies σ: 1.3, 0.7 or 1."""
        if not self._outcomes:
            return 1.0
        if sum(self._outcomes) / len(self._outcomes) >= 3 / 5:
            return 1.3
        return 0.7 if len(self._outcomes) == HISTORY and not any(self._outcomes) else 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {"entropy": self.entropy, "outcomes": self._outcomes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.set_entropy(state["entropy"])
        self.outcomes = state["outcomes"]


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
        # By policy, and by the stream on which they were made. None is dropped: a captured graph
        # may read it.
        self._results: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}

    def plain(self) -> float | list[float]:
        """Return the number, or the list of numbers."""
        numbers: list[float] = self.numbers.tolist()
        return numbers if self.by_column else numbers[0]

    def set(self, values: float | Sequence[float] | Tensor) -> None:
        """Write other numbers in place, so that a captured CUDA graph replays with them.

        Args:
            values: as many as before, as for :class:`LayerGamma`; of 0 alone too.

        Raises:
            TypeError, ValueError: as for :class:`LayerGamma`.
            ValueError: another number of values; or γ is the number 0, whose layer is plain.
        """
        other = LayerGamma(values, None if isinstance(values, Tensor) else self.numbers.device)
        if other.by_column != self.by_column or len(other.numbers) != len(self.numbers):
            wanted = f"hold {len(self.numbers)}" if self.by_column else "be one number"
            raise ValueError(f"gamma must {wanted}, got {len(other.numbers)}")
        if self.is_zero:
            raise ValueError("a gamma of 0 leaves its layer plain: give the layer another")
        self.numbers.copy_(other.numbers)
        for _, result in list(self._results.values()):
            own = result[NUMBERS:] if self.by_column else result[1:3]
            own.copy_(self.numbers)

    def in_policy(self, policy: Tensor, r: int) -> Tensor:
        """Return ``policy`` ``[9]`` with this γ in place of its bounds.

        With a number for each column it is ``[9 + r]``. The tensor made for one policy on one
        stream is kept, because the layer's next call passes the same policy.

        Raises:
            ValueError: the columns have not r numbers.
        """
        if constants.is_kept():
            key = id(policy), constants.stream_of(policy)
            found = self._results.get(key)
            if found is not None and found[0] is policy:
                return found[1]
        if self.by_column and len(self.numbers) != r:
            raise ValueError(
                f"gamma must be one number or hold r = {r} of them, got {len(self.numbers)}"
            )
        if not constants.is_kept():
            return self._combined(policy)
        if policy.is_cuda and torch.cuda.is_current_stream_capturing():
            for of, result in self._results.values():
                if of is policy:  # a capture begins when all streams are done
                    return result
            return self._combined(policy)  # a graph computes it anew at each replay
        with torch.inference_mode(False):  # a tensor of that mode is of no use outside it
            result = self._combined(policy)
        self._results[key] = policy, result
        return result

    def _combined(self, policy: Tensor) -> Tensor:
        numbers = self.numbers.to(policy.device)
        if self.by_column:
            return torch.cat([policy[:1], constant((1.0, 1.0), policy), policy[3:], numbers])
        return torch.cat([policy[:1], numbers, numbers, policy[3:]])


def sigma(energy: Tensor, entropy: Tensor | None, factor: float | Tensor = 1.0) -> Tensor:
    """Return ``σ`` ``[G]`` for energies ``[G]``, which are overwritten (SPEC §5).

    ``entropy`` is what :meth:`PolicyState.signals` returns; ``factor`` multiplies that of the
    history.
    """
    strength = energy.neg_().expm1_().neg_()
    if entropy is not None:
        strength = torch.maximum(strength, (entropy[0].to(strength.dtype) / 3).clamp_(max=1))
        factor = factor * entropy[1]
    return (strength * factor).clamp_(max=1)


def decide(
    policy: Tensor, energy: Tensor | None, entropy: Tensor | None, groups: int, settings: Settings
) -> Decision:
    """Choose γ, rank and order of every group, without leaving the device.

    Args:
        policy: what :func:`bounds` returns, ``[9]``; numbers after these are not read.
        energy: ``E`` per group, ``[G]`` in the accumulation dtype, overwritten; ``None`` when
            nothing is adaptive.
        entropy: what :meth:`PolicyState.signals` returns, ``[2]``, or ``None``.
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
    numbers = constants.vector(bounds(config), torch.float64, device)
    return Settled(own, numbers, drawn)


def own_gamma(
    gamma: LayerGamma | float | Sequence[float] | Tensor | None,
) -> LayerGamma | None:
    """Return ``gamma`` as a :class:`LayerGamma`, or ``None``."""
    if gamma is None or isinstance(gamma, LayerGamma):
        return gamma
    return LayerGamma(gamma)

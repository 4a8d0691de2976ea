"""Read from a config what a layer computes: its rules, rank and the bounds of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vps.config import VPSConfig

# The clips that compiled backends know, by their numbers in csrc/settings.h.
CLIPS = ("component", "spectral")


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


def bounds(config: VPSConfig, factor: float = 1.0) -> tuple[float, ...]:
    """Return the nine numbers by which the operator decides.

    These are a factor of σ beside that of the history, then low and high of γ, rank, topk and
    order, equal where one is fixed.
    """
    values = [factor]
    for name in ("gamma", "rank", "topk", "order"):
        fixed = getattr(config, name)
        adaptive = getattr(config, f"adaptive_{name}")
        values += getattr(config, f"{name}_bounds") if adaptive else (fixed, fixed)
    return tuple(float(value) for value in values)

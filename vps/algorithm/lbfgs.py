"""Keep the ephemeral L-BFGS memory of one layer: ``B′ = B̃ + 1e-3 · H_k B̃`` (SPEC §8).

``H_k`` approximates the inverse Hessian of the loss in the layer's output space ``[d_out]``. It is
made from differences between passes: ``s`` of the mean output, and ``y`` of the mean gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vps.algorithm.selection import accumulation_dtype

CAPACITY = 5
LEAST_CURVATURE = 1e-8
SCALE = 1e-3


class Pair(NamedTuple):
    """``s`` and ``y`` ``[d_out]``, and the numbers ``ρ = 1/sᵀy`` and ``H₀ = sᵀy/yᵀy``."""

    s: Tensor
    y: Tensor
    rho: float
    initial: float


class CurvatureMemory:
    """At most five pairs ``(s, y)`` with ``sᵀy > 1e-8``, oldest first.

    A memory without a pair is false in a condition, and changes nothing.
    """

    def __init__(self) -> None:
        self.pairs: tuple[Pair, ...] = ()
        self._last: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def record(self, w: Tensor, g: Tensor) -> bool:
        """Record one pass, whose difference from the pass before makes a pair.

        A pass that is not finite is left out, because it would spoil two pairs.

        Args:
            w: mean over tokens of the layer's output, ``[d_out]``.
            g: mean over tokens of ``∂L/∂output``, ``[d_out]``.

        Returns:
            Whether a pair was added.

        Raises:
            ValueError: w and g are not vectors of one length, the same in every pass.
        """
        if w.dim() != 1 or w.shape != g.shape:
            raise ValueError(
                "CurvatureMemory.record: w and g must both be [d_out], "
                f"got {tuple(w.shape)} and {tuple(g.shape)}"
            )
        dtype = accumulation_dtype(w.dtype)
        w, g = (vector.detach().to(dtype, copy=True) for vector in (w, g))
        if not bool((w.isfinite() & g.isfinite()).all()):
            return False
        before, self._last = self._last, (w, g)
        if before is None:
            return False
        if before[0].shape != w.shape:
            raise ValueError(
                f"CurvatureMemory.record: w must be {tuple(before[0].shape)} as before, "
                f"got {tuple(w.shape)}"
            )
        s, y = w - before[0], g - before[1]
        curvature = float(s @ y)
        if not LEAST_CURVATURE < curvature < float("inf"):
            return False
        self.pairs = (*self.pairs, Pair(s, y, 1 / curvature, curvature / float(y @ y)))[-CAPACITY:]
        return True

    def clear(self) -> None:
        """Forget everything, as before a new prompt."""
        self.pairs = ()
        self._last = None

    def apply(self, B: Tensor) -> Tensor:
        """Return ``H_k B`` for ``B`` ``[d_out, ...]``, see :func:`two_loop`."""
        return two_loop(self.pairs, B)


def two_loop(pairs: tuple[Pair, ...], B: Tensor) -> Tensor:
    """Return ``H_k`` times the columns of ``B``; a copy of ``B`` where there is no pair.

    Args:
        pairs: oldest first.
        B: ``[d_out, ...]``.

    Returns:
        A tensor of the shape of ``B``, in the accumulation dtype.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4.
    """
    columns = B.reshape(len(B), -1).to(accumulation_dtype(B.dtype), copy=True)
    if not pairs:
        return columns.view(B.shape)
    steps = []
    for s, y, rho, _ in reversed(pairs):
        step = (s @ columns).mul_(rho)
        columns.addr_(y, step, alpha=-1)
        steps.append(step)
    columns.mul_(pairs[-1].initial)
    for (s, y, rho, _), step in zip(pairs, reversed(steps), strict=True):
        columns.addr_(s, step.sub_((y @ columns).mul_(rho)))
    return columns.view(B.shape)


def precondition(pairs: tuple[Pair, ...], delta: Tensor) -> Tensor:
    """Return ``δ + 1e-3 · H_k δ`` for every token, which equals ``u B′ᵀ`` for ``δ = u B̃ᵀ``.

    ``H_k`` is symmetric, so the same step on ``∂L/∂δ`` turns ``(∂L/∂δ) B̃`` into ``(∂L/∂δ) B′``.

    Args:
        pairs: oldest first, at least one.
        delta: ``[..., d_out]``.

    Returns:
        A tensor of the shape and dtype of ``delta``.
    """
    flat = delta.reshape(-1, delta.shape[-1])
    change = two_loop(pairs, flat.t()).t()
    return change.mul_(SCALE).add_(flat).to(delta.dtype).view(delta.shape)

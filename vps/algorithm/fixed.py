"""Hold what a prompt decided: an update whose selection, core and γ are fixed (SPEC §11).

With these fixed the update changes r entries of the input before an untouched product:
``y = W(x + Σ_c e_c u(I_in[c])) + b`` with ``e = γ Cᵀ (R x)`` and ``R = W[I_out]``. So a later
token reads ``E = γ Cᵀ R`` ``[r, d_in]`` and no column, score, norm or policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vps.algorithm.core import Core, square


class FixedUpdate(NamedTuple):
    """What a prompt decided for one layer and G sequences.

    Args:
        I_in: ``[G, r]``.
        I_out: ``[G, r]``.
        core: ``C``, γ and the columns left out.
        through: ``E`` ``[G, r, d_in]`` in the dtype of x, or ``None`` where no row of W is known.
    """

    I_in: Tensor
    I_out: Tensor
    core: Core
    through: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> FixedUpdate:
        """Return the update with every tensor ``[G, ...]`` changed."""
        core = Core(*(None if one is None else change(one) for one in self.core))  # type: ignore[arg-type]
        through = None if self.through is None else change(self.through)
        return FixedUpdate(change(self.I_in), change(self.I_out), core, through)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that there are."""
        found = [self.I_in, self.I_out, *self.core, self.through]
        return [tensor for tensor in found if tensor is not None]


def fix(I_in: Tensor, I_out: Tensor, core: Core, rows: Tensor | None, like: Tensor) -> FixedUpdate:
    """Return the fixed update of one layer.

    Args:
        I_in, I_out: ``[G, r]``.
        core: what was decided.
        rows: ``R = W[I_out]`` ``[G, r, d_in]``, or ``None``.
        like: a tensor of the dtype of x.
    """
    I_in = I_in.contiguous()  # once, not for every token
    if rows is None:
        return FixedUpdate(I_in, I_out, core, None)
    matrix, gamma, inactive = core
    matrix = square(matrix) * gamma.view(-1, 1, 1)
    if inactive is not None:
        matrix = matrix.masked_fill(inactive.unsqueeze(2), 0.0)
    through = (matrix.mT @ rows.to(matrix.dtype)).to(like.dtype)
    return FixedUpdate(I_in, I_out, core, through)


def edited(x: Tensor, I_in: Tensor, through: Tensor) -> Tensor:
    """Return ``x + Σ_c e_c u(I_in[c])`` for x ``[G, T, d_in]``, ``[G, r]`` and ``[G, r, d_in]``."""
    e = torch.matmul(x, through.mT).to(x.dtype)
    return x.scatter_add(-1, I_in.unsqueeze(1).expand_as(e), e)


class Held:
    """What the layers of a model hold for the sequences of one cache.

    Args:
        refusal: why the cache cannot be followed, or ``None``.

    Attributes:
        is_made: whether a prompt has decided; until then layers decide and add their updates.
        updates: the update of each layer by the layer's number; ``None`` for a layer that was
            called several times in one pass.
    """

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.is_made = False
        self.updates: dict[int, FixedUpdate | None] = {}

    def add(self, number: int, update: FixedUpdate) -> None:
        """Add what a layer decided."""
        self.updates[number] = None if number in self.updates else update

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor ``[G, ...]``, as a cache changes its own."""
        for number, update in self.updates.items():
            if update is not None:
                self.updates[number] = update.map(change)

    def take(self, other: Held, in_place: bool) -> None:
        """Take the updates of another, which a prompt decided.

        ``in_place`` writes them into the tensors of earlier ones where these fit, so that a
        captured CUDA graph reads them.
        """
        for number, update in other.updates.items():
            earlier = self.updates.get(number)
            if in_place and earlier is not None and update is not None:
                pairs = list(zip(earlier.tensors(), update.tensors(), strict=False))
                if len(earlier.tensors()) == len(pairs) and all(_fits(*pair) for pair in pairs):
                    for own, new in pairs:
                        own.copy_(new)
                    continue
            self.updates[number] = update
        self.is_made = True


def _fits(own: Tensor, new: Tensor) -> bool:
    """Return whether ``new`` may be written into ``own``."""
    same = own.shape == new.shape and own.dtype == new.dtype and own.device == new.device
    return same and (not own.is_inference() or torch.is_inference_mode_enabled())

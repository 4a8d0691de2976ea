"""What the core of an update asks of a weight of which each rank holds a part, added up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vps.algorithm import torch_backend
from vps.algorithm.policy import Settings
from vps.algorithm.torch_backend import Inputs


class Products(NamedTuple):
    """Numbers at the selected features; ``None`` where the settings do not ask for them.

    Args:
        t: ``H[:, I_out]``, ``[G, T, r]``.
        X_A: ``x[:, I_in]``, ``[G, T, r]``, for SC.
        norm_A: ``‖W[I_out[c]]‖``, ``[G, r]``, for the component clip of SK.
        gram_A: inner products of the rows I_out of W, ``[G, r, r]``, for the other clips.
        norm_B: ``‖W[:, I_in[c]]‖``, ``[G, r]``, for the component clip.
        gram_B: inner products of the columns I_in of W, ``[G, r, r]``, for the spectral clip.
        B_selected: ``W[I_out, I_in]``, ``[G, r, r]``, for the second order.
    """

    t: Tensor
    X_A: Tensor | None = None
    norm_A: Tensor | None = None
    gram_A: Tensor | None = None
    norm_B: Tensor | None = None
    gram_B: Tensor | None = None
    B_selected: Tensor | None = None


class AddedUp:
    """:class:`weight.Weight` of the features selected already, whatever their number."""

    def __init__(self, products: Products) -> None:
        self.products = products

    def norm_in(self) -> Tensor:
        return _given(self.products.norm_B)

    def norm_out(self, I_out: Tensor) -> Tensor:
        return _given(self.products.norm_A)

    def gram_in(self) -> Tensor:
        return _given(self.products.gram_B)

    def gram_out(self, I_out: Tensor) -> Tensor:
        return _given(self.products.gram_A)

    def crossing(self, I_out: Tensor) -> Tensor:
        return _given(self.products.B_selected)


def needs_gram_of_rows(settings: Settings) -> bool:
    """Whether the clip needs ``gram_A`` instead of ``norm_A``."""
    return settings.tau is not None and (settings.coupled or settings.spectral)


def build_core(
    products: Products,
    numbers: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(core, γ, t)`` as :func:`torch_backend.build` has them, of a layer that is all of
    ``t`` and ``X_A``.

    Args:
        products: the sums over all ranks.
        numbers: of :func:`vps.algorithm.policy.bounds`.
        energy: ``[G]``, overwritten; ``None`` when nothing is adaptive.
        entropy: ℋ in nats, one element, or ``None``.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        settings: the rest.
    """
    t = products.t
    every = torch.arange(t.shape[-1], device=t.device).expand(t.shape[0], -1)
    X_A = t if products.X_A is None else products.X_A
    inputs = Inputs(X_A, t, None, mask, every, every, numbers, entropy)
    core, gamma, t, _ = torch_backend.build(
        inputs, t, energy, every, every, None, settings, AddedUp(products)
    )
    return core, gamma, t


def _given(numbers: Tensor | None) -> Tensor:
    assert numbers is not None
    return numbers

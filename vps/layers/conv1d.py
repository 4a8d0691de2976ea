"""``VPSConv1D``: sharpens Hugging Face's ``Conv1D``, the transposed linear layer of GPT-2."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vps.layers.forms import WEIGHT, Form, why_not_sharpenable
from vps.layers.linear import SharpenedLayer
from vps.layers.own_forward import is_matrix, parameter


class VPSConv1D(SharpenedLayer, Conv1D):  # type: ignore[misc]  # bias
    """A sharpened ``Conv1D``, whose weight ``[d_in, d_out]`` is the transpose of ``W``."""

    plain_class = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """Return the sharpened output ``[..., d_out]`` for x ``[..., d_in]``."""
        if not isinstance(self, SharpenedLayer):  # a reference taken while it was sharpened
            return Conv1D.forward(self, x)
        return self.answer(x)

    @property
    def widths(self) -> tuple[int, int]:
        return self.nf, self.nx

    def matrix(self) -> Tensor | None:
        weight = parameter(self, "weight")
        return weight.t() if is_matrix(weight) else None

    def vector(self) -> Tensor | None:
        return parameter(self, "bias")

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        return super().forward(x) if biased else x @ self.weight


def recognise(module: nn.Module) -> Form | None:
    """Return the form of a ``Conv1D`` with its weight in memory; ``None`` for any other."""
    if not isinstance(module, Conv1D) or why_not_sharpenable(module, Conv1D) is not None:
        return None
    if module.weight.is_meta:
        return None
    return Form(WEIGHT, VPSConv1D.sharpened)

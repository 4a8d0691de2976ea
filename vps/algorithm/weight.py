"""Define what a sharpened layer asks of W: the contract of the flow with a kind of weight.

Four kinds exist (SPEC §2–§4): :class:`Matrix` here, and in :mod:`vps.layers` a weight known by its
forward alone, a weight split over ranks by rows, and a weight split by columns. Policy, clip, SC,
order 2 and the update ask a layer for nothing else, so a rule is written once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import coupling, gradient, selection, tracing
from vps.algorithm.policy import Settings
from vps.algorithm.selection import accumulation_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Products(NamedTuple):
    """The numbers from which the core is made; ``None`` where the settings do not need one.

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


class Projection:
    """Tokens through a weight, with the columns I_in of W; for one call.

    Args:
        H: base product of the outputs that this process holds, ``[G, T, held]``, with its graph.
        output: the tensor to which the update is added: H, or H with a constant of the layer.
    """

    H: Tensor
    output: Tensor

    def base(self) -> Tensor:
        """Return ``H + b`` ``[G, T, held]`` with the bits of the unsharpened layer."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """Return the bias to add to H, ``[held]``, or ``None``."""
        raise NotImplementedError

    def selected(self, I_out: Tensor) -> Tensor:
        """Return ``H[:, I_out]`` ``[G, T, r]``, whose gradient reaches x but no parameter."""
        raise NotImplementedError

    def products(self, I_out: Tensor, settings: Settings) -> Products:
        """Return the numbers that the core needs, without a graph."""
        raise NotImplementedError

    def rows(self, I_out: Tensor) -> Tensor | None:
        """Return ``W[I_out]`` ``[G, r, d_in]``, or ``None`` where rows are not known."""
        return None

    def expand(self, u: Tensor) -> Tensor:
        """Return ``u Bᵀ`` ``[G, T, held]`` for u ``[G, T, r]``."""
        raise NotImplementedError

    def add(self, u: Tensor) -> Tensor:
        """Return the output with ``u Bᵀ`` added."""
        return self.output + self.expand(u)


class Weight:
    """W of one layer, in whichever form this process has it.

    ``reads_whole_input`` says whether layers that read the same x may share ``I_in``.
    """

    reads_whole_input = True

    @property
    def widths(self) -> tuple[int, int]:
        """Return d_out and d_in of the whole layer."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise a ValueError where x ``[..., d_in]`` does not fit."""
        d_in = self.widths[1]
        if x.dim() == 0 or x.shape[-1] != d_in:
            raise ValueError(f"vps: x must be [..., {d_in}] to fit the layer, got {tuple(x.shape)}")

    def cast(self, dtype: torch.dtype) -> Weight:
        """Return the weight as autocast to ``dtype`` casts it."""
        raise NotImplementedError

    def parameters(self) -> Iterable[Tensor]:
        """Return the tensors that the layer could train."""
        raise NotImplementedError

    def is_empty(self, x: Tensor) -> bool:
        """Return whether x ``[..., d_in]`` holds no token."""
        return x.numel() == 0

    def release(self) -> None:
        """Let go of the memory that a call took."""

    def select_inputs(self, x: Tensor, mask: Tensor | None, r: int) -> Tensor:
        """Return ``I_in`` ``[G, r]`` for x ``[G, T, d_in]`` and a bool mask ``[G, T]``."""
        return selection.top_k(selection.counted_statistics(x, mask, False)[0], r)

    def project(self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None) -> Any:
        """Return the :class:`Projection` of x, by one pass over W unless H is known."""
        raise NotImplementedError

    def select_outputs(
        self,
        weights: Sequence[Any],
        scores: Sequence[Tensor],
        r: int,
        heads: tuple[int, int] | None,
    ) -> list[Tensor]:
        """Return ``I_out`` ``[G, r]`` of each layer, from the scores of what this process holds.

        Args:
            weights: the weight of one layer, or of a query and a key; this one is the first.
            scores: ``[G, held]`` of each layer.
            r: columns.
            heads: query and key-value heads of two layers, which select together (SPEC §7).
        """
        if heads is None:
            return [selection.top_k(scores[0], r)]
        return list(coupling.select(scores[0], scores[1], r, *heads))

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``H + b`` ``[G, T, held]`` of x ``[G, T, d_in]``, as the layer by itself."""
        raise NotImplementedError

    def rows(self, projections: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return ``W[I_out]`` ``[G, r, d_in]`` of each layer, or ``None`` where rows are not known.

        Arguments are as for :meth:`complete`.
        """
        return [one.rows(I_out) for one, I_out in zip(projections, outputs, strict=True)]

    def complete(
        self,
        projections: Sequence[Any],
        outputs: Sequence[Tensor],
        settings: Sequence[Settings],
        energies: Sequence[Tensor],
    ) -> tuple[list[Products], Tensor | None]:
        """Return the products of every layer, and the energy ``[G]`` pooled over the layers.

        For a weight that is split over ranks, the ranks sum here what each of them holds.

        Args:
            projections: the projection of each layer.
            outputs: ``I_out`` ``[G, r]`` of each layer.
            settings: the settings of each layer.
            energies: ``[G]`` of the outputs that this process holds of each layer, or a single
                pooled energy, or nothing where nothing is adaptive.
        """
        triples = zip(projections, outputs, settings, strict=True)
        found = [one.products(I_out, own) for one, I_out, own in triples]
        if len(energies) < 2:
            return found, energies[0] if energies else None
        widths = [one.H.shape[-1] for one in projections]
        total = energies[0] * widths[0] + energies[1] * widths[1]
        return found, total / sum(widths)


class Matrix(Weight):
    """W in memory, ``[d_out, d_in]``."""

    def __init__(self, W: Tensor) -> None:
        self.W = W

    @property
    def widths(self) -> tuple[int, int]:
        d_out, d_in = self.W.shape
        return d_out, d_in

    def check(self, x: Tensor) -> None:
        W = self.W
        if W.dim() != 2 or W.dtype not in FLOATING:
            raise TypeError(
                "vps_linear: weight must be a floating-point matrix [d_out, d_in], "
                f"got {W.dtype} {tuple(W.shape)}"
            )
        if x.dim() == 0 or x.shape[-1] != W.shape[1]:
            raise ValueError(
                f"vps_linear: x must be [..., {W.shape[1]}] to fit weight {tuple(W.shape)}, "
                f"got {tuple(x.shape)}"
            )

    def parameters(self) -> Iterable[Tensor]:
        return (self.W,)

    def cast(self, dtype: torch.dtype) -> Matrix:
        return Matrix(cast(self.W, dtype))

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.W, bias)

    def project(
        self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None
    ) -> MatrixProjection:
        H = F.linear(x, self.W) if H is None else H
        return MatrixProjection(x, self.W, bias, H, I_in)


class MatrixProjection(Projection):
    """Tokens through a matrix.

    Args:
        x: ``[G, T, d_in]``.
        W: ``[d_out, d_in]``.
        b: ``[d_out]`` or ``None``.
        H: ``x Wᵀ``.
        I_in: ``[G, r]``.
    """

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, H: Tensor, I_in: Tensor) -> None:
        self.x, self.W, self.b, self.H, self.I_in = x, W, b, H, I_in
        self.output = H
        self.frozen = W.detach()
        # The columns, [d_out, G, r]; None where the groups ask for more columns than W has.
        self.B = gradient.columns(self.frozen, I_in) if gradient.reads_columns(W, I_in) else None

    def base(self) -> Tensor:
        return self.H if self.b is None else F.linear(self.x, self.W, self.b)

    def bias(self) -> Tensor | None:
        return self.b

    def selected(self, I_out: Tensor) -> Tensor:
        if not self._trains():
            return gather(self.H, I_out)
        if tracing.is_eager():
            t = gather(self.H.detach(), I_out)
            through: Tensor = _ThroughRows.apply(self.x, t, self.frozen[I_out])
            return through
        return gather(F.linear(self.x, self.frozen), I_out)

    def _trains(self) -> bool:
        """Return whether W may get a gradient, in which the update must take no part."""
        compiling = torch.compiler.is_compiling()
        if tracing.is_compiled_transform(compiling) if compiling else tracing.is_transforming():
            return True  # tensors in it do not tell
        # A trace is made with gradients and checked without.
        return self.W.requires_grad and (torch.is_grad_enabled() or torch.jit.is_tracing())

    def products(self, I_out: Tensor, settings: Settings) -> Products:
        x, H = self.x.detach(), self.H.detach()
        return matrix_products(x, self.frozen, H, self.I_in, I_out, self.B, settings)

    def rows(self, I_out: Tensor) -> Tensor:
        return self.frozen[I_out]

    def expand(self, u: Tensor) -> Tensor:
        if self.B is None:
            return gradient.expand(u, self.frozen, self.I_in)
        return u @ self.B.permute(1, 2, 0)

    def add(self, u: Tensor) -> Tensor:
        if self.B is None:
            return self.output + self.expand(u)
        if u.shape[0] == 1 and not torch.jit.is_tracing():  # a trace must hold for any G
            return torch.addmm(self.output[0], u[0], self.B.squeeze(1).t()).unsqueeze(0)
        return torch.baddbmm(self.output, u, self.B.permute(1, 2, 0))


def matrix_products(
    x: Tensor,
    W: Tensor,
    H: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    B: Tensor | None,
    settings: Settings,
) -> Products:
    """Return what the core asks of W in memory.

    Args:
        x, H: ``[G, T, d_in]`` and ``[G, T, d_out]``.
        W: ``[d_out, d_in]``; it may be edited between calls, so nothing is kept.
        I_in, I_out: ``[G, r]``.
        B: the columns I_in, ``[d_out, G, r]``, or ``None`` to read all of W instead.
        settings: which products are needed.
    """
    dtype, norm = accumulation_dtype(W.dtype), torch.linalg.vector_norm
    norm_A = gram_A = norm_B = gram_B = None
    if needs_gram_of_rows(settings):
        rows = W[I_out].to(dtype)
        gram_A = rows @ rows.mT
    elif settings.tau is not None and B is None:
        norm_A = norm(W, 2, dim=1, dtype=dtype)[I_out]
    elif settings.tau is not None:
        rows = W.index_select(0, I_out.reshape(-1))
        norm_A = norm(rows, 2, dim=1, dtype=dtype).view(I_out.shape)
    if needs_gram_of_columns(settings):
        columns = (W[:, I_in] if B is None else B).to(dtype)
        gram_B = torch.einsum("ogc,oge->gce", columns, columns)
    elif settings.tau is not None:
        found = norm(W if B is None else B, 2, dim=0, dtype=dtype)
        norm_B = found[I_in] if B is None else found
    crossing = None
    if settings.second_order:
        crossing = W[I_out.unsqueeze(2), I_in.unsqueeze(1)].to(dtype)
    X_A = gather(x, I_in) if settings.coupled else None
    return Products(gather(H, I_out), X_A, norm_A, gram_A, norm_B, gram_B, crossing)


def check_input(x: Tensor) -> None:
    """Refuse an x that is no dense floating-point tensor.

    Raises:
        TypeError: the message says what x is.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"vps: x must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"vps: x must be a dense tensor, got layout {x.layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"vps: x must be floating point (16 to 64 bits), got {x.dtype}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of x, or ``None`` where it is off."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # faster than asking by the name of the device
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an argument of F.linear as autocast does: all dtypes but float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def needs_gram_of_rows(settings: Settings) -> bool:
    """Return whether the clip needs ``gram_A`` instead of ``norm_A``."""
    return needs_gram_of_columns(settings) or settings.tau is not None and settings.coupled


def needs_gram_of_columns(settings: Settings) -> bool:
    """Return whether the clip needs ``gram_B`` instead of ``norm_B``."""
    return settings.tau is not None and settings.clip != "component"


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Return a new ``values[g, :, index[g]]`` ``[G, T, r]`` for ``[G, T, d]`` and ``[G, r]``."""
    if values.shape[0] == 1 and not torch.jit.is_tracing():  # a trace must hold for any G
        return values.index_select(-1, index[0])
    return values.gather(-1, index.unsqueeze(1).expand(-1, values.shape[1], -1))


class _ThroughRows(torch.autograd.Function):
    """The values ``t = x W[I_out]ᵀ`` ``[G, T, r]`` as a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return g @ rows, None, None

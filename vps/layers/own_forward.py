"""Ask a layer's own forward for the product without bias, and whether it is a linear map."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vps.algorithm.weight import FLOATING
from vps.layers import weight_rows
from vps.layers.riding import Columns, columns, distinct, one_hot
from vps.masking import STATE

if TYPE_CHECKING:
    from vps.layers.linear import SharpenedLayer


class Plain:
    """An entry on this thread's stack while the plain forward of ``module`` is asked for.

    The layer leaves its ``matrix`` and ``bias`` here, because some are in memory only meanwhile.

    Args:
        module: computes, with the layers it wraps, as if it were not sharpened.
        biased: whether its output has the bias.
    """

    def __init__(self, module: nn.Module, biased: bool) -> None:
        self.module = module
        self.biased = biased
        self.matrix: Tensor | None = None
        self.bias: Tensor | None = None


def running_plain(module: nn.Module) -> Plain | None:
    """Return the entry of ``module``, or of a layer around it, on this thread's stack, if any."""
    for entry in STATE.plain:
        if any(layer is module for layer in chain(entry.module)):
            found: Plain = entry
            return found
    return None


@contextmanager
def plain(module: nn.Module, biased: bool) -> Iterator[Plain]:
    """Let ``module`` and what it wraps compute unsharpened, on this thread, inside the block."""
    entry = Plain(module, biased)
    STATE.plain.append(entry)
    try:
        yield entry
    finally:
        STATE.plain.pop()


def chain(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a layer, the layer that it wraps as an adapter, and so on."""
    layer: nn.Module | None = module
    while layer is not None:
        yield layer
        layer = layer._modules.get("base_layer")


def innermost(module: nn.Module) -> nn.Module:
    """Return the last of :func:`chain`."""
    *_, last = chain(module)
    return last


def is_matrix(weight: Any) -> bool:
    """Return whether a parameter is a plain floating-point matrix in memory."""
    kind = type(weight)
    if kind is not nn.Parameter and kind is not Tensor:
        traced = kind.__module__.startswith("torch._subclasses")  # torch's own tracers
        if not traced or not isinstance(weight, Tensor):
            return False
    return weight.dtype in FLOATING and weight.dim() == 2 and not weight.is_meta


def parameter(module: nn.Module, name: str) -> Any:
    """Return ``module.name``, read from ``_parameters`` where it is there (saves 0.5 µs).

    A parametrization takes it away from there.
    """
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def without_bias(module: nn.Module) -> nn.Module | None:
    """Return a stand-in for ``module`` whose innermost layer has no bias, or ``None``.

    The caller runs the ``forward`` of its class. ``None`` where a wrapped layer has the forward of
    another party, which would not see the stand-in.
    """
    twin: nn.Module = object.__new__(type(module))
    inner = {name: value for name, value in module.__dict__.items() if name != "forward"}
    for name in ("_parameters", "_modules"):
        inner[name] = inner[name].copy()
    twin.__dict__.update(inner)
    wrapped = module._modules.get("base_layer")
    if wrapped is None:
        bias = twin._parameters["bias"]
        none = isinstance(module, nn.Linear) or bias is None
        twin._parameters["bias"] = None if none else torch.zeros_like(bias)  # type: ignore[assignment,arg-type]
        return twin
    forward = wrapped.__dict__.get("forward")
    if forward is not None and getattr(forward, "__self__", None) is not handle_of(wrapped):
        return None
    within = without_bias(wrapped)
    if within is not None:
        twin._modules["base_layer"] = within
    return None if within is None else twin


def fsdp_module() -> Any:
    """Return the class of modules that FSDP2 shards, or ``None`` where nothing uses it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def handle_of(module: nn.Module) -> Any:
    """Return the :class:`~vps.layers.opaque_layer.OpaqueLayer` of a module, or ``None``."""
    return module.__dict__.get("_sharpened")


class OwnForward:
    """A sharpened layer that is known by its forward alone, for one call.

    ``offset`` says whether the product may carry a constant that only a row of zeros shows.

    Args:
        layer: the layer.
        like: a tensor of the tokens' dtype and device.
        inside: whether the module's forward runs now; then the weights are in memory already, and
            the forward is not started again.
    """

    def __init__(self, layer: SharpenedLayer, like: Tensor, inside: bool) -> None:
        self.layer, self.like, self.inside = layer, like, inside
        self.module = layer.module
        self.d_out, self.d_in = layer.widths
        self.biased = layer.keeps_bias or not layer.leaves_out_bias()
        self.offset = layer.offset or self.biased
        self.entry: Plain | None = None
        self.gathered = False

    def product(self, rows: Tensor) -> Tensor:
        """Return ``rows Wᵀ`` ``[M, d_out]`` for ``[M, d_in]``, plus a constant if ``offset``."""
        if self.inside:
            return self.layer.apply_plain(rows, self.biased)
        self._gather()
        with plain(self.module, self.biased) as entry:
            output: Tensor = self.module.forward(rows)
        self.entry = entry
        return output

    def _gather(self) -> None:
        """Gather the shards of a layer that FSDP2 manages by itself, as its call would."""
        sharded = fsdp_module()
        if self.gathered or sharded is None or not isinstance(self.module, sharded):
            return
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            raise RuntimeError(
                "vps: query and key cannot be coupled with gradients for parameters where FSDP2 "
                "shards each of them by itself; expected fully_shard of their block, "
                "qk_coupling=False, or no gradient"
            )
        self.module.unshard()
        self.gathered = True

    def release(self) -> None:
        """Let go of what this call brought into memory."""
        self.entry = None
        if self.gathered:
            self.gathered = False
            self.module.reshard()  # type: ignore[operator]

    def bias(self) -> Tensor | None:
        """Return the bias ``[d_out]`` that the last product lacks, or ``None``."""
        if self.biased:
            return None
        return self.layer.bias if self.entry is None else self.entry.bias

    def matrix(self) -> Tensor | None:
        """Return W if it is a plain matrix in memory now or was in the last call."""
        return self.layer.matrix() if self.entry is None else self.entry.matrix

    def steady_product(self, rows: Tensor) -> Tensor:
        """Return the product without a gradient and without dropout."""
        with torch.no_grad(), steady(self.module):
            return self.product(rows)

    def gradient_product(self, rows: Tensor) -> Tensor:
        """Return the product with a graph, without dropout."""
        with steady(self.module):
            return self.product(rows)

    def constant_row(self) -> Tensor | None:
        """Return the constant of the product ``[d_out]``, or ``None`` where it has none."""
        if not self.offset:
            return None
        return self.steady_product(self.like.new_zeros(1, self.d_in))[0]

    def is_noisy(self) -> bool:
        """Return whether dropout acts on the product."""
        return next(dropouts(self.module), None) is not None

    def row_norms(self, index: Tensor, dtype: torch.dtype, known: Columns) -> Tensor:
        """Return ``‖W[index]‖`` in the shape of ``index``; some columns are known."""
        W = self.matrix()
        if W is None and self.layer.norms is not None:
            return self.layer.norms.find(self, dtype)[index]
        chosen, place = distinct(index)
        rows = self.rows(chosen, known)
        return torch.linalg.vector_norm(rows, 2, dim=1, dtype=dtype)[place]

    def rows(self, index: Tensor, known: Columns) -> Tensor:
        """Return ``W[index]`` ``[K, d_in]`` for ``index`` ``[K]``; some columns are known."""
        W = self.matrix()
        return weight_rows.find(self, index, known) if W is None else W.index_select(0, index)

    def rows_at_hand(self, index: Tensor, known: Columns) -> Tensor | None:
        """Return :meth:`rows`, or ``None`` where no backward pass gives them."""
        if self.matrix() is None:
            if torch.compiler.is_compiling() or self.layer.rounds_input:
                return None
            try:
                rows = weight_rows.by_gradient(self, index)
            except weight_rows.NoBackward:
                return None
            return rows if weight_rows.agree(rows, index, known) else None
        return self.rows(index, known)

    def describe(self) -> str | None:
        """Return why the forward is no linear map of each row by itself, or ``None``.

        It is tried on one-hot rows, on their sum, and on rows alone and together.
        """
        some = torch.arange(min(4, self.d_in), device=self.like.device)
        rows = one_hot(some, self.d_in, self.like.dtype)
        total = rows.sum(0, keepdim=True)
        try:
            constant = self._constant(total)
            self.offset = self.layer.offset = self.offset or bool((constant != 0).any())
            W = columns(self, some, rows.dtype, constant[0] if self.offset else None)
            together = self.steady_product(torch.cat([total, rows, -2 * total]))
        except Exception as error:  # whatever a layer of another library raises
            return f"its forward fails on one-hot rows: {type(error).__name__}: {error}"
        if together.shape != (len(rows) + 2, self.d_out) or not together.is_floating_point():
            came = f"{together.dtype} {tuple(together.shape)}"
            return f"its forward gives {came} for {len(rows) + 2} rows"
        size = W.abs().sum(0).double() + constant.abs().double()
        expected = torch.cat([W.sum(0, True), W, -2 * W.sum(0, True)]).double() + constant.double()
        eps = torch.finfo(together.dtype).eps
        if bool(((together.double() - expected).abs() > 16 * eps * size + 0.02 * size).any()):
            return "its forward is not a linear map of every row by itself"
        self.layer.rounds_input = self._rounds_input()
        return None

    def _rounds_input(self) -> bool:
        """Return whether the forward rounds its input, as int8 activations do, on dense rows."""
        steps = torch.arange(self.d_in, device=self.like.device, dtype=torch.float32)
        a, b = (3 * steps + 1).sin(), (7 * steps).cos()
        rows = torch.stack([a, b, a + b, 0 * a]).to(self.like.dtype)
        rows[2] = rows[0] + rows[1]
        of_a, of_b, of_sum, constant = self.steady_product(rows).double()
        apart = (of_sum - of_a - of_b + constant).norm()
        eps = torch.finfo(self.like.dtype).eps
        return bool(apart > 64 * eps * (of_a.norm() + of_b.norm() + constant.norm()))

    def _constant(self, like: Tensor) -> Tensor:
        """Return the product of zeros ``[1, d_out]``.

        It includes the bias where that is no summand of the output, because an adapter scales it.
        """
        zeros = torch.zeros_like(like)
        constant, bias = self.steady_product(zeros), self.bias()
        if self.biased or bias is None:
            return constant
        self.biased = True
        whole = self.steady_product(zeros)
        expected = constant.double() + bias.double()
        eps = torch.finfo(whole.dtype).eps
        apart = (whole.double() - expected).abs() > 16 * eps * expected.abs() + 16 * eps
        self.biased = self.layer.keeps_bias = bool(apart.any())
        return whole if self.biased else constant

    def why_no_backward(self) -> str | None:
        """Return why no rows come from the backward pass of the layer, or ``None``."""
        some = torch.arange(min(4, self.d_in, self.d_out), device=self.like.device)
        try:
            known = Columns(some, columns(self, some, self.like.dtype, self.constant_row()))
            rows = weight_rows.by_gradient(self, some)
        except weight_rows.NoBackward as error:
            return str(error)
        return None if weight_rows.agree(rows, some, known) else "it leaves out part of the weight"


def dropouts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that drop elements now."""
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.training and inner.p > 0:
            yield inner


@contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block."""
    active = list(dropouts(module))
    try:
        for dropout in active:
            dropout.training = False
        yield
    finally:
        for dropout in active:
            dropout.training = True

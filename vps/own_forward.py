"""A layer known by its own forward: its product without bias, and rows of W through it.

The rows of W come, in this order, from a matrix in memory; as norms found once, where every matrix
of the layer is quantized; or from the layer's backward pass, ``W[o] = ∂(x Wᵀ)[o] / ∂x``, which is
right whatever an adapter does meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vps.masking import STATE
from vps.riding import RIDERS, columns, one_hot
from vps.selection import accumulation_dtype, is_read_freely

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Plain:
    """On the stack of this thread while the forward of ``module`` runs for its own sake.

    Args:
        module: which, with the layers it wraps, then computes as if it were not sharpened.
        biased: whether its output has the bias.
        matrix, bias: of the layer, which leaves them here: some are in memory only meanwhile.
    """

    def __init__(self, module: nn.Module, biased: bool) -> None:
        self.module = module
        self.biased = biased
        self.matrix: Tensor | None = None
        self.bias: Tensor | None = None


def running_plain(module: nn.Module) -> Plain | None:
    """The entry of ``module`` or of a layer around it on this thread's stack, if there is one."""
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
    """A layer, the one that it wraps as an adapter, and so on."""
    layer: nn.Module | None = module
    while layer is not None:
        yield layer
        layer = layer._modules.get("base_layer")


def innermost(module: nn.Module) -> nn.Module:
    """The last of :func:`chain`."""
    *_, last = chain(module)
    return last


def is_matrix(weight: Any) -> bool:
    """Whether a parameter is a plain floating-point matrix in memory, no tensor of another kind."""
    kind = type(weight)
    if kind is not nn.Parameter and kind is not Tensor:
        traced = kind.__module__.startswith("torch._subclasses")  # torch's own tracers
        if not traced or not isinstance(weight, Tensor):
            return False
    return weight.dtype in FLOATING and weight.dim() == 2 and weight.device.type != "meta"


def without_bias(module: nn.Module) -> nn.Module | None:
    """A stand-in for ``module`` with the same parameters but the bias of its innermost layer; its
    class's ``forward`` is to be called.

    ``None`` where a layer that it wraps has a forward of another party, which would not see it.
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


def handle_of(module: nn.Module) -> Any:
    """The :class:`vps.opaque_layer.OpaqueLayer` that sharpens a module, or ``None``."""
    return module.__dict__.get("_sharpened")


class Layer(Protocol):
    """A sharpened layer, as :class:`OwnForward` sees it.

    Args:
        module: the layer in the model.
        widths: d_out and d_in.
        bias: of the layer, ``[d_out]`` or ``None``.
        offset: whether its product without bias may still add a constant.
        norms: norms of all rows, found once, or ``None`` to ask the backward pass.
    """

    offset: bool
    norms: RowNorms | None

    @property
    def module(self) -> nn.Module: ...

    @property
    def widths(self) -> tuple[int, int]: ...

    @property
    def bias(self) -> Tensor | None: ...

    def matrix(self) -> Tensor | None: ...

    def leaves_out_bias(self) -> bool: ...

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor: ...


class OwnForward:
    """:class:`vps.riding.Base` of a sharpened layer, for one call.

    Args:
        layer: which.
        like: a token, for dtype and device.
        inside: whether this is asked while the module's forward runs, which then is not started
            again: what brings weights into memory has been done.
    """

    def __init__(self, layer: Layer, like: Tensor, inside: bool) -> None:
        self.layer, self.like, self.inside = layer, like, inside
        self.module = layer.module
        self.d_out, self.d_in = layer.widths
        self.biased = not layer.leaves_out_bias()
        self.offset = layer.offset or self.biased
        self.entry: Plain | None = None

    def product(self, rows: Tensor) -> Tensor:
        if self.inside:
            return self.layer.apply_plain(rows, self.biased)
        with plain(self.module, self.biased) as entry:
            output: Tensor = self.module.forward(rows)
        self.entry = entry
        return output

    def bias(self) -> Tensor | None:
        if self.biased:
            return None
        return self.layer.bias if self.entry is None else self.entry.bias

    def matrix(self) -> Tensor | None:
        """W, if it is a plain matrix in memory now or was in the last call."""
        return self.layer.matrix() if self.entry is None else self.entry.matrix

    def steady_product(self, rows: Tensor) -> Tensor:
        with torch.no_grad(), _steady(self.module):
            return self.product(rows)

    def is_noisy(self) -> bool:
        return next(_dropouts(self.module), None) is not None

    def row_norms(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        W = self.matrix()
        norm = torch.linalg.vector_norm
        if W is None and self.layer.norms is not None:
            return self.layer.norms.find(self, dtype)[index]
        if len(index) > 1 and is_read_freely(index):
            chosen, place = torch.unique(index, return_inverse=True)
        else:
            chosen = index.reshape(-1)
            place = torch.arange(len(chosen), device=index.device).view(index.shape)
        rows = self.rows(chosen) if W is None else W.index_select(0, chosen)
        return norm(rows, 2, dim=1, dtype=dtype)[place]

    def rows(self, index: Tensor) -> Tensor:
        W = self.matrix()
        if W is not None:
            return W.index_select(0, index)
        return torch.cat([self._rows_by_gradient(block) for block in index.split(RIDERS)])

    def _rows_by_gradient(self, index: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), _steady(self.module):
            start = torch.zeros(
                len(index), self.d_in, dtype=self.like.dtype, device=self.like.device
            ).requires_grad_()
            try:
                output = self.product(start)
                chosen = one_hot(index.clone(), self.d_out, output.dtype)
                (rows,) = torch.autograd.grad(output, start, chosen)
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(
                    f"vps: a {type(self.module).__name__} has no backward pass ({error}), from "
                    "which the rows of its weight are taken for builder 'sc' and clip 'spectral', "
                    "and with an adapter for every clip; expected builder='sk' with "
                    "clip='component' or tau=None"
                ) from error
        return rows

    def describe(self) -> str | None:
        """Why the forward is no linear map of each row by itself, or ``None``: tried on one-hot
        rows, their sum, and rows alone and together."""
        some = torch.arange(min(4, self.d_in), device=self.like.device)
        rows = one_hot(some, self.d_in, self.like.dtype)
        total = rows.sum(0, keepdim=True)
        try:
            constant = self.steady_product(torch.zeros_like(total))
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
        return None


class RowNorms:
    """Norms of all rows of W, found once by applying the layer to the identity, in blocks.

    They are found again when a parameter or buffer of the layer is another or has changed.
    """

    def __init__(self) -> None:
        self._norms: Tensor | None = None
        self._key: list[tuple[Any, int]] = []

    def find(self, base: OwnForward, dtype: torch.dtype) -> Tensor:
        """``[d_out]``."""
        if self._norms is None or not (torch.compiler.is_compiling() or self._is_of(base.module)):
            total: Any = 0
            wide = accumulation_dtype(base.like.dtype)
            with torch.inference_mode(False):
                index = torch.arange(base.d_in, device=base.like.device)
                offset = None
                if base.offset:
                    offset = base.steady_product(base.like.new_zeros(1, base.d_in))[0]
                for block in index.split(RIDERS):
                    part = columns(base, block, base.like.dtype, offset)
                    total = total + part.to(wide).square().sum(0)
                self._norms = total.sqrt()
            self._key = _versions(base.module)
        norms = self._norms
        if norms.device != base.like.device:
            norms = self._norms = norms.to(base.like.device)
        return norms.to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_norms": None, "_key": []}  # weak references are neither copied nor pickled

    def _is_of(self, module: nn.Module) -> bool:
        now = _versions(module)
        return len(now) == len(self._key) and all(
            one() is other() and version == other_version
            for (one, version), (other, other_version) in zip(now, self._key, strict=True)
        )


def _versions(module: nn.Module) -> list[tuple[Any, int]]:
    return [
        (weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*module.parameters(), *module.buffers())
    ]


def are_fixed(module: nn.Module) -> bool:
    """Whether every matrix of a layer is quantized, so that its row norms may be kept: no edit
    would be made in place of such data, while ``weight.data`` of a plain one is edited unseen."""
    return not any(is_matrix(parameter) for parameter in module.parameters())


def _dropouts(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that drop elements now."""
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.training and inner.p > 0:
            yield inner


@contextmanager
def _steady(module: nn.Module) -> Iterator[None]:
    """Without dropout."""
    active = list(_dropouts(module))
    try:
        for dropout in active:
            dropout.training = False
        yield
    finally:
        for dropout in active:
            dropout.training = True

"""Hold what a prompt decided: an update whose selection, core and γ are fixed (SPEC §11).

With these fixed the update changes r entries of the input before an untouched product:
``y = W(x + Σ_c e_c u(I_in[c])) + b`` with ``e = γ Cᵀ (R x)`` and ``R = W[I_out]``. So a later
token reads ``E = γ Cᵀ R`` ``[r, d_in]`` and no column, score, norm or policy.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from vps.algorithm.core import Core, square
from vps.algorithm.flow import NOTHING, Given
from vps.masking import STATE


class FixedUpdate(NamedTuple):
    """What a prompt decided for one layer and G sequences, in memory of its own.

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

    def given(self) -> Given:
        """Return the update as the flow takes it."""
        edit = None if self.through is None else (self.I_in.unsqueeze(1), self.through.mT)
        return Given(self.I_in, self.I_out, None, self.core, self.through, edit)

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
    I_in, I_out = own_memory(I_in), own_memory(I_out)
    core = Core(*(None if one is None else own_memory(one) for one in core))  # type: ignore[arg-type]
    if rows is None:
        return FixedUpdate(I_in, I_out, core, None)
    matrix, gamma, inactive = core
    matrix = square(matrix) * gamma.view(-1, 1, 1)
    if inactive is not None:
        matrix = matrix.masked_fill(inactive.unsqueeze(2), 0.0)
    through = (matrix.mT @ rows.to(matrix.dtype)).to(like.dtype)
    return FixedUpdate(I_in, I_out, core, through)


def own_memory(tensor: Tensor) -> Tensor:
    """Return a contiguous copy: a cache writes into what it holds, and nobody else may."""
    return tensor.clone(memory_format=torch.contiguous_format)


def edited(x: Tensor, index: Tensor, across: Tensor) -> Tensor:
    """Return ``x + Σ_c e_c u(I_in[c])`` with ``e = x Eᵀ``.

    Args:
        x: ``[G, T, d_in]``.
        index: ``I_in`` ``[G, 1, r]``.
        across: ``Eᵀ`` ``[G, d_in, r]``.
    """
    e = torch.bmm(x, across)
    if e.dtype != x.dtype:  # under autocast
        e = e.to(x.dtype)
    return x.scatter_add(-1, index if x.shape[1] == 1 else index.expand_as(e), e)


class Readers:
    """Layers that read one x, of which the first that is called changes x for all of them.

    Args:
        updates: their updates, of one r, each with E.
    """

    def __init__(self, updates: list[FixedUpdate]) -> None:
        self.layers = [(own.I_in, own.through) for own in updates]
        self._changed: dict[int, Tensor] = {}
        self._x: tuple[Tensor, tuple[Any, ...]] | None = None

    def changed(
        self,
        x: Tensor,
        at: int,
        edit: Callable[..., Iterable[Tensor]],
        state: tuple[int, ...],
    ) -> Tensor:
        """Return ``x + e`` for the layer of place ``at``.

        Args:
            x: ``[G, T, d_in]``, perhaps a new view of what the layers read.
            at: the place of the layer.
            edit: ``edit(x, layers)`` computes it for all layers ``(I_in, E)``.
            state: what must be the same for another layer: x's version, the stream.
        """
        key = x.data_ptr(), x.shape, x.stride(), state
        if self._x is None or self._x[1] != key or at not in self._changed:
            self._changed = dict(enumerate(edit(x, self.layers)))
            self._x = x, key  # x itself, so that no other takes its address
        found = self._changed.pop(at)
        if not self._changed:
            self._x = None
        return found

    def clear(self) -> None:
        """Drop what no layer has asked for."""
        self._changed, self._x = {}, None


class Held:
    """What the layers of a model hold for the sequences of one cache.

    Args:
        refusal: why the cache cannot be followed, or ``None``.

    Attributes:
        is_made: whether a prompt has decided; until then layers decide and add their updates.
        updates: the update of each layer by the layer's number; ``None`` for a layer that was
            called several times in one pass.
        given: the same as the flow takes them, once the prompt has decided.
        ready: for a later token of a layer, by its number: what the layer had then, and the call.
        backends: the backends that were asked for when ``ready`` was filled.
        readers: the layers that read one x, by number, in the order of their calls.
    """

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.is_made = False
        self.updates: dict[int, FixedUpdate | None] = {}
        self.given: dict[int, Given | None] = {}
        self.ready: dict[int, tuple[Any, ...]] = {}
        self.backends: list[str] = []
        self.readers: list[list[int]] = []
        self._shared: list[Readers] = []
        self._x: Tensor | None = None
        self._called: set[int] = set()

    def find(self, layer: Any) -> Given | None:
        """Return what the prompt decided for a layer; ``None`` where it is to decide now.

        ``NOTHING`` stands for a layer that is plain while its partner is sharpened.

        Raises:
            ValueError: the cache cannot be followed, or its prompt decided nothing for the layer.
        """
        if self.refusal is not None:
            raise ValueError(self.refusal)
        if not self.is_made:
            return None
        if layer.gamma is not None and layer.gamma.is_zero:
            return NOTHING
        found = self.given.get(layer.number)
        if found is not None:
            return found
        if layer.number in self.updates:
            raise ValueError(
                "vps: scope='prompt' holds one decision for each layer, and one of widths "
                f"{layer.widths} is called several times in a pass; expected another scope, or "
                "the layer excluded"
            )
        raise ValueError(
            "vps: scope='prompt' needs the decision of the prompt, and this cache holds none for a "
            f"layer of widths {layer.widths}: it was filled while the layer was plain, disabled "
            "or sharpened anew; expected a cache that was filled by the model as it is now"
        )

    def note(self, layer: Any, x: Tensor) -> None:
        """Note that a layer reads x, while the prompt decides."""
        if torch.compiler.is_compiling():
            return
        if x is not self._x:
            self._x = x
            self.readers.append([])
        self.readers[-1].append(numbered(layer))

    def keep(self, decided: Iterable[tuple[Any, FixedUpdate | None]], called: Any) -> None:
        """Keep what layers decided in the call of one of them."""
        for layer, update in decided:
            number = numbered(layer)
            if layer is called and number in self._called:
                self.updates[number] = None
            elif update is not None:
                self.updates[number] = update
            if layer is called:
                self._called.add(number)

    def prepare(self, layer: Any, x: Tensor, call: tuple[Any, tuple[Tensor, ...]] | None) -> None:
        """Make a later token of a layer ready: ``call`` computes it, if that is a single call."""
        if call is not None and layer.config.clamp is None:
            rows = self.updates[layer.number].I_in.shape[0]  # type: ignore[union-attr]
            self.ready[layer.number] = layer.config, layer.gamma, x.dtype, (rows, 1), *call

    def later(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the output for a later token by what is ready, or ``None`` where it may not be.

        The products of a whole model evict Python's code from the caches, so each step of the
        longer way costs several times there what it costs in a loop.
        """
        entry = self.ready.get(layer.number)
        if entry is None or STATE.disabled or STATE.plain or self.backends != STATE.backends:
            return None
        config, gamma, dtype, dims, call, arguments = entry
        own = layer._parameters
        W = own.get("weight")
        if (
            layer.config is not config
            or layer.gamma is not gamma
            or layer.memory is not None
            or type(x) is not Tensor
            or type(W) is not Parameter
            or x.dtype is not dtype
            or x.shape[:-1] != dims
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
            or forward_ad._current_level >= 0
        ):
            return None
        y: Tensor = call(x, W, own.get("bias"), *arguments)
        return y

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor ``[G, ...]``, as a cache changes its own."""
        for number, update in self.updates.items():
            if update is not None:
                self.updates[number] = update.map(change)
        self._prepare()

    def take(self, other: Held, in_place: bool) -> None:
        """Take the updates of another, which a prompt decided.

        ``in_place`` writes them into the tensors of earlier ones where these fit, so that a
        captured CUDA graph reads them.
        """
        self.readers = other.readers
        if not self.is_made:  # else the same prompt adds the layers of an outer module
            self.updates = {n: own for n, own in self.updates.items() if n in other.updates}
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
        self._prepare()

    def leave(self) -> None:
        """Drop what belonged to one call of the model."""
        for readers in self._shared:
            readers.clear()

    def _prepare(self) -> None:
        self.given = {n: None if own is None else own.given() for n, own in self.updates.items()}
        self.ready, self._x, self._shared = {}, None, []
        for numbers in self.readers:
            found = {n: own for n in numbers if (own := self.updates.get(n)) is not None}
            like = next(iter(found.values()), None)
            if like is None or like.through is None or len(found) == 1:
                continue
            if all(_fits_beside(like.through, own.through) for own in found.values()):
                readers = Readers(list(found.values()))
                self._shared.append(readers)
                for at, number in enumerate(found):
                    self.given[number] = self.given[number]._replace(readers=(readers, at))  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        views: dict[str, Any] = {
            "given": {},
            "ready": {},
            "_shared": [],
            "_x": None,
        }  # which a pickle would copy
        return self.__dict__ | views

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()


def numbered(layer: Any) -> int:
    """Return the number by which caches know a layer; it gets one where it has none."""
    if layer.number is None:
        layer.number = uuid.uuid4().int >> 66  # unlike those of any other process
    found: int = layer.number
    return found


def _fits_beside(one: Tensor, other: Tensor | None) -> bool:
    """Return whether one launch may read E of two layers."""
    if other is None or one.shape != other.shape:
        return False
    return one.dtype == other.dtype and one.device == other.device


def _fits(own: Tensor, new: Tensor) -> bool:
    """Return whether ``new`` may be written into ``own``."""
    same = own.shape == new.shape and own.dtype == new.dtype and own.device == new.device
    return same and (not own.is_inference() or torch.is_inference_mode_enabled())

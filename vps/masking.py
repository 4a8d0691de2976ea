"""Tell layers which tokens count and how a model lays them out, which x does not show (SPEC §2).

Layouts are kept on a stack per thread, so two threads may run one model with different masks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vps.packing import Marks, Packed, Packing, Patches, TimeFirst


@dataclass(frozen=True)
class Encoded:
    """The encoder states ``[B, S, d]`` to which a decoder attends, and their mask ``[B, S]``."""

    states: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class TokenLayout:
    """The token dims and the mask of the running model, or of a :func:`token_mask`.

    The layout of a patched model applies to layers whose input has as many tokens. Layers that read
    ``encoded`` (cross-attention) take its mask; other layers (a vision tower) keep their own dims.

    Args:
        shape: token dims.
        mask: bool of that shape, or ``None`` where all tokens count.
        owner: the module; ``None`` for :func:`token_mask`, whose mask must fit every layer.
        encoded: the encoder states to which the model attends.
        rows: how many rows the inputs of the call have. A layer that gets one vector a row (a
            pooler, a head) has as many sequences of one token.
        packed: which rows hold several sequences.
        around: whether the owner is a module around models, which knows no more than their rows.
        marks: which tokens are the prompt (:func:`prompt`), or ``None`` where nothing says it.
        kept: ``logits_to_keep`` of the call: of which tokens an output head gets its input.
        cache: the cache that the call was given, or ``None``.
        held: the :class:`vps.algorithm.fixed.Held` of that cache (SPEC §11), or ``None``.
        is_ready: whether layers may go by ``held.ready`` (an eager call that nothing looks at).
    """

    shape: tuple[int, ...]
    mask: Tensor | None
    owner: object | None = None
    encoded: Encoded | None = None
    rows: tuple[int, ...] = ()
    packed: Packed | Patches | None = None
    around: bool = False
    marks: Marks | None = None
    kept: Any = None
    cache: Any = None
    held: Any = None
    is_ready: bool = False


# Token dims of a layer's input, the mask of that shape, how its rows are packed, and the layout of
# the model where the input does not show its sequences. A plain tuple, as one is made at each call.
_Sequences = tuple[
    tuple[int, ...],
    Tensor | None,
    Packed | Patches | TimeFirst | None,
    "TokenLayout | None",
]


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.layouts: list[TokenLayout] = []
        self.disabled: list[Any] = []
        self.backends: list[str] = []
        self.plain: list[Any] = []  # modules whose own forward runs
        self.prompts: list[Marks] = []
        self.readings: list[Any] = []  # at most one, vps.layers.pairing.Reading


# In lists, because torch.compile traces their mutation but no ContextVar.
STATE = _ThreadState()


@contextmanager
def token_mask(mask: Tensor) -> Iterator[None]:
    """Say which tokens count in the statistics of every VPS layer run inside, on this thread.

    A patched model takes this from its ``attention_mask``. Use it for a bare layer, or for a model
    that is called without an ``attention_mask`` and has padding. With ``torch.utils.checkpoint``,
    enter it inside the checkpointed function, which runs twice.

    Args:
        mask: bool ``[..., T]``, the dims of the layer's input without the last; True counts.

    Raises:
        TypeError: ``mask`` is no bool tensor.
        ValueError: raised by a layer whose input has other token dims.
    """
    _check_bool("token_mask", mask)
    STATE.layouts.append(TokenLayout(tuple(mask.shape), mask))
    try:
        yield
    finally:
        STATE.layouts.pop()


@contextmanager
def prompt(mask: Tensor) -> Iterator[None]:
    """Say which tokens are the prompt, for layers of ``scope="prompt"``, on this thread.

    Their counted tokens alone decide the updates of every sequence; all tokens are sharpened. Use
    it to score a given continuation in one pass, or for a bare layer. Without it the prompt is the
    whole input. A call that finds its cache filled uses what the cache's prompt decided. Layers of
    other scopes do not read it. With beams, B counts them.

    Args:
        mask: bool ``[B, T]``, the model's tokens, True marks the prompt; for a bare layer the dims
            of its input without the last. For an encoder-decoder these are the decoder's tokens.

    Raises:
        TypeError: ``mask`` is no bool tensor.
        ValueError: raised by a layer whose input has other token dims.

    Source: SPEC §11.
    """
    _check_bool("prompt", mask)
    STATE.prompts.append(Marks(mask))
    try:
        yield
    finally:
        STATE.prompts.pop()


def _check_bool(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"vps.{name}: mask must be a bool tensor [..., T], got {came}")


def marks_for(x: Tensor, dims: tuple[int, ...]) -> Marks | None:
    """Return the marks that apply to x, whose tokens have ``dims``, or ``None``.

    Inside a patched model they apply to the model's own tokens.
    """
    if not STATE.layouts or STATE.layouts[-1].owner is None:
        return STATE.prompts[-1] if STATE.prompts else None
    layout = STATE.layouts[-1]
    if layout.encoded is not None and _is_encoded(x, layout.encoded.states, layout.shape):
        return None
    marks, shape = layout.marks, layout.shape
    if marks is None or dims in (shape, shape[::-1]):
        return marks
    if not _is_kept(dims, layout):
        return None
    kept = layout.kept
    return Marks(marks.mask[:, kept if isinstance(kept, Tensor) else slice(-kept, None)])


def _is_kept(dims: tuple[int, ...], layout: TokenLayout) -> bool:
    """Return whether tokens of ``dims`` [B, k] are those that ``logits_to_keep`` asks for."""
    kept, shape = layout.kept, layout.shape
    if isinstance(kept, Tensor):
        count = kept.numel()
    else:
        count = kept if isinstance(kept, int) and len(shape) == 2 and 0 < kept < shape[1] else 0
    return count > 0 and tuple(dims) == (shape[0], count)


def held_for(x: Tensor, number: int | None) -> Any:
    """Return what the layers hold for the cache of the running model, or ``None``.

    It concerns a layer whose x has the tokens of the call, or those that ``logits_to_keep`` asks
    for; and one that has decided and now gets other tokens of these rows, as where a layer is
    applied to all that is cached.
    """
    if not STATE.layouts:
        return None
    layout = STATE.layouts[-1]
    held, own = layout.held, x.shape[:-1]
    if held is None:
        return None
    if layout.encoded is not None and _is_encoded(x, layout.encoded.states, layout.shape):
        return None
    if held.refusal is not None or own in (layout.shape, layout.shape[::-1]):
        return held
    if _has_tokens(x, layout.shape):
        return held
    if _is_kept(own, layout) or number in held.given and own[:1] == layout.shape[:1]:
        return held
    return None


def _has_tokens(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether x, ``[B · T, d]`` or with more dims as ``[B, 1, T, d]``, has these tokens."""
    own = x.shape[:-1]
    if x.dim() <= 2:
        return count(own) == count(shape)
    several = tuple(dim for dim in own if dim != 1)
    return len(own) > len(shape) > 0 and several == tuple(dim for dim in shape if dim != 1)


def bind_to_thread_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind ``function`` to this thread's present layouts and switches, wherever it runs later.

    Gradient checkpointing runs a block again during the backward pass, after the model's forward
    returned and perhaps on another thread.
    """
    bound_state = {name: list(stack) for name, stack in vars(STATE).items()}

    def bound(*args: Any, **kwargs: Any) -> Any:
        before = dict(vars(STATE))
        vars(STATE).update({name: list(stack) for name, stack in bound_state.items()})
        try:
            return function(*args, **kwargs)
        finally:
            vars(STATE).update(before)

    return bound


def count(dims: tuple[int, ...]) -> int:
    """Return the product of dims, by a loop that torch.compile traces with symbolic sizes too."""
    tokens = 1
    for dim in dims:
        tokens *= dim
    return tokens


def token_dims(x: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the token dims and the mask for a layer input ``x`` [..., d_in].

    If a model flattens its ``[B, T]`` tokens before a layer (OPT, shared experts), the model's own
    dims are returned, so that sequences stay apart. A layer that gets one vector a row (a pooler, a
    head) has B sequences of one token.

    Raises:
        ValueError: the mask of a :func:`token_mask` does not fit ``x``.
    """
    return _sequences(x)[:2]


def groups_of(x: Tensor, scope: str) -> tuple[tuple[int, ...], Tensor | None, Packing | None]:
    """Return what :func:`token_dims` does, and the packing of rows that ``scope`` splits.

    Raises:
        ValueError: the mask does not fit ``x``, or nothing shows which tokens of ``x`` belong to
            one sequence.
    """
    dims, mask, packed, unknown = _sequences(x)
    if scope == "token":
        return dims, mask, None
    marks = marks_for(x, dims) if scope == "prompt" else None
    scope = "sequence" if scope == "prompt" else scope
    if scope == "sequence" and unknown is not None and _holds_several(unknown, x):
        runs = f"tokens {list(unknown.shape)}" if unknown.shape else f"{max(unknown.rows)} rows"
        raise ValueError(
            f"vps: x must show which of its tokens are of one sequence, got {list(x.shape)} in a "
            f"layer of {type(unknown.owner).__name__}, which runs {runs} (a router may have "
            f"gathered them); expected scope='token' or the layer excluded, got scope={scope!r}"
        )
    packing = packed.on(x.device) if packed is not None and scope == "sequence" else None
    if marks is not None:
        if isinstance(packed, TimeFirst):
            dims = dims[::-1]
        if packing is not None:
            packing = packing.among(marks.among(None, dims), isinstance(packed, TimeFirst))
        else:
            mask = marks.among(mask, dims)
    return dims, mask, packing


def _sequences(x: Tensor) -> _Sequences:
    own = x.shape[:-1]
    if not STATE.layouts:
        return own, None, None, None
    layout = STATE.layouts[-1]
    if layout.encoded is not None and _is_encoded(x, layout.encoded.states, layout.shape):
        return own, layout.encoded.mask, None, None
    if own == layout.shape or _has_tokens(x, layout.shape):
        return layout.shape, layout.mask, layout.packed, None
    if layout.owner is None:
        raise ValueError(
            "vps.token_mask: mask must have the shape of x without its last dim, "
            f"{tuple(own)}, got {layout.shape}"
        )
    if isinstance(layout.packed, Patches) and own[-1:] == (tokens := count(own),):
        if tokens > 0 and layout.shape[0] % tokens == 0:
            return own, None, layout.packed.merged(tokens), None
    if len(layout.shape) > 2 and own == layout.shape[:-1]:  # one vector for each of several choices
        return (*own, 1), None, None, None
    if x.dim() == 3 and own == layout.shape[::-1]:
        mask = None if layout.mask is None else layout.mask.t()
        return own, mask, TimeFirst(layout.shape, layout.mask), None
    if x.dim() != 2:
        return own, None, None, None
    if own[0] in layout.rows:
        return (own[0], 1), None, None, None
    return own, None, None, None if layout.around else layout


def _holds_several(layout: TokenLayout, x: Tensor) -> bool:
    """Return whether the call of a layout has more than one sequence."""
    if any(rows > 1 for rows in layout.rows):
        return True
    return layout.packed is not None and layout.packed.on(x.device) is not None


def _is_encoded(x: Tensor, states: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether x is the encoder's states, in a decoder whose own tokens have dims ``shape``.

    Other dims than the decoder's settle it. Otherwise x must be the tensor itself, or an alias of
    it, which a reentrant checkpoint makes.
    """
    if x is states or x.shape[:-1] != states.shape[:-1]:
        return x is states
    if shape and tuple(states.shape[:-1]) != shape:
        return True
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._is_alias_of(x, states))  # type: ignore[attr-defined]


def group(x: Tensor, dims: tuple[int, ...], scope: str) -> Tensor:
    """Return x as ``[G, T, d_in]``: G groups of T tokens each (SPEC §2, scope)."""
    scope = "sequence" if scope == "prompt" else scope
    if scope == "sequence" and x.dim() == 3:
        return x
    tokens = count(dims)
    if scope == "token":
        length = 1
    else:
        length = dims[-1] if scope == "sequence" and dims else tokens
    return x.reshape(tokens // length, length, x.shape[-1])


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Refuse a mask that does not fit x ``[..., d_in]``."""
    if mask.dtype is not torch.bool:
        raise TypeError(f"vps_linear: mask must be bool, got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"vps_linear: mask must be {tuple(x.shape[:-1])}, x without its last dim, "
            f"got {tuple(mask.shape)}"
        )

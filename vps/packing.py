"""Split packed rows, which hold several sequences, into a group of tokens for each sequence.

A model shows where sequences start by ``position_ids`` that start again, by the ``cu_seq_lens`` of
FlashAttention or by ``seq_idx`` (SPEC §2). Tokens ``[B, T]`` are computed in parts ``[S, L]``. A
part holds S sequences of similar length, padded to the longest; their outputs go back into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")


class Part(NamedTuple):
    """Some of the sequences.

    Args:
        tokens: the index, among ``B · T``, of the token at each place ``[S, L]``. Past the end of a
            sequence it is the sequence's first token.
        counted: bool ``[S, L]``, whether the token at each place counts.
    """

    tokens: Tensor
    counted: Tensor


class Packing(NamedTuple):
    """How tokens ``[B, T]`` stand in parts.

    Args:
        parts: the parts; each sequence is in one of them.
        place: the place of each token ``[B · T]`` in the parts laid end to end.
    """

    parts: tuple[Part, ...]
    place: Tensor

    def among(self, marks: Tensor, is_time_first: bool) -> Packing:
        """Return the packing in which only tokens of bool marks ``[B, T]`` count.

        ``is_time_first`` says that the tokens are numbered as ``[T, B]``.
        """
        flat = (marks.t() if is_time_first else marks).reshape(-1)
        flat = flat.to(self.place.device)
        parts = tuple(
            part._replace(counted=part.counted & flat[part.tokens]) for part in self.parts
        )
        return self._replace(parts=parts)

    def take(self, values: Tensor) -> list[Tensor]:
        """Return, for each part, ``[S, L, d]`` from values ``[..., d]`` of all tokens."""
        flat = values.reshape(-1, values.shape[-1])
        return [
            flat.index_select(0, part.tokens.view(-1)).view(*part.tokens.shape, -1)
            for part in self.parts
        ]

    def apply(self, x: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        """Apply a ``compute`` that returns one output, as :meth:`apply_all` does."""
        (y,) = self.apply_all(x, lambda values, mask: [compute(values, mask=mask)])
        assert y is not None
        return y

    def apply_all(
        self, x: Tensor, compute: Callable[..., Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """Return outputs ``[..., d_out]`` for x ``[..., d_in]``, computed part by part.

        Args:
            x: the input for all tokens.
            compute: a function of the input ``[S, L, d_in]`` of a part and the ``mask`` of its
                counted tokens. It returns outputs ``[S, L, d_out]``, with ``None`` for a plain one.
        """
        inputs = zip(self.take(x), self.parts, strict=True)
        of_parts = [compute(values, mask=part.counted) for values, part in inputs]
        return [
            None if ys[0] is None else self.back([y for y in ys if y is not None], x.shape)
            for ys in zip(*of_parts, strict=True)
        ]

    def back(self, ys: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Return ``[..., d]`` from ``[S, L, d]`` for each part, where x has this ``shape``."""
        flat = torch.cat([y.flatten(0, 1) for y in ys])
        return flat.index_select(0, self.place).view(*shape[:-1], flat.shape[-1])


class Packed:
    """What one call says about the sequences in its rows; it is read when a layer first asks.

    Args:
        shape: B and T.
        counted: bool ``[B, T]``, or ``None`` where all tokens count.
        bounds: ``cu_seq_lens`` ``[S + 1]``, or ``None``.
        ids: ``seq_idx`` ``[B, T]``, or ``None``.
        positions: ``position_ids`` ``[B or 1, T]``, or ``None``.
        mask: the ``attention_mask`` of the call.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        counted: Tensor | None,
        bounds: Any,
        ids: Tensor | None,
        positions: Tensor | None,
        mask: Any,
    ) -> None:
        self.shape = shape
        self.counted = counted
        self.bounds = bounds
        self.ids = ids
        self.positions = positions
        self.mask = mask
        self._packing: dict[torch.device, Packing | None] = {}

    def is_told(self, *said: Any) -> bool:
        """Return whether its arguments, without ``counted``, are the very same objects."""
        shape, *rest = said
        mine = self.bounds, self.ids, self.positions, self.mask
        same = zip(mine, rest, strict=True)
        return self.shape == shape and all(one is other for one, other in same)

    def on(self, device: torch.device) -> Packing | None:
        """Return the parts on a device, or ``None`` where every row is one sequence.

        Raises:
            ValueError: the bounds do not fit the tokens, or cannot be read because a compiler, a
                tracer or a captured CUDA graph would keep the bounds of one call for all calls.
        """
        if device not in self._packing:
            starts = self._starts()
            if starts is not None:
                starts[:, 0] = True
            several = starts is not None and int(starts.sum()) > len(starts)
            self._packing[device] = _pack(starts, self.counted, device) if several else None  # type: ignore[arg-type]
        return self._packing[device]

    def _starts(self) -> Tensor | None:
        """Return where sequences start, bool ``[B, T]``, or ``None`` where that is not known.

        The first sequence of a row may be missing.
        """
        if isinstance(self.bounds, Tensor) and not _is_readable(self.bounds):
            if self.bounds.numel() == self.shape[0] + 1:
                return None  # as many sequences as rows
        for name, said in (("cu_seq_lens", self.bounds), ("seq_idx", self.ids)):
            if isinstance(said, Tensor) and not _is_readable(said):
                raise ValueError(
                    f"vps: {name} says where the sequences of a packed row start, which cannot be "
                    "read inside torch.compile, a tracer or a captured CUDA graph; expected "
                    "scope='token', or the model run without"
                )
        if self.bounds is not None:
            return self._from_bounds(self.bounds)
        if self.ids is not None:
            return torch.nn.functional.pad(self.ids[:, 1:] != self.ids[:, :-1], (1, 0))
        if self.positions is None or not _is_readable(self.positions):
            return None
        return self._from_positions(self.positions.expand(self.shape))

    def _from_bounds(self, bounds: Any) -> Tensor:
        """Return starts from ``cu_seq_lens``, which count through the rows laid end to end."""
        total = self.shape[0] * self.shape[1]
        edges = bounds.flatten().tolist() if isinstance(bounds, Tensor) else list(bounds)
        if not edges or edges[0] != 0 or edges != sorted(edges) or edges[-1] > total:
            raise ValueError(
                f"vps: cu_seq_lens must rise from 0 to at most {total}, the tokens of the call, "
                f"got {edges}"
            )
        starts = torch.zeros(total + 1, dtype=torch.bool)
        starts[torch.tensor(edges)] = True
        return starts[:-1].view(self.shape)

    def _from_positions(self, positions: Tensor) -> Tensor:
        """Return starts from positions, which start again with each sequence.

        A counted token starts a sequence if its position is no higher than the position of the
        row's first counted token, and than the position of the counted token before it.
        """
        counted = self.counted
        if counted is None:
            counted = torch.ones(self.shape, dtype=torch.bool, device=positions.device)
        counted = counted.to(positions.device)
        order = torch.arange(self.shape[1], device=positions.device).expand(self.shape)
        last = order.masked_fill(~counted, -1).cummax(1).values
        before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        first = counted.int().argmax(1, keepdim=True)
        highest = torch.minimum(
            positions.gather(1, before.clamp(min=0)), positions.gather(1, first)
        )
        return counted & (before >= 0) & (positions <= highest)


class Marks:
    """Which tokens are the prompt.

    Args:
        mask: bool ``[..., T]``, True marks the prompt.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._last: tuple[Tensor | None, Tensor] | None = None

    def among(self, counted: Tensor | None, dims: tuple[int, ...]) -> Tensor:
        """Return which tokens of ``dims`` are counted and of the prompt.

        Raises:
            ValueError: the mask has another shape.
        """
        if tuple(self.mask.shape) != dims:
            raise ValueError(
                f"vps.prompt: mask must have the shape of the tokens, {dims}, "
                f"got {tuple(self.mask.shape)}"
            )
        if counted is None:
            return self.mask
        # Layers of one x share their selection only where they get the very same mask.
        if self._last is None or self._last[0] is not counted:
            self._last = counted, self.mask.to(counted.device) & counted
        return self._last[1]


class TimeFirst:
    """The tokens ``[T, B]`` of a layer in a model with tokens ``[B, T]`` (XLNet, FSMT).

    Args:
        shape: B and T.
        counted: bool ``[B, T]``, or ``None`` where all tokens count.
    """

    def __init__(self, shape: tuple[int, ...], counted: Tensor | None) -> None:
        self.shape = shape
        self.counted = counted

    def on(self, device: torch.device) -> Packing:
        """Return one part, of B sequences of T tokens."""
        rows, length = self.shape
        order = torch.arange(rows * length, device=device)
        counted = self.counted
        if counted is None:
            counted = torch.ones(self.shape, dtype=torch.bool, device=device)
        part = Part(order.view(length, rows).t().contiguous(), counted.to(device))
        return Packing((part,), order.view(rows, length).t().reshape(-1))


class Patches:
    """Patches of several images in one row ``[n, d]``, as a vision tower gets them (Qwen-VL).

    Args:
        grid: numbers of patches of each image in time, height and width, ``[images, 3]``.
        patches: n.
        tokens: number of tokens of a layer, each merged from ``patches // tokens`` patches.
    """

    def __init__(self, grid: Tensor, patches: int, tokens: int) -> None:
        self.grid = grid
        self.patches = patches
        self.tokens = tokens
        self._packing: dict[torch.device, Packing] = {}
        self._merged: dict[int, Patches] = {tokens: self}

    def merged(self, tokens: int) -> Patches:
        """Return the same images for a layer with so many tokens."""
        if tokens not in self._merged:
            self._merged[tokens] = Patches(self.grid, self.patches, tokens)
        return self._merged[tokens]

    def on(self, device: torch.device) -> Packing | None:
        """Return the parts on a device; ``None`` for a single image, or while a compiler looks on.

        Raises:
            ValueError: the patches of an image do not make whole tokens.
        """
        if len(self.grid) < 2 or not _is_readable(self.grid):
            return None
        if device not in self._packing:
            size = self.patches // self.tokens
            images = self.grid.prod(1).tolist()
            if sum(images) != self.patches or any(image % size for image in images):
                raise ValueError(
                    f"vps: grid_thw must split {self.patches} patches into images of whole tokens, "
                    f"of {size} patches each, got images of {images}; expected scope='token' else"
                )
            starts = torch.zeros(1, self.tokens, dtype=torch.bool)
            starts[0, torch.tensor([0, *images]).cumsum(0)[:-1] // size] = True
            self._packing[device] = _pack(starts, None, device)
        return self._packing[device]


def _pack(starts: Tensor, counted: Tensor | None, device: torch.device) -> Packing:
    """Return the packing of sequences that start where bool ``starts`` ``[B, T]`` says.

    Only the tokens of bool ``counted`` ``[B, T]`` count.
    """
    first = starts.cpu().view(-1).nonzero().view(-1)
    total = starts.numel()
    lengths = torch.diff(first, append=torch.tensor([total]))
    longest = int(lengths.max())
    classes = torch.tensor([(longest // n).bit_length() for n in lengths.tolist()])
    place = torch.empty(total, dtype=torch.int64)
    parts, offset = [], 0
    for own in classes.unique().tolist():  # lengths of one class differ by a factor below 2
        starting, length = first[classes == own, None], lengths[classes == own, None]
        order = torch.arange(int(length.max()))
        there = order < length
        tokens = torch.where(there, starting + order, starting)
        where = torch.arange(offset, offset + tokens.numel()).view(tokens.shape)
        place[tokens[there]] = where[there]
        offset += tokens.numel()
        tokens, there = tokens.to(device), there.to(device)
        if counted is not None:
            there = there & counted.to(device).reshape(-1)[tokens]
        parts.append(Part(tokens, there))
    return Packing(tuple(parts), place.to(device))


def packed(
    shape: tuple[int, ...],
    counted: Tensor | None,
    given: Mapping[str, Any],
    mask: Any,
    positions: Any,
    outer: Any,
) -> Packed | None:
    """Return what a call says about the sequences in its rows; ``None`` where each row is one.

    Args:
        shape: dims of the tokens.
        counted: bool of these dims, or ``None`` where all tokens count.
        given: the arguments of the call.
        mask: the ``attention_mask`` of the call.
        positions: the ``position_ids`` of the call. Three kinds for images may follow those of the
            text (Qwen-VL: ``[4, B, T]``).
        outer: the result for the model that calls this one; it is returned if both calls say the
            same.
    """
    bounds, ids = None, given.get("seq_idx")
    for name in BOUNDS:
        bounds = given.get(name) if bounds is None else bounds
    if len(shape) != 2 or (bounds is None and (shape[1] < 2 or _is_traced())):
        return None
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]
    if not isinstance(positions, Tensor) or tuple(positions.shape) not in (shape, (1, shape[1])):
        positions = None
    if not isinstance(ids, Tensor) or tuple(ids.shape) != shape:
        ids = None
    if bounds is None and ids is None and positions is None:
        return None
    said = (shape[0], shape[1]), bounds, ids, positions, mask
    if isinstance(outer, Packed) and outer.is_told(*said):
        return outer
    return Packed(said[0], counted, *said[1:])


def _is_readable(values: Tensor) -> bool:
    """Return whether numbers may be read from ``values`` now, for this call alone."""
    return not (
        values.is_meta
        or _is_traced()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (values.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

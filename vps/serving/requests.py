"""Sharpen a fused layer over the requests of a batch (SPEC §2, scope).

An engine multiplies several stacked weights at once: ``qkv_proj`` is q, k and v, ``gate_up_proj``
gate and up. Each is sharpened by itself, under its name in the model's own files. The engine puts
the tokens of all requests into one ``x [N, d_in]``. The tokens of a prompt are one group, and every
generated token is a group by itself, as when a request runs alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.config import VPSConfig
from vps.functional import Projection, coupled_vps_linear, vps_linear, why_not_heads
from vps.model.matching import select_names


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a fused weight, and whether they are sharpened."""

    start: int
    stop: int
    sharpened: bool


@dataclass(frozen=True)
class Fused:
    """How one layer of an engine is sharpened.

    Args:
        parts: the layers in it, in the order of the weight's rows.
        config: the settings.
        heads: query and key-value heads, where parts 0 and 1 are coupled (SPEC §7), or ``None``.
    """

    parts: tuple[Part, ...]
    config: VPSConfig
    heads: tuple[int, int] | None = None

    def to_json(self) -> str:
        """Return all of it as text, which an operator can take as an argument."""
        return json.dumps([self.parts, self.config.to_json(), self.heads])

    @staticmethod
    @cache
    def from_json(text: str) -> Fused:
        """Read what :meth:`to_json` wrote; equal texts give the same object."""
        parts, config, heads = json.loads(text)
        made = tuple(Part(*part) for part in parts)
        return Fused(made, VPSConfig.from_json(config), None if heads is None else tuple(heads))


def split(
    name: str, sizes: Sequence[int], packed: Mapping[str, Sequence[str]], config: VPSConfig
) -> Fused | None:
    """Return the parts of a layer, or ``None`` where ``config`` names none of them.

    Args:
        name: the layer's name in the engine, such as ``model.layers.0.self_attn.qkv_proj``.
        sizes: output features of each part.
        packed: last names of the parts by the last name of a fused layer. A layer that is missing
            here is one part, under its own name.
        config: the settings.

    Raises:
        ValueError: ``config`` names a part, and ``packed`` has other than ``len(sizes)`` parts.
    """
    parent, _, leaf = name.rpartition(".")
    leaves = list(packed.get(leaf, [leaf]))
    names = [f"{parent}.{part}" if parent else part for part in leaves]
    chosen = set(select_names(names, None, config))
    if not chosen:
        return None
    if len(names) == 1:
        sizes = [sum(sizes)]
    elif len(names) != len(sizes):
        raise ValueError(
            f"vps: cannot sharpen {name}: it is made of {len(names)} layers, {', '.join(leaves)}, "
            f"but has {len(sizes)} outputs, of {', '.join(map(str, sizes))} features"
        )
    parts, start = [], 0
    for part, size in zip(names, sizes, strict=True):
        parts.append(Part(start, start + size, part in chosen))
        start += size
    return Fused(tuple(parts), config)


def couple(fused: Fused, heads: int, kv_heads: int) -> Fused | str:
    """Couple the first two parts as query and key, or return why they cannot be coupled."""
    parts = fused.parts
    if len(parts) != 3:
        return "it is not made of separate query, key and value layers"
    if not (parts[0].sharpened and parts[1].sharpened):
        return "query and key are not both sharpened"
    d_q, d_k = (part.stop - part.start for part in parts[:2])
    reason = why_not_heads(d_q, d_k, heads, kv_heads)
    return dataclasses.replace(fused, heads=(heads, kv_heads)) if reason is None else reason


class Run(NamedTuple):
    """Groups of one length that follow each other in x: ``groups`` of ``length`` tokens."""

    groups: int
    length: int


def runs(starts: Iterable[int]) -> list[Run]:
    """Return the fewest runs that hold the requests of a batch.

    Requests without a token, with which an engine pads its batch, drop out.

    Args:
        starts: where each request begins in x, and where the last one ends.
    """
    edges = list(starts)
    lengths = (stop - start for start, stop in zip(edges, edges[1:], strict=False))
    return [
        Run(len(list(same)), length)
        for length, same in groupby(length for length in lengths if length > 0)
    ]


def sharpen(
    x: Tensor, weight: Tensor, bias: Tensor | None, fused: Fused, grouping: list[Run] | None
) -> Tensor:
    """Compute a fused layer, each of its parts sharpened by itself.

    Args:
        x: ``[N, d_in]``, the tokens of all requests.
        weight: ``[d_out, d_in]``, the parts' weights stacked.
        bias: ``[d_out]`` or ``None``.
        fused: the parts and the settings.
        grouping: the groups of x. ``None`` makes every token its own group.

    Returns:
        ``[N, d_out]``.

    Raises:
        RuntimeError: groups of more or fewer tokens than x has.
    """
    if grouping is None or x.shape[0] == 0:
        return _parts(x.unsqueeze(1), weight, bias, fused).flatten(0, 1)
    sizes = [groups * length for groups, length in grouping]
    if sum(sizes) != x.shape[0]:
        raise RuntimeError(f"vps: {x.shape[0]} tokens came for requests of {sum(sizes)} tokens")
    pieces = []
    for piece, (groups, length) in zip(x.split(sizes), grouping, strict=True):
        grouped = piece.view(groups, length, x.shape[1])
        pieces.append(_parts(grouped, weight, bias, fused).flatten(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, fused: Fused) -> Tensor:
    """Return the outputs of all parts for x ``[G, T, d_in]``, side by side."""
    layers = []
    for start, stop, _ in fused.parts:
        layers.append((weight[start:stop], None if bias is None else bias[start:stop]))
    outputs: list[Tensor] = []
    if fused.heads is not None:
        query, key = (Projection(*layer) for layer in layers[:2])
        outputs += coupled_vps_linear(x, query, key, *fused.heads, fused.config)
    for part, layer in list(zip(fused.parts, layers, strict=True))[len(outputs) :]:
        if part.sharpened:
            outputs.append(vps_linear(x, *layer, fused.config))
        else:
            outputs.append(F.linear(x, *layer))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

"""Which tokens of a mixed batch belong together, and a fused layer over them (SPEC §2, scope).

An engine puts the tokens of all its requests into one ``x [N, d_in]``. The tokens of a prompt are
one group, and every generated token is a group by itself, as when a request runs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.functional import Projection, coupled_vps_linear, vps_linear
from vps.serving.parts import Fused


class Run(NamedTuple):
    """Groups of one length that follow each other in x: ``groups`` of ``length`` tokens."""

    groups: int
    length: int


def runs(starts: Iterable[int]) -> list[Run]:
    """Where each request begins in x, and where the last one ends, as few runs as hold them.

    Requests without a token, with which an engine pads its batch, drop out.
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
    """A fused layer, each of its parts sharpened by itself.

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
    tokens = sum(groups * length for groups, length in grouping)
    if tokens != x.shape[0]:
        raise RuntimeError(f"vps: {x.shape[0]} tokens came for requests of {tokens} tokens")
    pieces = [_parts(group, weight, bias, fused).flatten(0, 1) for group in _groups(x, grouping)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _groups(x: Tensor, grouping: list[Run]) -> Iterator[Tensor]:
    """x in pieces ``[G, T, d_in]``."""
    sizes = [groups * length for groups, length in grouping]
    for piece, (groups, length) in zip(x.split(sizes), grouping, strict=True):
        yield piece.view(groups, length, x.shape[1])


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, fused: Fused) -> Tensor:
    """All parts for x ``[G, T, d_in]``."""
    layers = []
    for part in fused.parts:
        rows = slice(part.start, part.stop)
        layers.append((weight[rows], None if bias is None else bias[rows]))
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

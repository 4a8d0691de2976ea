"""Sharpen a fused layer over the requests of a batch (SPEC §2, scope, and §11).

An engine multiplies several stacked weights at once: ``qkv_proj`` is q, k and v, ``gate_up_proj``
gate and up. Each is sharpened by itself, under its name in the model's own files. The engine puts
the tokens of all requests into one ``x [N, d_in]``. The tokens of a prompt are one group, and every
generated token is a group by itself, as when a request runs alone. With ``scope="prompt"`` what the
prompt decided holds for all later tokens of its request.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import functional
from vps.algorithm.core import Core
from vps.algorithm.fixed import FixedUpdate
from vps.algorithm.flow import Given
from vps.config import VPSConfig
from vps.functional import NOTHING, Projection, why_not_heads
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
        name: the layer's name, by which requests hold decisions with ``scope="prompt"``. It is
            empty with other scopes, so that equal layers give one compiled graph.
    """

    parts: tuple[Part, ...]
    config: VPSConfig
    heads: tuple[int, int] | None = None
    name: str = ""

    def to_json(self) -> str:
        """Return all of it as text, which an operator can take as an argument."""
        return json.dumps([self.parts, self.config.to_json(), self.heads, self.name])

    @staticmethod
    @cache
    def from_json(text: str) -> Fused:
        """Read what :meth:`to_json` wrote; equal texts give the same object."""
        parts, config, heads, name = json.loads(text)
        heads = None if heads is None else tuple(heads)
        return Fused(tuple(Part(*part) for part in parts), VPSConfig.from_json(config), heads, name)


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
    return Fused(tuple(parts), config, name=name if config.scope == "prompt" else "")


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


# What prompts decided for each sharpened part of a layer, by the layer's name.
Decision = dict[str, list[Given]]


class Run(NamedTuple):
    """Groups of one length that follow each other in x: ``groups`` of ``length`` tokens.

    Args:
        groups, length: their numbers.
        decision: with ``scope="prompt"`` what is decided for all groups. A prompt adds to it.
        prompts: what the prompt of each group decided; empty where the group is a prompt.
    """

    groups: int
    length: int
    decision: Decision | None = None
    prompts: tuple[Decision, ...] = ()

    def given(self, layer: str) -> list[Given]:
        """Return what is decided for each sharpened part of a layer, ``[groups, ...]``."""
        assert self.decision is not None
        if layer not in self.decision:
            parts = zip(*(prompt[layer] for prompt in self.prompts), strict=True)
            self.decision[layer] = [_stacked(part) for part in parts]
        return self.decision[layer]


def _stacked(givens: Sequence[Given]) -> Given:
    """Return what single groups are given as what all of them are given.

    Where one has no ``through``, all do without: the form of SPEC §4 computes the same.
    """

    def together(tensors: Sequence[Any]) -> Any:
        return None if any(one is None for one in tensors) else torch.cat(list(tensors))

    I_in, I_out, cores, through = zip(
        *((one.I_in, one.I_out, one.core, one.through) for one in givens), strict=True
    )
    core = Core(*map(together, zip(*cores, strict=True)))
    return FixedUpdate(together(I_in), together(I_out), core, together(through)).given()


class Decisions:
    """What the prompts of unfinished requests decided (``scope="prompt"``).

    Attributes:
        of: the decision of each request, by its id.
        stacked: the decision of each run of several requests in the last batch, by their ids.
    """

    def __init__(self) -> None:
        self.of: dict[str, Decision] = {}
        self.stacked: dict[tuple[str, ...], Decision] = {}

    def finish(self, requests: set[str]) -> None:
        """Free what is kept for requests, which another request may follow by the same id."""
        for request in requests:
            self.of.pop(request, None)
        if requests:
            kept = self.stacked.items()
            self.stacked = {ids: own for ids, own in kept if requests.isdisjoint(ids)}

    def runs(
        self, requests: Iterable[str], lengths: Mapping[str, int], starting: set[str]
    ) -> list[Run]:
        """Return the runs of a batch; a prompt is a run by itself.

        Args:
            requests: ids in the order of x.
            lengths: tokens of each request.
            starting: the requests that have all their tokens in x.

        Raises:
            RuntimeError: the prompt of a request was not seen.
        """
        found, stacked = [], {}
        for (length, decided), same in groupby(
            requests, lambda request: (lengths[request], request in self.of)
        ):
            ids = tuple(same)
            if not decided:
                if not starting.issuperset(ids):
                    raise RuntimeError(
                        "vps: scope='prompt' was given a part of a prompt, whose beginning was "
                        "computed before; set scope to 'token'"
                    )
                found += [Run(1, length, self.of.setdefault(request, {})) for request in ids]
                continue
            prompts = tuple(self.of[request] for request in ids)
            decision = prompts[0]
            if len(ids) > 1:
                decision = stacked[ids] = self.stacked.get(ids, {})
            found.append(Run(len(ids), length, decision, prompts))
        self.stacked = stacked
        return found


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
        RuntimeError: groups of more or fewer tokens than x has, or a layer that decides twice.
    """
    if grouping is None or x.shape[0] == 0:
        return _parts(x.unsqueeze(1), weight, bias, fused).flatten(0, 1)
    sizes = [run.groups * run.length for run in grouping]
    if sum(sizes) != x.shape[0]:
        raise RuntimeError(f"vps: {x.shape[0]} tokens came for requests of {sum(sizes)} tokens")
    pieces = []
    for piece, run in zip(x.split(sizes), grouping, strict=True):
        grouped = piece.view(run.groups, run.length, x.shape[1])
        pieces.append(_parts(grouped, weight, bias, fused, run).flatten(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, fused: Fused, run: Run | None = None
) -> Tensor:
    """Return the outputs of all parts for x ``[G, T, d_in]``, side by side."""
    decision = None if run is None or run.prompts else run.decision
    held: list[FixedUpdate | None] | None = None if decision is None else []
    given = iter(run.given(fused.name)) if run is not None and run.prompts else repeat(NOTHING)
    layers = []
    for start, stop, _ in fused.parts:
        layers.append((weight[start:stop], None if bias is None else bias[start:stop]))
    outputs: list[Tensor] = []

    def add(layers: Sequence[tuple[Tensor, Tensor | None]], **options: Any) -> None:
        each = tuple(Projection(*layer) for layer in layers)
        ys = functional.sharpen(x, each, fused.config, held=held, **options)
        outputs.extend(
            F.linear(x, *layer) if y is None else y for y, layer in zip(ys, layers, strict=True)
        )

    if fused.heads is not None and (run is None or not run.prompts):
        add(layers[:2], heads=fused.heads)
    for part, layer in list(zip(fused.parts, layers, strict=True))[len(outputs) :]:
        if part.sharpened:
            add([layer], given=next(given))
        else:
            outputs.append(F.linear(x, *layer))
    if decision is not None:
        if fused.name in decision:
            raise RuntimeError(
                f"vps: scope='prompt' holds one decision for each layer, and {fused.name} is "
                "called several times in a pass; expected another scope, or the layer excluded"
            )
        made = (one for one in held or () if one is not None)
        decision[fused.name] = [one.given() for one in made]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

"""The linear layers inside a fused one: ``qkv_proj`` is q, k and v, ``gate_up_proj`` gate and up.

A serving engine multiplies their stacked weights at once; each is sharpened by itself, under the
name that it has in the model's own files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vps.config import VPSConfig
from vps.functional import why_not_heads
from vps.model.matching import select_names


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of a fused weight, and whether they are sharpened."""

    start: int
    stop: int
    sharpened: bool


@dataclass(frozen=True)
class Fused:
    """How one layer of an engine is sharpened.

    Args:
        parts: of its weight, in the order of its rows.
        config: the settings.
        heads: query and key-value heads, where parts 0 and 1 are coupled (SPEC §7), or ``None``.
    """

    parts: tuple[Part, ...]
    config: VPSConfig
    heads: tuple[int, int] | None = None

    def to_json(self) -> str:
        """All of it as text, which an operator can take as an argument."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @cache
    def from_json(text: str) -> Fused:
        """What :meth:`to_json` wrote, made once a text."""
        values = json.loads(text)
        return Fused(
            tuple(Part(**part) for part in values["parts"]),
            VPSConfig(**values["config"]),
            None if values["heads"] is None else tuple(values["heads"]),
        )


def split(
    name: str, sizes: Sequence[int], packed: Mapping[str, Sequence[str]], config: VPSConfig
) -> Fused | None:
    """The parts of a layer, of which those are sharpened that ``config`` names; ``None`` for none.

    Args:
        name: of the layer in the engine, such as ``model.layers.0.self_attn.qkv_proj``.
        sizes: output features of each part.
        packed: last names of the parts by the last name of a fused layer. A layer that it lacks is
            one part, under its own name.
        config: the settings.

    Raises:
        ValueError: the names are not as many as the sizes, and the config asks for one of them.
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
    """``fused`` with its first two parts coupled as query and key, or why they cannot be."""
    parts = fused.parts
    if len(parts) != 3:
        return "it is not made of separate query, key and value layers"
    if not (parts[0].sharpened and parts[1].sharpened):
        return "query and key are not both sharpened"
    d_q, d_k = (part.stop - part.start for part in parts[:2])
    reason = why_not_heads(d_q, d_k, heads, kv_heads)
    return dataclasses.replace(fused, heads=(heads, kv_heads)) if reason is None else reason

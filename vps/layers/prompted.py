"""Let a layer decide for a cache, or use what the cache's prompt decided (SPEC §11)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vps import masking
from vps.algorithm.fixed import FixedUpdate, Held
from vps.algorithm.flow import Given

if TYPE_CHECKING:
    from vps.layers.linear import SharpenedLayer

_numbers = itertools.count(1)


def given(layer: SharpenedLayer, x: Tensor) -> Given | None:
    """Return what the prompt of the running model's cache decided for a layer.

    ``None`` where the layer decides by x, because the cache is empty or there is none.

    Raises:
        ValueError: the cache cannot be followed, or its prompt decided nothing for the layer.
    """
    held: Held | None = masking.held_for(x)
    if held is None:
        return None
    if held.refusal is not None:
        raise ValueError(held.refusal)
    if not held.is_made:
        return None
    found = held.given.get(layer.number)  # type: ignore[arg-type]
    if found is not None:
        return found
    if layer.number not in held.updates:
        raise ValueError(
            "vps: scope='prompt' needs the decision of the prompt, and this cache holds none for a "
            f"layer of widths {layer.widths}: it was filled while the layer was plain, disabled or "
            "sharpened anew; expected a cache that was filled by the model as it is now"
        )
    raise ValueError(
        f"vps: scope='prompt' holds one decision for each layer, and one of widths "
        f"{layer.widths} is called several times in a pass; expected another scope, or the layer "
        "excluded"
    )


def number(layer: Any) -> int:
    """Return the number by which caches know a layer; it gets one where it has none."""
    if layer.number is None:
        layer.number = next(_numbers)
    found: int = layer.number
    return found


def deciding(x: Tensor) -> Held | None:
    """Return where layers leave what they decide by x; ``None`` where nobody holds it."""
    held: Held | None = masking.held_for(x)
    return None if held is None or held.is_made or held.refusal is not None else held


def keep(
    held: Held, layers: Sequence[Any], decided: Sequence[FixedUpdate | None], called: Any
) -> None:
    """Keep what the layers decided in the call of one of them."""
    for layer, update in zip(layers, decided, strict=False):
        if update is not None:
            held.add(number(layer), update, layer is called)

"""Find and load the C++ operator for CPUs, which is built from csrc.

``VPS_CPP_LIBRARY`` names a library to load instead of the installed one, such as a build with
sanitizers.
"""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vps.algorithm.core import Core
from vps.algorithm.fixed import FixedUpdate
from vps.backends import operator
from vps.backends.call import Call, Kind, Result, why_not_native


@cache
def why_missing() -> str | None:
    """Load the C++ operator; return why that failed, or ``None``."""
    library = _library()
    if library is None:
        return "its library is not built: VPS_BUILD_CPP=1 pip install ... says why"
    if not library.is_file():
        return f"VPS_CPP_LIBRARY={library} is no file"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another machine or torch
        return f"its library does not load: {error}"
    return None


def why_not(kind: Kind) -> str | None:
    """Return why the operator does not take calls of a kind, or ``None``."""
    return why_not_native(kind, "cpu")


HELD = "(Tensor y{0}, Tensor features{0}, Tensor core{0}, Tensor gamma{0}, Tensor through{0})"
operator.LIBRARY.define(f"linear_held{operator.ARGUMENTS} -> {HELD.format('')}")
operator.LIBRARY.define(
    f"linear_pair_held{operator.PAIR} -> {HELD.format('_q')[:-1]}, {HELD.format('_k')[1:]}"
)


def hold(call: Call) -> Result | None:
    """Run a call whose decisions are held; ``None`` for one that needs more than the output."""
    first = call.layers[0].settings
    if call.traced or first.clamp is not None or call.needs_gradient():
        return None
    with torch._C._AutoDispatchBelowAutograd():
        if call.heads is None:
            packed = operator.packed_settings(first)
            found = [torch.ops.vps.linear_held.default(*call.inputs(), *packed)]
        else:
            second = call.layers[1].settings
            arguments = operator.of_pair(call.inputs(0), call.inputs(1), first, second, *call.heads)
            both = torch.ops.vps.linear_pair_held.default(*arguments)
            found = [both[:5], both[5:]]
    held: Any = call.held
    ys: list[Tensor | None] = []
    for layer, (y, features, core, gamma, through) in zip(call.layers, found, strict=True):
        I_in, I_out = features.unbind(1)
        ys.append(None if layer.is_plain else y)
        update = FixedUpdate(I_in.contiguous(), I_out, Core(core, gamma, None), through)
        held.append(None if layer.is_plain else update)
    return ys, found[0][1][:, 0]


run = partial(operator.run, hold=hold)
later = operator.later


def _library() -> Path | None:
    named = os.environ.get("VPS_CPP_LIBRARY")
    return Path(named) if named else next(Path(__file__).parents[1].glob("_cpp*.so"), None)


if why_missing() is not None:  # graphs hold the operator, so torch has to implement it
    operator.implement_in_torch()

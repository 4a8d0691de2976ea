"""Share the input selection of one x, and equal calls, between the layers of a traced graph.

In a trace a tensor has no version to tell whether it was edited since (:mod:`sharing`), but
functionalization, which torch.compile and torch.export go through, makes every edit a new value,
and calls are compared by their values there. So v, gate and up take the selection of q and gate;
the call for query and key, which each of the two makes, happens once, and so do constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode, PythonFunctionalizeAPI
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from vps.algorithm import constants

# Where I_in stands in the results of an operator; features are I_in first, [G, 2 or 3, r].
SELECTIONS: dict[str, Callable[[tuple[Tensor, ...]], Tensor]] = {
    "vps::linear": lambda results: results[1][:, 0],
    "vps::couple": lambda results: results[3][:, 0],
    "vps::linear_pair": lambda results: results[2],
}


class _Trace:
    """Hold the results of the calls of one graph by their arguments, and I_in by x and mask.

    Tensors go by identity, which is unique since every one of them is kept.
    """

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}
        self.selections: dict[tuple[int, int], tuple[int, Callable[[], Tensor]]] = {}


# By what builds a graph; one of a branch or a loop inside another is a graph of its own.
_TRACES: WeakKeyDictionary[Any, _Trace] = WeakKeyDictionary()


def register(library: torch.library.Library) -> None:
    """Share between calls of the operators of ``library``."""
    for name in (*SELECTIONS, "vps::numbers"):
        torch.library.register_torch_dispatch(name, FunctionalTensorMode, _share, lib=library)


def _share(
    mode: FunctionalTensorMode,
    operator: Any,
    types: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Return the results of ``operator``, called once in a graph for equal arguments."""
    functional = PythonFunctionalizeAPI(mode, pre_dispatch=mode.pre_dispatch)
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, functional.unwrap_tensors(args), strict=False))
    values = functional.unwrap_tensors(tuple(kwargs.values()))
    given |= dict(zip(kwargs, values, strict=True))
    recorder = get_proxy_mode()
    if recorder is None:  # a first look at shapes and edits
        return functional.wrap_tensors(operator(**given))
    trace = _TRACES.setdefault(recorder.tracer, _Trace())
    key = (operator, *((name, _identity(given[name])) for name in names if name in given))
    if key not in trace.calls:
        trace.calls[key] = list(given.values()), _call(trace, operator, given)
    return functional.wrap_tensors(trace.calls[key][1])


def _identity(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return id(argument)
    return tuple(argument) if isinstance(argument, list) else argument


def _call(trace: _Trace, operator: Any, given: dict[str, Any]) -> Any:
    """Call ``operator``, with the selection of an earlier call of the same x and mask."""
    if operator is torch.ops.vps.numbers.default:
        return constants.fill(**given)
    same, r = (id(given["x"]), id(given["mask"])), given["r"] if "r" in given else given["rules"][0]
    if given["I_in"] is not None:
        return operator(**given)
    width, selection = trace.selections.get(same, (0, None))
    if selection is not None and width >= r:
        I_in = selection() if width == r else selection()[:, :r]
        return operator(**given | {"I_in": I_in})
    results = operator(**given)
    find = SELECTIONS[operator.name()]
    trace.selections[same] = r, lambda: find(results)
    return results

"""Share the input selection of one x (of q, k and v, or gate and up) between calls, and plans.

Each thread remembers the selection of the last x, by weak references and versions: it is found
again only for the very same, unchanged tensors. In a trace a tensor has no version. But
torch.compile and torch.export make every edit a new value (functionalization), so calls are
compared by their values there. So k, v and up take the selection of q and gate; the call for query
and key, which each of the two makes, happens once, and so do constants.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode, PythonFunctionalizeAPI
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from vps import constants
from vps.algorithm.flow import Layer
from vps.algorithm.weight import Matrix

_tuple: Any = tuple.__new__  # of a NamedTuple, without a call of its own
_is_tracing, _get_mode = torch._C._is_tracing, torch._C._get_dispatch_mode
_is_any_autocast_enabled, _STRIDED = torch._C._is_any_autocast_enabled, torch.strided
_Parameter = nn.Parameter
_PROXY = torch._C._TorchDispatchModeKey.PROXY

# References to x and to its mask, the state of both, the grouping, and the indices I_in [G, r]. A
# plain tuple, since layers make and read one at each call.
_Selection = tuple[
    weakref.ref[Tensor], weakref.ref[Tensor] | None, tuple[int, ...], tuple[int, ...], Tensor
]


class _Last(threading.local):
    """The last selection of the thread."""

    selection: _Selection | None = None


_LAST = _Last()


def find(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], r: int) -> Tensor | None:
    """Return indices ``[G, r]`` remembered for this x, mask and ``shape``, or ``None``."""
    if torch.compiler.is_compiling() or _is_tracing() or _get_mode(_PROXY) is not None:
        return None  # a graph must select by itself
    last = _LAST.selection
    if last is None:
        return None
    of_x, of_mask, state, of_shape, I_in = last
    if of_x() is not x or of_shape != shape:
        return None
    if (None if of_mask is None else of_mask()) is not mask or state_of(x, mask) != state:
        return None
    width = I_in.shape[1]
    return None if width < r else I_in if width == r else I_in[:, :r]


def remember(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], I_in: Tensor) -> None:
    """Keep the indices ``[G, r]`` selected for x and mask until another x comes or x is freed."""
    state = state_of(x, mask)
    if state is not None:
        of_mask = None if mask is None else weakref.ref(mask, _forget)
        _LAST.selection = weakref.ref(x, _forget), of_mask, state, shape, I_in


def forget() -> None:
    """Drop what this thread remembers."""
    _LAST.selection = None


def state_of(x: Tensor, mask: Tensor | None) -> tuple[int, ...] | None:
    """Return the versions of both, and the stream and the capture in which a selection is ready.

    ``None`` where an edit would not show, here or when this call runs again. Inference tensors
    count no versions. A compiled call is replayed with other values, and the tensors of a
    functional transform (``vmap``) die with it.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or torch.compiler.is_compiling() or x.is_inference():
        return None
    order = _order(x) if x.is_cuda else (0, 0)
    if order is None:
        return None
    if mask is None:
        return x._version, *order
    return None if mask.is_inference() else (x._version, *order, mask._version)


def _order(x: Tensor) -> tuple[int, int] | None:
    """Return the current stream of x's GPU, and the number of the capture there or 0.

    What one capture selects is ready for the rest of its graph, and for nothing else. ``None``
    where the capture has no number.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if not torch.cuda.is_current_stream_capturing():
        return stream, 0
    capture = capture_number(stream)
    return None if capture is None else (stream, capture)


def capture_number(stream: int) -> int | None:
    """Return the number by which CUDA's driver knows the capture on a stream, or ``None``."""
    ask = _driver()
    if ask is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    code = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), *[None] * 3)
    return number.value if code == 0 and status.value == 1 else None  # 1: it captures


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):  # ROCm
        return None


def _forget(reference: weakref.ref[Tensor]) -> None:
    """Drop the selection with its x or mask, on the thread that frees it."""
    last = _LAST.selection
    if last is not None and any(reference is own for own in last[:2]):
        forget()


class Kept:
    """Keep a plan for layers, without what belongs to them; neither copied nor pickled.

    Not even weak references to weights are kept: ``torch.utils.swap_tensors`` would refuse them.

    Args:
        layers: the layers, whose weights are their parameters.
        plan: the plan of these layers, without L-BFGS pairs.
        x: an input of these layers.

    Attributes:
        readers: weak references to the layers that read the same x after these; ``None`` where
            one of them did not once (:func:`vps.layers.pairing.read`).
    """

    readers: tuple[weakref.ref[Any], ...] | None = ()

    def __init__(self, layers: tuple[Any, ...], plan: Any, x: Tensor) -> None:
        self.dtype, self.device, self.width = x.dtype, x.device, x.shape[-1]
        self.kind, self.config, self.tail = type(plan), plan.config, plan[3:]
        self.state = weakref.ref(plan.state)
        self.facts = plan.kind
        own_gamma = any(own[-1] is not None for own in plan.layers)
        self.stream = constants.stream_of(x) if own_gamma else None  # its numbers are ready there
        self.parts = [
            (own.weight.W.shape, layer.gradient, own[2:])
            for layer, own in zip(layers, plan.layers, strict=True)
        ]

    def find(self, layers: tuple[Any, ...], x: Tensor) -> Any:
        """Return the plan with the present parameters of the layers.

        ``None`` means that the plan does not hold for x or for the layers as they are.
        """
        if (
            type(x) is not Tensor
            or x.dtype is not self.dtype
            or x.device != self.device
            or not x.numel()
            or not x.dim()
            or x.size(-1) != self.width
            or x.layout is not _STRIDED
            or _is_any_autocast_enabled()
        ):
            return None
        state, config, found = layers[0].state, self.config, []
        if self.state() is not state:
            return None
        if self.stream is not None and self.stream != constants.stream_of(x):
            return None
        for layer, (shape, gradient, rest) in zip(layers, self.parts, strict=True):
            own = layer.__dict__.get("_parameters")
            W, memory = None if own is None else own.get("weight"), layer.memory
            if (
                type(W) is not _Parameter
                or W.shape != shape
                or layer.config is not config
                or layer.state is not state
                or layer.gradient is not gradient
                or layer.gamma is not rest[-1]
                or memory is not None
                and memory.pairs
            ):
                return None
            matrix: Any = Matrix.__new__(Matrix)  # a call less than Matrix(W)
            matrix.W = W
            found.append(_tuple(Layer, (matrix, own.get("bias"), *rest)))
        return _tuple(self.kind, (tuple(found), config, state, *self.tail))

    def __reduce__(self) -> Any:
        return type(None), ()


# Where to find I_in in the results of an operator; features [G, 2 or 3, r] begin with I_in.
SELECTIONS: dict[str, Callable[[tuple[Tensor, ...]], Tensor]] = {
    "vps::linear": lambda results: results[1][:, 0],
    "vps::couple": lambda results: results[3][:, 0],
    "vps::linear_pair": lambda results: results[2],
}


class _Trace:
    """The results of the calls of one graph by their arguments, and I_in by x and mask.

    Tensors are compared by identity, which is unique because all of them are kept.
    """

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}
        self.selections: dict[tuple[int, int], tuple[int, Callable[[], Tensor]]] = {}


# By the tracer that builds a graph; a branch or a loop inside a graph is a graph of its own.
_TRACES: WeakKeyDictionary[Any, _Trace] = WeakKeyDictionary()


def register(library: torch.library.Library) -> None:
    """Share results between calls of the operators of ``library`` in a graph."""
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

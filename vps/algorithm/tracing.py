"""Say which tracer, compiler or transform follows a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_FORWARD_MODE = (
    "vps: x or weight carries a tangent of forward-mode differentiation (jvp), expected reverse "
    "mode (backward)"
)


def is_exporting() -> bool:
    """Return whether ``torch.export`` runs.

    ``torch.compiler.is_exporting`` is also true inside ``torch.compile`` in torch 2.11.
    """
    return torch.compiler._is_exporting_flag


def is_transforming() -> bool:
    """Return whether a transform of ``torch.func``, or ``vmap``, runs and no compiler looks on."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_eager() -> bool:
    """Return whether no tracer, compiler or transform of ``torch.func`` looks on."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transforming())


def is_alone() -> bool:
    """Return whether no tracer, compiler, mode or transform looks on, so results may be kept."""
    return is_eager() and torch._C._len_torch_dispatch_stack() == 0


def is_compiled_transform(compiling: bool) -> bool:
    """Return whether a transform runs under a compiler, or makes edits functional.

    ``compiling`` says whether a compiler runs, which this function cannot see: the compiler does
    not trace it but calls it.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack:
        return False
    functional = torch._C._functorch.TransformType.Functionalize
    return compiling or any(each.key() == functional for each in stack)


# A compiler calls this while it traces, when the transforms run for it too.
is_compiled_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated() -> bool:
    """Return whether a result of now, such as a gradient, may be differentiated or mapped."""
    return torch.is_grad_enabled() or is_transforming()


def reverse_only(tensor: Tensor) -> Tensor:
    """Return a tensor, inside a transform, through which forward mode is refused (SPEC §6)."""
    result: Tensor = _ReverseOnly.apply(tensor)
    return result


class _ReverseOnly(torch.autograd.Function):
    """The identity, with a gradient and no tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)


def refuse_tangents(*tensors: Tensor) -> None:
    """Refuse forward mode, which is not defined (SPEC §6) and would lose the tangents.

    Raises:
        NotImplementedError: a tensor carries a tangent.
    """
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(NO_FORWARD_MODE)

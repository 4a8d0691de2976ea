"""What traces a call."""

from __future__ import annotations

import torch

NO_FORWARD_MODE = (
    "vps: x or weight carries a tangent of forward-mode differentiation (jvp), expected reverse "
    "mode (backward)"
)


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, to which torch 2.11 says yes in ``torch.compile``, too."""
    return torch.compiler._is_exporting_flag


def is_transforming() -> bool:
    """Whether a transform of ``torch.func``, or ``vmap``, runs and no compiler looks on."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_eager() -> bool:
    """Whether no tracer, compiler or transform of ``torch.func`` looks on."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transforming())


def is_alone() -> bool:
    """Whether no tracer, compiler, mode or transform looks on: what is made now may be kept."""
    return is_eager() and torch._C._len_torch_dispatch_stack() == 0


def is_compiled_transform(compiling: bool) -> bool:
    """Whether a transform runs that a compiler follows, or one that makes edits functional.

    ``compiling`` says whether a compiler does, which this cannot ask: it is run as it is.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack:
        return False
    functional = torch._C._functorch.TransformType.Functionalize
    return compiling or any(each.key() == functional for each in stack)


# A compiler asks while it traces, where the transforms run for it, too.
is_compiled_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated() -> bool:
    """Whether what is computed now, such as a gradient, may itself be differentiated or mapped."""
    return torch.is_grad_enabled() or is_transforming()

"""Sharpened layers inside transforms of ``torch.func``: ``grad``, ``vjp``, ``jacrev``, ``vmap``.

A transform hands a layer wrapped tensors, which no operator of ours knows. A function of autograd
takes the wrapping off, level by level: ``vmap`` over tokens means more groups of one call, ``vmap``
over weights one call for each, and the gradient is that of SPEC §6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vps.algorithm import gradient, tracing
from vps.algorithm.coupling import Joint
from vps.algorithm.lbfgs import Pair
from vps.algorithm.policy import Settings
from vps.algorithm.torch_backend import Inputs, Outputs

# Of the arguments below, those whose first dim is of the groups, which vmap makes longer.
OF_GROUPS = {"x", "mask", "I_in", "I_out", "H", "energy"}


class _Call:
    """What is no tensor in a call; an object that transforms pass on as it is."""

    def __init__(self, run: Callable[..., Any], clamp: float | None, pairs: tuple[Pair, ...]):
        self.run, self.clamp, self.pairs = run, clamp, pairs


def sharpen(
    inputs: Inputs,
    settings: Settings,
    forward: Callable[[Inputs, Settings], Outputs],
    pairs: tuple[Pair, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output ``[G, T, d_out]`` and ``I_in``, with ``forward`` of a backend, which computes with
    ``pairs``."""

    def run(*tensors: Any) -> tuple[Tensor, ...]:
        *found, t = forward(Inputs(*tensors), settings)
        if t is None:  # without a clamp
            t = found[0].new_empty(len(found[0]), 0)
        # An argument cannot be returned as it is, so that selections that were given go as views.
        return *(each.view_as(each) for each in found), t

    y, I_in, *_ = _Sharpen.apply(_Call(run, settings.clamp, pairs), *inputs)
    return y, I_in


def couple(decide: Callable[..., Joint], *tensors: Tensor | None) -> Joint:
    """What a query and a key projection decide together, without a gradient, by ``decide`` of x,
    both weights, the mask and I_in."""
    return Joint(*_Couple.apply(_Call(decide, None, ()), *tensors))


def _each(
    function: Any, names: tuple[str, ...], info: Any, in_dims: Any, call: _Call, *tensors: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply ``function`` to tensors of which some have a dim that ``vmap`` maps over."""
    size, dims = info.batch_size, in_dims[1:]
    if all(dim is None or name in OF_GROUPS for name, dim in zip(names, dims, strict=True)):
        merged = [
            _merged(tensor, dim, size) if name in OF_GROUPS and tensor is not None else tensor
            for name, tensor, dim in zip(names, tensors, dims, strict=True)
        ]
        results = [each.unflatten(0, (size, -1)) for each in function.apply(call, *merged)]
    else:
        single = [
            function.apply(
                call,
                *(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)),
            )
            for i in range(size)
        ]
        results = [torch.stack(each) for each in zip(*single, strict=True)]
    return tuple(results), (0,) * len(results)


def _merged(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``[size · G, …]`` from ``[G, …]`` that has the mapped dim at ``dim``, or nowhere."""
    first = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return first.flatten(0, 1)


class _ReverseOnly(torch.autograd.Function):
    """A function of reverse mode: forward mode is not defined (SPEC §6)."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(tracing.NO_FORWARD_MODE)


class _Sharpen(_ReverseOnly):
    """The output, and the constants of the backward pass."""

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = call.run(*tensors)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, x, weight = inputs[:3]
        ctx.call = call
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        wanted, call = ctx.needs_input_grad[1:], ctx.call
        if g is None:
            return (None,) * (1 + len(wanted))
        x, weight, *selected = ctx.saved_tensors
        constants = (*selected, call.clamp, call.pairs)
        return (
            None,
            gradient.of_input(g, weight, *constants) if wanted[0] else None,
            gradient.of_weight(g, x) if wanted[1] else None,
            gradient.of_bias(g) if wanted[2] else None,
            *[None] * (len(wanted) - 3),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each(_Sharpen, Inputs._fields, info, in_dims, *arguments)


class _Couple(_ReverseOnly):
    """A joint decision, of which nothing is differentiable."""

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(call.run(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each(_Couple, ("x", "W_q", "W_k", "mask", "I_in"), info, in_dims, *arguments)

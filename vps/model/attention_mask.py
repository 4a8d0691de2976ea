"""Carry a model's ``attention_mask`` to the statistics of its sharpened layers (SPEC §2)."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vps import packing
from vps.algorithm import tracing
from vps.algorithm.selection import is_read_freely
from vps.layers.pairing import remove_hooks
from vps.masking import STATE, Encoded, TokenLayout, bind_to_thread_state
from vps.model import prompt_cache

# Arguments with one input a row, beside a model's own main argument.
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def attach(model: nn.Module) -> None:
    """Hook every module of ``model`` that takes tokens and an ``attention_mask``.

    Every Hugging Face model in it, such as a vision tower, is hooked too, and around them ``model``
    itself.
    """
    prompt_cache.attach(model)
    found = False
    for module in reversed(list(model.modules())):  # the model itself comes last
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks, and nothing in it is sharpened
        names = _parameters(module)
        takes_tokens = "input_ids" in names or "inputs_embeds" in names
        is_model = hasattr(type(module), "main_input_name")
        if is_model or (takes_tokens and "attention_mask" in names):
            found = True
            module.register_forward_pre_hook(_Enter(names), with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)
        elif found and module is model and "_orig_mod" not in model._modules:  # not compiled
            around = _Around()
            module.register_forward_pre_hook(around.enter)
            module.register_forward_hook(around.leave, always_call=True)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the arguments of a module's ``forward``, or nothing where it does not tell them."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except Exception:  # builtins, scripted modules and properties raise anything
        return ()


def detach(model: nn.Module) -> None:
    """Remove what :func:`attach` and later forward passes left in ``model``."""
    prompt_cache.detach(model)
    for module in model.modules():
        remove_hooks(module, _is_ours)
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _BoundCheckpoint):
            vars(module)["_gradient_checkpointing_func"] = checkpoint.checkpoint


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return hook is _leave or isinstance(hook, _Enter) or isinstance(owner, _Around)


class _Enter:
    """A forward pre-hook that pushes the layout of the call."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        # The prefix of the arguments that describe the tokens of the module's own layers.
        self.prefix = "decoder_" if "decoder_input_ids" in names else ""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        _drop(module)  # left behind when an interrupt cut the last call short
        layout = _prompted(_layout(module, given, self.prefix), given, self.prefix)
        if layout.shape or not _is_said():
            STATE.layouts.append(layout)
        if module.training and torch.is_grad_enabled():
            _bind_checkpoints(module)


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Pop what :class:`_Enter` pushed, as a forward hook.

    A module around this one is told how many rows there were, which it cannot know by itself.
    """
    own = _drop(module)
    layouts = STATE.layouts
    if own is not None and output is not None:
        prompt_cache.settle(own.held, own.cache, output)
    if own is not None and layouts and layouts[-1].around:
        layouts[-1] = dataclasses.replace(layouts[-1], rows=layouts[-1].rows + own.rows)


class _Around:
    """Hooks of a module around models: they push a layout to which the models add their rows."""

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _drop(self)
        if not _is_said():
            STATE.layouts.append(TokenLayout((), None, self, around=True))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _drop(self)


def _drop(owner: object) -> TokenLayout | None:
    """Remove and return the layout of an owner, with all layouts that were pushed after it."""
    layouts = STATE.layouts
    for depth in range(len(layouts)):
        if layouts[depth].owner is owner:
            own = layouts[depth]
            del layouts[depth:]
            if STATE.readings:
                STATE.readings[-1].end()
            return own
    return None


def _layout(module: nn.Module, given: Mapping[str, Any], prefix: str) -> TokenLayout:
    encoded = _encoded(given)
    ids, embeds = given.get(f"{prefix}input_ids"), given.get(f"{prefix}inputs_embeds")
    if isinstance(ids, Tensor):
        shape = tuple(ids.shape)
    elif isinstance(embeds, Tensor):
        shape = tuple(embeds.shape[:-1])
    else:
        return _tower(module, given, encoded)
    mask = given.get(f"{prefix}attention_mask")
    if isinstance(mask, Mapping):  # one mask per kind of layer; linear attention may have none
        masks = [one for one in mask.values() if isinstance(one, Tensor)]
        mask = mask.get("full_attention", masks[0] if masks else None)
    if isinstance(mask, Tensor):
        counted = _counted(mask, shape, given)
    else:
        counted = None if mask is not None else _said(shape)
    counted = _unless_all(counted)
    outer = STATE.layouts[-1].packed if STATE.layouts else None
    positions = given.get(f"{prefix}position_ids")
    packed = packing.packed(shape, counted, given, mask, positions, outer)
    return TokenLayout(shape, counted, module, encoded, _rows(module, given, shape), packed)


def _prompted(layout: TokenLayout, given: Mapping[str, Any], prefix: str) -> TokenLayout:
    """Return a layout with what ``scope="prompt"`` asks for: the cache, and the prompt's tokens."""
    if not layout.shape:
        return layout
    models = (one for one in reversed(STATE.layouts) if one.owner is not None and one.shape)
    outer = next(models, None)
    if outer is None:
        marks = STATE.prompts[-1] if STATE.prompts else prompt_cache.marks_of(given, layout.shape)
    else:
        config = getattr(outer.owner, "config", None)
        encodes = getattr(config, "is_encoder_decoder", False) and layout.encoded is None
        encodes = encodes and not prefix  # the encoder alone has no tokens of the decoder
        marks = outer.marks if outer.shape == layout.shape and not encodes else None
    held, cache = prompt_cache.held_by(given), prompt_cache.in_call(given)
    is_ready = held is not None and held.is_made and tracing.is_alone()
    if is_ready and held is not None and held.backends != STATE.backends:
        held.backends, held.ready = list(STATE.backends), {}
    kept = given.get("logits_to_keep")
    return dataclasses.replace(
        layout, marks=marks, kept=kept, cache=cache, held=held, is_ready=is_ready
    )


def _tower(module: nn.Module, given: Mapping[str, Any], encoded: Encoded | None) -> TokenLayout:
    """Return the layout of a call without tokens, such as of a vision tower."""
    rows, grid = _rows(module, given, ()), given.get("grid_thw")
    for patches in given.values():
        if isinstance(grid, Tensor) and isinstance(patches, Tensor) and patches is not grid:
            total = len(patches)
            packed = packing.Patches(grid, total, total)
            return TokenLayout((total,), None, module, encoded, rows, packed)
    return TokenLayout((), None, module, encoded, rows)


def _rows(module: nn.Module, given: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many rows of tokens, of images and of sounds a call has; these may differ."""
    found = [math.prod(shape[:-1])] if len(shape) > 1 else []
    for name in (*INPUTS, getattr(module, "main_input_name", "")):
        value = given.get(name)
        # A matrix of floats holds sounds by row, or else the patches of all images.
        if isinstance(value, Tensor) and (
            value.dim() > 2
            or (value.dim() == 2 and (name == "input_values" or not value.is_floating_point()))
        ):
            found.append(value.shape[0])
    return tuple(found)


def _encoded(given: Mapping[str, Any]) -> Encoded | None:
    """Return the encoder states to which the call attends, or ``None``."""
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if not isinstance(states, Tensor) or states.dim() != 3:
        return None
    shape = tuple(states.shape[:2])
    if mask is None:
        mask = _said(shape)
    elif not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        mask = None
    return Encoded(states, None if mask is None else _unless_all(mask.bool()))


def _unless_all(counted: Tensor | None) -> Tensor | None:
    """Return the mask, or ``None`` where all tokens count.

    This is asked on a CPU alone, because elsewhere it would wait for the device.
    """
    if counted is None or not is_read_freely(counted) or not counted.all():
        return counted
    return None


def _is_said() -> bool:
    """Return whether the innermost layout comes from :func:`vps.token_mask`."""
    return bool(STATE.layouts) and STATE.layouts[-1].owner is None


def _said(shape: tuple[int, ...]) -> Tensor | None:
    """Return the mask of the innermost :func:`vps.token_mask`, if it has this shape."""
    for layout in reversed(STATE.layouts):
        if layout.owner is None:
            return layout.mask if layout.shape == shape else None
    return None


def _counted(mask: Tensor, shape: tuple[int, ...], given: Mapping[str, Any]) -> Tensor | None:
    """Return which of the call's own tokens count: bool of ``shape`` [B, T], or ``None`` for all.

    A 2-D mask [B, past + T] says it in its last T columns. In a 4-D mask [B, heads, T, K], boolean
    or additive, a token counts if it may attend to itself. Where the keys start at 0 (a static
    cache may go on past the call's keys), a token's own key is at its position. Where a full
    sliding window has dropped the first keys, the call's keys are the last.
    """
    if len(shape) != 2 or mask.shape[0] != shape[0]:
        return None
    length = shape[1]
    if mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool()
    if mask.dim() != 4 or mask.shape[2] != length or mask.shape[3] < length:
        return None
    allowed = mask[:, 0]
    if allowed.is_floating_point():
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    steps = torch.arange(length, device=mask.device)
    own = steps + (allowed.shape[-1] - length)
    positions = given.get("cache_position")
    # Before transformers 5.24 it was called past_key_values.
    past = given.get("cache", given.get("past_key_values"))
    if isinstance(positions, Tensor):
        own = torch.minimum(own, positions.to(mask.device))
    elif hasattr(past, "get_seq_length"):
        own = torch.minimum(own, steps + past.get_seq_length())
    elif type(past).__name__ == "PagedAttentionCache":  # keys in any order; there is no padding
        return None
    own = own.view(1, length, 1).expand(shape[0], length, 1)
    return allowed.bool().gather(-1, own).squeeze(-1)


class _BoundCheckpoint:
    """A checkpoint function whose recomputation sees the layouts of the first run."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(bind_to_thread_state(function), *args, **kwargs)


def _bind_checkpoints(model: nn.Module) -> None:
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _BoundCheckpoint):
            vars(module)["_gradient_checkpointing_func"] = _BoundCheckpoint(checkpoint)

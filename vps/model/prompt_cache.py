"""Keep what a prompt decided with the cache of its sequences (SPEC §11, ``scope="prompt"``).

A cache of transformers that holds decisions follows them: its class becomes a subclass of its own
class whose methods that reorder, repeat, select or reset sequences do the same to the decisions.
Copies and pickles of the cache have them too, and they are freed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor, nn

from vps.algorithm.fixed import Held, numbered
from vps.layers.opaque_layer import sharpened_by
from vps.masking import Marks

# Arguments in which models take caches. Before transformers 5.24 it was past_key_values.
NAMES = ("cache", "past_key_values", "cache_params", "mems", "past_buckets_states", "state")


def held_by(given: Mapping[str, Any]) -> Held | None:
    """Return what layers hold for the cache among the arguments of a call.

    A cache that is empty, and a call without one, start anew; ``None`` where there will be none.
    """
    cache = in_call(given)
    if cache is None:
        return None if given.get("use_cache") is False else Held()
    if not _can_follow(cache):
        return Held(
            f"vps: scope='prompt' cannot follow the sequences of a {type(cache).__name__}; "
            "expected a Cache of transformers, or another scope"
        )
    own: Held | None = getattr(cache, "vps_held", None)
    if own is not None and own.is_made:
        if torch.compiler.is_compiling() or not _is_empty(cache, waits=False):
            return own
        own.is_made = False
    elif not _is_empty(cache, waits=True):
        return Held(
            "vps: scope='prompt' needs the decision of the prompt, and this cache already has "
            "tokens without one: it was filled by an unpatched model, under vps.disabled or under "
            "another scope; expected an empty cache"
        )
    return Held()


def in_call(given: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or the fields of its output, or ``None``."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def settle(held: Held | None, given: Any, output: Any) -> None:
    """Leave with its cache what the layers of a call decided, after the call.

    Args:
        held: what the layers of the call held.
        given: the cache that the call was given, or ``None``.
        output: the output of the model, which may have a new cache.
    """
    if getattr(given, "vps_prompt_length", None) is not None:
        del given.vps_prompt_length  # it was for this call
    if held is not None:
        held.leave()
    if held is None or held.is_made or held.refusal is not None or not held.updates:
        return
    cache = given
    if cache is None:
        found = output.values() if isinstance(output, Mapping) else output
        found = found if isinstance(output, (Mapping, tuple, list)) else ()
        cache = next((one for one in found if _can_follow(one)), None)
    if cache is not None and not _is_exporting():
        _attach(cache, held)


def _attach(cache: Any, held: Held) -> None:
    own = getattr(cache, "vps_held", None)
    if own is None:
        cache.vps_held = own = Held()
    if not isinstance(cache, _Following):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
    own.take(held, bool(getattr(cache, "is_compileable", False)))


# As torch.compiler.disable says it, which imports torch._dynamo: no compiler can change a class.
_attach._torchdynamo_disable = True  # type: ignore[attr-defined]


def _is_exporting() -> bool:
    return torch.compiler.is_compiling() and torch.compiler._is_exporting_flag


def _can_follow(cache: object) -> bool:
    """Return whether an object is a cache of transformers."""
    return any(
        kind.__name__ == "Cache" and kind.__module__ == "transformers.cache_utils"
        for kind in type(cache).__mro__
    )


def _is_empty(cache: Any, waits: bool) -> bool:
    """Return whether a cache has no token; ``waits`` says whether it may wait for a GPU to tell."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", ())
    if torch.compiler.is_compiling() and getattr(cache, "is_compileable", False):
        return not cache.is_initialized  # how many tokens there are is not known to a compiler
    for layer in layers:
        states = getattr(layer, "has_previous_state", False)  # of linear attention
        if any(states.values() if isinstance(states, dict) else _listed(states)):
            return False
        find = getattr(layer, "get_seq_length", None)
        length = 0 if find is None else find()
        if isinstance(length, Tensor) and length.is_cuda:
            if not waits:
                return False
            if torch.cuda.is_current_stream_capturing():
                continue
        if length:
            return False
    return True


def _listed(states: Any) -> Any:
    return states if isinstance(states, (list, tuple)) else (states,)


class _Following:
    """The methods of a cache that change which sequences it has."""

    vps_held: Held

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        found = super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.vps_held.map(lambda own: own.index_select(0, beam_idx.to(own.device)))
        return found

    def batch_repeat_interleave(self, repeats: int) -> Any:
        found = super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.vps_held.map(lambda own: own.repeat_interleave(repeats, 0))
        return found

    def batch_select_indices(self, indices: Any) -> Any:
        found = super().batch_select_indices(indices)  # type: ignore[misc]
        self.vps_held.map(lambda own: own[_on(indices, own.device)])
        return found

    def reset(self) -> Any:
        found = super().reset()  # type: ignore[misc]
        self.vps_held.is_made = False  # the tensors stay, for the next prompt
        return found

    def crop(self, *arguments: Any, **options: Any) -> Any:
        found = super().crop(*arguments, **options)  # type: ignore[misc]
        if _is_empty(self, waits=True):
            self.vps_held.is_made = False
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__mro__[2], dict(self.__dict__))


@cached
def _following(kind: type) -> type:
    """Return the subclass of a kind of cache whose decisions follow its sequences."""
    return type(kind.__name__, (_Following, kind), {"__module__": kind.__module__})


def _restored(kind: type, state: dict[str, Any]) -> Any:
    cache: Any = object.__new__(_following(kind))
    cache.__dict__.update(state)
    return cache


def _on(indices: Any, device: torch.device) -> Any:
    return indices.to(device) if isinstance(indices, Tensor) else indices


class NotedPrompt:
    """``model._get_candidate_generator``, which notes how long the prompt is.

    Assisted decoding runs the prompt and the first candidates in one call, and only the generator
    of candidates is given the prompt alone.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        ids, model_kwargs = options.get("input_ids"), options.get("model_kwargs")
        cache = None if model_kwargs is None else in_call(model_kwargs)
        if isinstance(ids, Tensor) and cache is not None:
            cache.vps_prompt_length = ids.shape[-1]
        return type(self.model)._get_candidate_generator(self.model, *arguments, **options)


def marks_of(given: Mapping[str, Any], shape: tuple[int, ...]) -> Marks | None:
    """Return the prompt of assisted decoding, in its first call with tokens ``shape`` [B, T]."""
    length = getattr(in_call(given), "vps_prompt_length", None)
    if length is None or len(shape) != 2 or shape[1] <= length:
        return None
    return Marks((torch.arange(shape[1]) < length).expand(shape))


def attach(model: nn.Module) -> None:
    """Number the sharpened layers of ``model``, and note the prompts of assisted decoding."""
    for module in model.modules():
        layer = sharpened_by(module)
        if layer is not None:
            numbered(layer)
        if callable(getattr(type(module), "_get_candidate_generator", None)):
            module.__dict__["_get_candidate_generator"] = NotedPrompt(module)


def detach(model: nn.Module) -> None:
    """Take back what :func:`attach` left on the modules of ``model``."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_get_candidate_generator"), NotedPrompt):
            del module.__dict__["_get_candidate_generator"]

"""Find the query and key projections of each attention block, and their numbers of heads.

A block is a module with children ``q_proj`` and ``k_proj``. Projections fused into one layer
(GPT-2, GPT-NeoX, Phi-3) stay uncoupled, and so does a cross-attention, whose keys come from another
input.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vps.functional import why_not_heads
from vps.layers import pairing
from vps.layers.linear import SharpenedLayer
from vps.layers.opaque_layer import sharpened_by
from vps.layers.shards import tensor_parallel
from vps.layers.shards.tensor_parallel import TensorParallelLinear

QUERY, KEY = "q_proj", "k_proj"
CROSS = re.compile(r"cross|encoder_attn|enc_attn", re.IGNORECASE)


def couple_blocks(model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """Couple query and key in every attention block of a patched model that allows it.

    Returns:
        Names of the coupled blocks, and reasons by name of the others. In a model without such a
        block the reason has the name ``"qk_coupling"``.
    """
    coupled, reasons = [], {}
    config = _text_config(model)
    for name, block in model.named_modules():
        children = dict(block._modules.items())  # a scripted module has no dict
        query, key = (_sharpened(children.get(child)) for child in (QUERY, KEY))
        if query is None and key is None:
            continue
        try:
            pair = _pair(name, block, query, key, config)
        except Exception as error:  # the attributes of a block may raise anything
            pair = f"{type(error).__name__}: {error}"
        if isinstance(pair, str):
            reasons[name] = f"q and k select separately: {pair}"
        else:
            pairing.attach(block, pair)
            coupled.append(name)
    if not coupled and not reasons:
        reasons["qk_coupling"] = f"no block has separate sharpened layers {QUERY} and {KEY}"
    return tuple(coupled), reasons


def _sharpened(child: nn.Module | None) -> SharpenedLayer | None:
    """Return what sharpens a child, or ``None`` where there is no child."""
    return None if child is None else sharpened_by(child)


def _pair(
    name: str,
    block: nn.Module,
    query: SharpenedLayer | None,
    key: SharpenedLayer | None,
    config: Any,
) -> pairing.Coupling | str:
    """Return the coupling of a block, or why the block stays uncoupled."""
    if query is None or key is None:
        return f"{QUERY if query is None else KEY} is not a sharpened linear layer"
    if CROSS.search(name) or getattr(block, "is_cross_attention", False):
        return "a cross-attention reads its keys from another input"
    if query.coupling is not None or key.coupling is not None:
        return "a layer is shared with another block"
    if any("weight" in layer.module.__dict__ for layer in (query, key)):
        return "a hook computes the weight of a layer when that layer is called"
    (d_q, in_q), (d_k, in_k) = query.widths, key.widths
    if in_q != in_k:
        return f"they read {in_q} and {in_k} features"
    heads: Any
    kv_heads: Any
    size = getattr(block, "head_dim", None)
    if isinstance(size, int) and size > 0:
        heads, kv_heads = d_q // size, d_k // size
    else:
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if not isinstance(heads, int) or not isinstance(kv_heads, int):
            return "neither the block nor the model's config says how many heads there are"
    reason = why_not_heads(d_q, d_k, heads, kv_heads)
    if reason is not None:
        return reason
    if isinstance(query, TensorParallelLinear) and isinstance(key, TensorParallelLinear):
        return tensor_parallel.pair(query, key, heads, kv_heads)
    if isinstance(query, TensorParallelLinear) or isinstance(key, TensorParallelLinear):
        return "only one of them is split over ranks"
    return pairing.Coupling(query, key, heads, kv_heads)


def _text_config(model: nn.Module) -> Any:
    """Return the config of the language model in a model, or ``None`` where that is not clear."""
    try:
        config = getattr(model, "config", None)
        getter = getattr(config, "get_text_config", None)
        return getter() if callable(getter) else config
    except Exception:  # a config with several text models raises
        return None

"""Find the modules that a config names, by PEFT's conventions, and those that must stay plain."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

from vps.config import VPSConfig

ALL_LINEAR = "all-linear"
# Names of a list of experts, of routers, and of the module around both and its class.
EXPERTS = re.compile(r"(^|_)experts?$", re.IGNORECASE)
ROUTER = re.compile(r"(^|_)(router|gate|gating|switch|wg)$", re.IGNORECASE)
MIXTURE = re.compile(r"(^|_)(moe|experts?)$")
MIXTURE_CLASS = re.compile(r"(MoE|Moe|Experts?)(Block|Layer|MLP|FFN|FeedForward)?$")
# Modules of torch that read the weights of their linear layers without calling these; the second
# does so in its fast path for inference.
READERS = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def matches(name: str, patterns: tuple[str, ...] | str) -> bool:
    """Return whether a name has one of these suffixes of whole parts, or matches the regex."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def layer_index(name: str) -> int | None:
    """Return the index of a module's block: the first part of its name that is a number."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None


def select_names(names: Iterable[str], head: str | None, config: VPSConfig) -> list[str]:
    """Return the names of the linear layers that ``config`` asks for, in their order.

    Args:
        names: names of all linear layers of the model.
        head: name of the output head, which ``"all-linear"`` leaves out.
        config: targets, excluded names and layers.
    """
    chosen = []
    for name in names:
        if config.target_modules == ALL_LINEAR:
            wanted = name != head
        else:
            wanted = matches(name, config.target_modules)
        if wanted and config.exclude_modules is not None:
            wanted = not matches(name, config.exclude_modules)
        if wanted and config.layers_to_transform is not None:
            wanted = layer_index(name) in config.layers_to_transform
        if wanted:
            chosen.append(name)
    return chosen


def loose_targets(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Return, by name, why these modules are refused: they are no linear layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: f"its type is {type(modules[name]).__name__}, which is no supported layer"
        for name in names
        if next(modules[name].parameters(), None) is not None
    }


def bypassed(model: nn.Module) -> dict[int, str]:
    """Return, by id, why layers are refused whose weight is read without a call."""
    return {
        id(parent._modules[name]): f"{reader.__name__} reads its weight without calling it"
        for parent in model.modules()
        for reader, names in READERS.items()
        if inspect.getattr_static(type(parent), "forward", None) is reader.forward
        for name in names
    }


def experts(model: nn.Module) -> dict[int, str]:
    """Return, by id, why experts of a mixture are refused under every scope but ``"token"``.

    A router gives an expert ``[n, d_in]``, gathered from all sequences. An expert that all tokens
    share is in no list of experts.
    """
    reason = (
        "it is an expert, whose tokens a router gathers from all sequences; it is sharpened under "
        "scope='token' alone"
    )
    return {
        id(module): reason
        for name, parent in model.named_modules()
        for key, child in parent._modules.items()
        if child is not None and _is_of_experts(name.rpartition(".")[2], parent, key, child)
        for module in child.modules()
    }


def _is_of_experts(name: str, parent: nn.Module, key: str, child: nn.Module) -> bool:
    """Return whether a child is a list of experts, or one of several numbered experts.

    ``name`` is the parent's own name, and ``key`` the child's name in it.
    """
    if "shared" in key or "shared" in name:
        return False
    if not isinstance(child, nn.ModuleList | nn.ModuleDict):
        return re.fullmatch(r"experts?_?\d+", key) is not None
    if EXPERTS.search(key) or "Expert" in type(child).__name__:
        return True
    routers = [other for other in parent._modules if ROUTER.search(other)]
    mixture = MIXTURE.search(name) or MIXTURE_CLASS.search(type(parent).__name__)
    return bool(routers) and (mixture is not None or any("router" in each for each in routers))

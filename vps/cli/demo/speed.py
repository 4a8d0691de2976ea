"""Time greedy decoding of the plain model, the sharpened one and a static LoRA, in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch

from vps.config import VPSConfig
from vps.model.generation import generate
from vps.model.patching import disabled, set_config, sharpened_layers, unpatch

ROUNDS = 3
TOKENS = 16
RANK = 4  # of the LoRA, the largest rank that the policy may choose


@dataclass(frozen=True)
class Timed:
    """Hold tokens per second of one model: of all rounds, and the median of its ratios to plain."""

    name: str
    rates: tuple[float, ...]
    ratio: float

    @property
    def rate(self) -> float:
        """Return the median."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Speed:
    """Hold the models in the order of the page, and why one is missing, or ``None``."""

    models: tuple[Timed, ...]
    threads: int
    tokens: int
    missing: str | None = None


def lora_beside(model: Any) -> Any:
    """Return a copy of a sharpened model with its weights shared, no sharpening and a LoRA.

    Raises:
        ModuleNotFoundError: PEFT is missing.
    """
    if util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            "LoRA was not timed, it needs PEFT: pip install 'vps-kernels[engines]'"
        )
    from peft import LoraConfig, inject_adapter_in_model

    names = sorted({name.rpartition(".")[2] for name in sharpened_layers(model)})
    twin = copy.deepcopy(model, {id(each): each for each in model.parameters()})
    unpatch(twin)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), twin)
    return twin.eval()


def measure_speed(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    configs: dict[str, VPSConfig],
    *,
    tokens: int = TOKENS,
    rounds: int | None = None,
) -> Speed:
    """Time every model on one prompt, in rounds that begin with another each.

    The model comes back with the config that it had.

    Args:
        model: a sharpened model.
        tokenizer, inputs: as for :func:`vps.model.generation.generate`.
        configs: the sharpened models' configs, by name.
        tokens: decoded by each in each round, at most.
        rounds: that count, :data:`ROUNDS` unless said; one before them warms up.
    """
    own = next(iter(sharpened_layers(model).values())).config
    missing = None
    ways: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
        "plain": (model, lambda: disabled(model))
    }
    for name, config in configs.items():
        ways[name] = (model, lambda config=config: _set(model, config))  # type: ignore[misc]
    try:
        ways[f"LoRA, r = {RANK}"] = (lora_beside(model), nullcontext)
    except ModuleNotFoundError as error:
        missing = str(error)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    try:
        for round_ in range((ROUNDS if rounds is None else rounds) + 1):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                timed, context = ways[name]
                with context():
                    found = generate(timed, tokenizer, inputs, tokens if round_ else 4)
                if round_:
                    rates[name].append(len(found.tokens) / found.seconds)
    finally:
        set_config(model, own)
    plain = rates["plain"]
    models = tuple(
        Timed(
            name,
            tuple(found),
            statistics.median(a / b for a, b in zip(plain, found, strict=True)),
        )
        for name, found in rates.items()
    )
    return Speed(models, torch.get_num_threads(), tokens, missing)


def _set(model: Any, config: VPSConfig) -> AbstractContextManager[Any]:
    set_config(model, config)
    return nullcontext()

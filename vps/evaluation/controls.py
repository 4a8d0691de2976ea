"""Run a sharpened model with the guidance taken out: what sharpening has to beat.

Each control is a context manager on a patched model and leaves it as it was. ``baseline`` switches
the layers off; ``random_indices`` draws the features; ``random_noise`` keeps the size of every
update and takes its direction away; ``shuffled_selection`` uses features that another layer chose.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vps import masking
from vps.algorithm import coupling, policy, selection
from vps.algorithm.flow import Given
from vps.backends.dispatch import backend
from vps.config import VPSConfig
from vps.functional import NOTHING, arrange, sharpen
from vps.masking import STATE, held_for
from vps.model.matching import experts
from vps.model.patching import disabled, patch, sharpened_layers

SHARPENED = "sharpened"
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform")
Hook = Callable[[str, int, Any, Tensor, Tensor], Tensor | None]  # name and part of the tokens, x, y
Features = tuple[Tensor, Tensor]  # I_in and I_out, [G, r]


def control(model: nn.Module, name: str, seed: int = 0) -> AbstractContextManager[None]:
    """Return the control of that name; ``"sharpened"`` changes nothing.

    Args:
        model: a patched model.
        name: one of :data:`CONTROLS` or ``"sharpened"``.
        seed: seed of what the control draws.

    Raises:
        ValueError: an unknown name, or no sharpened layer in the model.
    """
    _layers(model)
    if name == SHARPENED:
        return nullcontext()
    if name not in CONTROLS:
        raise ValueError(
            f"control: name must be 'sharpened' or one of {', '.join(CONTROLS)}, got {name!r}"
        )
    return CONTROLS[name](model, seed)


def baseline(model: nn.Module, seed: int = 0) -> AbstractContextManager[None]:
    """Switch the layers off: the bits of the unpatched model."""
    return disabled(model)


@contextmanager
def random_indices(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Draw features at random, others in every layer, instead of selecting (``builder="random"``).

    Policy, clip and factors stay. Features that carry little make smaller updates; see
    :func:`random_noise` for a control of equal size.
    """

    def drawn(number: int, config: VPSConfig) -> VPSConfig:
        return config.replace(builder="random", seed=_own_seed(seed, number))

    with with_configs(model, drawn):
        yield


@contextmanager
def random_noise(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Replace the update by one of equal norm: ``y = H + b + n · ‖u‖/‖n‖`` with ``n = (x P) Qᵀ``.

    ``u`` is what the layer added; both norms are taken over the counted tokens of each group
    (SPEC §2), so under ``scope="token"`` every token keeps its own. ``P`` ``[d_in, r]`` and ``Q``
    ``[d_out, r]`` are Gaussian, fixed for each layer by the seed; r is the largest rank that its
    config allows. Costs a second base product a layer; in 16-bit dtypes ``u`` carries the rounding
    of the layer's output.
    """
    factors: dict[tuple[str, torch.device], Features] = {}
    order = {name: number for number, name in enumerate(_layers(model))}

    def hook(name: str, part: int, layer: Any, x: Tensor, y: Tensor) -> Tensor | None:
        settings = _settings(layer)
        if settings is None or x.numel() == 0:
            return None
        plain = layer.plain_output(x)
        key = (name, x.device)
        if key not in factors:
            d_out, d_in = layer.widths
            generator = torch.Generator().manual_seed(seed * 1_000_003 + order[name])
            factors[key] = tuple(
                torch.randn(d, settings.r, generator=generator).to(x.device) for d in (d_in, d_out)
            )  # type: ignore[assignment]
        P, Q = factors[key]
        _refuse_held(layer, x)
        grouped, _, counted, _ = arrange(x, None, layer.config.scope)
        with torch.autocast(x.device.type, enabled=False):
            dtype = selection.accumulation_dtype(y.dtype)
            noise = (x.to(dtype) @ P.to(dtype)) @ Q.to(dtype).mT
            sizes = []
            for update in ((y - plain).to(dtype), noise):
                finite = update.detach().nan_to_num(0.0, 0.0, 0.0)
                finite = finite.reshape(*grouped.shape[:-1], -1)
                if counted is not None:
                    finite = finite.masked_fill(~counted.unsqueeze(-1), 0.0)
                sizes.append(torch.linalg.vector_norm(finite, dim=(1, 2), keepdim=True))
            scale = (sizes[0] / sizes[1]).nan_to_num(0.0, 0.0, 0.0)
            scaled = noise.reshape(*grouped.shape[:-1], -1) * scale
        return plain + scaled.reshape(y.shape).to(y.dtype)

    with _hooked(model, hook):
        yield


def _refuse_held(layer: Any, x: Tensor) -> None:
    """Refuse a later token under ``scope="prompt"``, for which a control would decide anew."""
    held = held_for(x, layer.number) if layer.config.scope == "prompt" else None
    if held is not None and held.is_made:
        raise ValueError(
            "evaluation: this control decides at every call, and scope='prompt' holds what the "
            "prompt decided; expected given continuations, or another scope where text is generated"
        )


@contextmanager
def shuffled_selection(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Give every layer the features that another of its shape selected at the same tokens.

    The donor is drawn by the seed among the layers that come earlier in the model, so it has run
    by then and, under ``scope="token"``, nothing looks ahead. A layer without one (the first of
    its shape, or where the donor saw other groups of tokens) uses features drawn at random, and so
    does every layer under ``builder="random"``, where all of a shape use the same. Everything else
    of the layer stays: policy, pooled energy of query and key, clip, factors. The updates are
    computed by the torch backend.
    """
    layers = _layers(model)
    donors = _donors(layers, seed)
    order = {name: number for number, name in enumerate(layers)}
    chosen: dict[tuple[str, int], Features] = {}

    def begin(*_: Any) -> None:
        chosen.clear()

    def hook(name: str, part: int, layer: Any, x: Tensor, y: Tensor) -> Tensor | None:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError("shuffled_selection: expected to run outside torch.autocast")
        d_out, d_in = layer.widths
        settings = _settings(layer)
        if settings is None or x.numel() == 0 or settings.r == 0:
            return None
        r = settings.r
        _refuse_held(layer, x)
        grouped, _, counted, _ = arrange(x, None, layer.config.scope)
        energy: Tensor | None = None
        own_seed, donated = seed, None
        if layer.config.builder == "random":
            own_seed = _own_seed(seed, order[name])
        else:
            deciding = layer.deciding()
            with torch.no_grad():
                found = decide(deciding, grouped, counted, settings)
            if len(deciding) == 2:
                energy = found.energy
            chosen[name, part] = found.I_in, found.outputs[deciding.index(layer)]
            donated = chosen.get((donors.get(name, ""), part))
        if donated is None or donated[0].shape != (len(grouped), r):
            drawn = selection.random_features(own_seed, d_in, d_out, r)
            I_in, I_out = (torch.tensor(i, device=x.device).expand(len(grouped), r) for i in drawn)
            donated = I_in, I_out
        given = Given(*donated, energy)
        with backend("torch"):
            return sharpen(x, (layer.projection(x),), layer.config, state=layer.state, given=given)[
                0
            ]

    handle = model.register_forward_pre_hook(begin)
    try:
        with _hooked(model, hook):
            yield
    finally:
        handle.remove()


CONTROLS: dict[str, Callable[[nn.Module, int], AbstractContextManager[None]]] = {
    "baseline": baseline,
    "random_indices": random_indices,
    "random_noise": random_noise,
    "shuffled_selection": shuffled_selection,
}


@contextmanager
def with_configs(model: nn.Module, change: Callable[[int, VPSConfig], VPSConfig]) -> Iterator[None]:
    """Give every layer the config that ``change`` makes of its number and its own, for the time."""
    layers = list(_layers(model).values())
    before = [layer.config for layer in layers]
    try:
        for number, (layer, config) in enumerate(zip(layers, before, strict=True)):
            layer.config = change(number, config)
        yield
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config


@contextmanager
def configured(model: nn.Module, config: VPSConfig | None) -> Iterator[None]:
    """Put every layer under ``config``, patching anew where that selects other layers.

    Raises:
        TypeError: no ``VPSConfig`` and not ``None``, which leaves all as it is.
        ValueError: other layers than those of the one config there is, or of unequal ones.
    """
    before = [layer.config for layer in _layers(model).values()]
    if config is None:
        yield
        return
    if not isinstance(config, VPSConfig):
        raise TypeError(f"evaluation: config must be a VPSConfig, got {type(config).__name__}")
    if any(_selects_otherwise(model, old, config) for old in before):
        if any(old != before[0] for old in before):
            raise ValueError(
                "evaluation: a config with other target modules needs layers of one config, got "
                f"{len(set(before))}"
            )
        patch(model, config)
        try:
            yield
        finally:
            patch(model, before[0])
        return
    with with_configs(model, lambda number, old: config):
        yield


def _selects_otherwise(model: nn.Module, old: VPSConfig, new: VPSConfig) -> bool:
    """Tell whether the configs sharpen different layers; for experts the scope decides, too."""
    if any(getattr(old, name) != getattr(new, name) for name in SELECTING):
        return True
    return (old.scope == "token") != (new.scope == "token") and bool(experts(model))


def _layers(model: nn.Module) -> dict[str, Any]:
    layers: dict[str, Any] = sharpened_layers(model) if isinstance(model, nn.Module) else {}
    if not layers:
        raise ValueError("control: the model holds no sharpened layer; call vps.patch first")
    return layers


def _own_seed(seed: int, number: int) -> int:
    """Return the seed of the layer of that number."""
    return random.Random(f"{seed}:{number}").randrange(2**31)


def _donors(layers: dict[str, Any], seed: int) -> dict[str, str]:
    """Draw an earlier layer of the same shape for every layer but the first of each shape."""
    earlier: dict[tuple[int, ...], list[str]] = {}
    donors = {}
    generator = random.Random(seed)
    for name, layer in layers.items():
        alike = earlier.setdefault(layer.widths, [])
        if alike:
            donors[name] = generator.choice(alike)
        alike.append(name)
    return donors


@contextmanager
def _hooked(model: nn.Module, hook: Hook) -> Iterator[None]:
    """Let ``hook`` replace the output of every layer that is switched on, before other hooks."""

    def call(
        name: str, layer: Any, module: nn.Module, args: tuple[Tensor, ...], y: Tensor
    ) -> Tensor | None:
        if any(state is layer.state for state in STATE.disabled):
            return None
        if not layer.is_whole:
            raise TypeError(
                f"control: {name} is split over ranks, of which each holds a part; expected a "
                "model in one process"
            )
        x = args[0]
        packing = masking.groups_of(x, layer.config.scope)[2]
        if packing is None:
            return hook(name, 0, layer, x, y)
        ys = packing.take(y)
        for number, (values, part) in enumerate(zip(packing.take(x), packing.parts, strict=True)):
            with masking.token_mask(part.counted):
                other = hook(name, number, layer, values, ys[number])
            ys[number] = ys[number] if other is None else other
        return packing.back(ys, x.shape)

    handles = [
        layer.register_forward_hook(partial(call, name, layer), prepend=True)
        for name, layer in _layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _settings(layer: Any) -> policy.Settings | None:
    d_out, d_in = layer.widths
    if layer.gamma is not None and layer.gamma.is_zero:
        return None
    return policy.settings(layer.config, layer.gradient, d_in, d_out, layer.gamma is not None)


class Decided(NamedTuple):
    """What a layer, or a query and a key, decide for x ``[G, T, d_in]``.

    Args:
        products: H of each ``[G, T, d_out]``, with its graph.
        I_in: ``[G, r]``.
        outputs: I_out of each, ``[G, r]``.
        energy: ``[G]``, pooled over both; ``None`` where it is not measured.
    """

    products: list[Tensor]
    I_in: Tensor
    outputs: list[Tensor]
    energy: Tensor | None


def decide(
    layers: Sequence[Any],
    x: Tensor,
    mask: Tensor | None,
    settings: policy.Settings,
    given: Given = NOTHING,
) -> Decided:
    """Select the features of a layer, or of a query and a key, as the flow would.

    Args:
        layers: those that decide together.
        x: ``[G, T, d_in]``.
        mask: bool ``[G, T]``, True counts; ``None`` when all count.
        settings: how many features, and whether an energy is asked for.
        given: features of a single layer that are decided already.
    """
    products, r = [one.base_product(x) for one in layers], settings.r
    with torch.no_grad():
        x, *found = (values.detach() for values in (x, *products))
        if len(layers) == 2:
            pair = layers[0].coupling
            joint = coupling.decide(
                x, found[0], found[1], mask, given.I_in, r, pair.heads, pair.kv_heads
            )
            I_in, *outputs = joint.features.unbind(1)
            return Decided(products, I_in, outputs, joint.energy if settings.adaptive else None)
        s_out, energy = selection.counted_statistics(found[0], mask, settings.adaptive)
        if given.I_in is not None and given.I_out is not None:
            return Decided(products, given.I_in, [given.I_out], energy)
        s_in, _ = selection.counted_statistics(x, mask, False)
        return Decided(products, selection.top_k(s_in, r), [selection.top_k(s_out, r)], energy)

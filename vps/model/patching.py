"""Sharpen the linear layers of a whole model, and make them plain again.

Layers stay the same objects. So whatever holds a layer, its parameters or its hooks holds the
sharpened layer, and later the plain layer again.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from vps.algorithm.policy import PolicyState
from vps.config import VPSConfig
from vps.layers import adapters, attention, opaque_layer, pairing, recognise
from vps.layers.forms import WEIGHT, Form, Refusal
from vps.layers.linear import SharpenedLayer
from vps.layers.own_forward import innermost
from vps.masking import STATE
from vps.model import attention_mask, matching
from vps.model.matching import layer_index, select_names
from vps.model.snapshot import Snapshot

# Class names, also of quantized layers of other libraries: HQQLinear, QuantLinear, WQLinear_GEMM.
LINEAR = re.compile(r"Linear(8bitLt|4bit|_\w+)?$")


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did.

    Args:
        patched: names of the layers now sharpened.
        forms: for each of them ``"weight"``, if it is computed from its weight, or
            ``"opaque (…)"`` with the kind of layer, if through the layer's own forward.
        refused: reasons by name of layers that the config asked for and that cannot be sharpened.
        not_patched: reasons by name of fused experts, and of attention blocks without Q/K coupling.
        coupled: names of the attention blocks whose query and key select together.
    """

    patched: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    not_patched: dict[str, str] = field(default_factory=dict)
    coupled: tuple[str, ...] = ()
    forms: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} layers sharpened"]
        if self.coupled:
            lines[0] += f", query and key coupled in {len(self.coupled)} attention blocks"
        kinds = Counter(self.forms.values())
        if set(kinds) - {WEIGHT}:
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            lines.append(f"forms: {listed}")
        for title, reasons in (("refused", self.refused), ("not patched", self.not_patched)):
            lines += [f"{title}: {name}: {reason}" for name, reason in reasons.items()]
        return "\n".join(lines)


def patch(model: nn.Module, config: VPSConfig | None = None) -> PatchReport:
    """Sharpen the linear layers of ``model`` that ``config.target_modules`` names.

    Each layer is sharpened where it stands and stays the same object. The statistics see the
    model's ``attention_mask`` and the starts of packed sequences. Experts are refused under every
    scope but ``"token"`` (SPEC §2). Patching a patched model again first takes the old sharpening
    back. It keeps entropy and history, unless they differ between parts that were patched by
    themselves.

    Args:
        model: any module, such as a Hugging Face model built from ``nn.Linear`` or ``Conv1D``.
        config: the settings; defaults when ``None``.

    Returns:
        What was sharpened, refused and left.

    Raises:
        TypeError: ``model`` is no module, or ``config`` no config.
        ValueError: no layer matches (the message lists the names of linear layers), or no matching
            layer can be sharpened (it lists the reasons). The model stays as it was.

    Warns:
        UserWarning: some of the layers asked for were refused.
    """
    check_module(model, "vps.patch")
    config = VPSConfig() if config is None else config
    if not isinstance(config, VPSConfig):
        raise TypeError(f"vps.patch: config must be a VPSConfig, got {type(config).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError("vps.patch: model is itself a linear layer; use VPSLinear.from_linear")
    linears = _linear_layers(model)
    names = select_names(linears, _head_name(model, linears), config)
    others = set(dict(model.named_modules(remove_duplicate=False))) - set(linears)
    refused = matching.loose_targets(_named_outright(others, linears, config), model)
    if not names and not refused:
        raise ValueError(_nothing_matches(linears, config))
    found = {name: recognise.recognise(linears[name]) for name in names}
    refused |= {n: form.reason for n, form in found.items() if isinstance(form, Refusal)}
    bypassed = matching.bypassed(model)
    if config.scope != "token":
        bypassed |= matching.experts(model)
    refused |= {name: bypassed[key] for name in names if (key := id(linears[name])) in bypassed}
    wanted = [name for name in names if name not in refused]
    if not wanted:
        raise ValueError(_all_refused(refused))

    before = Snapshot(model)
    try:
        earlier = sharpened_layers(model).values()
        state = _joined_state(layer.state for layer in earlier)
        if earlier:
            unpatch(model)
        report = _sharpened(model, config, state, linears, found, refused)
        if report.refused:
            listed = "; ".join(f"{name}: {reason}" for name, reason in report.refused.items())
            count = len(report.refused)
            warnings.warn(f"vps.patch: {count} layers were refused: {listed}", stacklevel=2)
    except BaseException:
        before.restore()
        raise
    return report


def _sharpened(
    model: nn.Module,
    config: VPSConfig,
    state: PolicyState,
    linears: dict[str, nn.Module],
    found: dict[str, Form | Refusal],
    refused: dict[str, str],
) -> PatchReport:
    """Sharpen the layers that are ``found`` and not ``refused``, and hook the model."""
    adapters.watch()
    wanted = [name for name in found if name not in refused]
    unique = {id(linears[name]): linears[name] for name in wanted}
    for module in unique.values():
        recognise.sharpen(module, config, state)
    broken = {key: reason for key, new in unique.items() if (reason := recognise.check(new))}
    refused = refused | {n: broken[key] for n in wanted if (key := id(linears[n])) in broken}
    wanted = [name for name in wanted if name not in refused]
    if not wanted:
        raise ValueError(_all_refused(refused))
    for key in broken:
        recognise.plain(unique[key])
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":  # before a compiler or a capture looks on
            state.signals(device)
    attention_mask.attach(model)
    coupled, uncoupled = attention.couple_blocks(model)
    not_patched = _fused_experts(model)
    if not config.couples:
        coupled, uncoupled = (), {}
    names_of_forms = {name: form.name for name in wanted if isinstance(form := found[name], Form)}
    return PatchReport(tuple(wanted), refused, not_patched | uncoupled, coupled, names_of_forms)


def unpatch(model: nn.Module) -> None:
    """Make every sharpened layer plain again; each stays the same object.

    Args:
        model: a sharpened model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no sharpened layer in the model.
    """
    layers = require_layers(model, "vps.unpatch")
    attention_mask.detach(model)
    pairing.detach(model)
    for layer in layers.values():
        recognise.plain(layer.module)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with the bits of the unpatched model, on this thread, inside the block.

    Args:
        model: a sharpened model.

    Raises:
        ValueError: no sharpened layer in the model.
    """
    layers = require_layers(model, "vps.disabled")
    states = list({id(layer.state): layer.state for layer in layers.values()}.values())
    STATE.disabled.extend(states)
    try:
        yield
    finally:
        del STATE.disabled[len(STATE.disabled) - len(states) :]


def set_config(model: nn.Module, config: VPSConfig) -> None:
    """Change the settings of all sharpened layers; the choice of layers stays as patched.

    Args:
        model: a sharpened model.
        config: the new settings, with the target modules of the old ones.

    Raises:
        TypeError: ``config`` is no :class:`VPSConfig`.
        ValueError: no sharpened layer in the model; other target modules, which need a new patch;
            another scope than ``"token"`` for experts; or layers with the γ of a calibration.
    """
    layers = require_layers(model, "vps.set_config")
    if not isinstance(config, VPSConfig):
        raise TypeError(f"vps.set_config: config must be a VPSConfig, got {type(config).__name__}")
    for layer in layers.values():
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            if getattr(config, name) != getattr(layer.config, name):
                raise ValueError(
                    f"vps.set_config: {name} differs from the patched model's "
                    f"({getattr(layer.config, name)!r}); call vps.patch with the new config"
                )
    check_scope(model, config.scope, "set_config")
    for layer in layers.values():
        if layer.gamma is not None and config.replace(scope=layer.config.scope) != layer.config:
            raise ValueError(
                "vps.set_config: the layers have the γ of a calibration made for another config; "
                "call vps.clear_calibration first"
            )
    for layer in layers.values():
        layer.config = config


def check_scope(model: nn.Module, scope: str, function: str) -> None:
    """Refuse a scope other than ``"token"`` for sharpened experts.

    Raises:
        ValueError: the model has sharpened experts; the message names the first.
    """
    if scope == "token":
        return
    experts = matching.experts(model)
    for name, layer in sharpened_layers(model).items():
        if id(layer.module) in experts:
            raise ValueError(
                f"vps.{function}: scope must be 'token' while {name} is sharpened, got {scope!r}: "
                f"{experts[id(layer.module)]}; patch the model under scope={scope!r} to leave "
                "experts plain"
            )


def policy_state(model: nn.Module) -> PolicyState:
    """Return the entropy and history that all sharpened layers of ``model`` share.

    Args:
        model: a sharpened model.

    Raises:
        ValueError: no sharpened layer in the model, or layers of differently patched models.
    """
    return shared_state(model, "vps.policy_state")


def shared_state(model: nn.Module, caller: str) -> PolicyState:
    """Do what :func:`policy_state` does, with errors in the name of ``caller``."""
    layers = require_layers(model, caller)
    states = {id(layer.state): layer.state for layer in layers.values()}
    if len(states) > 1:
        raise ValueError(
            f"{caller}: the layers belong to {len(states)} policy states, of parts patched "
            "by themselves; call vps.patch on the whole model"
        )
    return next(iter(states.values()))


def sharpened_layers(model: nn.Module) -> dict[str, SharpenedLayer]:
    """Return every sharpened layer of ``model`` by the first name of its module.

    Of an adapter and the layer that it wraps, only the adapter is listed.
    """
    found: dict[str, SharpenedLayer] = {}
    seen: set[int] = set()
    for name, module in _outside_adapters(model):
        layer = opaque_layer.sharpened_by(module)
        if layer is not None and id(module) not in seen:
            seen.add(id(module))
            found[name] = layer
    return found


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by all of their names, except those inside a layer of PEFT."""
    within = ""
    for name, module in model.named_modules(remove_duplicate=False):
        if within and name.startswith(within):
            continue
        within = f"{name}." if name and adapters.is_adapter(module) else ""
        yield name, module


def check_module(model: nn.Module, caller: str) -> None:
    """Refuse what is no module, in the name of ``caller``."""
    if not isinstance(model, nn.Module):
        report = "; vps.patch returns a report and changes the model that it is given"
        raise TypeError(
            f"{caller}: model must be an nn.Module, got {type(model).__name__}"
            f"{report if isinstance(model, PatchReport) else ''}"
        )


def require_layers(model: nn.Module, caller: str) -> dict[str, Any]:
    """Return the sharpened layers of a model that must have some."""
    check_module(model, caller)
    layers = sharpened_layers(model)
    if not layers:
        raise ValueError(f"{caller}: the model holds no sharpened layer; call vps.patch first")
    return layers


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that is a linear map or wraps one, by all of its names."""
    conv1d = adapters.loaded("transformers.pytorch_utils", "Conv1D")
    kinds = (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)
    found = {}
    for name, module in _outside_adapters(model):
        base = innermost(module) if adapters.is_adapter(module) else module
        if isinstance(base, kinds) or LINEAR.search(type(base).__name__):
            found[name] = module
    return found


def _named_outright(
    others: set[str], linears: dict[str, nn.Module], config: VPSConfig
) -> list[str]:
    """Return the modules that the config names although they are no linear layers."""
    if isinstance(config.target_modules, str):
        return []
    named = select_names(sorted(others), None, config)
    inside = tuple(f"{name}." for name in linears)
    return [name for name in named if not name.startswith(inside)]


def _head_name(model: nn.Module, linears: dict[str, nn.Module]) -> str | None:
    """Return the output head, which ``"all-linear"`` leaves out as PEFT does."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except Exception:  # a model without one may raise, which must not stop the patch
        head = None
    return next((name for name, module in linears.items() if module is head), None)


def _joined_state(states: Iterable[PolicyState]) -> PolicyState:
    """Return the state of all parts, or a new one where parts hold different values."""
    found = list(states)
    values = {(None if s.entropy is None else float(s.entropy), s.outcomes) for s in found}
    return found[0] if len(values) == 1 else PolicyState()


def _all_refused(refused: dict[str, str]) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
    return f"vps.patch: none of the {len(refused)} matching layers can be sharpened: {listed}"


def _nothing_matches(linears: dict[str, nn.Module], config: VPSConfig) -> str:
    if not linears:
        return "vps.patch: the model holds no linear layer"
    fields = ("target_modules", "exclude_modules", "layers_to_transform")
    asked = {name: getattr(config, name) for name in fields}
    said = ", ".join(f"{name} {value!r}" for name, value in asked.items() if value is not None)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
    numbered = ""
    if config.layers_to_transform is not None:
        blocks = [index for name in linears if (index := layer_index(name)) is not None]
        numbered = f" (blocks {min(blocks)} to {max(blocks)})" if blocks else " (no numbered block)"
    return (
        f"vps.patch: {said} match none of the model's {len(linears)} linear layers, which are "
        f"named {', '.join(kinds)}{numbered}; choose among these"
    )


def _fused_experts(model: nn.Module) -> dict[str, str]:
    """Return why modules stay plain that hold several experts in one 3-D parameter, by name."""
    return {
        name: f"its experts are one fused {tuple(parameter.shape)} tensor, not linear layers"
        for name, module in model.named_modules()
        for parameter in list(module._parameters.values())[:1]
        if "expert" in name and parameter is not None and not is_lazy(parameter)
        if parameter.dim() == 3
    }

"""``vps.calibrate``: examples in, a :class:`vps.Calibration` out, with what is to be said of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vps.config import VPSConfig
from vps.fitting import held_out as reported
from vps.fitting.descent import Fit, Options, each_nll, fit, mean_nll
from vps.fitting.examples import LONGEST, Encoded, Example, parse, split, told, usable
from vps.fitting.forms import Form, Plain, Scale, Sharpening, frequent_features, random_features
from vps.fitting.kept import Kept
from vps.fitting.lora import lora
from vps.fitting.loss import device_of
from vps.fitting.sensitivity import Sensitivity, sensitivities
from vps.fitting.texts import OTHER_TEXTS
from vps.model.calibration import Calibration, fingerprint, model_id
from vps.model.ephemeral import restored
from vps.model.matching import matches
from vps.model.patching import check_scope, patch, policy_state, sharpened_layers, unpatch

SHARPENING = reported.SHARPENING
PLAIN = reported.PLAIN
CONTROLS = ("scale", "random-1", "random-2", "static", "lora")
PER = ("layer", "column")
LORA_EXAMPLES = 12  # by which the layers of the control are chosen
NOTHING_FOUND = (
    "nothing was found: held-out examples show no improvement by the calibration (its file says so)"
)
NOT_MEASURED = "no held-out examples: whether the calibration helps was not measured"

Progress = Callable[[str, int], None]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    held_out: Sequence[Any] | None = None,
    other_texts: Sequence[str] | None = None,
    config: VPSConfig | None = None,
    per: str = "layer",
    layers: Sequence[str] | int | None = None,
    controls: Sequence[str] | bool = True,
    options: Options | None = None,
    scope: str = "token",
    chat: bool = True,
    longest: int = LONGEST,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    advance: Callable[[], None] | None = None,
) -> Calibration:
    """Fit a γ of either sign to every layer, and measure what that is worth.

    A quarter of the examples is kept to stop by and, unless ``held_out`` is given, a quarter to
    report on. Examples of more than ``longest`` tokens, or without one to predict, are left out and
    named in ``report``. Each control is fitted likewise, to as many numbers: ``"scale"`` is
    ``(1 + a) · H``, ``"random-1"`` and ``"random-2"`` sharpen features drawn at random,
    ``"static"`` those selected most often on the fitting examples, ``"lora"`` is PEFT's. The model
    comes back as it was; meanwhile no other thread may run it.

    Args:
        model: a causal language model of transformers, sharpened or not.
        tokenizer: its tokenizer.
        examples: texts, pairs ``(prompt, answer)``, or mappings with ``"prompt"`` and ``"answer"``
            (or ``"gold"``) or ``"text"``. Of a pair the answer is scored.
        held_out: others, to report on; an empty list for no report.
        other_texts: texts that the examples do not cover, for side effects; twelve short ones
            when ``None``.
        config: settings for a model that is not sharpened; its γ means nothing here.
        per: ``"layer"`` or ``"column"``, as many numbers a layer as its update can have columns.
        layers: names or their ends, or how many of those with the largest ``∂L/∂γ``; the others
            stay plain. ``None`` for all.
        controls: names of :data:`CONTROLS`; all, or none.
        options: of the descent, the same for all.
        scope: under which examples are scored; ``"token"`` is the only one without a leak from late
            tokens to early ones.
        chat: put prompts into the chat template, where there is one.
        longest: tokens of an example.
        seed: of the split, the order of the examples and the controls.
        resume: a file from which an interrupted call goes on, removed at the end.
        progress: called with every step and the parts it has.
        advance: called after every part.

    Returns:
        The calibration; ``found`` and ``report`` hold what was measured.

    Raises:
        TypeError, ValueError: arguments out of range, too few examples that can be used, held-out
            ones among the others, or a ``resume`` file of another call.
        ModuleNotFoundError: scipy, or PEFT for its control, is missing.

    Warns:
        UserWarning: examples were left out, nothing was found, or nothing was measured.
    """
    options = Options(seed=seed) if options is None else options
    names = _controls(controls)
    if per not in PER:
        raise ValueError(f"calibrate: per must be one of {PER}, got {per!r}")
    given = {"examples": _parsed("example", examples)}
    if held_out is not None:
        given["held-out examples"] = _parsed("held-out example", held_out)
    given["other texts"] = _parsed(
        "other text", OTHER_TEXTS if other_texts is None else other_texts
    )
    step, say = progress or (lambda message, total: None), advance or (lambda: None)
    with prepared(model, config, scope) as own:
        device = device_of(model)
        settings: dict[str, Any] = {"chat": chat, "longest": longest, "device": device}
        found_in = {of: usable(tokenizer, of, all_, **settings) for of, all_ in given.items()}
        codes = {of: dict(own) for of, (own, _) in found_in.items()}
        left_out = [each for _, out in found_in.values() for each in out]
        lost = [told(out, len(given[of])) for of, (_, out) in found_in.items() if out]
        apart = codes.get("held-out examples")
        try:
            parts = split(list(codes["examples"]), None if apart is None else list(apart), seed)
        except ValueError as error:
            raise ValueError("; ".join([str(error), *lost])) from None
        for line in lost:
            warnings.warn(f"vps.calibrate: {line}", stacklevel=2)
        every = codes["examples"] | (apart or {})
        use = {name: [every[each] for each in group] for name, group in vars(parts).items()}
        others = {each.identity: each for each in codes["other texts"].values()}
        use["other"] = list(others.values())
        weights = fingerprint(model)
        key = {
            "weights": weights,
            "config": _plain(asdict(own)),
            "data": parts.data,
            "held_out": [each.identity for each in parts.held_out],
            "other": list(others),
            "per": per,
            "layers": layers if isinstance(layers, int) or layers is None else list(layers),
            "controls": list(names),
            "options": json.loads(json.dumps(asdict(options))),
            "scope": scope,
            "chat": chat,
            "longest": longest,
            "seed": seed,
        }
        kept = Kept(resume, key)
        chosen = _layers(model, layers, use["fit"], step, say)
        found, gamma = _run(model, chosen, per, names, use, options, seed, kept, step, say)
        families = {}
        if parts.held_out:
            families = reported.comparisons({n: each["outcomes"] for n, each in found.items()})
        result = Calibration(
            config=own,
            model=model_id(model),
            architecture=type(model).__name__,
            weights=weights,
            data=parts.data,
            gamma=gamma,
            examples=tuple(each.identity for each in (*parts.fit, *parts.stop)),
            scope=scope,
            found=_found(found, families),
            report=_plain(
                {
                    "forms": {name: each["summary"] for name, each in found.items()},
                    "comparisons": reported.as_dict(families),
                    "controls": list(names),
                    "layers": len(chosen),
                    "examples": {n: len(getattr(parts, n)) for n in ("fit", "stop", "held_out")},
                    "left_out": [asdict(each) for each in left_out],
                    "options": key["options"],
                    "seed": seed,
                }
            ),
        )
    kept.remove()
    if result.found is None:
        warnings.warn(f"vps.calibrate: {NOT_MEASURED}", stacklevel=2)
    elif not result.found:
        warnings.warn(f"vps.calibrate: {NOTHING_FOUND}", stacklevel=2)
    return result


def sensitivity(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    config: VPSConfig | None = None,
    scope: str = "token",
    chat: bool = True,
    longest: int = LONGEST,
    progress: Progress | None = None,
    advance: Callable[[], None] | None = None,
) -> list[Sensitivity]:
    """``∂L/∂γ`` of every layer at γ = 0 with its noise; nothing is fitted, the largest first.

    Args: as for :func:`calibrate`.

    Raises:
        TypeError, ValueError: as for :func:`calibrate`.

    Warns:
        UserWarning: examples were left out.
    """
    parsed = _parsed("example", examples)
    if not parsed:
        raise ValueError("calibrate: expected at least one example, got none")
    with prepared(model, config, scope):
        settings: dict[str, Any] = {"chat": chat, "longest": longest, "device": device_of(model)}
        codes, left_out = usable(tokenizer, "examples", parsed, **settings)
        if left_out:
            warnings.warn(f"vps.calibrate: {told(left_out, len(parsed))}", stacklevel=2)
        use = [code for _, code in codes]
        if progress is not None:
            progress("taking gradients", len(use))
        form = Sharpening(model, list(sharpened_layers(model)), False)
        return sensitivities(model, form, use, advance or (lambda: None))


@contextmanager
def prepared(model: nn.Module, config: VPSConfig | None, scope: str) -> Iterator[VPSConfig]:
    """``model`` sharpened, frozen and scored under ``scope``; its config. Then as it was.

    Raises:
        ValueError: layers of several configs, or of another than ``config``.
    """
    if scope not in VPSConfig.CHOICES["scope"]:
        allowed = VPSConfig.CHOICES["scope"]
        raise ValueError(f"calibrate: scope must be one of {allowed}, got {scope!r}")
    patched_here = not sharpened_layers(model)
    if patched_here:
        patch(model, config)
    try:
        held: dict[str, Any] = sharpened_layers(model)
        configs = list(dict.fromkeys(layer.config for layer in held.values()))
        if len(configs) > 1:
            raise ValueError(f"calibrate: the layers have {len(configs)} configs, expected one")
        if config is not None and config != configs[0]:
            raise ValueError(
                "calibrate: the model is sharpened with another config than the one given"
            )
        check_scope(model, scope, "calibrate")
        with restored(model):
            policy_state(model).reset()
            for layer in held.values():
                layer.gradient, layer.memory = False, None
                layer.config = layer.config.replace(scope=scope)
            yield configs[0]
    finally:
        if patched_here:
            unpatch(model)


def _run(
    model: nn.Module,
    chosen: list[str],
    per: str,
    controls: Sequence[str],
    use: Mapping[str, list[Encoded]],
    options: Options,
    seed: int,
    kept: Kept,
    step: Progress,
    say: Callable[[], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Every form's outcomes and summary, and γ."""
    parts = {reported.HELD_OUT: use["held_out"], reported.SIDE: use["other"]}
    size = sum(map(len, parts.values())) if use["held_out"] else 0
    found: dict[str, dict[str, Any]] = {}
    gamma: dict[str, Any] = {}

    def measure(form: Form, done: Fit | None) -> None:
        if size:
            step(f"measuring: {form.name}", size)
        outcomes = reported.outcomes(model, form, parts, say) if size else []
        summary: dict[str, Any] = {"numbers": 0 if done is None else form.count}
        if done is not None:
            summary |= {name: value for name, value in vars(done).items() if name != "values"}
        found[form.name] = {"outcomes": outcomes, "summary": summary}

    by_column = per == "column"
    base = Plain(model, chosen, False)
    measure(base, None)
    plain = mean_nll(model, base, use["stop"])
    for name in (SHARPENING, *controls):
        form = _form(name, model, chosen, by_column, use["fit"], seed, step, say)
        step(f"fitting: {name}", options.looks - len(options.learning_rates))
        done = fit(
            model, form, use["fit"], use["stop"], options, plain,
            advance=say, state=kept.state(name), save=partial(kept.keep, name),
        )  # fmt: skip
        if isinstance(form, Sharpening) and name == SHARPENING:
            gamma = form.gammas()
        measure(form, done)
    return found, gamma


def _form(
    name: str,
    model: nn.Module,
    chosen: list[str],
    by_column: bool,
    examples: Sequence[Encoded],
    seed: int,
    step: Progress,
    say: Callable[[], None],
) -> Form:
    """The form of that name, as it is before it is fitted."""
    sharpening = Sharpening(model, chosen, by_column)
    if name == SHARPENING:
        return sharpening
    if name == "scale":
        return Scale(model, chosen, by_column)
    if name.startswith("random-"):
        features = random_features(sharpening, 2 * seed + int(name[-1]) - 1)
    elif name == "static":
        step("counting selected features", len(examples))
        with sharpening.counting() as counts:
            each_nll(model, sharpening, examples, say)
            features = frequent_features(sharpening, counts)
    else:
        few = examples[:LORA_EXAMPLES]
        step("choosing the layers of LoRA", len(few))
        return lora(model, chosen, sharpening.count, few, seed, say)
    return Sharpening(model, chosen, by_column, features, name)


def _layers(
    model: nn.Module,
    layers: Sequence[str] | int | None,
    examples: Sequence[Encoded],
    step: Progress,
    say: Callable[[], None],
) -> list[str]:
    """Names of the layers that are fitted."""
    every = list(sharpened_layers(model))
    if layers is None:
        return every
    if isinstance(layers, (bool, str, bytes)):
        raise TypeError(f"calibrate: layers must be a number or names, got {layers!r}")
    if isinstance(layers, int):
        if not 1 <= layers <= len(every):
            raise ValueError(f"calibrate: layers must be from 1 to {len(every)}, got {layers}")
        step("taking gradients", len(examples))
        form = Sharpening(model, every, False)
        best = {each.name for each in sensitivities(model, form, examples, say)[:layers]}
        return [name for name in every if name in best]
    if not all(isinstance(each, str) for each in layers):
        raise TypeError(f"calibrate: layers must be a number or names, got {layers!r}")
    chosen = [name for name in every if matches(name, tuple(layers))]
    unused = [each for each in layers if not any(matches(name, (each,)) for name in every)]
    if unused or not chosen:
        raise ValueError(
            f"calibrate: layers {unused or list(layers)!r} name none of the model's "
            f"{len(every)} sharpened layers, such as {every[0]!r}"
        )
    return chosen


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _found(found: Mapping[str, dict[str, Any]], families: dict[str, list[Any]]) -> bool | None:
    if found[SHARPENING]["summary"]["step"] == 0:
        return False
    return reported.improves(families)


def _controls(controls: Sequence[str] | bool) -> tuple[str, ...]:
    if isinstance(controls, bool):
        return CONTROLS if controls else ()
    wanted = [controls] if isinstance(controls, str) else list(controls)
    if any(name not in CONTROLS for name in wanted):
        raise ValueError(f"calibrate: controls must be of {CONTROLS}, got {wanted!r}")
    return tuple(name for name in CONTROLS if name in wanted)


def _parsed(name: str, values: Sequence[Any]) -> list[Example]:
    return [parse(each, f"{name} {number}", empty=True) for number, each in enumerate(values, 1)]

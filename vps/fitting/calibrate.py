"""Fit γ of every layer to examples: ``vps.calibrate``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vps import files
from vps.config import VPSConfig
from vps.fitting.candidates import Candidate, Sharpening
from vps.fitting.descent import Fit, Options, each_nll, fit, mean_nll
from vps.fitting.examples import LONGEST, Encoded, parse_all, split, told, unrelated_texts, usable
from vps.fitting.fitted_controls import Scale, frequent_features, lora, random_features
from vps.fitting.sensitivity import prepared, sensitivities
from vps.fitting.verdict import (
    HELD_OUT,
    SHARPENING,
    SIDE,
    as_dict,
    comparisons,
    improves,
    outcomes,
)
from vps.model.calibration import Calibration, fingerprint, model_id
from vps.model.matching import matches
from vps.model.patching import sharpened_layers
from vps.reading import parse_json, read_text

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
    ``"static"`` those selected most often on the fitting examples, ``"lora"`` is of rank 1. The
    model comes back as it was; meanwhile no other thread may run it.

    Args:
        model: a causal language model of transformers, sharpened or not.
        tokenizer: its tokenizer.
        examples: texts, pairs ``(prompt, answer)``, or mappings with ``"prompt"`` and ``"answer"``
            (or ``"gold"``) or ``"text"``. Of a pair the answer is scored.
        held_out: other examples, to report on; an empty list for no report.
        other_texts: texts that the examples do not cover, for side effects; twelve short ones
            when ``None``.
        config: settings for a model that is not sharpened; its γ means nothing here.
        per: ``"layer"`` or ``"column"``, as many numbers a layer as its update can have columns.
        layers: names or their ends, or how many of those with the largest ``∂L/∂γ``; the others
            stay plain. ``None`` for all.
        controls: names of controls; ``True`` for all, ``False`` for none.
        options: how to fit, the same for all forms.
        scope: the scope under which examples are scored. Under ``"token"``, and under ``"prompt"``,
            where the prompt of an example decides, late tokens leak into no early one.
        chat: put prompts into the chat template, where there is one.
        longest: most tokens of an example.
        seed: seed of the split, the order of the examples and the controls.
        resume: a file from which an interrupted call goes on, removed at the end.
        progress: called with the name of every step and the number of its parts.
        advance: called after every part.

    Returns:
        The calibration; ``found`` and ``report`` hold what was measured.

    Raises:
        TypeError, ValueError: arguments out of range, too few examples that can be used, held-out
            ones among the others, or a ``resume`` file of another call.
        ModuleNotFoundError: scipy is missing.

    Warns:
        UserWarning: examples were left out, nothing was found, or nothing was measured.
    """
    options = Options(seed=seed) if options is None else options
    names = _controls(controls)
    if per not in PER:
        raise ValueError(f"calibrate: per must be one of {PER}, got {per!r}")
    given = {"examples": parse_all("example", examples)}
    if held_out is not None:
        given["held-out examples"] = parse_all("held-out example", held_out)
    given["other texts"] = parse_all(
        "other text", unrelated_texts() if other_texts is None else other_texts
    )
    step, say = progress or (lambda message, total: None), advance or (lambda: None)
    with prepared(model, config, scope) as own:
        device = next(model.parameters()).device
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
            "options": _plain(asdict(options)),
            "scope": scope,
            "chat": chat,
            "longest": longest,
            "seed": seed,
        }
        kept = Kept(resume, key)
        work = _Fitting(model, use, per == "column", options, seed, step, say)
        chosen = work.layers(layers)
        found, gamma = work.run(chosen, names, kept)
        families = {}
        if parts.held_out:
            families = comparisons({n: each["outcomes"] for n, each in found.items()})
        result = Calibration(
            config=own,
            model=model_id(model),
            architecture=type(model).__name__,
            weights=weights,
            data=parts.data,
            gamma=gamma,
            examples=tuple(each.identity for each in (*parts.fit, *parts.stop)),
            scope=scope,
            found=found[SHARPENING]["summary"]["step"] > 0 and improves(families),
            report=_plain(
                {
                    "forms": {name: each["summary"] for name, each in found.items()},
                    "comparisons": as_dict(families),
                    "controls": list(names),
                    "layers": len(chosen),
                    "examples": {n: len(getattr(parts, n)) for n in ("fit", "stop", "held_out")},
                    "left_out": [asdict(each) for each in left_out],
                    "options": key["options"],
                    "seed": seed,
                }
            ),
        )
    if kept.path is not None:
        kept.path.unlink(missing_ok=True)
    if result.found is None:
        warnings.warn(f"vps.calibrate: {NOT_MEASURED}", stacklevel=2)
    elif not result.found:
        warnings.warn(f"vps.calibrate: {NOTHING_FOUND}", stacklevel=2)
    return result


@dataclass(frozen=True)
class _Fitting:
    """Hold what one call works with: examples by their use, settings, and whom to tell."""

    model: nn.Module
    use: Mapping[str, list[Encoded]]
    by_column: bool
    options: Options
    seed: int
    step: Progress
    say: Callable[[], None]

    def layers(self, wanted: Sequence[str] | int | None) -> list[str]:
        """Return the names of the layers that are fitted."""
        every = list(sharpened_layers(self.model))
        if wanted is None:
            return every
        if isinstance(wanted, (bool, str, bytes)):
            raise TypeError(f"calibrate: layers must be a number or names, got {wanted!r}")
        if isinstance(wanted, int):
            if not 1 <= wanted <= len(every):
                raise ValueError(f"calibrate: layers must be from 1 to {len(every)}, got {wanted}")
            self.step("taking gradients", len(self.use["fit"]))
            candidate = Sharpening(self.model, every, False)
            found = sensitivities(self.model, candidate, self.use["fit"], self.say)
            best = {each.name for each in found[:wanted]}
            return [name for name in every if name in best]
        if not all(isinstance(each, str) for each in wanted):
            raise TypeError(f"calibrate: layers must be a number or names, got {wanted!r}")
        chosen = [name for name in every if matches(name, tuple(wanted))]
        unused = [each for each in wanted if not any(matches(name, (each,)) for name in every)]
        if unused or not chosen:
            raise ValueError(
                f"calibrate: layers {unused or list(wanted)!r} name none of the model's "
                f"{len(every)} sharpened layers, such as {every[0]!r}"
            )
        return chosen

    def run(
        self, chosen: list[str], controls: Sequence[str], kept: Kept
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Fit and measure every candidate; outcomes and summary by name, and γ."""
        model, use, options = self.model, self.use, self.options
        parts = {HELD_OUT: use["held_out"], SIDE: use["other"]}
        size = sum(map(len, parts.values())) if use["held_out"] else 0
        found: dict[str, dict[str, Any]] = {}
        gamma: dict[str, Any] = {}

        def measure(candidate: Candidate, done: Fit | None) -> None:
            if size:
                self.step(f"measuring: {candidate.name}", size)
            own = outcomes(model, candidate, parts, self.say) if size else []
            summary: dict[str, Any] = {"numbers": 0 if done is None else candidate.count}
            if done is not None:
                summary |= {name: value for name, value in vars(done).items() if name != "values"}
            found[candidate.name] = {"outcomes": own, "summary": summary}

        base = Candidate(model, chosen, False)
        measure(base, None)
        plain = mean_nll(model, base, use["stop"])
        for name in (SHARPENING, *controls):
            candidate = self.candidate(name, chosen)
            self.step(f"fitting: {name}", options.looks - len(options.learning_rates))
            done = fit(
                model, candidate, use["fit"], use["stop"], options, plain,
                advance=self.say, state=kept.states.get(name), save=partial(kept.keep, name),
            )  # fmt: skip
            if isinstance(candidate, Sharpening) and name == SHARPENING:
                gamma = candidate.gammas()
            measure(candidate, done)
        return found, gamma

    def candidate(self, name: str, chosen: list[str]) -> Candidate:
        """Make the candidate of that name, as it is before it is fitted."""
        model, examples = self.model, self.use["fit"]
        sharpening = Sharpening(model, chosen, self.by_column)
        if name == SHARPENING:
            return sharpening
        if name == "scale":
            return Scale(model, chosen, self.by_column)
        if name.startswith("random-"):
            features = random_features(sharpening, 2 * self.seed + int(name[-1]) - 1)
        elif name == "static":
            self.step("counting selected features", len(examples))
            with sharpening.counting() as counts:
                each_nll(model, sharpening, examples, self.say)
                features = frequent_features(sharpening, counts)
        else:
            few = examples[:LORA_EXAMPLES]
            self.step("choosing the layers of LoRA", len(few))
            return lora(model, chosen, sharpening.count, few, self.seed, self.say)
        return Sharpening(model, chosen, self.by_column, features, name)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they come back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _controls(controls: Sequence[str] | bool) -> tuple[str, ...]:
    if isinstance(controls, bool):
        return CONTROLS if controls else ()
    wanted = [controls] if isinstance(controls, str) else list(controls)
    if any(name not in CONTROLS for name in wanted):
        raise ValueError(f"calibrate: controls must be of {CONTROLS}, got {wanted!r}")
    return tuple(name for name in CONTROLS if name in wanted)


def left(path: Path) -> dict[str, Any] | None:
    """Read the key and states that an interrupted call left in a file; ``None`` without one.

    Raises:
        ValueError: the file holds something else, or is none.
    """
    if not path.exists():
        return None
    try:
        files.check_regular(path)
        values = parse_json(read_text(path))
        if set(values) == {"key", "states"} and all(isinstance(values[n], dict) for n in values):
            return dict(values)
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(
        f"calibrate: {path} holds no interrupted calibration; expected one, or no such file"
    )


class Kept:
    """Keep the state of every candidate, so that an interrupted call goes on.

    Raises:
        ValueError: a file of another call; the message says what differs.
    """

    def __init__(self, path: str | Path | None, key: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.key = _plain(key)
        before = None if self.path is None else left(self.path)
        self.states: dict[str, Any] = {} if before is None else before["states"]
        if before is not None and before["key"] != self.key:
            names = [name for name in self.key if before["key"].get(name) != self.key[name]]
            raise ValueError(
                f"calibrate: {self.path} is of a calibration with other {', '.join(names)}; "
                "remove it to start anew"
            )

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """Write the state of a candidate."""
        self.states[name] = state
        if self.path is not None:
            files.replace(self.path, json.dumps({"key": self.key, "states": self.states}))

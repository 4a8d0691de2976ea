"""Hold the settings of virtual parameter sharpening, the fields of SPEC §5, and check them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Self

from vps.reading import parse_json

DEFAULT_TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
MAX_RANK = 64
MAX_TOPK = 64
NOT_GIVEN: Any = None


@dataclass(frozen=True)
class VPSConfig:
    """How a model is sharpened.

    A value that is given holds: ``gamma=0.1`` fixes γ at 0.1. A value that is left out is chosen by
    the policy inside its bounds. After construction every field holds its resolved value.

    Args:
        rank: columns of the update, 1 to 64; 2 when left out and not adaptive.
        adaptive_rank: let the policy choose the rank inside ``rank_bounds``. ``None``, here and
            below, lets it choose if the value is left out.
        topk: selected features per side, 1 to 64; it bounds the rank. When left out and not
            adaptive, it is 32 or the rank, whichever is more.
        adaptive_topk: let the policy choose it inside ``topk_bounds``; ``None`` does so only with
            ``adaptive_rank=True``.
        gamma: scale of the update, at least 0; 0.5 when left out and not adaptive. With 0 the layer
            is the base layer.
        adaptive_gamma: let the policy choose γ inside ``gamma_bounds``.
        order: terms of the expansion of ``W · exp(γ U Vᵀ W)``; 1 or 2.
        adaptive_order: let the policy choose the order inside ``order_bounds``.
        tau: largest norm of one component (``clip="component"``) or of the whole update
            (``clip="spectral"``), in units of the weight; ``None`` leaves out the clip.
        alpha: ridge of the SC builder, in units of ``x²``; positive.
        clamp: bound on every element of δ, in units of the output; ``None`` leaves it out.
        builder: ``"sk"``, ``"sc"``, ``"hybrid"`` or ``"random"``. The last draws features by
            ``seed``, as a control that shows whether guidance by activations matters.
        seed: seed of the random builder; at least 0.
        scope: which tokens share one selection: ``"sequence"``, ``"batch"`` or ``"token"``; with
            ``"prompt"`` the prompt of a sequence decides once for all its tokens (SPEC §11).
        qk_coupling: select outputs of query and key projections jointly (SPEC §7).
        lbfgs: precondition ``B`` with the ephemeral L-BFGS memory (SPEC §8).
        target_modules: as in PEFT: a sequence of name suffixes, a string that is a regular
            expression for the full name, or ``"all-linear"`` (all but the output head).
        exclude_modules: names to leave out, in the same forms; ``None`` for none.
        layers_to_transform: indices of the blocks to sharpen; ``None`` for all.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; the message names field, value and range.

    Warns:
        UserWarning: a value beside ``adaptive_…=True``, or bounds of a fixed value; the message
            says which of them decides.

    Source: SPEC §5; the paper, appendix B.
    """

    rank: int = NOT_GIVEN
    adaptive_rank: bool | None = None
    rank_bounds: tuple[int, int] = (1, 4)
    topk: int = NOT_GIVEN
    adaptive_topk: bool | None = None
    topk_bounds: tuple[int, int] = (16, 64)
    gamma: float = NOT_GIVEN
    adaptive_gamma: bool | None = None
    gamma_bounds: tuple[float, float] = (0.3, 0.8)
    order: int = NOT_GIVEN
    adaptive_order: bool | None = None
    order_bounds: tuple[int, int] = (1, 2)
    tau: float | None = 0.8
    alpha: float = 1e-3
    clamp: float | None = None
    clip: str = "component"
    builder: str = "hybrid"
    seed: int = 0
    scope: str = "sequence"
    qk_coupling: bool = True
    lbfgs: bool = True
    target_modules: tuple[str, ...] | str = DEFAULT_TARGET_MODULES
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    # For a copy by dataclasses.replace: the values that the original resolved by itself.
    _implied: InitVar[Mapping[str, Any] | None] = None

    ADAPTIVE: ClassVar[dict[str, Any]] = {"rank": 2, "topk": 32, "gamma": 0.5, "order": 1}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "builder": ("sk", "sc", "hybrid", "random"),
        "scope": ("sequence", "batch", "token", "prompt"),
        "clip": ("component", "spectral"),
    }

    def __post_init__(self, _implied: Mapping[str, Any] | None) -> None:
        beside = self._resolve(_implied)
        for name in self.ADAPTIVE:
            self._check_bool(f"adaptive_{name}")
        self._check_bool("qk_coupling")
        self._check_bool("lbfgs")
        for name, allowed in self.CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"VPSConfig.{name} is {value!r}, expected one of {allowed}")
        self._check_int("seed", self.seed, 0, 2**63 - 1)
        for name, low, high in (("rank", 1, MAX_RANK), ("topk", 1, MAX_TOPK), ("order", 1, 2)):
            self._check_int(name, getattr(self, name), low, high)
            self._check_bounds(f"{name}_bounds", self._check_int, low, high)
        self._check_number("gamma", self.gamma, True)
        self._check_bounds("gamma_bounds", self._check_number, True)
        self._check_number("alpha", self.alpha, False)
        for name in ("tau", "clamp"):
            if getattr(self, name) is not None:
                self._check_number(name, getattr(self, name), False)
        self._check_names("target_modules")
        if self.exclude_modules is not None:
            self._check_names("exclude_modules")
        self._check_layers()
        self._warn(beside, self.ADAPTIVE if _implied is None else ())

    def _resolve(self, before: Mapping[str, Any] | None) -> list[str]:
        """Resolve values that were left out (SPEC §5); return names given beside their switch."""
        for name, value in (before or {}).items():
            if getattr(self, name) == value:  # a copy passed it on; nobody gave it
                object.__setattr__(self, name, None)
        implied: dict[str, Any] = {}
        beside = []
        for name, default in self.ADAPTIVE.items():
            switch = f"adaptive_{name}"
            value, adaptive = getattr(self, name), getattr(self, switch)
            own = value is None and name != "order"
            if name == "topk":
                own = own and self.adaptive_rank is True
                default = max(default, self.rank) if isinstance(self.rank, int) else default
            if value is None:
                implied[name] = default
                object.__setattr__(self, name, default)
            if adaptive is None:
                implied[switch] = own
                object.__setattr__(self, switch, own)
            elif adaptive is True and value is not None:
                if before is None or name in before or switch in before:
                    beside.append(name)
        object.__setattr__(self, "_implied", implied)
        return beside

    def _warn(self, beside: Iterable[str], bounded: Iterable[str], stacklevel: int = 4) -> None:
        """Warn once of values, and of bounds of these names, that have no effect."""
        said = [
            f"{name}={getattr(self, name)!r} has no effect beside adaptive_{name}=True: "
            f"{name}_bounds {getattr(self, f'{name}_bounds')} decide"
            for name in beside
        ]
        said += [
            f"{name}_bounds={getattr(self, f'{name}_bounds')} have no effect: {name} is fixed "
            f"at {getattr(self, name)!r}; adaptive_{name}=True would let them decide"
            for name in bounded
            if not getattr(self, f"adaptive_{name}")
            and getattr(self, f"{name}_bounds") != getattr(type(self), f"{name}_bounds")
        ]
        if said:
            warnings.warn(f"VPSConfig: {'; '.join(said)}", stacklevel=stacklevel)

    def __hash__(self) -> int:  # of few fields, because every call of a layer computes it
        return hash((self.rank, self.gamma, self.gamma_bounds, self.builder, self.scope))

    @property
    def is_off(self) -> bool:
        """Return whether γ is 0 whatever the input."""
        return (self.gamma_bounds[1] if self.adaptive_gamma else self.gamma) == 0

    @property
    def couples(self) -> bool:
        """Return whether a query and a key select together; with drawn features they do not."""
        return self.qk_coupling and self.builder != "random"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes`` applied and checked.

        Unlike ``dataclasses.replace`` it can tell a value that is given from the same value left
        out. A changed value holds unless the original was told to adapt it. A switch that is turned
        on drops the original's value.

        Args:
            changes: new values by name of a field.

        Raises:
            TypeError: a name is no field; the message suggests the nearest field.
        """
        for name in changes:
            if name not in self.field_names():
                raise TypeError(f"VPSConfig has no field {name!r}{nearest_field(name)}")
        implied = dict(self._implied or {})  # type: ignore[attr-defined]  # see _resolve
        for name in self.ADAPTIVE:
            if changes.get(f"adaptive_{name}") is True:
                changes.setdefault(name, None)
        # A changed value is given, also if it equals the implied value.
        left = {name: None if name in changes else implied[name] for name in implied}
        left |= {name: None for name in changes if name in self.ADAPTIVE}
        copy = dataclasses.replace(self, **changes, _implied=left)
        copy._warn((), [name for name in self.ADAPTIVE if f"{name}_bounds" in changes], 3)
        return copy

    def to_json(self) -> str:
        """Return the settings as a JSON object, with ``null`` for fields that were left out."""
        left = dict.fromkeys(self._implied or ())  # type: ignore[attr-defined]
        return json.dumps(dataclasses.asdict(self) | left, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the settings that :meth:`to_json` wrote; missing keys take their defaults.

        Args:
            text: a JSON object, not the path of a file.

        Raises:
            ValueError: the text is no JSON object, or has a key that is unknown or comes twice; the
                message suggests the nearest known key.
            TypeError: a value of the wrong type.

        Warns:
            UserWarning: as the constructor does; files of earlier versions have values beside
                ``adaptive_…=true``.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"VPSConfig.from_json: text {text[:40]!r} is {error}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"VPSConfig.from_json: expected an object, got {type(values).__name__}"
            )
        for name in values:
            if name not in cls.field_names():
                raise ValueError(f"VPSConfig.from_json: unknown key {name!r}{nearest_field(name)}")
        return cls(**values)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all fields, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"VPSConfig.{name} is {value!r}, expected True or False")

    @staticmethod
    def _check_int(name: str, value: object, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"VPSConfig.{name} is {value!r}, expected an integer {low} to {high}")
        if not low <= value <= high:
            raise ValueError(f"VPSConfig.{name} is {value!r}, expected {low} to {high}")

    @staticmethod
    def _check_number(name: str, value: object, zero: bool) -> None:
        expected = f"a finite number {'≥' if zero else '>'} 0"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"VPSConfig.{name} is {value!r}, expected {expected}")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError(f"VPSConfig.{name} is {value!r}, expected {expected}")

    def _check_bounds(self, name: str, check: Any, *limits: Any) -> None:
        bounds = getattr(self, name)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"VPSConfig.{name} is {bounds!r}, expected a pair (low, high)")
        for value in bounds:
            check(name, value, *limits)
        if bounds[0] > bounds[1]:
            raise ValueError(f"VPSConfig.{name} is {bounds!r}, expected low ≤ high")
        object.__setattr__(self, name, tuple(bounds))

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            if not value:
                raise ValueError(f"VPSConfig.{name} is empty, expected a regular expression")
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"VPSConfig.{name} is {value!r}, expected a regular expression: {error}"
                ) from None
            return
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(
            isinstance(item, str) and item for item in value
        ):
            raise TypeError(
                f"VPSConfig.{name} is {value!r}, expected a string or a list of non-empty strings"
            )
        if not value:
            raise ValueError(f"VPSConfig.{name} is empty, expected at least one name")
        ordered = value if isinstance(value, (list, tuple)) else sorted(value)
        object.__setattr__(self, name, tuple(ordered))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = (layers,)
        if not isinstance(layers, (list, tuple)):
            raise TypeError(
                f"VPSConfig.layers_to_transform is {layers!r}, expected integers or None"
            )
        if not layers:
            raise ValueError("VPSConfig.layers_to_transform is empty, expected at least one index")
        for index in layers:
            self._check_int("layers_to_transform", index, 0, 2**31 - 1)
        object.__setattr__(self, "layers_to_transform", tuple(layers))


def nearest_field(name: str) -> str:
    """Return a hint at the field with the nearest name, or at all fields if none is near."""
    close = difflib.get_close_matches(name, VPSConfig.field_names(), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the fields are {', '.join(VPSConfig.field_names())}"

"""Read a grid file, YAML or JSON, into the cells that it asks for.

::

    title: SmolLM2 on arithmetic       # optional, for the report
    fixed:                             # fields of VPSConfig for every cell
      scope: token
      builder: sk
    grid:                              # every combination; or a list of such mappings, all done
      - gamma: [0.3, 0.5, 0.7]
      - rank: [1, 2, 4]
        order: [1, 2]
    cells:                             # single cells over `fixed`, each with an optional name
      - {name: no clip, tau: null}
    controls: true                     # or false, or a list out of CONTROLS
    draws: 1                           # of every control, each with a seed of its own

A cell is ``fixed`` changed by its own fields; a value given for gamma, rank, topk or order holds.
``scope`` is ``"token"`` unless the file says otherwise: an evaluation scores given texts, where
other scopes look ahead. Equal settings make one cell. The baseline comes first, then the cells as
the file has them, each followed by its controls.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vps.config import VPSConfig, nearest_field
from vps.reading import read_values

BASELINE = "baseline"
CONTROLS = ("random_indices", "random_noise", "shuffled_selection")
KEYS = ("title", "fixed", "grid", "cells", "controls", "draws")
MOST_CELLS = 10_000
FORMAT = "vps-ablation-2"  # of a run's definition


class GridError(ValueError):
    """Refuse a grid that cannot be run, saying where, what is expected and what came."""


@dataclass(frozen=True)
class Cell:
    """Describe one variant of the model to evaluate.

    Args:
        index: position in the grid.
        name: unique in the grid.
        config: the settings; ``None`` is the unpatched model.
        control: one of :data:`CONTROLS`, or ``None`` for a cell that the file asks for.
        draw: number of the control's draw, from 0.
        of: names of the cells that a control belongs to.
    """

    index: int
    name: str
    config: VPSConfig | None = None
    control: str | None = None
    draw: int = 0
    of: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        values = dataclasses.asdict(self)
        return json.loads(json.dumps(values))  # tuples as they come back from a file

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Make a cell of what :meth:`as_dict` gave."""
        config = values["config"]
        made = None
        if config is not None:
            with warnings.catch_warnings():  # which reading the grid has given
                warnings.simplefilter("ignore")
                made = VPSConfig.from_json(json.dumps(config))
        return cls(**{**values, "config": made, "of": tuple(values["of"])})


@dataclass(frozen=True)
class Grid:
    """Hold a title and the cells, the baseline first."""

    title: str
    cells: tuple[Cell, ...]


def read_grid(path: Path) -> Grid:
    """Read the grid of a JSON or YAML file.

    Raises:
        GridError: what the file holds is no grid; the message names the file.
        ModuleNotFoundError: it is no JSON, and pyyaml is missing.
        OSError: the file cannot be read.
    """
    try:
        return make_grid(read_values(path), default_title=path.stem)
    except ValueError as error:
        raise GridError(f"{path}: {error}") from None
    except RecursionError:
        raise GridError(f"{path}: nested too deeply") from None


def make_grid(values: Any, default_title: str = "ablation") -> Grid:
    """Make the grid of a mapping as in the module's description.

    Raises:
        GridError: a key, field or value that cannot be used, with the nearest known name.
    """
    values = _mapping("the grid", values)
    for key in values:
        if key not in KEYS:
            hint = _nearest(key, KEYS)
            if key in VPSConfig.field_names():
                hint = "; put fields of VPSConfig under 'fixed' or 'grid'"
            raise GridError(f"unknown key {key!r}, expected one of {', '.join(KEYS)}{hint}")
    title = values.get("title", default_title)
    if not isinstance(title, str):
        raise GridError(f"title is {title!r}, expected text")
    fixed = VPSConfig(scope="token")
    fixed = _config("fixed", fixed, _fields("fixed", values.get("fixed")))
    names: dict[str, VPSConfig] = {}
    known: dict[VPSConfig, str] = {}
    for where, name, changes in _asked(values):
        config = _config(where, fixed, changes)
        if config in known:
            if name is not None and name != known[config]:
                raise GridError(f"{where}: the settings are those of cell {known[config]!r}")
            continue
        name = name or _name(changes)
        if name in names or name == BASELINE:
            raise GridError(f"{where}: there is another cell {name!r}; give it a name of its own")
        names[name] = config
        known[config] = name
    if not names:
        raise GridError("there is no cell; give a 'grid' or 'cells'")
    draws = values.get("draws", 1)
    if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws <= 100:
        raise GridError(f"draws is {draws!r}, expected an integer 1 to 100")
    return Grid(title, _with_controls(names, _controls(values.get("controls", True)), draws))


def definition_of(grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run the same run, as it stands in ``run.json``."""
    return {
        "format": FORMAT,
        "title": grid.title,
        "settings": json.loads(json.dumps(settings)),
        "cells": [cell.as_dict() for cell in grid.cells],
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what two definitions of a run differ in."""

    def changed(there: Mapping[str, Any], here: Mapping[str, Any], verb: str = "") -> list[str]:
        names = dict.fromkeys([*there, *here])
        pairs = ((name, there.get(name), here.get(name)) for name in names)
        return [f"{name} {verb}{a!r} there, {b!r} here" for name, a, b in pairs if a != b]

    found = changed(before["settings"], now["settings"], "is ")
    cells = [{cell["name"]: _flat(cell) for cell in each["cells"]} for each in (before, now)]
    for place, one, other in (("there", *cells), ("here", *reversed(cells))):
        names = [name for name in one if name not in other]
        if names:
            listed = ", ".join(repr(name) for name in names[:3]) + (", …" if names[3:] else "")
            found.append(f"{len(names)} cells only {place}: {listed}")
    for name in cells[0]:
        own = changed(cells[0][name], cells[1].get(name, cells[0][name]))
        if own:
            found.append(f"cell {name!r}: {', '.join(own)}")
    if not found and list(cells[0]) != list(cells[1]):
        found.append("the cells are in another order")
    return found + changed({"title": before["title"]}, {"title": now["title"]}, "is ")


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: cell[key] for key in ("control", "draw", "of")}
    return values | dict(cell["config"] or {})


def _asked(values: Mapping[str, Any]) -> Iterable[tuple[str, str | None, dict[str, Any]]]:
    """Yield of every cell its place in the file, its name if it has one, and its fields."""
    for key in values:
        if key == "grid":
            yield from _combinations(values[key] or [])
        elif key == "cells":
            yield from _single(values[key] or [])


def _combinations(parts: Any) -> Iterable[tuple[str, str | None, dict[str, Any]]]:
    several = isinstance(parts, list)
    for number, part in enumerate(parts if several else [parts], 1):
        where = f"grid, part {number}" if several else "grid"
        axes = _fields(where, part)
        size = 1
        for name, choices in axes.items():
            if not isinstance(choices, list) or not choices:
                raise GridError(f"{where}: {name} is {choices!r}, expected a list of values")
            size *= len(choices)
        if size > MOST_CELLS:
            raise GridError(f"{where}: {size} combinations, expected at most {MOST_CELLS}")
        for combination in itertools.product(*axes.values()):
            if axes:
                yield where, None, dict(zip(axes, combination, strict=True))


def _single(cells: Any) -> Iterable[tuple[str, str | None, dict[str, Any]]]:
    if not isinstance(cells, list):
        raise GridError(f"cells is {cells!r}, expected a list of mappings")
    for number, each in enumerate(cells, 1):
        where = f"cells, number {number}"
        changes = dict(_mapping(where, each))
        name = changes.pop("name", None)
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise GridError(f"{where}: name is {name!r}, expected text")
        yield where, name, _fields(where, changes)


def _with_controls(
    names: Mapping[str, VPSConfig], controls: Sequence[str], draws: int
) -> tuple[Cell, ...]:
    """List the baseline, then every cell and its controls; one may serve several cells."""
    # A control of equal settings is one: guidance is what random indices take away, so cells that
    # differ in the builder alone share them.
    shared: dict[tuple[str, int, VPSConfig], list[str]] = {}
    for name, config in names.items():
        if config.builder == "random":
            continue
        for control, draw in itertools.product(controls, range(draws)):
            shared.setdefault((control, draw, _of_control(control, config)), []).append(name)
    cells = [Cell(0, BASELINE)]
    for name, config in names.items():
        cells.append(Cell(len(cells), name, config))
        for (control, draw, settings), served in shared.items():
            if served[0] == name:
                title = f"{name} · {control}" + (f" {draw + 1}" if draws > 1 else "")
                cells.append(Cell(len(cells), title, settings, control, draw, tuple(served)))
    return tuple(cells)


def _of_control(control: str, config: VPSConfig) -> VPSConfig:
    return config.replace(builder="random") if control == "random_indices" else config


def _controls(value: Any) -> Sequence[str]:
    if value is True:
        return CONTROLS
    if value is False:
        return ()
    if not isinstance(value, list):
        raise GridError(
            f"controls is {value!r}, expected true, false or a list of {', '.join(CONTROLS)}"
        )
    for name in value:
        if name not in CONTROLS:
            known = ", ".join(CONTROLS)
            raise GridError(
                f"controls: unknown control {name!r}, expected {known}{_nearest(name, CONTROLS)}"
            )
    return tuple(dict.fromkeys(value))


def _config(where: str, fixed: VPSConfig, changes: Mapping[str, Any]) -> VPSConfig:
    try:
        return fixed.replace(**changes)
    except (ValueError, TypeError) as error:
        raise GridError(f"{where}: {error}") from None


def _fields(where: str, value: Any) -> dict[str, Any]:
    found = dict(_mapping(where, {} if value is None else value))
    for name in found:
        if name not in VPSConfig.field_names():
            hint = nearest_field(name) if isinstance(name, str) else ""
            raise GridError(f"{where}: VPSConfig has no field {name!r}{hint}")
    return {name: numbers(name, each) for name, each in found.items()}


def numbers(name: str, value: Any) -> Any:
    """Turn what YAML 1.1 reads as text in a field of numbers, such as ``1e-3``, into numbers."""
    if isinstance(value, list):
        return [numbers(name, each) for each in value]
    kind = next(str(field.type) for field in dataclasses.fields(VPSConfig) if field.name == name)
    if isinstance(value, str) and "float" in kind:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _name(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_written(value)}" for name, value in changes.items()) or "fixed"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(_written(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise GridError(f"{where}: expected a mapping, got {type(value).__name__}: {value!r:.60}")
    return value


def _nearest(name: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""

"""Grid files and the cells they ask for."""

from pathlib import Path

import pytest

from vps import VPSConfig
from vps.evaluation.grid import CONTROLS, Cell, GridError, make_grid, read_grid

ROOT = Path(__file__).parents[2]


def test_grid_makes_the_cells_it_says(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(
        """\ufeff
        title: what helps
        fixed: {builder: sk, alpha: 1e-2}
        cells:
          - {name: no clip, tau: null}
          - {target_modules: all-linear, scope: sequence}
        grid:
          - {gamma: [0.3, 0.5], rank: [1, 2]}
          - gamma: [0.5, 0.7]
            rank: [2]
            adaptive_gamma: [true]
            target_modules: [[q_proj, k_proj]]
        controls: false
        """
    )
    found = read_grid(path)
    base = VPSConfig(builder="sk", scope="token", alpha=0.01)
    fixed = base.replace(adaptive_gamma=False, adaptive_rank=False)
    pair = base.replace(
        adaptive_rank=False, rank=2, target_modules=("q_proj", "k_proj"), adaptive_gamma=True
    )
    wanted = {
        "baseline": None,
        "no clip": base.replace(tau=None),
        "target_modules=all-linear scope=sequence": base.replace(
            target_modules="all-linear", scope="sequence"
        ),
        "gamma=0.3 rank=1": fixed.replace(gamma=0.3, rank=1),
        "gamma=0.3 rank=2": fixed.replace(gamma=0.3, rank=2),
        "gamma=0.5 rank=1": fixed.replace(gamma=0.5, rank=1),
        "gamma=0.5 rank=2": fixed.replace(gamma=0.5, rank=2),
        "gamma=0.5 rank=2 adaptive_gamma=on target_modules=q_proj,k_proj": pair.replace(gamma=0.5),
        "gamma=0.7 rank=2 adaptive_gamma=on target_modules=q_proj,k_proj": pair.replace(gamma=0.7),
    }
    assert found.title == "what helps"
    assert {cell.name: cell.config for cell in found.cells} == wanted
    assert [cell.index for cell in found.cells] == list(range(9))
    assert all(Cell.from_dict(cell.as_dict()) == cell for cell in found.cells)
    written = tmp_path / "g.json"
    written.write_text('{"grid": {"alpha": [1e-3], "gamma": [0.1]}, "controls": ["random_noise"]}')
    assert [cell.name for cell in read_grid(written).cells] == [
        "baseline", "alpha=0.001 gamma=0.1", "alpha=0.001 gamma=0.1 · random_noise"
    ]  # fmt: skip


def test_every_cell_has_its_controls():
    found = make_grid({"grid": {"builder": ["sk", "sc", "random"], "gamma": [0.3]}, "draws": 2})
    names = [cell.name for cell in found.cells if cell.control is None]
    assert names == ["baseline", *(f"builder={b} gamma=0.3" for b in ("sk", "sc", "random"))]
    served = {name: [] for name in names}
    for cell in found.cells:
        for name in cell.of:
            served[name].append((cell.control, cell.draw))
            own = next(other.config for other in found.cells if other.name == name)
            random = cell.control == "random_indices"
            assert cell.config == (own.replace(builder="random") if random else own)
    every = [(control, draw) for control in CONTROLS for draw in (0, 1)]
    assert sorted(served[names[1]]) == sorted(served[names[2]]) == every
    assert served["baseline"] == served[names[3]] == []  # random is a control itself
    shared = [cell for cell in found.cells if cell.control == "random_indices"]
    assert [cell.of for cell in shared] == [tuple(names[1:3])] * 2
    assert len({cell.name for cell in found.cells}) == len(found.cells)
    some = make_grid({"cells": [{"gamma": 0.1}], "controls": ["random_noise"]})
    assert [cell.control for cell in some.cells] == [None, None, "random_noise"]


def test_example_grid():
    found = read_grid(ROOT / "benchmarks/grids/smollm2.yaml")
    asked = [cell for cell in found.cells if cell.control is None]
    assert len(asked) >= 21 and len(found.cells) > 3 * len(asked)
    reference = next(cell.config for cell in asked if cell.name.startswith("reference"))
    for cell in asked[1:]:
        differs = [n for n in VPSConfig.field_names()
                   if getattr(cell.config, n) != getattr(reference, n)]  # fmt: skip
        assert len(differs) <= 1 or cell.name.startswith("adaptive"), (cell.name, differs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gird": {}}, "unknown key 'gird', expected one of .*did you mean 'grid'"),
        ({"gamma": 0.3}, "unknown key 'gamma', .*put fields of VPSConfig under 'fixed' or 'grid'"),
        ({"grid": {"gama": [1]}}, "grid: VPSConfig has no field 'gama'; did you mean 'gamma'"),
        ({"grid": [{"gamma": 0.3}]}, "grid, part 1: gamma is 0.3, expected a list of values"),
        ({"grid": {"gamma": []}}, "gamma is .., expected a list"),
        ({"grid": {"gamma": [-1]}}, "grid: VPSConfig.gamma is -1, expected a finite number ≥ 0"),
        ({"grid": {"tau": ["none"]}}, "VPSConfig.tau is 'none', expected"),
        ({"grid": {"seed": list(range(200)), "rank": [1] * 51}}, "10200 combinations, expected at"),
        ({"cells": {"gamma": 0.3}}, "cells is .*, expected a list of mappings"),
        ({"cells": [{"name": 3, "gamma": 0.3}]}, "cells, number 1: name is 3, expected text"),
        ({"cells": [{"name": "baseline", "gamma": 0.3}]}, "another cell 'baseline'"),
        (
            {"cells": [{"name": "a", "gamma": 0.3}, {"name": "b", "gamma": 0.3}]},
            "number 2: the settings are those of cell 'a'",
        ),
        ({"fixed": ["sk"], "cells": [{}]}, "fixed: expected a mapping, got list"),
        ({"fixed": {"rank": 0}, "cells": [{}]}, "VPSConfig.rank is 0, expected 1 to 64"),
        ({"fixed": {"rank": 1}}, "there is no cell; give a 'grid' or 'cells'"),
        ({"cells": [{}], "controls": ["random"]}, "unknown control 'random'.*mean 'random_"),
        ({"cells": [{}], "controls": "all"}, "controls is 'all', expected true, false or a list"),
        ({"cells": [{}], "draws": 0}, "draws is 0, expected an integer 1 to 100"),
        ({"cells": [{}], "title": 3}, "title is 3, expected text"),
        ([1], "the grid: expected a mapping, got list"),
    ],
)
def test_grid_errors_name_what_is_wrong(values, message):
    with pytest.raises(GridError, match=message):
        make_grid(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.yaml", "grid: [", "g.yaml: not valid YAML: .*line 1"),
        ("g.yaml", "grid: {gamma: [1]}\ngrid: {rank: [1]}", "the key 'grid' comes twice"),
        ("g.yaml", "grid: {!!python/name:os.system : [1]}", "not valid YAML: .*python/name"),
        ("g.yaml", "", "g.yaml: the grid: expected a mapping, got NoneType"),
        ("g.json", '{"grid": {"rank": [1], "rank": [2]}}', "the key 'rank' comes twice"),
        ("g.json", "{", "g.json: not valid JSON"),
        ("g.yaml", b"\xff\xfe\xfa", "g.yaml: not UTF-8 text, at byte 0"),
        ("g.json", f'{{"grid": {"[" * 700}1{"]" * 700}}}', "g.json: "),
        ("g.yaml", "title: 2024-13-45", "g.yaml: not valid YAML: month must be in 1..12"),
    ],
)
def test_grid_file_errors(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GridError, match=message):
        read_grid(tmp_path / name)


def test_what_yaml_merges_in_may_be_set_anew(tmp_path):
    (tmp_path / "g.yaml").write_text(
        "fixed: &all {builder: sk, gamma: 0.3}\ncells: [{<<: *all, gamma: 0.5}]\ncontrols: false"
    )
    cells = read_grid(tmp_path / "g.yaml").cells
    assert [cell.config.gamma for cell in cells[1:]] == [0.5]

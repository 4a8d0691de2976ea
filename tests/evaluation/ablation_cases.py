"""A grid, what its cells give, and what an earlier version left of a run."""

import json

from vps.evaluation.grid import make_grid
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Evaluation

SETTINGS = {"model": "m", "tasks": ["t"], "limit": None}


def outcomes(cell, documents=6):
    """Numbers that depend on the cell alone."""
    gamma = 0 if cell.config is None else round(10 * cell.config.gamma)
    return [
        Outcome("t", str(i), "acc", float((i * 7 + gamma + cell.draw) % 3 == 0))
        for i in range(documents)
    ] + [
        Outcome("text", str(i), "nll", 2.5 + i + 0.01 * gamma, None, 10.0 + i)
        for i in range(documents)
    ]


def evaluate(cell):
    return Evaluation(outcomes(cell), {"loglikelihood": "token"})


def grid(*gammas, **more):
    return make_grid({"grid": {"gamma": list(gammas or (0.3, 0.5))}, "controls": False} | more)


TEN = grid(*(i / 10 for i in range(1, 10)))  # cells


def by_an_earlier_version(folder):
    """Make a finished run what version 0.1 left, all cells as lines of one file; those lines."""
    definition = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(definition | {"format": "vps-ablation-1"}))
    lines = []
    for path in sorted(folder.glob("cells/*.json"), key=lambda path: int(path.stem)):
        values = json.loads(path.read_text())
        for group in values["outcomes"]:
            group["margin"] = None
            group.setdefault("weight", None)
        lines.append(json.dumps(values).encode() + b"\n")
        path.unlink()
    (folder / "cells").rmdir()
    (folder / "cells-0.jsonl").write_bytes(b"".join(lines))
    return lines

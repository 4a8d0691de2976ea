"""Linear layers as a decoder meets them, alone and the seven of a block, by every variant.

On a GPU in CUDA graphs, one a variant, over distinct layers whose weights exceed the cache four
times, and as a second table call by call; on a CPU call by call. One stream orders the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import common, machine, results, shapes, variants
from benchmarks.common import Budget
from benchmarks.results import Case, Section


class Cell(NamedTuple):
    """One case: shapes of the layers, and sequences × tokens."""

    title: str
    shapes: tuple[tuple[int, int], ...]
    groups: int
    tokens: int
    dtype: torch.dtype
    single: bool


def single_cells(device: str) -> Iterator[list[Cell]]:
    """Layers by themselves, a list for each mean over shapes."""
    for dtype in shapes.DTYPES[device]:
        for groups, tokens in shapes.TOKENS[device]:
            yield [
                Cell(
                    f"{d_in} to {d_out}, {title(groups, tokens, dtype)}",
                    ((d_in, d_out),), groups, tokens, dtype, True,
                )
                for d_in, d_out in shapes.SINGLE[device]
            ]  # fmt: skip


def block_cells(device: str) -> Iterator[Cell]:
    """The seven projections of one block of every model."""
    more = shapes.MORE_TOKENS if device == "cuda" else {}
    for name in sorted(shapes.MODELS, key=lambda name: name not in more):
        model = shapes.MODELS[name]
        for dtype in shapes.DTYPES[device]:
            for groups, tokens in more.get(name, shapes.TOKENS[device]):
                text = f"7 linears of {name}, {title(groups, tokens, dtype)}"
                seven = tuple(model.projections().values())
                yield Cell(text, seven, groups, tokens, dtype, False)


def title(groups: int, tokens: int, dtype: torch.dtype) -> str:
    """Such as ``"N = 16 (16 × 1), bfloat16"``: tokens in all, and how they are grouped."""
    split = f" ({groups} × {tokens})" if groups > 1 else ""
    return f"N = {groups * tokens}{split}, {shapes.title(dtype)}"


def plan(device: str) -> list[list[Cell]]:
    """All cells, those that the targets name first; layers alone come in lists to be averaged."""
    blocks = [[cell] for cell in block_cells(device)]
    aimed_at = sum(any(f" {name}," in c.title for name in shapes.MORE_TOKENS) for [c] in blocks)
    first = aimed_at if device == "cuda" else 0
    return blocks[:first] + list(single_cells(device)) + blocks[first:]


def run(seconds: float) -> dict[str, Section]:
    """Sections ``layer`` and, on a GPU, ``layer, eager``."""
    device = machine.device()
    before = machine.clocks()
    budget = Budget(seconds)
    cells = plan(device)
    left = sum(why_not(cell, device) is None for group in cells for cell in group)
    forms: dict[str, dict[str, Case]] = {"layer": {}}
    if device == "cuda":
        forms["layer, eager"] = {}

    with torch.no_grad():
        for group in cells:
            found = []
            for cell in group:
                if (reason := why_not(cell, device)) is not None:
                    found.append(_empty(reason, device))
                else:
                    found.append(measure(cell, device, budget.part(left)))
                    left -= 1
                for form, case in found[-1].items():
                    forms[form][cell.title] = case
                    common.show(f"{form}: {cell.title}", case)
            if group[0].single:
                of = title(group[0].groups, group[0].tokens, group[0].dtype)
                for form, mean in forms.items():
                    mean[f"geometric mean, {of}"] = common.mean_case(each[form] for each in found)
                    common.show(f"{form}: geometric mean, {of}", mean[f"geometric mean, {of}"])
    return {form: common.section(cases, before) for form, cases in forms.items()}


def why_not(cell: Cell, device: str) -> str | None:
    """Why a cell is not run on this device, or ``None``."""
    here = cell.single or any(f" {name}," in cell.title for name in shapes.ON_A_CPU)
    if device == "cpu" and not here:
        return "not measured: too large for the time on a CPU"
    return None


def measure(cell: Cell, device: str, seconds: float) -> dict[str, Case]:
    """The case in every form; empty when there is no time left."""
    if seconds <= 0:
        return _empty(common.TIME_WAS_UP, device)
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
    work = variants.random_workload(
        cell.shapes, cell.groups, cell.tokens, cell.dtype, device, shapes.WEIGHT_BYTES[device]
    )
    budget = Budget(seconds)
    found = variants.of_layers(work)
    calls = len(work.linears) // len(cell.shapes)
    if device == "cpu":
        return {"layer": common.measure(found, variants.BASE, budget.left(), work=calls)}
    graphs = variants.in_graphs(found)
    in_graphs = common.measure(graphs, variants.BASE, budget.part(2), work=calls)
    del graphs
    # Call by call the host takes most of the time, and far more of it.
    eager = common.measure(found, variants.BASE, budget.left(), work=calls, least=10)
    return {"layer": in_graphs, "layer, eager": eager}


def _empty(reason: str, device: str) -> dict[str, Case]:
    case = results.case(variants.BASE, {variants.BASE: results.empty(reason)})
    return dict.fromkeys(("layer", "layer, eager") if device == "cuda" else ("layer",), case)


if __name__ == "__main__":
    common.command("layer", run, __doc__, seconds=360)

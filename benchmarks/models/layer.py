"""Time linear layers as a decoder meets them, alone and the seven of a block, by every variant.

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
    """Describe one case: shapes of the layers, and sequences × tokens."""

    title: str
    shapes: tuple[tuple[int, int], ...]
    groups: int
    tokens: int
    dtype: torch.dtype
    single: bool


def single_cells(device: str) -> Iterator[list[Cell]]:
    """Yield layers by themselves, a list for each mean over shapes."""
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
    """Yield the seven projections of one block of every model."""
    more = shapes.MORE_TOKENS if device == "cuda" else {}
    for name in sorted(shapes.MODELS, key=lambda name: name not in more):
        model = shapes.MODELS[name]
        for dtype in shapes.DTYPES[device]:
            for groups, tokens in more.get(name, shapes.TOKENS[device]):
                text = f"7 linears of {name}, {title(groups, tokens, dtype)}"
                seven = tuple(model.projections().values())
                yield Cell(text, seven, groups, tokens, dtype, False)


def title(groups: int, tokens: int, dtype: torch.dtype) -> str:
    """Name tokens and their groups, such as ``"N = 16 (16 × 1), bfloat16"``."""
    split = f" ({groups} × {tokens})" if groups > 1 else ""
    return f"N = {groups * tokens}{split}, {shapes.title(dtype)}"


def plan(device: str) -> list[list[Cell]]:
    """List all cells, the most important first; layers alone come in lists to be averaged."""
    blocks = [[cell] for cell in block_cells(device)]
    aimed_at = sum(any(f" {name}," in c.title for name in shapes.MORE_TOKENS) for [c] in blocks)
    first = aimed_at if device == "cuda" else 0
    return blocks[:first] + list(single_cells(device)) + blocks[first:]


def run(seconds: float) -> dict[str, Section]:
    """Measure the sections ``layer`` and, on a GPU, ``layer, eager``."""
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
    """Say why a cell is not run on this device, or ``None``."""
    here = cell.single or any(f" {name}," in cell.title for name in shapes.ON_A_CPU)
    if device == "cpu" and not here:
        return "not measured: too large for the time on a CPU"
    return None


def measure(cell: Cell, device: str, seconds: float) -> dict[str, Case]:
    """Time the case in every form; it is empty when there is no time left."""
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
    return variants.in_both_forms("layer", found, variants.BASE, device, budget, calls)


def _empty(reason: str, device: str) -> dict[str, Case]:
    case = results.unmeasured(variants.BASE, reason)
    return dict.fromkeys(("layer", "layer, eager") if device == "cuda" else ("layer",), case)


if __name__ == "__main__":
    common.command("layer", run, __doc__, seconds=360)

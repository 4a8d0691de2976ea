"""Which of several processes this is, where torchrun or accelerate started it."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from vps.cli.options import UsageError

PATIENCE = timedelta(weeks=52)  # processes need not be equally fast


class Process(NamedTuple):
    """Which of several processes this is, and which on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def take_process(environment: MutableMapping[str, str]) -> Process:
    """What torchrun or accelerate say of this process, taken out of the environment.

    Each process computes what is its own, so the libraries below must not look for the others.

    Raises:
        UsageError: numbers that do not fit.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [environment.pop(name, None) for name in names]
    environment.pop("LOCAL_WORLD_SIZE", None)
    if texts[0] is None and texts[1] is None:
        return Process()
    try:
        rank, world = int(texts[0] or 0), int(texts[1] or 1)
        local = rank if texts[2] is None else int(texts[2])
    except ValueError:
        world = rank = local = -1
    if not 0 <= rank < world or local < 0:
        came = ", ".join(f"{name} {text!r}" for name, text in zip(names, texts, strict=True))
        raise UsageError(f"expected 0 ≤ RANK < WORLD_SIZE and LOCAL_RANK ≥ 0, got {came}")
    return Process(rank, world, local)


def own_device(name: str, process: Process) -> str:
    """A GPU of its own for each process of one machine, where ``cuda`` names none."""
    return f"cuda:{process.local}" if name == "cuda" and process.world > 1 else name


@contextmanager
def joined(process: Process) -> Iterator[Any]:
    """The group of all processes, by which they exchange Python objects; ``None`` for one alone.

    Raises:
        UsageError: the others cannot be reached.
    """
    if process.world == 1:
        yield None
        return
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo", rank=process.rank, world_size=process.world, timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        where = [os.environ.get(name, "none") for name in ("MASTER_ADDR", "MASTER_PORT")]
        raise UsageError(
            f"process {process.rank} of {process.world} cannot join the others at "
            f"{':'.join(where)}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield dist.group.WORLD
        dist.barrier()  # none leaves while another still listens to it
    finally:
        dist.destroy_process_group()

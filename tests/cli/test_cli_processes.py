"""Which process this is, by what torchrun and accelerate put into the environment."""

import types

import pytest

from vps.cli.options import Process, joined, own_device, take_process
from vps.cli.values import UsageError
from vps.evaluation.lm import shared


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 3)),
    ],
)
def test_take_process(environment, process):
    given = environment | {"HOME": "/"}
    assert take_process(given) == process and given == {"HOME": "/"}


def test_take_process_refuses():
    for rank, world in (("2", "2"), ("x", "2"), ("-1", "2")):
        with pytest.raises(UsageError, match=f"got RANK '{rank}', WORLD_SIZE '2', LOCAL_RANK None"):
            take_process({"RANK": rank, "WORLD_SIZE": world})


def test_each_process_has_a_gpu_of_its_own():
    assert own_device("cuda", Process(3, 4, 1)) == "cuda:1"
    assert own_device("cuda", Process()) == "cuda"
    assert own_device("cpu", Process(3, 4, 1)) == "cpu"


def test_processes_that_cannot_meet(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UsageError, match="process 1 of 2 cannot join the others at none:none"):
        with joined(Process(1, 2, 1)):
            pass
    with joined(Process()) as group:
        assert group is None


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_requests_are_shared_by_context(monkeypatch, world):
    """Every rank gets the answers of all, in order, and requests of one context stay together."""
    requests = [types.SimpleNamespace(args=(f"c{i // 3}", i)) for i in range(11)]
    parts: list = [None] * world
    contexts: list = [set() for _ in range(world)]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: world)
    for rank in [*range(world), 0, world - 1]:  # the last two meet the parts of all

        def compute(own, rank=rank):
            contexts[rank] |= {each.args[0] for each in own}
            return [each.args[1] * 10 for each in own]

        def gather(into, own, group, rank=rank):
            parts[rank] = own
            into[:] = [[None] * 11 if part is None else part for part in parts]

        monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)
        monkeypatch.setattr("torch.distributed.all_gather_object", gather)
        answers = shared(compute, requests, "group")
    assert answers == [i * 10 for i in range(11)]
    assert sum(map(len, contexts)) == 4 and sum(map(len, parts)) == 11
    assert shared(compute, requests, None) == [i * 10 for i in range(11)]

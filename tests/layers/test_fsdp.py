"""FSDP2 on two processes, in both orders of vps.patch and fully_shard."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys, warnings
import torch
import torch.distributed as dist
from matrix_cases import llama, run, shard
import vps
from vps import VPSConfig

warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(f"{folder}/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(rank))


for builder in ("sk", "sc"):
    config = VPSConfig(builder=builder)
    plain = llama()
    vps.patch(plain, config)
    with torch.no_grad():
        expected = run(plain, ids)
    for order in ("patch first", "shard first"):
        for layers in (False, True):
            model = llama()
            if order == "patch first":
                vps.patch(model, config)
            shard(model, layers)
            if order == "shard first":
                vps.patch(model, config)
            with torch.no_grad():
                for logits, right in zip(run(model, ids), expected, strict=True):
                    torch.testing.assert_close(logits, right, rtol=0, atol=1e-5)
            name = "model.layers.1.mlp.down_proj.weight"
            shards = model.state_dict()[name].to_local().shape[0]
            assert shards == 32, shards
            if not layers:  # gradients of x and of the parameters
                for one in (plain, model):
                    one.requires_grad_().zero_grad()
                    one(ids).logits.square().mean().backward()
                own = model.get_parameter(name).grad.full_tensor()
                right = plain.get_parameter(name).grad.clone()
                dist.all_reduce(right)
                torch.testing.assert_close(own, right / 2, rtol=1e-3, atol=1e-6)
            vps.unpatch(model)
            assert not vps.model.patching.sharpened_layers(model)
            with torch.no_grad():
                base = run(llama(), ids)
                for logits, right in zip(run(model, ids), base, strict=True):
                    torch.testing.assert_close(logits, right, rtol=0, atol=1e-5)
dist.destroy_process_group()
print("done")
"""


def test_two_processes(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (here, *here.parents[:2]))),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            out, errors = process.communicate(timeout=180)
            assert process.returncode == 0 and out.endswith("done\n"), errors[-3000:]
    finally:
        for process in started:
            process.kill()
    assert torch.distributed.is_available()

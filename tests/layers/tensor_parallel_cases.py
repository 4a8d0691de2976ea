"""What every rank of a tensor-parallel group compares with one process; a script, not a test.

Each case gives numbers or lists that :mod:`test_tensor_parallel` judges, by name and rank.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import tensor_parallel_effects  # noqa: F401  # its cases
import torch
import torch.distributed as dist
from tensor_parallel_group import (
    HIDDEN,
    RANKS,
    case,
    compared,
    decoded,
    differences,
    error,
    recorded,
    run,
    sharpened,
    tokens,
)

import vps
from vps import VPSConfig
from vps.algorithm.policy import LayerGamma
from vps.model.patching import sharpened_layers


@case(*RANKS)
def matrix(group):
    """SK, SC × scopes × prefill and cached decode, and generation."""
    results = {}
    for family in ("llama", "qwen2"):
        models = group.pair(family)
        for builder in ("sk", "sc"):
            for scope in ("sequence", "batch", "token", "prompt"):
                if family == "qwen2" and scope == "batch":
                    continue
                name = f"{family} {builder} {scope}"
                with sharpened(models, VPSConfig(builder=builder, scope=scope)):
                    results[f"{name} prefill"] = compared(models, input_ids=tokens())
                    results[f"{name} decode"] = decoded(models, tokens())
                    if scope == "sequence" and group.world == 2:
                        a, b = (
                            model.generate(tokens(), max_new_tokens=4, do_sample=False)
                            for model in models
                        )
                        results[f"{name} generate"] = {"error": float((a != b).sum())}
    return results


@case(2)
def every_setting(group):
    results = {}
    models = group.pair("short", torch.float64)
    settings = {
        "spectral": {"clip": "spectral"},
        "no clip": {"tau": None},
        "clamp": {"clamp": 0.02},
        "order 2": {"order": 2},
        "adaptive order": {"adaptive_order": True},
        "uncoupled": {"qk_coupling": False},
        "fixed": {"rank": 3, "gamma": 0.4, "adaptive_rank": False, "adaptive_gamma": False},
        "random": {"builder": "random"},
        "random fixed": {"builder": "random", "adaptive_rank": False, "adaptive_gamma": False},
        "wide": {"rank_bounds": (6, 16)},
        "everything": {"clip": "spectral", "order": 2, "clamp": 0.05, "rank_bounds": (3, 6)},
    }  # fmt: skip
    for name, changes in settings.items():
        for builder, scope in (("sk", "sequence"), ("sc", "token")):
            config = VPSConfig(**({"builder": builder, "scope": scope} | changes))
            with sharpened(models, config):
                results[f"{name} {builder} {scope}"] = compared(models, input_ids=tokens())
    return results


@case(2)
def entropy_and_history(group):
    results = {}
    models = group.pair("short", torch.float64)
    for entropy, outcomes in ((2.0, ()), (None, (True,)), (0.5, (False,) * 5)):
        with sharpened(models, VPSConfig(builder="sk"), entropy, outcomes):
            results[f"{entropy} {outcomes}"] = compared(models, input_ids=tokens())
    return results


@case(2)
def masks(group):
    """Padding to the left, to the right, a row of nothing but padding, and packed rows."""
    results = {}
    models = group.pair("short", torch.float64)
    packed = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    left, right, none = (torch.ones(2, 7, dtype=torch.long) for _ in range(3))
    left[0, :3] = 0
    right[1, 5:] = 0
    none[1] = 0
    for builder, scopes in (("sk", ("sequence", "batch", "token")), ("sc", ("sequence",))):
        for scope in scopes:
            with sharpened(models, VPSConfig(builder=builder, scope=scope)):
                for name, mask in (("left", left), ("right", right)):
                    results[f"{name} {builder} {scope}"] = compared(
                        models, input_ids=tokens(), attention_mask=mask
                    )
                results[f"packed {builder} {scope}"] = compared(
                    models, input_ids=tokens(), position_ids=packed, use_cache=False
                )
                results[f"decode {builder} {scope}"] = decoded(
                    models, tokens(), attention_mask=left
                )
                with vps.token_mask(none.bool()):
                    results[f"none {builder} {scope}"] = compared(models, input_ids=tokens())
    return results


@case(2)
def calibrated(group):
    """Layers with a γ of their own, or one for each column; a query or a key with γ = 0."""
    models = group.pair("short", torch.float64)
    results = {}
    for flagged, values in {
        "proj": -0.4,
        "_proj": [0.3, -0.2, 0.1, 0.5],
        "q_proj": 0.0,
        "k_proj": 0.0,
        "o_proj": 0.0,
        "gate_proj": 0.0,
    }.items():
        for builder, order in (("sk", 1), ("sc", 2)):
            with sharpened(models, VPSConfig(builder=builder, order=order)):
                for model in models:
                    for name, layer in model.named_modules():
                        if name.endswith(flagged):
                            layer.gamma = LayerGamma(values)
                with torch.no_grad():
                    expected, got = (model(tokens()).logits for model in models)
                results[f"{flagged} {builder}"] = {"error": error(expected, got)}
    off = VPSConfig(gamma=0.0, adaptive_gamma=False)
    with sharpened(models, off), torch.no_grad():
        plain = models[0](tokens()).logits
        for model in models:
            for layer in sharpened_layers(model).values():
                layer.gamma = LayerGamma(-0.4)
        expected, got = (model(tokens()).logits for model in models)
        assert not torch.equal(expected, plain)
        results["config without γ"] = {"error": error(expected, got)}
    return results


@case(2)
def hybrid_turns_to_sc(group):
    """A layer that holds a gradient, and its coupled peer that does not."""
    models = group.pair("short", torch.float64)
    results = {}
    for flagged in ("q_proj", "k_proj", "o_proj", "up_proj"):
        with sharpened(models, VPSConfig()):
            for model in models:
                for name, layer in model.named_modules():
                    if name.endswith(flagged):
                        layer.gradient = True
            results[flagged] = compared(models, input_ids=tokens())
    return results


@case(*RANKS)
def bfloat16(group):
    """Selections may differ by rounding here, but not from rank to rank."""
    results = {}
    models = group.pair("short", torch.bfloat16)
    for builder in ("sk", "sc"):
        for scope in ("sequence", "token"):
            with sharpened(models, VPSConfig(builder=builder, scope=scope)):
                with torch.no_grad(), recorded() as (_, split):
                    expected, got = (model(input_ids=tokens()).logits for model in models)
                everyone = [None] * group.world
                dist.all_gather_object(everyone, split)
                results[f"{builder} {scope}"] = {
                    "ranks": sum(other != split for other in everyone),
                    "error": error(expected, got),
                    "size": float(expected.abs().max()),
                }
    return results


@case(*RANKS)
def more_columns_than_a_rank_holds(group):
    """Six features of the MLP over the ranks and r up to 16; one of four ranks holds none."""
    models = group.pair("narrow", torch.float64)
    results = {}
    for builder in ("sk", "sc"):
        for scope in ("sequence", "token"):
            config = VPSConfig(
                builder=builder, scope=scope, rank_bounds=(4, 16), order=2, clip="spectral"
            )
            with sharpened(models, config):
                results[f"{builder} {scope}"] = compared(models, input_ids=tokens())
    return results


@case(4)
def held(group):
    """Features of the six that this rank holds."""
    mlp = group.pair("narrow", torch.float64)[1].model.layers[0].mlp
    return {"down_proj": mlp.down_proj.weight.to_local().shape[1]}


def layers(models, name):
    return [model.get_submodule(f"model.layers.0.{name}") for model in models]


def parts(plain, split, x):
    """Outputs of both for x ``[..., d_in]``, the plain one cut as this rank's."""
    shard = split.shard
    own = slice(shard.offset, shard.offset + shard.size)
    with torch.no_grad():
        expected = plain(x)
        if split.splits_inputs:
            return expected, split(x[..., own].contiguous())
        return expected[..., own], split(x)


@case(*RANKS)
def broken_numbers(group):
    """NaN and infinity in features of one rank, in one token and in a weight."""
    results = {}
    models = group.pair("llama")
    for builder in ("sk", "sc"):
        for scope in ("sequence", "batch", "token"):
            with sharpened(models, VPSConfig(builder=builder, scope=scope)):
                for name in ("mlp.gate_proj", "mlp.down_proj"):
                    plain, split = layers(models, name)
                    for value in (float("nan"), float("inf")):
                        x = torch.randn(
                            2, 5, plain.in_features, generator=torch.Generator().manual_seed(2)
                        )
                        x[0, 1, -1] = value  # held by the last rank where inputs are split
                        x[1, 3, 0] = -value
                        expected, got = parts(plain, split, x)
                        finite = expected.isfinite()
                        results[f"{name} {builder} {scope} {value}"] = {
                            "finite": float((finite != got.isfinite()).sum()),
                            "some": float(finite.sum()),
                            "error": error(expected[finite], got[finite]),
                        }
                plain, split = layers(models, "mlp.gate_proj")
                last = plain.out_features - 1
                before = plain.weight[last, 3].item()
                plain.weight.data[last, 3] = float("nan")
                local = split.weight.to_local()
                if group.rank == group.world - 1:
                    local.data[-1, 3] = float("nan")
                x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
                expected, got = parts(plain, split, x)
                finite = expected.isfinite()
                results[f"weight {builder} {scope}"] = {
                    "finite": float((finite != got.isfinite()).sum()),
                    "some": float(finite.sum()),
                    "error": error(expected[finite], got[finite]),
                }
                plain.weight.data[last, 3] = before
                if group.rank == group.world - 1:
                    local.data[-1, 3] = before
    return results


@case(*RANKS)
def ties_across_ranks(group):
    """Whole numbers, so that sums are exact: equal rows on every rank, and equal inputs."""
    results = {}
    models = group.pair("llama")
    for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"):
        plain, split = layers(models, name)
        before = plain.weight.data.clone()
        generator = torch.Generator().manual_seed(4)
        d_out, d_in = plain.weight.shape
        whole = torch.randint(-2, 3, (d_out // 4, d_in), generator=generator).float()
        whole = whole.repeat(4, 1) if not split_inputs(name) else before.round()
        plain.weight.data.copy_(whole)
        with sharpened(models, VPSConfig(builder="sk", rank_bounds=(6, 6))):
            plain, split = layers(models, name)
            shard, local = split.shard, split.weight.to_local()
            kept = local.data.clone()
            own = slice(shard.offset, shard.offset + shard.size)
            local.data.copy_(whole[:, own] if split.splits_inputs else whole[own])
            x = torch.randint(-2, 3, (2, 5, d_in // 4), generator=generator).float().repeat(1, 1, 4)
            with recorded() as records:
                expected, got = parts(plain, split, x)
            results[name] = {"error": error(expected, got), **differences(*records)}
            local.data.copy_(kept)
            plain.weight.data.copy_(before)
    return results


def split_inputs(name):
    return name.endswith(("o_proj", "down_proj"))


def main():
    """``folder [ranks [cases…]]``: groups of 2 and 4, or one, one after the other."""
    folder, wanted = Path(sys.argv[1]), [int(text) for text in sys.argv[2:3]] or RANKS
    for ranks in wanted:
        (own := folder / str(ranks)).mkdir()
        children = []
        for rank in range(ranks):
            child = os.fork()
            if not child:
                try:
                    run(rank, ranks, own, sys.argv[3:])
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:  # the others would wait for this one
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a rank of {ranks} failed")


if __name__ == "__main__":
    main()

"""What every rank of a tensor-parallel group compares with one process; a script, not a test.

Each case gives numbers or lists that :mod:`test_tensor_parallel` judges, by name and rank. Ranks
are forks of one process, which imports everything once.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections import defaultdict
from pathlib import Path
from unittest import mock

import peft
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import vps
from vps import VPSConfig, column_wise, functional, row_wise, torch_backend
from vps.evaluation.controls import control
from vps.policy import LayerGamma
from vps.statistics import measure
from vps.tensor_parallel import TensorParallelLinear

HIDDEN, VOCABULARY = 32, 64
RANKS = (2, 4)
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=4, initializer_range=0.2,
    tie_word_embeddings=False,
)  # fmt: skip
CASES = {ranks: {} for ranks in RANKS}


def case(*ranks):
    """Run the function in groups of so many ranks."""

    def register(function):
        for number in ranks:
            CASES[number][function.__name__] = function
        return function

    return register


class Group:
    """The models of one launch: ``plain`` in this process, ``split`` over the ranks."""

    def __init__(self, folder):
        self.folder, self.models = folder, {}
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def pair(self, name, dtype=torch.float32):
        """The unsharpened plain and split model of a family."""
        if (name, dtype) not in self.models:
            torch.manual_seed(0)
            if name == "qwen2":
                plain = Qwen2ForCausalLM(Qwen2Config(**SIZES))
            else:
                # narrow: fewer features than ranks times r, and none at all on the last of four
                width = {"intermediate_size": 6} if name == "narrow" else {}
                depth = {} if name == "llama" else {"num_hidden_layers": 1}
                sizes = SIZES | width | depth
                plain = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
            for parameter in plain.parameters():
                if parameter.dim() == 1:  # biases, and scales of the norms
                    parameter.data += 0.1 * torch.randn_like(parameter)
            plain = plain.to(dtype).eval()
            path = self.folder / f"{name}-{dtype}"
            if self.rank == 0:
                plain.save_pretrained(path)
            dist.barrier()
            split = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=dtype).eval()
            self.models[name, dtype] = plain, split
        return self.models[name, dtype]


@contextlib.contextmanager
def sharpened(models, config, entropy=None, outcomes=()):
    """Both models sharpened alike."""
    for model in models:
        vps.patch(model, config)
        state = vps.policy_state(model)
        state.set_entropy(entropy)
        for improved in outcomes:
            state.record(improved)
    try:
        yield
    finally:
        for model in models:
            vps.unpatch(model)


def tokens(rows=2, length=7):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def embedded():
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x.requires_grad_()


@contextlib.contextmanager
def recorded():
    """Selections, γ and columns in use of every layer, of the plain and of the split model."""
    plain, split = [], []

    def keep(kept, out):
        used = (out.core != 0).any(1)
        kept.append([out.I_in.tolist(), out.I_out.tolist(), out.gamma.tolist(), used.tolist()])

    def wrap(function, kept):
        def wrapped(*args, **kwargs):
            out = function(*args, **kwargs)
            for each in out if isinstance(out, list) else [out]:
                keep(kept, each)
            return out

        return wrapped

    with (
        vps.backend("torch"),
        mock.patch.object(functional.one_group, "sharpen", lambda *_: None),
        mock.patch.object(torch_backend, "forward", wrap(torch_backend.forward, plain)),
        mock.patch.object(column_wise, "forward", wrap(column_wise.forward, split)),
        mock.patch.object(row_wise, "forward", wrap(row_wise.forward, split)),
    ):
        yield plain, split


def differences(plain, split):
    """Layers whose indices or columns in use differ, and the largest difference of γ."""
    assert len(plain) == len(split) > 0
    unequal = sum(a[:2] != b[:2] or a[3] != b[3] for a, b in zip(plain, split, strict=True))
    gammas = [
        abs(x - y)
        for a, b in zip(plain, split, strict=True)
        for x, y in zip(a[2], b[2], strict=True)
    ]
    return {"unequal": unequal, "gamma": max(gammas)}


def error(a, b):
    return float((a.double() - b.double()).abs().max())


def compared(models, **inputs):
    """Logits and selections of one forward pass of both models."""
    with torch.no_grad(), recorded() as records:
        expected, got = (model(**inputs).logits for model in models)
    with torch.no_grad(), vps.disabled(models[0]):
        moved = error(models[0](**inputs).logits, expected)
    return {"error": error(expected, got), "moved": moved, **differences(*records)}


def decoded(models, ids, **inputs):
    """The same for a prefill and two cached steps, each with the tokens of the plain model."""
    with torch.no_grad(), recorded() as records:
        outs = [model(ids, use_cache=True, **inputs) for model in models]
        worst = error(outs[0].logits, outs[1].logits)
        mask = inputs.get("attention_mask")
        for _ in range(2):
            chosen = outs[0].logits[:, -1:].argmax(-1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(chosen)], 1)
            outs = [
                model(chosen, past_key_values=out.past_key_values, attention_mask=mask)
                for model, out in zip(models, outs, strict=True)
            ]
            worst = max(worst, error(outs[0].logits, outs[1].logits))
        result = differences(*records)
    return {"error": worst, **result}


@case(*RANKS)
def matrix(group):
    """SK, SC × scopes × prefill and cached decode, and generation."""
    results = {}
    for family in ("llama", "qwen2"):
        models = group.pair(family)
        for builder in ("sk", "sc"):
            for scope in ("sequence", "batch", "token"):
                if group.world > 2 and family == "qwen2" and scope != "sequence":
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
        for builder, scope in (("sk", "sequence"), ("sc", "token"), ("sc", "batch")):
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
    """Padding to the left, to the right, and a row of nothing but padding."""
    results = {}
    models = group.pair("short", torch.float64)
    left, right, none = (torch.ones(2, 7, dtype=torch.long) for _ in range(3))
    left[0, :3] = 0
    right[1, 5:] = 0
    none[1] = 0
    for builder in ("sk", "sc"):
        for scope in ("sequence", "batch", "token"):
            with sharpened(models, VPSConfig(builder=builder, scope=scope)):
                for name, mask in (("left", left), ("right", right)):
                    results[f"{name} {builder} {scope}"] = compared(
                        models, input_ids=tokens(), attention_mask=mask
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


@case(2)
def leaves_no_trace(group):
    """Bits when disabled, taken back or with γ = 0; names of parameters; what is saved."""
    plain, split = group.pair("llama")
    ids = tokens()
    keys = list(split.state_dict())
    classes = [type(module) for module in split.modules()]
    with torch.no_grad():
        before = split(ids).logits
        report = vps.patch(split, VPSConfig())
        with vps.disabled(split):
            disabled = split(ids).logits
        on = split(ids).logits
        vps.set_config(split, VPSConfig(gamma=0.0, adaptive_gamma=False))
        zero = split(ids).logits
        vps.set_config(split, VPSConfig())
        again = split(ids).logits
        vps.patch(split, VPSConfig())
        twice = split(ids).logits
        path = group.folder / "saved"
        split.save_pretrained(path)
        settings = group.folder / f"settings-{group.rank}.json"
        vps.save(split, settings)
        same_keys = list(split.state_dict()) == keys
        vps.unpatch(split)
        off = split(ids).logits
        vps.load(split, settings)
        loaded = split(ids).logits
        vps.unpatch(split)
    dist.barrier()
    saved = LlamaForCausalLM.from_pretrained(path).state_dict()
    unequal = [n for n, p in plain.state_dict().items() if not torch.equal(p, saved[n])]
    return {
        "disabled": float((disabled != before).sum()),
        "zero": float((zero != before).sum()),
        "off": float((off != before).sum()),
        "on": float((on != before).sum()),
        "again": float((again != on).sum() + (twice != on).sum() + (loaded != on).sum()),
        "keys": float(not same_keys),
        "classes": float([type(module) for module in split.modules()] != classes),
        "saved": unequal,
        "report": str(report),
        "leftovers": [
            name
            for name, module in split.named_modules()
            if {"base_forward", "shard", "config", "coupling"} & set(vars(module))
            and isinstance(module, nn.Linear)
        ],
    }


@contextlib.contextmanager
def counted():
    """Numbers sent by this rank, by layer and kind of exchange."""
    sent, running = defaultdict(lambda: defaultdict(list)), ["elsewhere"]

    def wrap(name, position):
        function = getattr(dist, name)

        def wrapped(*args, **kwargs):
            sent[running[-1]][name].append(args[position].numel())
            return function(*args, **kwargs)

        return mock.patch.object(dist, name, wrapped)

    known = {"all_reduce": 0, "all_gather_into_tensor": 1, "all_to_all_single": 1}
    others = (
        "all_gather", "broadcast", "reduce", "gather", "scatter", "reduce_scatter_tensor",
        "reduce_scatter", "all_to_all", "all_gather_object", "send", "isend",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, position in known.items():
            stack.enter_context(wrap(name, position))
        for name in others:
            stack.enter_context(
                mock.patch.object(dist, name, mock.Mock(side_effect=AssertionError(name)))
            )
        yield sent, running


@case(*RANKS)
def communication(group):
    """What each layer sends, for two sequences of 7 tokens."""
    _, split = group.pair("llama")
    results = {}
    configs = {
        "sk": VPSConfig(builder="sk", scope="sequence"),
        "sk token": VPSConfig(builder="sk", scope="token"),
        "sk uncoupled": VPSConfig(builder="sk", qk_coupling=False),
        "sc": VPSConfig(builder="sc"),
        "sc token": VPSConfig(builder="sc", scope="token"),
        "sc no clip": VPSConfig(builder="sc", tau=None),
        "spectral order 2": VPSConfig(builder="sk", clip="spectral", order=2),
    }
    for name, config in configs.items():
        vps.patch(split, config)
        with counted() as (sent, running):
            handles = []
            for layer, module in split.named_modules():
                if isinstance(module, TensorParallelLinear):
                    handles += [
                        module.register_forward_pre_hook(
                            lambda *_, layer=layer: running.append(layer)
                        ),
                        module.register_forward_hook(lambda *_: running.pop() and None),
                    ]
            with torch.no_grad():
                split(tokens())
            for handle in handles:
                handle.remove()
        vps.unpatch(split)
        results[name] = {
            layer.removeprefix("model.layers.0."): kinds
            for layer, kinds in sent.items()
            if layer.startswith("model.layers.0.")
        }
    return results


@case(*RANKS)
def gradients(group):
    """∂L/∂x and ∂L/∂W, with clamp, masks and SC."""
    results = {}
    models = group.pair("short", torch.float64)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for name, config in {
        "sk": VPSConfig(builder="sk"),
        "sc clamp": VPSConfig(builder="sc", clamp=0.05, order=2),
        "token": VPSConfig(builder="sk", scope="token", clamp=0.05),
    }.items():
        with sharpened(models, config):
            found = []
            for model in models:
                embeds = embedded()
                logits = model(inputs_embeds=embeds, attention_mask=mask).logits
                logits[:, 4:].square().mean().backward()
                weights = [
                    layer.get_parameter(name).grad
                    for layer in model.model.layers
                    for name in (
                        "self_attn.q_proj.weight", "self_attn.o_proj.weight",
                        "mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.bias",
                    )
                ]  # fmt: skip
                weights = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
                found.append([embeds.grad, *(w.clone() for w in weights)])
                model.zero_grad()
            results[name] = {
                "error": max(error(a, b) for a, b in zip(*found, strict=True)),
                "size": float(found[0][0].abs().max()),
            }
    return results


@case(2)
def statistics(group):
    """What the policy decides and the size of every update, over the whole of each layer."""
    models, results = group.pair("short", torch.float64), {}
    for builder in ("sk", "sc"):
        with sharpened(models, VPSConfig(builder=builder)):
            found = [measure(model, {"input_ids": tokens()}) for model in models]
        for plain, split in zip(*found, strict=True):
            assert plain.name == split.name
            names = ("sigma", "gamma", "rank", "energy", "relative_size")
            worst = max(abs(getattr(plain, name) - getattr(split, name)) for name in names)
            results[f"{builder} {plain.name}"] = {"error": worst}
    return results


@case(2)
def refusals(group):
    """Styles and layers that cannot be sharpened, and calls that cannot be computed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        ColwiseParallel,
        RowwiseParallel,
        TensorParallelLayer,
    )

    mesh = init_device_mesh("cpu", (group.world,))

    def holder(style, placement=None):
        module = nn.Module()
        module.q_proj = nn.Linear(8, 8)
        if placement is not None:
            module.q_proj.weight = nn.Parameter(
                distribute_tensor(module.q_proj.weight.data, mesh, [placement])
            )
        style.install_forward(module.q_proj, mesh)
        return module

    modules = {
        "sequence_parallel": holder(ALL_PARALLEL_STYLES["sequence_parallel"]),
        "replicate": holder(TensorParallelLayer()),
        "packed_colwise": holder(ALL_PARALLEL_STYLES["packed_colwise"]),
        "scattered": holder(RowwiseParallel(output_layouts=Shard(1)), Shard(1)),
        "split input": holder(ColwiseParallel(input_layouts=Shard(1)), Shard(0)),
        "dtensors": holder(ColwiseParallel(use_local_output=False), Shard(0)),
        "replicated weight": holder(ALL_PARALLEL_STYLES["colwise"], Replicate()),
        "wrong dim": holder(ALL_PARALLEL_STYLES["rowwise"], Shard(0)),
        "plain weight": holder(ALL_PARALLEL_STYLES["colwise"]),
    }
    messages = {}
    for name, module in modules.items():
        try:
            messages[name] = str(vps.patch(module))
        except ValueError as refusal:
            messages[name] = str(refusal)

    _, split = group.pair("llama")
    vps.patch(split)
    with vps.backend("reference"):
        try:
            split(tokens())
        except RuntimeError as refusal:
            messages["backend"] = str(refusal)
    for layer in split.modules():
        if isinstance(layer, TensorParallelLinear):
            layer.memory = vps.lbfgs.CurvatureMemory()
            layer.memory.record(torch.zeros(4), torch.zeros(4))
            layer.memory.record(torch.ones(4), torch.ones(4))
    try:
        split(tokens())
    except RuntimeError as refusal:
        messages["memory"] = str(refusal)
    for layer in split.modules():
        if isinstance(layer, TensorParallelLinear):
            layer.memory = None
    try:
        with control(split, "random_noise"):
            split(tokens())
    except TypeError as refusal:
        messages["control"] = str(refusal)
    adapters = peft.LoraConfig(target_modules=["q_proj"])
    try:
        peft.get_peft_model(split, adapters)
    except TypeError as refusal:
        messages["adapter"] = str(refusal)
    vps.unpatch(split)
    adapted = nn.Module()
    adapted.q_proj = nn.Linear(8, 8)
    adapted.q_proj.weight = nn.Parameter(
        distribute_tensor(adapted.q_proj.weight.data, mesh, [Shard(0)])
    )
    ALL_PARALLEL_STYLES["colwise"].install_forward(adapted.q_proj, mesh)
    adapted.q_proj = peft.tuners.lora.Linear(adapted.q_proj, "default", config=adapters, r=2)
    try:
        vps.patch(adapted)
    except ValueError as refusal:
        messages["adapted"] = str(refusal)
    return messages


@case(2)
def other_styles(group):
    """Outputs that are gathered and inputs that come whole."""
    from transformers.distributed import DistributedConfig

    plain, _ = group.pair("short", torch.float64)
    plan = {
        "model.layers.*.self_attn.q_proj": "colwise_gather_output",
        "model.layers.*.self_attn.k_proj": "colwise_gather_output",
        "model.layers.*.self_attn.v_proj": "colwise_gather_output",
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    split = AutoModelForCausalLM.from_pretrained(
        group.folder / "short-torch.float64",
        distributed_config=DistributedConfig(tp_plan=plan),
        dtype=torch.float64,
    ).eval()
    models, results = (plain, split), {}
    for builder in ("sk", "sc"):
        with sharpened(models, VPSConfig(builder=builder)):
            results[builder] = compared(models, input_ids=tokens())
            found = []
            for model in models:
                embeds = embedded()
                model(inputs_embeds=embeds).logits.square().mean().backward()
                found.append(embeds.grad)
                model.zero_grad()
            results[f"{builder} gradient"] = {"error": error(*found)}
    return results


def run(rank, ranks, folder, names):
    """One rank; its results go to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group, results = Group(folder), {}
    for name in names or CASES[ranks]:
        results[name] = CASES[ranks][name](group)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


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

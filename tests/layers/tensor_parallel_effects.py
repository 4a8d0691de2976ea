"""What tensor-parallel sharpening sends, leaves behind, differentiates and refuses: more cases."""

import contextlib
from collections import defaultdict
from unittest import mock

import peft
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from evaluation_cases import plain_model, tokenizer
from tensor_parallel_group import RANKS, case, compared, embedded, error, sharpened, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import vps
from vps import VPSConfig
from vps.evaluation.controls import control
from vps.layers.shards.tensor_parallel import TensorParallelLinear
from vps.model.statistics import measure


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

    known = {"all_reduce": 0, "all_gather": 1, "all_to_all_single": 1}
    others = (
        "all_gather_into_tensor", "broadcast", "reduce", "gather", "scatter",
        "reduce_scatter_tensor", "reduce_scatter", "all_to_all", "all_gather_object", "send",
        "isend",
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
    """∂L/∂x and ∂L/∂W, with clamp, masks, packed rows and SC."""
    results = {}
    models = group.pair("short", torch.float64)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    starts = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    padded, packed = {"attention_mask": mask}, {"position_ids": starts, "use_cache": False}
    for name, (config, inputs) in {
        "sk": (VPSConfig(builder="sk"), padded),
        "sc clamp": (VPSConfig(builder="sc", clamp=0.05, order=2), padded),
        "token": (VPSConfig(builder="sk", scope="token", clamp=0.05), padded),
        "packed": (VPSConfig(builder="sc"), packed),
    }.items():
        with sharpened(models, config):
            found = []
            for model in models:
                embeds = embedded()
                logits = model(inputs_embeds=embeds, **inputs).logits
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
                x = embedded()  # of a gradient, through layers split by columns and by rows
                y = model.model.layers[0].mlp(x)
                (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                found[-1] += torch.autograd.grad(g.square().sum() / 1e4, x)
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
def refinement(group):
    """Answers, losses, decisions and gradients of a refinement, each rank for itself."""
    plain, path = plain_model(layers=1), group.folder / "refined"
    if group.rank == 0:
        plain.save_pretrained(path)
    dist.barrier()
    split = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32).eval()
    found = []
    for model in (plain, split):
        vps.patch(model, VPSConfig(lbfgs=False))
        result = vps.refine(model, tokenizer(), "2 + 3 =", "5", iterations=3, max_new_tokens=3)
        found.append(result.as_dict())
    return {"plain": found[0], "split": found[1]}


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
        "hooked": holder(ALL_PARALLEL_STYLES["colwise"], Shard(0)),
    }
    add_hook_to_module(modules["hooked"].q_proj, ModelHook())
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
            layer.memory = vps.algorithm.lbfgs.CurvatureMemory()
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

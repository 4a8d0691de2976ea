"""One matrix: {plain, LoRA, int8, nf4, torchao, offload, FSDP2} × scopes × {SK, SC} × {prefill,
decode}.

Every cell against a model whose linears call the reference with the dense, merged weights. The
tensor-parallel row is in test_tensor_parallel.py.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from matrix_cases import IDS, llama, oracle, quantized, replaced, run, shard, weights_of

import vps
from vps import VPSConfig

pytestmark = pytest.mark.filterwarnings("ignore")
QUANTIZED = ("int8", "nf4", "torchao int8", "torchao int4", "torchao fp8")
FORMS = {
    "plain": {"weight"},
    "LoRA before": {"opaque (lora.Linear)"},
    "LoRA after": {"weight"},
    "int8": {"opaque (Linear8bitLt)"},
    "nf4": {"opaque (Linear4bit)"},
    "torchao int8": {"opaque (Int8Tensor)"},
    "torchao int4": {"opaque (IntxUnpackedToInt8Tensor)"},
    "torchao fp8": {"opaque (Float8Tensor)"},
    "nf4 with LoRA": {"opaque (lora.Linear)", "opaque (Linear4bit)"},
    "LoRA, CPU offload, patch": {"opaque (lora.Linear)"},
    "LoRA, FSDP2, patch": {"opaque (lora.Linear)"},
    "patch, CPU offload": {"weight"},
    "CPU offload, patch": {"opaque (offloaded Linear)"},
    "disk offload, patch": {"opaque (offloaded Linear)"},
    "patch, FSDP2": {"weight"},
    "FSDP2, patch": {"opaque (FSDP2 Linear)"},
    "patch, FSDP2 of layers": {"weight"},
    "FSDP2 of layers, patch": {"opaque (FSDP2 Linear)"},
}
SCOPES = ("sequence", "token", "prompt")
CELLS = [(scope, builder) for scope in SCOPES for builder in ("sk", "sc")]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """One process by itself."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lora(targets):
    from peft import LoraConfig

    return LoraConfig(target_modules=targets, r=3, lora_alpha=7)


def adapt(model, targets):
    from peft import get_peft_model

    model = get_peft_model(model, lora(targets)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def offload(model, where, folder):
    from accelerate import cpu_offload, disk_offload

    if where == "cpu":
        return cpu_offload(model, execution_device="cpu")
    return disk_offload(model, str(folder), execution_device="cpu")


def build(kind, config, folder):
    """The sharpened model, its report, and the dense weights it stands for."""
    model = llama()
    if kind in QUANTIZED:
        replaced(model, quantized(kind))
        known = weights_of(model)
        if kind == "int8":  # whose H is no product with W, for x is quantized too
            known = []
            replaced(model, lambda layer: (known.append(copy.deepcopy(layer)), layer)[1])
        return model, vps.patch(model, config), known
    if kind == "nf4 with LoRA":
        replaced(model, quantized("nf4"))
    known = weights_of(model)
    if "LoRA" in kind:
        targets = ["q_proj", "v_proj", "down_proj"] if "nf4" in kind else "all-linear"
        if kind == "LoRA after":
            report = vps.patch(model, config)
            model = adapt(model, targets)
            return model, report, merged(model, known)
        model = adapt(model, targets)
        known = merged(model, known)  # for nf4: what merging into 4 bits would not hold
        if "FSDP2" in kind:
            shard(model.base_model.model, False)
        elif "offload" in kind:
            offload(model, "cpu", folder)
        return model, vps.patch(model, config), known
    report = vps.patch(model, config) if kind.startswith("p") else None
    if "FSDP2" in kind:
        shard(model, "layers" in kind)
    elif "offload" in kind:
        offload(model, "disk" if "disk" in kind else "cpu", folder)
    return model, report or vps.patch(model, config), known


def in_order(model):
    found = []
    replaced(model.base_model.model, lambda layer: (found.append(layer), layer)[1])
    return found


def merged(model, known):
    return [
        (W + layer.get_delta_weight("default").double() if hasattr(layer, "lora_A") else W, b)
        for (W, b), layer in zip(known, in_order(model), strict=True)
    ]


LITERAL = {}


def literal(kind, known, config):
    """What the oracle gives, once for all kinds of the same weights."""
    same = "as LoRA" if "LoRA" in kind and "nf4" not in kind else "as plain"
    if kind in QUANTIZED or "nf4" in kind:
        same = kind
    key = same, config.scope, config.builder, config.gamma_bounds
    if key not in LITERAL:
        LITERAL[key] = run(oracle(known, config), IDS)
    return LITERAL[key]


@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_matrix(kind, tmp_path, request):
    if "FSDP2" in kind:
        request.getfixturevalue("process_group")
    model, report, known = build(kind, VPSConfig(), tmp_path)
    assert set(report.forms.values()) == FORMS[kind] and len(report.patched) == 14
    assert len(report.coupled) == 2 and not report.refused and not report.not_patched
    plain = literal(kind, known, VPSConfig(gamma_bounds=(0, 0)))
    for scope, builder in CELLS:
        config = VPSConfig(scope=scope, builder=builder)
        vps.set_config(model, config)
        expected = literal(kind, known, config)
        logits = run(model, IDS)
        for part, right, base in zip(logits, expected, plain, strict=True):
            assert (right - base).abs().max() > 0.1
            torch.testing.assert_close(part, right, rtol=0, atol=1e-5)
    with vps.disabled(model):
        off = run(model, IDS)
    for part, base in zip(off, plain, strict=True):
        torch.testing.assert_close(part, base, rtol=0, atol=1e-5)
    vps.unpatch(model)
    for part, before in zip(run(model, IDS), off, strict=True):
        assert torch.equal(part, before)
    assert not vps.model.patching.sharpened_layers(model)


@pytest.mark.parametrize("kind", ["LoRA before", "nf4", "CPU offload, patch", "FSDP2, patch"])
@torch.no_grad()
def test_padding_does_not_count(kind, tmp_path, request):
    if "FSDP2" in kind:
        request.getfixturevalue("process_group")
    model, _, _ = build(kind, VPSConfig(), tmp_path)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    alone = run(model, IDS[:1, 2:])
    together = run(model, IDS, mask=mask)
    torch.testing.assert_close(together[0][:1, 2:], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1][:1], alone[1], rtol=0, atol=1e-5)

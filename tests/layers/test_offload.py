"""Layers whose weights accelerate keeps on the disk or elsewhere: right, and let go of again."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from matrix_cases import IDS, llama, quantized, replaced, run
from torch import nn

import vps
from vps import VPSConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def offloaded(order, folder, config=None):
    model = llama()
    if order == "before":
        model = disk_offload(model, str(folder), execution_device="cpu")
        vps.patch(model, config)
    else:
        vps.patch(model, config)
        model = disk_offload(model, str(folder), execution_device="cpu")
    return model


def expected(config=None):
    model = llama()
    vps.patch(model, config)
    return run(model, IDS)


def same(model, right):
    for logits, other in zip(run(model, IDS), right, strict=True):
        torch.testing.assert_close(logits, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("builder", ["sk", "sc"])
@torch.no_grad()
def test_weights_are_let_go_of(order, builder, tmp_path, monkeypatch):
    from accelerate import hooks

    config = VPSConfig(builder=builder)
    model = offloaded(order, tmp_path, config)
    loaded, fetch = [], hooks.set_module_tensor_to_device

    def watch(module, name, device, value=None, **rest):
        fetch(module, name, device, value=value, **rest)
        tensor = module._parameters.get(name)
        if tensor is not None and tensor.device.type == "cpu" and tensor.dim() == 2:
            loaded.append(weakref.ref(tensor))

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", watch)
    same(model, expected(config))
    gc.collect()
    assert len(loaded) > 14 and all(reference() is None for reference in loaded)
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.device.type == "meta"
    layers = vps.model.patching.sharpened_layers(model)
    held = [vars(layer.norms) for layer in layers.values() if layer.norms is not None]
    assert not any(isinstance(t, torch.Tensor) for values in held for t in values.values())


@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_capture_statistics_and_controls(order, tmp_path):
    from vps.evaluation.controls import CONTROLS, control
    from vps.model.statistics import measure

    model, plain = offloaded(order, tmp_path), llama()
    vps.patch(plain)
    for one, other in zip(
        measure(model, {"input_ids": IDS}), measure(plain, {"input_ids": IDS}), strict=True
    ):
        assert one.name == other.name
        for field in ("gamma", "rank", "energy", "relative_size"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4)
    for name in CONTROLS:
        with control(model, name, seed=1), control(plain, name, seed=1):
            torch.testing.assert_close(
                model(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-4, msg=name
            )
    with torch.enable_grad(), vps.capture(model) as captured:
        model(IDS).logits.sum().backward()
        assert all(record.gradient_mean is not None for record in captured.values())


@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_hooks_of_accelerate_come_off(order, tmp_path):
    model = llama()
    if order == "before":
        cpu_offload(model, execution_device="cpu")
        vps.patch(model)
    else:
        vps.patch(model)
        cpu_offload(model, execution_device="cpu")
    right = expected()
    same(model, right)
    remove_hook_from_submodules(model)  # which also brings the weights back
    same(model, right)
    vps.unpatch(model)
    same(model, run(llama(), IDS))
    assert set(vps.patch(model).forms.values()) == {"weight"}
    same(model, right)


@torch.no_grad()
def test_a_device_map_of_several_places(tmp_path):
    """Blocks on the disk beside blocks in memory."""
    model = llama()
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    report = vps.patch(model)
    assert report.forms["model.layers.0.mlp.up_proj"] == "opaque (offloaded Linear)"
    assert len(report.coupled) == 2
    same(model, expected())


@torch.no_grad()
def test_unpatching_after_offloading(tmp_path):
    model = offloaded("after", tmp_path)
    run(model, IDS)
    vps.unpatch(model)
    assert all(type(m) is not vps.VPSLinear for m in model.modules())
    same(model, run(llama(), IDS))


@torch.no_grad()
def test_quantized_and_offloaded():
    model, plain = (replaced(llama(), quantized("torchao int8")) for _ in range(2))
    cpu_offload(model, execution_device="cpu")
    report = vps.patch(model)
    vps.patch(plain)
    assert set(report.forms.values()) == {"opaque (offloaded Linear)"}
    same(model, run(plain, IDS))

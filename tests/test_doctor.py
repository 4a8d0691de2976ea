"""What doctor says about this machine, and about one with less."""

import json
from importlib import util

import torch

from vps import __version__, backends, doctor


def test_facts_are_those_of_the_machine():
    facts = doctor.diagnose()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["vps"] in (__version__, "not installed as a package")
    assert f"{torch.get_num_threads()} threads" in facts["devices"]["cpu"]
    assert json.loads(json.dumps(facts)) == facts


def test_every_backend_is_available_or_has_a_reason():
    shown = doctor.diagnose()["backends"]
    assert shown == {name: reason or "available" for name, reason in backends().items()}
    assert shown["torch"] == "available"


def test_a_missing_package_says_what_to_install(monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest)
    )
    packages = doctor.diagnose()["packages"]
    assert packages["gguf"] == "missing: pip install 'vps-kernels[hf]'"
    assert set(packages) == set(doctor.OPTIONAL)


def test_a_missing_device_or_tool_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    facts = doctor.diagnose()
    assert "built without CUDA" in facts["devices"]["cuda"]
    assert facts["tools"] == {"c++": "not found", "nvcc": "not found"}


def test_every_engine_is_available_or_has_a_reason(monkeypatch):
    shown = doctor.diagnose()["engines"]
    assert set(shown) >= {"bitsandbytes", "torchao", "PEFT", "accelerate offload", "FSDP2"}
    assert {"tensor parallel", "vLLM"} <= set(shown)
    assert all(text.startswith(("available: ", "missing: ", "none: ")) for text in shown.values())
    for name in ("bitsandbytes", "torchao", "PEFT", "accelerate offload", "FSDP2"):
        assert shown[name].startswith("available: "), shown[name]
    monkeypatch.setattr(doctor.metadata, "version", lambda package: missing(package))
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    without = doctor.engines()
    assert without["bitsandbytes"] == "missing: pip install 'vps-kernels[engines]'"
    assert without["vLLM"].startswith("missing: ")
    assert "without torch.distributed" in without["FSDP2"]
    assert "without torch.distributed" in without["tensor parallel"]


def test_old_transformers_are_said(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "5.3.0")
    assert "5.3.0 is older than 5.17" in doctor.engines()["tensor parallel"]


def missing(package):
    raise doctor.metadata.PackageNotFoundError(package)

"""``vps doctor``: what this machine can run, and what to do next."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vps.cli.options import Command, Json

PROMPT = '--prompt "Why is the sky blue?"'


@dataclass(kw_only=True)
class Doctor(Command):
    """Show what this machine can run, and what to do next."""

    as_json: Json = False

    def run(self) -> None:
        """Print the facts and the advice."""
        from vps.doctor import diagnose

        facts = diagnose()
        steps = advice(facts)
        if self.as_json:
            print(json.dumps({**facts, "next": steps}, indent=2))
            return
        for section, entries in facts.items():
            print(section)
            width = max(14, *map(len, entries))
            for name, value in entries.items():
                print(f"  {name:<{width}} {value}")
        print("next")
        for step in steps:
            print(f"  {step}")


def advice(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what to do after :func:`vps.doctor.diagnose`: first what to mend, then what to try."""
    from vps.model.loading import demo_model, where_to_get_one

    steps = []
    packages, backends, devices = facts["packages"], facts["backends"], facts["devices"]

    def missing(*names: str) -> bool:
        return any(str(packages.get(name, "")).startswith("missing") for name in names)

    loads = not missing("transformers")
    if not loads:
        steps.append("to load models: pip install 'vps-kernels[hf]'")
    on_gpu = any(name.startswith("cuda:") for name in devices)
    if not on_gpu and shutil.which("nvidia-smi") is not None:
        steps.append(
            f"a GPU driver is here but not used ({devices.get('cuda', 'no CUDA')}): install torch "
            "as https://pytorch.org/get-started/locally says for your CUDA"
        )
    if on_gpu and backends["triton"] != "available":
        steps.append(f"to use the GPU well: {backends['triton']}")
    if backends["cpp"] != "available":
        how = (
            "a wheel brings it; to build it here: VPS_BUILD_CPP=1 pip install --no-build-isolation"
            " --force-reinstall --no-deps vps-kernels"
        )
        if facts["tools"]["c++"] == "not found":
            how = "a wheel brings it; to build it here, install a C++ compiler first (g++)"
        steps.append(f"the backend cpp, the fastest on a CPU, is missing: {how}")
    if not loads:
        return steps
    model = demo_model()
    if model is None:
        steps.append(f"for a small model to try: {where_to_get_one()}")
        steps.append(
            f"or one of the hub: vps generate --model HuggingFaceTB/SmolLM2-135M-Instruct {PROMPT}"
        )
    else:
        steps.append(f"see it work: vps generate --model {model} {PROMPT} --compare")
        steps.append("all of it on one page, in two minutes: vps demo")
    if missing("lm_eval", "scipy"):
        steps.append("to find out whether it helps: pip install 'vps-kernels[eval]'")
    elif model is not None:
        steps.append(f"does it help? vps eval --model {model} --tasks vps_chains_choice --limit 40")
    return steps

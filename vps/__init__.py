"""Virtual Parameter Sharpening: dynamic low-rank updates for frozen linear layers.

``y = Wx + b + γ(xA)Bᵀ`` with ``A = WᵀV`` and ``B = WU`` made on the fly from the layer's own
weight and the activations passing through. Public names are loaded when they are asked for
(PEP 562), so that ``import vps.verify`` loads no torch.
"""

import sys
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vps import backends, reference
    from vps.algorithm.policy import PolicyState
    from vps.backends.dispatch import backend
    from vps.config import VPSConfig
    from vps.fitting.calibrate import calibrate
    from vps.fitting.sensitivity import sensitivity
    from vps.functional import vps_linear
    from vps.layers.linear import VPSLinear
    from vps.masking import prompt, token_mask
    from vps.model.calibration import Calibration, clear_calibration
    from vps.model.capture import capture
    from vps.model.generation import EntropyProcessor, token_entropy
    from vps.model.patching import PatchReport, disabled, patch, policy_state, set_config, unpatch
    from vps.model.settings import load, save
    from vps.refine import Iteration, RefineResult, refine

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "EntropyProcessor",
    "Iteration",
    "PatchReport",
    "PolicyState",
    "RefineResult",
    "VPSConfig",
    "VPSLinear",
    "__version__",
    "backend",
    "backends",
    "calibrate",
    "capture",
    "clear_calibration",
    "disabled",
    "load",
    "patch",
    "policy_state",
    "prompt",
    "reference",
    "refine",
    "save",
    "sensitivity",
    "set_config",
    "token_entropy",
    "token_mask",
    "unpatch",
    "vps_linear",
]

# Modules that are public themselves; ``backends`` and ``refine`` can be called.
_MODULES = ("backends", "fitting", "reference", "refine")
_HOMES = {
    "algorithm.policy": ("PolicyState",),
    "backends.dispatch": ("backend",),
    "config": ("VPSConfig",),
    "fitting": ("calibrate", "sensitivity"),
    "functional": ("vps_linear",),
    "layers.linear": ("VPSLinear",),
    "masking": ("prompt", "token_mask"),
    "model.calibration": ("Calibration", "clear_calibration"),
    "model.capture": ("capture",),
    "model.generation": ("EntropyProcessor", "token_entropy"),
    "model.patching": (
        "PatchReport",
        "disabled",
        "patch",
        "policy_state",
        "set_config",
        "unpatch",
    ),
    "model.settings": ("load", "save"),
    "refine": ("Iteration", "RefineResult"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from its module and keep it."""
    if name in _MODULES:
        return import_module(f"vps.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vps' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"vps.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """List the public names, loaded or not, and what the module holds."""
    return sorted({*globals(), *__all__, "fitting"})


class _Moved:
    """Finds modules by the names that they had in version 0.1, which pickles of patched models
    hold; the module is the one that has moved, not a second one."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.spec: ModuleSpec | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, leaf = name.rpartition(".")
        if package != "vps" or leaf in __all__:
            return None
        for folder in ("algorithm", "backends", "layers", "layers.shards", "model", "cli"):
            moved = f"vps.{folder}.{leaf}"
            if find_spec(moved) is not None:
                return ModuleSpec(name, _Moved(moved))  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import has put that of the old name there


class _Operators:
    """Registers ``torch.ops.vps`` when torch is imported after vps: a program that torch.export
    saved asks for the operators by name, before any name of ours is used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                # A torch without what we need raises when a layer is asked for.
                with suppress(ImportError):
                    import_module("vps.functional")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.append(_Moved())  # type: ignore[arg-type]
if "torch" in sys.modules:
    import_module("vps.functional")
else:
    sys.meta_path.insert(0, _Operators())  # type: ignore[arg-type]

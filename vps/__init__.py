"""Virtual Parameter Sharpening: dynamic low-rank updates for frozen linear layers.

``y = Wx + b + γ(xA)Bᵀ`` with ``A = WᵀV`` and ``B = WU`` made on the fly from the layer's own
weight and the activations passing through.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vps import backends, reference
from vps.algorithm.policy import PolicyState
from vps.backends.dispatch import backend
from vps.config import VPSConfig
from vps.functional import vps_linear
from vps.layers.linear import VPSLinear
from vps.masking import token_mask
from vps.model.calibration import Calibration, clear_calibration
from vps.model.capture import capture
from vps.model.entropy import EntropyProcessor, token_entropy
from vps.model.patching import PatchReport, disabled, patch, policy_state, set_config, unpatch
from vps.model.settings import load, save
from vps.refine import Iteration, RefineResult, refine

if TYPE_CHECKING:
    from vps.fitting import calibrate, sensitivity

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


def __getattr__(name: str) -> Any:
    """Fitting, with what it needs for evaluation, when it is asked for: importing vps is light."""
    if name == "fitting":
        return import_module("vps.fitting")
    if name in ("calibrate", "sensitivity"):
        return getattr(import_module("vps.fitting"), name)
    raise AttributeError(f"module 'vps' has no attribute {name!r}")


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


sys.meta_path.append(_Moved())  # type: ignore[arg-type]

"""Virtual Parameter Sharpening: dynamic low-rank updates for frozen linear layers.

``y = Wx + b + γ(xA)Bᵀ`` with ``A = WᵀV`` and ``B = WU`` made on the fly from the layer's own
weight and the activations passing through.
"""

from importlib import import_module
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

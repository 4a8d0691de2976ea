"""Fit γ of every layer to examples, beside controls with as many numbers, and say what it is worth.

γ enters linearly, so a backward pass gives ``∂L/∂γ`` of all layers; a few steps of Adam on these
numbers fit them, with everything else frozen and every selection held within its step.
"""

from vps.fitting.calibrate import CONTROLS, calibrate
from vps.fitting.descent import Options
from vps.fitting.examples import Example, check_apart, read_examples
from vps.fitting.report import text
from vps.fitting.sensitivity import Sensitivity, agreement, sensitivity

__all__ = [
    "CONTROLS",
    "Example",
    "Options",
    "Sensitivity",
    "agreement",
    "calibrate",
    "check_apart",
    "read_examples",
    "sensitivity",
    "text",
]

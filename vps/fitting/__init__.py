"""Fit γ of every layer to examples, beside controls with as many numbers, and say what it is worth.

γ enters linearly, so a backward pass gives ``∂L/∂γ`` of all layers; a few steps of Adam on these
numbers fit them, with everything else frozen and every selection held within its step.

Files in reading order:

- ``examples``: prompts with answers, or texts; split, encoded, or left out with a reason.
- ``candidates``: a patched model with numbers that can be fitted, differentiably.
- ``descent``: a few steps of Adam on them, and the loss.
- ``fitted_controls``: output scale, LoRA, random and frequent features.
- ``sensitivity``: ∂L/∂γ of every layer and its noise, without fitting.
- ``verdict``: held-out comparisons, and what a calibration says of itself (``calibration.txt``).
- ``calibrate``: examples in, a :class:`vps.Calibration` out; an interrupted call goes on.
"""

from vps.fitting.calibrate import CONTROLS, calibrate
from vps.fitting.descent import Options
from vps.fitting.examples import Example, check_apart, read_examples
from vps.fitting.sensitivity import Sensitivity, agreement, sensitivity
from vps.fitting.verdict import text

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

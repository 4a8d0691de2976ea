"""Text in, losses out: verification of what a language model wrote, without evaluating it.

``L = Σ w_i ℓ_i`` with parts *numeric*, *units*, *self_consistency* and *algebraic* (SPEC §9,
docs/guides/verifier.md). Imports neither torch nor any other part of vps. In reading order:

- ``composite``: ``CompositeVerifier`` and ``check``, what most callers need
- ``losses``: whether two answers are equal, and the four parts of the loss
- ``answer``: the answer in a text: a plain one, a formula, or words
- ``text``: hostile text made plain, and the part of it that a mark names
- ``kinds``: quantities, ratios, times, dates and ranges
- ``units``: names of units and money (``units.txt``), and conversion by pint
- ``arithmetic``: exact numbers from text, bounded
- ``pool``: worker processes behind a time limit
- ``worker``: the process that answers, with limits on itself
- ``symbolic``: formulas by Math-Verify, and what it lacks
"""

from vps.verify.answer import Answer, extract_answer, extract_number
from vps.verify.composite import (
    DEFAULT_WEIGHTS,
    CompositeVerifier,
    Losses,
    Verdict,
    check,
)
from vps.verify.losses import (
    algebraic_loss,
    numeric_loss,
    self_consistency_loss,
    units_loss,
)
from vps.verify.pool import Pool, default_pool
from vps.verify.units import registry

__all__ = [
    "DEFAULT_WEIGHTS",
    "Answer",
    "CompositeVerifier",
    "Losses",
    "Pool",
    "Verdict",
    "algebraic_loss",
    "check",
    "default_pool",
    "extract_answer",
    "extract_number",
    "numeric_loss",
    "self_consistency_loss",
    "units_loss",
    "warm",
]


def warm(timeout: float = 60.0) -> None:
    """Wait until a worker of the default pool and the table of units are ready.

    No verdict waits for them then.

    Args:
        timeout: seconds to wait.

    Raises:
        TimeoutError: none was ready in time.
        ImportError: pint or math-verify is not installed.
    """
    registry()
    default_pool().warm(timeout)

"""What the verifier refuses to work out, and the two ways in which it says no."""

from __future__ import annotations

MAX_TOKENS = 256
MAX_DEPTH = 40
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
MAX_BITS = 8192
MAX_FACTORIAL = 170


class NotAnExpressionError(ValueError):
    """Text that is no expression of the grammar."""


class UndecidableError(ValueError):
    """An expression without a value, or with one that is not worked out: too large, too deep."""

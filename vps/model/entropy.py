"""Compute next-token entropy, ``ℋ = −Σ p log p`` in nats, and tell it to the policy (SPEC §5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vps.backends import dispatch
from vps.model.patching import policy_state


def token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax over the last dim, in nats.

    On CUDA a Triton kernel reads the logits once, unless they are float64.

    Args:
        logits: ``[..., vocabulary]``, floating point; −inf excludes a token.

    Returns:
        ``[...]``, computed in float64 for float64 logits and in float32 for others. NaN where a
        row holds NaN or +inf, or nothing but −inf.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: the vocabulary is empty.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"token_entropy: logits must be a floating-point tensor, got {came}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"token_entropy: logits must be [..., V] with V > 0, got {tuple(logits.shape)}"
        )
    wide = logits.dtype == torch.float64  # the kernel gives float32
    if logits.is_cuda and not wide and dispatch.backends()["triton"] is None:
        from vps.kernels import entropy

        rows = logits.detach().reshape(-1, logits.shape[-1])
        return entropy.token_entropy(rows).view(logits.shape[:-1])
    values = logits.detach() if wide else logits.detach().float()
    return torch.special.entr(values.softmax(-1)).sum(-1)


class EntropyProcessor:
    """A logits processor for ``model.generate`` that tells the policy each step's entropy.

    The policy state of a model takes one number: the mean over all sequences or beams of the step,
    finished ones included, without those whose logits are not finite. A single sequence gets its
    own ℋ, and its tokens do not depend on others. The entropy of the last step stays set until
    ``vps.policy_state(model).reset()``.

    Use: ``model.generate(..., logits_processor=[vps.EntropyProcessor(model)])``. It runs after the
    processors that transformers adds for penalties, and before those for sampling.

    Args:
        model: a sharpened model.

    Raises:
        ValueError: no sharpened layer in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.state = policy_state(model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the entropy of logits ``scores`` [B, vocabulary], and return them unchanged."""
        self.state.set_entropy(token_entropy(scores).nanmean().nan_to_num(0.0))
        return scores

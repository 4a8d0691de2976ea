"""Next-token entropy, ``ℋ = −Σ p log p`` nats, and how it reaches the policy (SPEC §5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vps.backends import dispatch
from vps.model.patching import policy_state


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax over the last dim, in nats, computed in float32 or, of float64, in it.

    On CUDA one Triton kernel reads the logits once; those in float64 go to torch.

    Args:
        logits: ``[..., vocabulary]``, floating point; −inf excludes a token.

    Returns:
        float32 ``[...]``, float64 of float64 logits; NaN where a row holds NaN or +inf, or nothing
        but −inf.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no vocabulary.
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

    The model's one policy state takes one number: the mean over the sequences, or beams, of the
    step, without those whose logits are not finite, and padding finished ones included. With
    one sequence, whose tokens then do not depend on batch-mates, it is that sequence's own ℋ. The
    last step's stays set until ``vps.policy_state(model).reset()``.

    Use: ``model.generate(..., logits_processor=[vps.EntropyProcessor(model)])``. It follows the
    processors that transformers adds for penalties and comes before those of sampling.

    Args:
        model: a sharpened model.

    Raises:
        ValueError: no sharpened layer in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.state = policy_state(model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the entropy of logits ``scores`` [B, vocabulary], which come back unchanged."""
        self.state.set_entropy(token_entropy(scores).nanmean().nan_to_num(0.0))
        return scores

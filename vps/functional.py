"""``vps_linear``: one sharpened linear layer, ``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)``.

The only door to the backends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import masking, policy, torch_backend
from vps.config import VPSConfig

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def backends() -> dict[str, str | None]:
    """Backend names, each with ``None`` when it can run or the reason why it cannot."""
    return {
        "torch": None,
        "reference": None,
        "triton": "not part of this version of vps",
        "cpp": "not part of this version of vps",
        "cuda": "not part of this version of vps",
    }


def vps_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    config: VPSConfig | None = None,
    *,
    mask: Tensor | None = None,
    state: policy.PolicyState | None = None,
    gradient: bool = False,
) -> Tensor:
    """Sharpen one linear layer.

    Args:
        x: input ``[..., d_in]`` in float16, bfloat16, float32 or float64.
        weight: frozen weight ``[d_out, d_in]``, of the dtype of x (or any under autocast).
        bias: ``[d_out]`` or ``None``.
        config: the settings; defaults of :class:`VPSConfig` when ``None``.
        mask: bool ``[...]``, x without its last dim, True counts in the statistics; ``None``
            uses what :func:`vps.token_mask` or the patched model says.
        state: entropy and improvement history.
        gradient: the layer holds a gradient, which turns ``builder="hybrid"`` into SC.

    Returns:
        ``[..., d_out]`` in the dtype of x, bit-identical to ``F.linear`` where γ is 0 and for a
        group without a counted token. Differentiable in x, weight and bias (SPEC §6).

    Raises:
        TypeError: x or weight no floating-point tensor, or a mask that is not bool.
        ValueError: shapes that do not fit, naming both.

    Source: SPEC §2–§6.
    """
    config = VPSConfig() if config is None else config
    _check(x, weight, mask)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
        with torch.autocast(kind, enabled=False):
            return vps_linear(x, weight, bias, config, mask=mask, state=state, gradient=gradient)
    r = policy.largest_rank(config, weight.shape[1], weight.shape[0])
    if policy.is_off(config) or x.numel() == 0 or r == 0:
        return F.linear(x, weight, bias)
    if mask is None:
        dims, mask = masking.token_dims(x)
    else:
        dims = tuple(mask.shape)
    grouped = x.reshape(_group_shape(dims, config.scope, x.shape[-1]))
    if mask is not None:
        mask = mask.to(x.device).reshape(grouped.shape[:-1])
    call = torch_backend.Call(config, state, gradient, r)
    y = torch_backend.sharpen(grouped, weight, bias, mask, call)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"vps_linear: x must be floating point (16 to 64 bits), got {x.dtype}")
    if weight.dim() != 2 or weight.dtype not in FLOATING:
        raise TypeError(
            "vps_linear: weight must be a floating-point matrix [d_out, d_in], "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"vps_linear: x must be [..., {weight.shape[1]}] to fit weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise TypeError(f"vps_linear: mask must be bool, got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"vps_linear: mask must be {tuple(x.shape[:-1])}, x without its last dim, "
                f"got {tuple(mask.shape)}"
            )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an argument of F.linear: all but float64 takes its dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _group_shape(dims: tuple[int, ...], scope: str, d_in: int) -> tuple[int, int, int]:
    """``[G, T, d_in]``: G groups of T tokens each (SPEC §2, scope)."""
    tokens = 1
    for dim in dims:
        tokens *= dim
    if scope == "token":
        return tokens, 1, d_in
    length = dims[-1] if scope == "sequence" and dims else tokens
    return tokens // length, length, d_in

"""Check before timing: random layers and inputs of clear selection, and the float64 oracle.

Outlier features, as trained models have them, keep scores apart; an input on which two scores come
closer than rounding is drawn again, so every backend must select the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from vps import VPSConfig, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OUTLIERS = (7.5, 6.2, 5.2, 4.3, 3.6, 3.0, 2.5, 2.0)
MARGIN = 0.01
ENERGY = 0.7  # mean x² and H²: a rank of 2, far from where it changes
DRAWS = 200


def linear(d_in: int, d_out: int, dtype: torch.dtype, device: str, bias: bool = False) -> nn.Linear:
    """Make a frozen random layer, some of whose outputs are larger than the rest."""
    layer = nn.Linear(d_in, d_out, bias, device=device, dtype=dtype).requires_grad_(False)
    randomize(layer.weight)
    return layer


def randomize(weight: Tensor) -> None:
    """Fill a weight ``[d_out, d_in]`` so that it keeps the size of its input, with outliers."""
    d_out, d_in = weight.shape
    weight.normal_()
    factors = torch.tensor(OUTLIERS[:d_out], device=weight.device, dtype=weight.dtype)
    weight[torch.randperm(d_out, device=weight.device)[: len(factors)]] *= factors[:, None]
    weight /= (d_in * weight.square().mean(dtype=torch.float32)).sqrt()


def activations(groups: int, tokens: int, d_in: int, dtype: torch.dtype, device: str) -> Tensor:
    """Draw an input ``[groups, tokens, d_in]``, some of whose features are larger than the rest."""
    x = torch.randn(groups, tokens, d_in, dtype=dtype, device=device)
    factors = torch.tensor(OUTLIERS[:d_in], device=device, dtype=dtype)
    x[..., torch.randperm(d_in, device=device)[: len(factors)]] *= factors
    return x.mul_((ENERGY / x.square().mean(dtype=torch.float32)).sqrt())


class Clear(NamedTuple):
    """Hold an input whose selection rounding cannot change, and the oracle's results for it.

    x is ``[G, T, d_in]``, y float64 ``[G, T, d_out]``, I_in and I_out ``[G, most]``.
    """

    x: Tensor
    y: Tensor
    I_in: Tensor
    I_out: Tensor


def clear_case(layer: nn.Linear, groups: int, tokens: int, config: VPSConfig) -> Clear:
    """Draw a fresh input group by group, with the float64 results of the reference.

    Raises:
        AssertionError: no input with a clear selection was drawn.
    """
    dtype, device = layer.weight.dtype, str(layer.weight.device)
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    columns = most(config)
    found: list[tuple[Tensor, ...]] = []
    for _ in range(DRAWS + groups):
        x = activations(1, tokens, layer.in_features, dtype, device)
        right = reference.vps_linear(x.double(), weight, bias, config=config)
        group = right.groups[0]
        if is_clear(group, config):
            found.append((x, right.y, group.I_in[None, :columns], group.I_out[None, :columns]))
        if len(found) == groups:
            return Clear(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    raise AssertionError(f"no clear selection in {DRAWS} inputs of {tokens} tokens")


def most(config: VPSConfig) -> int:
    """Return the columns of a selection."""
    return config.rank_bounds[1] if config.adaptive_rank else config.rank


def is_clear(group: reference.Group, config: VPSConfig, margin: float = MARGIN) -> bool:
    """Say whether rounding can change neither the selection nor the rank."""
    for scores in (group.s_in, group.s_out):
        best = scores.sort(descending=True).values[: most(config) + 1]
        if bool((best[1:] > (1 - margin) * best[:-1]).any()):
            return False
    low, high = config.rank_bounds
    level = low + (high - low) * group.sigma
    return not config.adaptive_rank or abs(level - round(level)) > margin


def check(name: str, y: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless y is near what float64 gives; exactly equal for indices.

    Raises:
        AssertionError: with the name and the relative error.
    """
    if not y.is_floating_point():
        if not torch.equal(y, expected):
            raise AssertionError(f"{name}: other indices than the oracle's")
        return
    expected = expected.double()
    error = float((y.double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE[dtype or y.dtype]:  # a NaN is no small error
        raise AssertionError(f"{name}: relative error {error:.1e}")


def why_wrong(test: Callable[[], object]) -> str | None:
    """Run a check and return its error as the reason for an empty cell, or ``None``."""
    try:
        with poisoned():
            test()
    except Exception as error:  # whatever a broken backend raises must not end the run
        return f"wrong: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN or a huge number, so that what is not written shows."""
    allocate = torch.empty

    def empty(*shape: object, **options: object) -> Tensor:
        fresh = allocate(*shape, **options)  # type: ignore[call-overload]
        if fresh.dtype.is_floating_point:
            return fresh.fill_(float("nan"))
        return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

    with mock.patch.object(torch, "empty", empty):
        yield

"""An update that a prompt has fixed: later tokens against the reference, over the random cases."""

import random

import pytest
import torch
from cases import drawn_gamma, memory_of, pairs_of, random_case, relative_error
from torch import Tensor

import vps
from vps import VPSConfig, reference
from vps.algorithm.core import square
from vps.algorithm.fixed import FixedUpdate, Held, Readers, edited
from vps.algorithm.flow import Given
from vps.algorithm.policy import LayerGamma
from vps.backends import torch_backend
from vps.functional import Projection, sharpen
from vps.model.prompt_cache import settle


def prompted(seed):
    """A random case of at least two tokens a sequence, and how many of these are its prompt."""
    case = random_case(seed)
    case["config"] = case["config"].replace(scope="prompt")
    x = case["x"]
    if x.dim() < 2:
        x = x.expand(1, 1, x.shape[-1])
    x = x.reshape(-1, x.shape[-2], x.shape[-1])
    rng = random.Random(seed)
    late = torch.randn(
        len(x), rng.randint(1, 4), x.shape[-1], dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    mask = None if case["mask"] is None else case["mask"].reshape(x.shape[:-1])
    return case, x, late, mask


def given_of(update):
    return update.given()


def decided(case, x, mask, projection):
    """What the prompt decides, by the backend of now."""
    held: list = []
    sharpen(x, (projection,), case["config"], mask=mask, state=case["state"], held=held)
    return held[0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("extra", ["", "pairs", "gamma"])
@torch.no_grad()
def test_later_tokens_equal_the_reference(backend, extra):
    compared = 0
    for seed in range(150 if backend == "torch" else 40):
        case, x, late, mask = prompted(seed)
        W, config = case["W"], case["config"]
        memory = gamma = own = None
        pairs = []
        if extra == "pairs":
            pairs = pairs_of(seed, len(W))
            memory = memory_of(pairs, len(W))
        if extra == "gamma":
            settings = vps.algorithm.policy.settings(config, case["gradient"], *W.shape[::-1], True)
            own = drawn_gamma(seed, settings.r)
            gamma = LayerGamma(own)
        projection = Projection(W, case["b"], case["gradient"], memory, gamma)
        with vps.backend(backend):
            update = decided(case, x, mask, projection)
            if update is None:
                continue
            (y,) = sharpen(late, (projection,), config, given=given_of(update))
        result = reference.vps_linear(
            x, W, case["b"], config=config, mask=mask, entropy=case["entropy"],
            outcomes=case["outcomes"], gradient=case["gradient"], memory=pairs, gamma=own,
        )  # fmt: skip
        for row, group, found in zip(late, result.groups, y, strict=True):
            chosen = group.I_in[: group.rank], group.I_out[: group.rank], group.core
            expected = reference.held_vps_linear(
                row, W, case["b"], *chosen, group.gamma, clamp=config.clamp,
                memory=pairs if config.lbfgs else (),
            )  # fmt: skip
            assert relative_error(found, expected) <= 1e-9, seed
            compared += 1
    assert compared > 50


@torch.no_grad()
def test_the_prompt_and_what_follows_equal_one_pass():
    """The reference itself: all tokens under marks, against its own later tokens."""
    for seed in range(40):
        case, x, late, mask = prompted(seed)
        whole = torch.cat([x, late], 1)
        marks = torch.zeros(whole.shape[:-1], dtype=torch.bool)
        marks[:, : x.shape[1]] = True
        counted = None
        if mask is not None:
            counted = torch.cat([mask, torch.ones(late.shape[:-1], dtype=torch.bool)], 1)
        y = reference.vps_linear(
            whole, case["W"], case["b"], config=case["config"], mask=counted, prompt=marks,
            entropy=case["entropy"], outcomes=case["outcomes"], gradient=case["gradient"],
        )  # fmt: skip
        with vps.prompt(marks):
            own = vps.vps_linear(
                whole, case["W"], case["b"], case["config"], mask=counted, state=case["state"],
                gradient=case["gradient"],
            )  # fmt: skip
        assert relative_error(own, y.y) <= 1e-9, seed
        for group, row, found in zip(y.groups, late, y.y[:, x.shape[1] :], strict=True):
            chosen = group.I_in[: group.rank], group.I_out[: group.rank], group.core
            clamp, b = case["config"].clamp, case["b"]
            again = reference.held_vps_linear(row, case["W"], b, *chosen, group.gamma, clamp=clamp)
            assert relative_error(again, found) <= 1e-9, seed


def made(seed, kind, dtype, d_in, d_out) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight, an input and a bias; ``kind`` says how large some features are."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    x = torch.randn(2, 6, d_in, generator=generator)
    if kind != "plain":
        outliers = torch.randperm(d_in, generator=generator)[:4]
        late = slice(4 if kind == "cancelling late" else 0, None)
        x[:, late, outliers] += 200 if kind == "huge" else 20
        x[..., outliers] += 2  # so that they are selected
        if kind.startswith("cancelling"):
            W[:, outliers[1::2]] = -W[:, outliers[::2]]
    b = torch.randn(d_out, generator=generator) if seed % 2 else None
    return x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "outliers", "huge", "cancelling", "cancelling late"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@torch.no_grad()
def test_sixteen_bits_err_at_most_twice_as_much_as_torch(backend, kind, dtype):
    if vps.backends()[backend] is not None:
        pytest.skip(vps.backends()[backend])
    for seed in range(16):
        sizes = [(64, 48), (192, 576), (576, 192)][seed % 3]
        x, W, b = made(seed, kind, dtype, *sizes)
        config = VPSConfig(
            scope="prompt", builder="sc" if seed % 2 else "sk", tau=None if seed % 4 else 0.8
        )
        layer, exact_layer = (Projection(W, b) for _ in range(2))
        wide = Projection(W.double(), None if b is None else b.double())
        held: list = []
        with vps.backend(backend):
            sharpen(x[:, :4], (layer,), config, held=held)
            update = held[0]
            (found,) = sharpen(x[:, 4:], (layer,), config, given=given_of(update))
        core = update.core._replace(
            matrix=update.core.matrix.double(), gamma=update.core.gamma.double()
        )
        given = Given(update.I_in, update.I_out, None, core)
        (exact,) = sharpen(x[:, 4:].double(), (wide,), config, given=given)
        with vps.backend("torch"):
            given = Given(update.I_in, update.I_out, None, update.core)
            (added,) = sharpen(x[:, 4:], (exact_layer,), config, given=given)
        for norm in (float("inf"), 2):
            errors = [torch.dist(each.double(), exact, norm) for each in (found, added)]
            assert errors[0] <= 2 * errors[1], (seed, norm)


def test_a_feature_that_is_left_out_twice_changes_nothing():
    x = torch.randn(2, 3, 4)
    through = torch.zeros(2, 2, 4)
    assert torch.equal(edited(x, torch.zeros(2, 1, 2, dtype=torch.int64), through.mT), x)


def all_held(x, layers, config, heads, backend):
    held: list = []
    with vps.backend(backend):
        ys = sharpen(x, layers, config, heads=heads, held=held)
    return ys, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, (4, 2)])
@pytest.mark.parametrize("groups, tokens", [(1, 1), (1, 6), (3, 1), (3, 5)])
@torch.no_grad()
def test_every_way_holds_what_the_general_way_decides(monkeypatch, dtype, heads, groups, tokens):
    """The operators of C++ and the short way of torch against the flow."""
    ways = ["torch"]
    if dtype is not torch.float64 and vps.backends()["cpp"] is None:
        ways.append("cpp")
    choices = [{}, {"builder": "sc"}, {"order": 2}, {"clip": "spectral"}, {"tau": None}]
    for seed, choice in enumerate(choices):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(groups, tokens, 24, generator=generator).to(dtype)
        widths = (32, 16) if heads else (20,)
        made = [torch.randn(width, 24, generator=generator).to(dtype) for width in widths]
        layers = tuple(Projection(W, W[:, 0].clone()) for W in made)
        config = VPSConfig(scope="prompt", **({"tau": 0.7} | choice))
        found = [all_held(x, layers, config, heads, way) for way in ways]
        with monkeypatch.context() as general:
            general.setattr(torch_backend, "_is_short", lambda call: False)
            right_y, right = all_held(x, layers, config, heads, "torch")
        error = 0.03 if dtype is torch.bfloat16 else 1e-4
        close = {"rtol": error, "atol": error}
        for ys, held in found:
            assert len(held) == len(right) == len(layers)
            for y, own, right_of_y, other in zip(ys, held, right_y, right, strict=True):
                assert (y - right_of_y).abs().max() <= error * right_of_y.abs().max()
                assert torch.equal(own.I_in, other.I_in) and torch.equal(own.I_out, other.I_out)
                torch.testing.assert_close(own.through, other.through, **close)
                for mine, its in zip(folded(own), folded(other), strict=True):
                    torch.testing.assert_close(mine, its, **close)


@pytest.mark.parametrize("builder", ["random", "sc", "sk"])
@pytest.mark.parametrize("clip", ["component", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_what_is_held_is_nobody_elses(builder, clip, dtype):
    """A cache writes into it, and a later γ of the layer does not show in it."""
    W, x, gamma = torch.randn(16, 24).to(dtype), torch.randn(1, 3, 24).to(dtype), LayerGamma(0.5)
    for own in (gamma, None):
        config = VPSConfig(
            scope="prompt", builder=builder, clip=clip, rank=2, topk=8, gamma=0.4, clamp=5.0
        )
        layer, held = Projection(W, None, False, None, own), []
        with vps.backend("torch"):
            (y,) = sharpen(x, (layer,), config, held=held)
            kept = [tensor.clone() for tensor in held[0].tensors()]
            gamma.set(-3.0)
            assert all(map(torch.equal, kept, held[0].tensors()))
            gamma.set(0.5)
            for tensor in held[0].tensors():
                tensor.zero_()  # raises where elements share memory
            again: list = []
            assert torch.equal(sharpen(x, (layer,), config, held=again)[0], y)
        assert all(map(torch.equal, kept, again[0].tensors()))


def folded(update):
    """γ ``[G]`` and γ times C ``[G, r, r]`` of an update."""
    matrix, gamma, inactive = update.core
    matrix = square(matrix)
    if inactive is not None:
        matrix = matrix.masked_fill(inactive.unsqueeze(1), 0.0)
    return gamma.double(), (matrix * gamma.view(-1, 1, 1)).double()


def test_the_first_of_the_layers_of_one_x_changes_it_for_all():
    x, calls = torch.randn(2, 3, 5), []
    one = FixedUpdate(torch.zeros(2, 1), torch.zeros(2, 1), None, torch.zeros(2, 1, 5))
    readers = Readers([one, one, one])

    def edit(x, layers):
        calls.append(len(layers))
        return [x + at for at in range(len(layers))]

    def changed(x, at):
        return readers.changed(x, at, edit, (x._version,))

    for at in (1, 0, 2):
        view = x.view(6, 5).reshape(2, 3, 5)  # as where a model flattens x
        assert torch.equal(changed(view, at), x + at)
    assert calls == [3] and readers._x is None and not readers._changed
    changed(x, 0)
    x.add_(1)  # what waits is of the earlier x
    assert torch.equal(changed(x, 1), x + 1)
    assert torch.equal(changed(x.clone(), 1), x + 1)
    changed(x, 0)
    changed(x, 0)  # the same layer again
    assert calls == [3] * 6
    held = Held()
    held._shared = [readers]
    settle(held, None, None)  # the end of a call of the model
    assert readers._x is None and not readers._changed

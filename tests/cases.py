"""Random layers, inputs and settings with hostile values, shared by the tests of the backends."""

import concurrent.futures
import copy
import io
import pickle
import random

import torch

from vps import PolicyState, VPSConfig, reference, vps_linear
from vps.algorithm import policy
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import LayerGamma
from vps.functional import Projection, coupled_vps_linear

FAR = 2**30 + 1  # elements between rows: a few of them reach beyond 2^31
HOSTILE = ("", "", "ties", "zero", "nan", "inf", "huge", "strided")


def random_case(seed):
    """A layer, an input and settings of the test grid."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = rng.choice([1, 2, 3, 7, 33, 64]), rng.choice([1, 2, 5, 31, 48])
    shape = rng.choice([(), (1,), (5,), (1, 1), (1, 6), (3, 4), (2, 3, 4), (9, 1)])
    config = VPSConfig(
        rank=rng.choice([1, 2, 3, 5]),
        adaptive_rank=rng.random() < 0.6,
        rank_bounds=(rng.choice([1, 2]), rng.choice([2, 4, 6])),
        topk=rng.choice([1, 3, 32]),
        adaptive_topk=rng.random() < 0.4,
        topk_bounds=(rng.choice([1, 2, 16]), 64),
        adaptive_gamma=rng.random() < 0.6,
        order=rng.choice([1, 2]),
        adaptive_order=rng.random() < 0.3,
        tau=rng.choice([None, 0.8, 0.1]),
        clip=rng.choice(["component", "spectral"]),
        clamp=rng.choice([None, None, 0.05]),
        builder=rng.choice(["sk", "sc", "hybrid", "random"]),
        scope=rng.choice(["sequence", "batch", "token"]),
    )
    kind = rng.choice(HOSTILE)
    x = torch.randn(*shape, d_in, dtype=torch.float64, generator=generator)
    x = x * rng.choice([0.1, 1.0, 3.0])
    if kind == "ties":
        x = x.round()
    elif kind == "zero":
        x = x * 0
    elif kind in ("nan", "inf") and x.dim() > 1:
        x.view(-1, d_in)[0, 0] = float(kind)
    elif kind == "huge":
        # Where fewer tokens count than there are columns, the SC system of a huge x is singular
        # in any finite precision.
        x = x * (1e60 if config.builder in ("sk", "random") else 1e3)
    elif kind == "strided":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    W = torch.randn(d_out, d_in, dtype=torch.float64, generator=generator) / d_in**0.5
    b = torch.randn(d_out, dtype=torch.float64, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    state = PolicyState()
    entropy = rng.choice([None, None, 0.7, 5.0])
    outcomes = [rng.random() < 0.5 for _ in range(rng.choice([0, 0, 3, 5]))]
    state.set_entropy(entropy)
    for improved in outcomes:
        state.record(improved)
    gradient = rng.random() < 0.5
    return dict(
        x=x,
        W=W,
        b=b if rng.random() < 0.5 else None,
        config=config,
        mask=mask if rng.random() < 0.5 else None,
        state=state,
        entropy=entropy,
        outcomes=outcomes,
        gradient=gradient,
    )


def sharpened(case, **more):
    """The output of the layer of a case, by :func:`vps.vps_linear`."""
    return vps_linear(
        case["x"], case["W"], case["b"], case["config"],
        mask=case["mask"], state=case["state"], gradient=case["gradient"], **more,
    )  # fmt: skip


def reference_of(case, **more):
    """The same by the reference, with every intermediate."""
    return reference.vps_linear(
        case["x"], case["W"], case["b"], config=case["config"], mask=case["mask"],
        entropy=case["entropy"], outcomes=case["outcomes"], gradient=case["gradient"], **more,
    )  # fmt: skip


def relative_error(y, expected):
    """Error of the finite elements beside their norm; others must not be finite in either."""
    finite = expected.isfinite()
    assert torch.equal(finite, y.isfinite())
    size = expected[finite].norm().clamp(min=1e-300)
    return float((y.double() - expected)[finite].norm() / size)


def held_constant(x, W, result, clamp=None, columns=None, memory=()):
    """``x Wᵀ`` and its update, with selection, core, factors and γ of a result as constants.

    ``columns`` is a list where the layer has a γ of its own for each; else γ is the result's.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ W.T
    for group in result.groups:
        A, B, V = (t.detach() for t in (group.A_clipped, group.B_clipped, group.V))
        if isinstance(columns, list):
            B = B * B.new_tensor(columns)[: group.rank]
        t = flat[group.tokens] @ A
        if group.order == 2:
            M = (V / group.scale.detach().sqrt()).T @ B
            t = t + group.gamma / 2 * t @ M.T
        delta = t @ (B + 1e-3 * reference.inverse_hessian(memory) @ B if memory else B).T
        delta = delta if clamp is None else delta.clamp(-clamp, clamp)
        y = y.index_add(0, group.tokens, group.gamma * delta)
    return y.view(*x.shape[:-1], -1)


def drawn_gamma(seed, r):
    """A γ of a layer's own: a number of either sign, or one for each of r columns."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        return rng.uniform(-1.5, 1.5)
    return [rng.choice([0.0, rng.uniform(-1.5, 1.5)]) for _ in range(r - 1)] + [-0.7]


def columns_of(case, W):
    """How many columns the update of a layer of a case can have at most."""
    return policy.settings(case["config"], case["gradient"], *reversed(W.shape), True).r


def pairs_of(seed, size):
    """One, two or five L-BFGS pairs of a quadratic, so that every pair is kept."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
    hessian = root @ root.T + torch.eye(size, dtype=torch.float64)
    count = random.Random(seed).choice([1, 2, 5])
    steps = torch.randn(count, size, dtype=torch.float64, generator=generator)
    return [(s, hessian @ s) for s in steps]


def memory_of(pairs, size):
    """A memory of a layer of ``size`` outputs that holds these pairs."""
    memory = CurvatureMemory()
    w = g = torch.zeros(size, dtype=torch.float64)
    memory.record(w, g)
    for s, y in pairs:
        w, g = w + s, g + y
        memory.record(w, g)
    assert len(memory.pairs) == len(pairs)
    return memory


def in_float32(case):
    """The case with float32 tensors, and with the same values in float64 for the reference."""
    huge = case["x"].nan_to_num(0.0, 0.0, 0.0).abs().max() > 1e30
    x = case["x"] * 1e-40 if huge else case["x"]
    tensors = {"x": x.float(), "W": case["W"].float(), "b": case["b"]}
    if case["b"] is not None:
        tensors["b"] = case["b"].float()
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    return case | tensors, case | wide


HEADS = [(1, 1, 3), (4, 2, 5), (6, 1, 4), (3, 3, 8)]  # query heads, key-value heads, size


def coupled_case(seed):
    """A case of the grid with a query and a key projection in place of its layer."""
    case = random_case(seed)
    heads, kv_heads, size = HEADS[seed % len(HEADS)]
    generator = torch.Generator().manual_seed(seed)
    d_in = case["x"].shape[-1]

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    config = case["config"]
    if config.builder == "random":
        config = config.replace(builder="hybrid")
    weights = [tensor(n * size, d_in) / d_in**0.5 for n in (heads, kv_heads)]
    bias = [tensor(len(W)) if case["b"] is not None else None for W in weights]
    memories = [[], []]
    if random.Random(seed).random() < 0.5:
        memories = [[(s, s + 0.1 * tensor(len(W))) for s in tensor(2, len(W))] for W in weights]
    return case | dict(
        config=config, weights=weights, bias=bias, memories=memories, heads=(heads, kv_heads)
    )


def sharpened_pair(case, gammas=(None, None)):
    """Outputs of the query and key of a case, which select together."""
    projections = (
        Projection(
            W, b, gradient, memory_of(pairs, len(W)), None if own is None else LayerGamma(own)
        )
        for W, b, gradient, pairs, own in zip(*parts(case), gammas, strict=True)
    )
    return coupled_vps_linear(
        case["x"], *projections, *case["heads"], case["config"],
        mask=case["mask"], state=case["state"],
    )  # fmt: skip


def reference_of_pair(case, gammas=(None, None)):
    """The same by the reference."""
    heads, kv_heads = case["heads"]
    return reference.coupled_vps_linear(
        case["x"], *map(reference.Projection, *parts(case), gammas), heads=heads,
        kv_heads=kv_heads, config=case["config"], mask=case["mask"], entropy=case["entropy"],
        outcomes=case["outcomes"],
    )  # fmt: skip


def parts(case):
    """Weight, bias, whether there is a gradient and memory, of the query and of the key."""
    return case["weights"], case["bias"], (case["gradient"], True), case["memories"]


def coupled_in_float32(case):
    """As :func:`in_float32`, and without a memory, which only torch computes with."""
    size = case["x"].nan_to_num(0.0, 0.0, 0.0).abs().max()
    narrow = case | dict(
        x=(case["x"] * (1e-40 if size > 1e30 else 1.0)).float(),
        weights=[W.float() for W in case["weights"]],
        bias=[None if b is None else b.float() for b in case["bias"]],
        memories=[[], []],
    )
    return narrow, narrow | dict(
        x=narrow["x"].double(),
        weights=[W.double() for W in narrow["weights"]],
        bias=[None if b is None else b.double() for b in narrow["bias"]],
    )


def copies(module):
    """Copies of a module of every kind: deep, pickled, and saved by torch."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    )


def in_threads(work, arguments):
    """Call ``work`` with each argument in a thread of its own; whether each call was truthy."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return all(pool.map(work, arguments))

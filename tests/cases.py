"""Random layers, inputs and settings with hostile values, shared by the tests of the backends."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vps
from vps import PolicyState, VPSConfig, reference

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


def reference_of(case):
    return reference.vps_linear(
        case["x"],
        case["W"],
        case["b"],
        config=case["config"],
        mask=case["mask"],
        entropy=case["entropy"],
        outcomes=case["outcomes"],
        gradient=case["gradient"],
    )


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


def coupled_reference_of(case):
    query, key = (
        reference.Projection(W, b, gradient, memory)
        for W, b, gradient, memory in zip(
            case["weights"], case["bias"], (case["gradient"], True), case["memories"], strict=True
        )
    )
    heads, kv_heads = case["heads"]
    return reference.coupled_vps_linear(
        case["x"],
        query,
        key,
        heads=heads,
        kv_heads=kv_heads,
        config=case["config"],
        mask=case["mask"],
        entropy=case["entropy"],
        outcomes=case["outcomes"],
    )


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


def tiny_llama():
    """A patched model of one block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    vps.patch(model)
    return model


def number_llama():
    """A plain model of two blocks that reads :func:`number_tokenizer`; sharpening changes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model


def number_tokenizer():
    """A tokenizer of 96 words that are numbers."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(str(i) for i in range(92))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )

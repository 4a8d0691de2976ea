"""Token entropy in torch, and the processor that feeds it to the policy during generate."""

import math

import pytest
import torch
from tiny import tiny_llama

import vps
from vps import EntropyProcessor, policy_state, token_entropy


def test_entropy_is_that_of_the_softmax():
    logits = torch.randn(2, 3, 50) * 5
    p = logits.double().softmax(-1)
    assert torch.allclose(token_entropy(logits).double(), -(p * p.log()).sum(-1), atol=1e-6)
    assert token_entropy(logits).dtype == torch.float32
    rounded = logits.bfloat16()
    assert torch.equal(token_entropy(rounded), token_entropy(rounded.float()))
    infinity = float("inf")
    edges = torch.tensor(
        [[0.0] * 4, [0.0, -infinity, 0.0, -infinity], [1e4, 0.0, 0.0, 0.0], [-infinity] * 4,
         [math.nan, 0.0, 0.0, 0.0]]
    )  # fmt: skip
    found = token_entropy(edges)
    assert torch.allclose(found[:3], torch.tensor([math.log(4), math.log(2), 0.0]))
    assert found[3:].isnan().all()
    assert token_entropy(torch.randn(7)).shape == ()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_float64_stays_float64(device):
    """Two tokens of p and 1 − p, whose entropy float32 knows to 7 digits."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    p = 1 / 3 + 1e-10
    exact = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    logits = torch.tensor([math.log(p), math.log1p(-p)], dtype=torch.float64, device=device)
    found = token_entropy(logits)
    assert found.dtype == torch.float64 and math.isclose(float(found), exact, rel_tol=1e-14)
    for narrow in (torch.float32, torch.float16, torch.bfloat16):
        assert token_entropy(logits.to(narrow)).dtype == torch.float32
    model = tiny_llama()
    scores = torch.stack([logits, logits])
    assert EntropyProcessor(model)(None, scores) is scores  # the mean of the step is as exact
    assert math.isclose(float(policy_state(model).entropy), exact, rel_tol=1e-14)


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError),
        (None, TypeError),
        (torch.ones(2, 0), ValueError),
    ],
)
def test_what_has_no_entropy(logits, error):
    with pytest.raises(error, match="token_entropy: logits must be"):
        token_entropy(logits)


def test_every_step_reaches_the_policy():
    model = tiny_llama()
    state, seen = policy_state(model), []

    def stepwise(ids):
        """Greedy decoding by hand: each step's logits decide what the next step's policy knows."""
        cache = None
        for _ in range(5):
            step = ids if cache is None else ids[:, -1:]
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            seen.append(float(token_entropy(out.logits[:, -1]).mean()))
            state.set_entropy(seen[-1])
            ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
        return ids

    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        expected = stepwise(ids)
    assert math.isclose(float(state.entropy), seen[-1], rel_tol=1e-6) and len(set(seen)) == 5
    state.reset()
    model.generation_config.eos_token_id = None
    found = model.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0,
        logits_processor=[EntropyProcessor(model)],
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert math.isclose(float(state.entropy), seen[-1], rel_tol=1e-5)
    model(ids).logits.requires_grad_()  # an entropy set in inference mode serves other passes
    model(inputs_embeds=torch.randn(1, 3, 16, requires_grad=True)).logits.sum().backward()


def test_a_batch_sets_its_mean_and_one_broken_sequence_does_not_count():
    model = tiny_llama()
    processor = EntropyProcessor(model)
    scores = torch.randn(3, 50)
    assert processor(torch.ones(3, 1), scores) is scores
    found = float(policy_state(model).entropy)
    assert math.isclose(found, float(token_entropy(scores).mean()), rel_tol=1e-6)
    broken = torch.cat([scores, torch.full((1, 50), math.nan)])
    processor(torch.ones(4, 1), broken)
    assert math.isclose(float(policy_state(model).entropy), found, rel_tol=1e-6)
    processor(torch.ones(1, 1), broken[3:])
    assert float(policy_state(model).entropy) == 0
    vps.unpatch(model)
    with pytest.raises(ValueError, match="no sharpened layer"):
        EntropyProcessor(model)

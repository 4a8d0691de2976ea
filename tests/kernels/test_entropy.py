"""Kernel of the token entropy against torch in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps.kernels import entropy

pytestmark = pytest.mark.usefixtures("poison")


def check(logits):
    nats = entropy.launch(logits)
    assert nats.dtype == torch.float32
    wide = logits.double().cpu()
    expected = torch.distributions.Categorical(logits=wide, validate_args=False)
    p, log_p = expected.probs, expected.logits
    expected = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    torch.testing.assert_close(nats.double().cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 8192), (2, 20_001), (1, 262_144)])
def test_entropy(device, dtype, shape):
    logits = torch.randn(shape, device=device).to(dtype)
    check(logits)
    check(logits * 30)
    check(logits * 0 + 5)


def test_excluded_tokens(device):
    logits = torch.randn(3, 20_000, device=device)
    logits[0, :9000] = -float("inf")  # a whole stretch of the row
    logits[1, 1:] = -float("inf")
    logits[2, ::2] = -float("inf")
    check(logits)
    assert entropy.launch(logits)[1] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_huge_logits(device):
    nats = entropy.launch(torch.tensor([[-3e38, 3e38, 3e38]], device=device))
    torch.testing.assert_close(nats.cpu(), torch.tensor([2.0]).log())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_undefined_rows_are_nan(device):
    logits = torch.randn(4, 9000, device=device)
    logits[0, 3], logits[1, 8999], logits[2] = float("nan"), float("inf"), -float("inf")
    assert entropy.launch(logits).isnan().tolist() == [True, True, True, False]


def test_strides_and_rows(device):
    logits = torch.randn(6, 50, device=device)
    check(logits.T)
    check(logits[::2, ::3])
    nats = entropy.launch(logits)
    assert torch.equal(nats, entropy.launch(logits))
    assert torch.equal(nats[3:4], entropy.launch(logits[3:4]))
    assert entropy.launch(logits[:0]).shape == (0,)


def test_beyond_2_31_elements(device, sparse):
    logits = sparse.as_strided((4, 6), (FAR, 1))
    logits.copy_(torch.randn(4, 6))
    check(logits)
    check(logits.T)


def test_errors():
    with pytest.raises(TypeError, match="int64"):
        entropy.launch(torch.ones(2, 3, dtype=torch.int64))
    for shape in [(3,), (2, 0)]:
        with pytest.raises(ValueError, match=r"logits must be \[N, V\]"):
            entropy.launch(torch.ones(shape))


def test_operator(device):
    torch.library.opcheck(torch.ops.vps.token_entropy.default, (torch.randn(2, 9, device=device),))

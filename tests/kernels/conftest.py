"""Memory for tensors of more than 2^31 elements."""

import pytest
import torch
from cases import FAR


@pytest.fixture
def sparse(device, tmp_path):
    """Numbers for five rows that lie FAR apart, in a file of which few pages are ever touched."""
    if device == "cuda":
        pytest.skip("a sparse file stands for the memory")
    return torch.from_file(str(tmp_path / "sparse"), True, 5 * FAR, dtype=torch.float16)

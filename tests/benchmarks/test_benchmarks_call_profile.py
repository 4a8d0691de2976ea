"""What the profile of a call makes of a report of perf."""

import pytest
import torch
from torch import nn

from benchmarks.call_profile import KINDS, REST, profile, shares, table, why_missing

REPORT = """
# Overhead  Shared Object  Symbol
    40.00%  libtorch_cpu.so         [.] mkl_blas_avx512_sgemm_kernel_0
    10.00%  [JIT] tid 7             [.] 0x00007f1b207633aa
    20.00%  libpython3.11.so.1.0    [.] _PyEval_EvalFrameDefault
     5.00%  _cpp.abi3.so            [.] vps::avx512::add_rows<4, vps::BFloat16>
     5.00%  libtorch_cpu.so         [.] c10::Dispatcher::callBoxed
    """


def test_every_sample_is_of_one_kind_and_the_shares_add_to_one():
    found = shares(REPORT)
    assert found == pytest.approx(
        {"matrix product": 50 / 80, "Python": 20 / 80, "csrc": 5 / 80, REST: 5 / 80}
    )


def test_table_has_a_row_a_kind_and_a_column_a_layer():
    lines = table({"nn.Linear": (4e-6, {"Python": 1e-6}), "VPSLinear": (6e-6, {})}).splitlines()
    assert lines[0] == "| µs a call | nn.Linear | VPSLinear |"
    assert "| Python | 1.0 | 0.0 |" in lines and lines[-1] == "| all | 4.0 | 6.0 |"
    assert len(lines) == 2 + len(KINDS) + 2


@pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
def test_a_profile_accounts_for_the_whole_time():
    each, kinds = profile(nn.Linear(64, 64), torch.randn(1, 4, 64), 0.5)
    assert 0 < each < 1e-2 and sum(kinds.values()) == pytest.approx(each)
    assert kinds["Python"] > 0

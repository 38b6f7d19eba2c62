"""The ops of a CPU on the cases of the kernels, and where they take another way than the reference."""

from __future__ import annotations

import pytest
import torch
from _support import small_cases

from fastdllm_triton import reference
from fastdllm_triton.ops import NAMES, cpu
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.ops import Expected, wrong
from fastdllm_triton.verify.tolerance import bitwise

CPU = torch.device("cpu")
OWN = [op for op in NAMES if getattr(cpu, op) is not getattr(reference, op)]
CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case}-{str(dtype).removeprefix('torch.')}")
    for op in OWN
    for case in small_cases(op)
    for dtype in OPS[op].dtypes
]


def test_every_op_is_there():
    assert {name: callable(getattr(cpu, name)) for name in NAMES} == dict.fromkeys(cpu.__all__, True)
    assert {"head_statistics", "rms_norm", "rope_kv_write", "token_statistics", "window_attention"} == set(OWN)


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_a_case_is_as_close_as_torch_and_twice_the_same(op, case, dtype):
    cases, function = OPS[op], getattr(cpu, op)
    inputs = cases.inputs(case.sizes, CPU, dtype)
    expected = Expected.of(cases, inputs)
    got = cases.outputs(function, inputs, **cases.common)
    judged = expected.judge(got)
    assert not wrong(judged), judged
    again = cases.outputs(function, inputs | cases.result_memory(expected.plain), **cases.common)
    assert all(bitwise(got[name], again[name]) for name in got)

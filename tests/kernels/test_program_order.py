"""No result depends on the order of a launch's programs, which a GPU does not promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from _order import ORDERS, VARIABLE, programs_in_order

from fastdllm_triton.kernels._check import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be told the order of programs")

FOLDER = Path(__file__).parent
FILES = [
    "test_commit_tokens.py",
    "test_head_statistics.py",
    "test_linear.py",
    "test_rms_norm.py",
    "test_rope_kv_write.py",
    "test_swiglu.py",
    "test_token_statistics.py",
    "test_window_attention.py",
    "test_window_inputs.py",
]


@triton.jit
def _arrival_kernel(counter_ptr, arrival_ptr, COLUMNS: tl.constexpr):
    arrival = tl.atomic_add(counter_ptr, 1)
    tl.store(arrival_ptr + tl.program_id(0) * COLUMNS + tl.program_id(1), arrival)


@pytest.mark.parametrize("order", ORDERS)
def test_programs_run_in_the_order_asked_for(order: str) -> None:
    def arrivals() -> list[int]:
        arrival = torch.zeros(12, dtype=torch.int32)
        _arrival_kernel[(3, 4)](torch.zeros(1, dtype=torch.int32), arrival, COLUMNS=4)
        return arrival.tolist()

    with programs_in_order(order):
        first, second = arrivals(), arrivals()
    if order == "reversed":
        assert first == second == list(range(11, -1, -1))
    else:
        assert sorted(first) == sorted(second) == list(range(12)) != first != second
    assert arrivals() == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("file", FILES)
def test_the_tests_of_the_kernels_pass_in_another_order_of_programs(file: str, order: str) -> None:
    environment = {**os.environ, VARIABLE: order, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]

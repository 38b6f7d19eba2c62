"""Helpers of the op tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.kernels._check import INTERPRETED
from fastdllm_triton.verify.cases import OPS, Case
from fastdllm_triton.verify.ops import try_case
from fastdllm_triton.verify.tolerance import as_close_as_torch

#: Where kernel tests run: the interpreter takes CPU tensors.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
#: The interpreter has no bfloat16.
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def ints(values: list[int] | None, device: torch.device | str = "cpu") -> Tensor | None:
    """An int32 tensor of slots, or nothing."""
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def assert_as_close_as_torch(got: Tensor, exact: Tensor, torch_result: Tensor) -> None:
    """The rule of :func:`fastdllm_triton.verify.tolerance.as_close_as_torch`, in one line with what failed."""
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    found = as_close_as_torch(got, exact, torch_result)
    assert found.ok, f"error {found.error:.3e} where {found.bound:.3e} is allowed"


def small_cases(op: str) -> list[Case]:
    """The cases of an op that the interpreter has time for."""
    return [case for case in OPS[op].cases if case.where in ("quick", "full")]


def assert_case_holds(op: str, case: Case, dtype: torch.dtype, **options: Any) -> None:
    """The kernel, with further arguments, is as close as PyTorch in a case, and twice the same to the bit."""
    worst, wrong, same = try_case(OPS[op], case, DEVICE, dtype, **options)
    assert not wrong, f"{wrong}: error {worst.error:.3e} where {worst.bound:.3e} is allowed"
    assert same, "a second run, given memory for its results, gives other bits"

"""Helpers of the op tests."""

from __future__ import annotations

import torch
from torch import Tensor

#: Where kernel tests run: the interpreter takes CPU tensors.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: The interpreter has no bfloat16.
KERNEL_DTYPES = [torch.float32, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def ints(values: list[int] | None, device: torch.device | str = "cpu") -> Tensor | None:
    """An int32 tensor of slots, or nothing."""
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def assert_as_close_as_torch(got: Tensor, exact: Tensor, torch_result: Tensor) -> None:
    """Rule of FlashAttention's tests: at most twice the error that PyTorch itself makes in this dtype, and two roundings.

    A rounding is at least 2^-18 of the largest element: float32 sums in another order differ by more than their last bit.

    Args:
        got: what is judged.
        exact: the float64 result.
        torch_result: PyTorch's, in the dtype of ``got``.
    """
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    assert torch.equal(got.isfinite(), exact.isfinite())
    exact = torch.where(exact.isfinite(), exact, 0)
    got, torch_result = got.double().nan_to_num(0, 0, 0), torch_result.double().nan_to_num(0, 0, 0)
    rounding = max(torch.finfo(torch_result.dtype).eps, 2**-18)
    allowed = 2 * (torch_result - exact).abs().max() + 2 * rounding * exact.abs().max()
    error = (got - exact).abs().max()
    assert error <= allowed, f"error {error:.3e} where {allowed:.3e} is allowed"

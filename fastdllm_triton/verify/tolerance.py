"""The one rule by which a kernel's result is judged, here and in the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: float32 sums in another order differ by more than their last bit: a rounding counts as at least this share.
LEAST_ROUNDING = 2**-18


@dataclass(frozen=True)
class Judgement:
    """The largest error of a result, and what is allowed."""

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    @property
    def severity(self) -> float:
        """The error in units of the bound: above 1 it is too large."""
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)


def as_close_as_torch(got: Tensor, exact: Tensor, torch_result: Tensor) -> Judgement:
    """Rule of FlashAttention's tests: at most twice the error that PyTorch itself makes in this dtype, and two roundings.

    A rounding is that of the largest element, and at least 2^-18 of it.

    Args:
        got: what is judged.
        exact: the float64 result.
        torch_result: PyTorch's, in the dtype of ``got``.

    Returns:
        The error and the bound; an infinite error if dtype or shape are wrong, or if other elements are finite.
    """
    if got.dtype != torch_result.dtype or got.shape != exact.shape or not torch.equal(got.isfinite(), exact.isfinite()):
        return Judgement(math.inf, 0.0)
    if not got.numel():
        return Judgement(0.0, 0.0)
    exact = torch.where(exact.isfinite(), exact, 0)
    got, torch_error = got.double().nan_to_num(0, 0, 0), torch_result.double().nan_to_num(0, 0, 0) - exact
    rounding = max(torch.finfo(torch_result.dtype).eps, LEAST_ROUNDING)
    bound = 2 * torch_error.abs().max() + 2 * rounding * exact.abs().max()
    return Judgement(float((got - exact).abs().max()), float(bound))


def identical(got: Tensor, expected: Tensor) -> Judgement:
    """For ids, counts and flags: the number of entries that differ, of which none is allowed."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return Judgement(math.inf, 0.0)
    return Judgement(float((got != expected).sum()), 0.0)


def bitwise(first: Tensor, second: Tensor) -> bool:
    """Whether two results are the same bits, NaNs and zeros of either sign included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second)))

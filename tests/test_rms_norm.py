"""rms_norm: the reference against the formula in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from _support import randn
from torch import Tensor

from fastdllm_triton.reference.rms_norm import rms_norm as reference

EPS = 1e-5
SHAPES = [
    (1, 1),  # nothing to average
    (3, 7),  # an odd width
    (2, 5, 64),  # leading dimensions are kept
    (2, 3584),  # Dream's width, no power of two
    (4, 4096),  # LLaDA's
]


def formula(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """In float64, one element at a time in thought: x_i * w_i / sqrt(mean of squares + eps)."""
    x, weight = x.double(), weight.double()
    return x * weight / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape):
    x, weight, residual = case(shape, torch.float64)
    torch.testing.assert_close(reference(x, weight, EPS), formula(x, weight))
    y, total = reference(x, weight, EPS, residual=residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, formula(x + residual, weight))


def test_reference_agrees_with_torch_in_float32():
    x, weight, _ = case((4, 4096), torch.float32)
    torch.testing.assert_close(reference(x, weight, EPS), torch.nn.functional.rms_norm(x, (4096,), weight, EPS))


def test_reference_sums_in_float32_whatever_the_dtype():
    # 3 * 10^4 overflows float16 when squared, and bfloat16 stops counting at 256.
    x = torch.full((1, 4096), 3e4, dtype=torch.float16)
    assert torch.equal(reference(x, torch.ones(4096, dtype=torch.float16), EPS), torch.ones_like(x))
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert torch.equal(reference(x, torch.ones(4096, dtype=torch.bfloat16), 0.0), x)


def test_reference_rounds_where_the_models_do():
    x, weight, residual = case((2, 64), torch.bfloat16)
    y, total = reference(x, weight, EPS, residual=residual)
    assert torch.equal(total, (x.float() + residual.float()).bfloat16())
    unit = formula(total, torch.ones(64)).float().bfloat16()
    assert torch.equal(y, (unit.float() * weight.float()).bfloat16())


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(reference(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))


def test_reference_writes_into_out_and_over_the_residual():
    x, weight, residual = case((2, 5, 64), torch.float32)
    expected, total = reference(x, weight, EPS, residual=residual)
    out = torch.empty_like(x)
    y, updated = reference(x, weight, EPS, residual=residual, out=out, residual_out=residual)
    assert y is out and updated is residual
    assert torch.equal(out, expected) and torch.equal(residual, total)

"""swiglu: the reference against the formula in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from _support import randn
from torch import Tensor

from fastdllm_triton.reference.swiglu import swiglu as reference

SHAPES = [
    (1, 1),  # a single product
    (3, 7),  # an odd width
    (2, 3, 130),  # leading dimensions are kept, a tail
    (2, 12288),  # LLaDA's width
]


def formula(gate_up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up, in float64."""
    width = gate_up.shape[-1] // 2
    gate, up = gate_up.double()[..., :width], gate_up.double()[..., width:]
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape):
    x = 4 * randn(*shape[:-1], 2 * shape[-1])
    torch.testing.assert_close(reference(x), formula(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_saturates_without_nan(dtype):
    gate = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0], dtype=dtype)
    got = reference(torch.cat((gate, torch.ones_like(gate))))
    assert torch.equal(got, gate.clamp(min=0))


def test_reference_rounds_silu_before_the_product():
    x = randn(8, 64, dtype=torch.bfloat16)
    gate, up = x.chunk(2, dim=-1)
    silu = (gate.double() / (1 + (-gate.double()).exp())).bfloat16()
    assert torch.equal(reference(x), (silu.float() * up.float()).bfloat16())


def test_reference_writes_into_out():
    x, out = randn(2, 3, 8, dtype=torch.float32), torch.empty(2, 3, 4)
    assert reference(x, out=out) is out
    assert torch.equal(out, reference(x))

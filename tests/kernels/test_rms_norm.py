"""rms_norm: the reference against the formula in float64, its own claims of the kernel (test_cases.py has the rest)."""

from __future__ import annotations

import pytest
import torch
from _support import CPU, DEVICE, KERNEL_DTYPES, randn, small_cases
from torch import Tensor

from fastdllm_triton.kernels import rms_norm as module
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels.rms_norm import rms_norm as kernel
from fastdllm_triton.reference.rms_norm import rms_norm as reference
from fastdllm_triton.verify.cases.rms_norm import RMS_NORM

EPS = 1e-5


def formula(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """In float64, one element at a time in thought: x_i * w_i / sqrt(mean of squares + eps)."""
    x, weight = x.double(), weight.double()
    return x * weight / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)


@pytest.mark.parametrize("of", [case for case in small_cases("rms_norm") if "gather" not in case.sizes], ids=str)
def test_reference_is_the_formula(of):
    inputs = RMS_NORM.inputs({**of.sizes, "residual": True}, CPU, torch.float64)
    x, weight, residual = (inputs[name] for name in ("x", "weight", "residual"))
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


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_sum_with_the_residual_is_the_reference_s_to_the_bit(dtype):
    x, weight, residual = (tensor.to(DEVICE) for tensor in case((2, 3584), dtype))
    assert torch.equal(kernel(x, weight, EPS, residual=residual)[1], reference(x, weight, EPS, residual=residual)[1])


def test_kernel_rounds_where_the_reference_does():
    # Nearly every element equal: only a unit that falls between two float16 may round the other way.
    x, weight, residual = (tensor.to(DEVICE) for tensor in case((16, 4096), torch.float16))
    y, _ = kernel(x, weight, EPS, residual=residual)
    want, _ = reference(x, weight, EPS, residual=residual)
    assert (y == want).double().mean() > 0.999


def test_kernel_writes_into_out_and_over_the_residual_and_nowhere_else():
    x, weight, residual = (tensor.to(DEVICE) for tensor in case((4, 64), torch.float32))
    want, total = reference(x, weight, EPS, residual=residual)
    # Rows of wider tensors: what lies between them stays.
    wide_out, wide_residual = torch.full((4, 80), 7.0, device=DEVICE), torch.full((4, 96), 8.0, device=DEVICE)
    wide_residual[:, :64] = residual
    y, updated = kernel(x, weight, EPS, residual=wide_residual[:, :64], out=wide_out[:, :64], residual_out=wide_residual[:, :64])
    torch.testing.assert_close(y, want)
    assert torch.equal(updated, total) and torch.equal(wide_residual[:, :64], total)
    assert (wide_out[:, 64:] == 7).all() and (wide_residual[:, 64:] == 8).all()


def test_kernel_takes_strided_rows_and_no_rows():
    x, weight, _ = (tensor.to(DEVICE) for tensor in case((6, 3, 64), torch.float32))
    torch.testing.assert_close(kernel(x[::2], weight, EPS), reference(x[::2], weight, EPS))
    torch.testing.assert_close(kernel(x.transpose(0, 1), weight, EPS), reference(x.transpose(0, 1), weight, EPS))
    assert kernel(x[:0], weight, EPS).shape == (0, 3, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(63)}, "weight must be .*, got shape"),
        ({"weight": torch.ones(64, dtype=torch.float16)}, "weight must be .*, got torch.float16"),
        ({"residual": torch.ones(2, 65)}, "residual must be .*, got shape"),
        ({"out": torch.ones(2, 128)[:, ::2]}, "out must be .*, got strides"),
        ({"residual_out": torch.ones(2, 64)}, "residual_out must be .*, got a tensor"),
        ({"x": torch.ones(2, 64, dtype=torch.int32)}, "x must be .*, got torch.int32"),
        ({"x": torch.ones(1, 65_536)}, "x must be .*, got one of 65536"),
    ],
)
def test_kernel_names_what_is_wrong(change, message):
    args = {"x": torch.ones(2, 64), "weight": torch.ones(64)} | change
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        kernel(**{name: tensor.to(DEVICE) for name, tensor in args.items()}, eps=EPS)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_hold_a_row_in_registers(arch):
    for width in (1, 7, 3584, 4096, 5120, module.MAX_WIDTH):
        config = module.select_config(arch, width)
        assert config.block_e >= width
        assert config.num_warps * arch.warp_size <= 1024
        assert config.block_e // (config.num_warps * arch.warp_size) <= 64


ROWS = [[4, -1, 0], [2, 2, -1]]


@pytest.mark.parametrize("function", [reference, kernel])
@pytest.mark.parametrize("residual", [False, True])
def test_rows_are_gathered_first_and_a_negative_one_is_zeros(function, residual):
    x, weight, added = (tensor.to(DEVICE) for tensor in case((5, 24), torch.float32))
    options = {"residual": added} if residual else {}
    rows = torch.tensor(ROWS, device=DEVICE)
    y, total = function(x, weight, EPS, rows=rows, **options)
    want = x + added if residual else x
    for i, row in enumerate(rows.flatten().tolist()):
        expected = torch.zeros(24, device=DEVICE) if row < 0 else want[row]
        torch.testing.assert_close(total.view(-1, 24)[i], expected, rtol=0, atol=0)
        torch.testing.assert_close(y.view(-1, 24)[i].cpu(), formula(expected.cpu(), weight.cpu()).float())
    assert y.shape == total.shape == (2, 3, 24)


def test_a_gather_of_strided_rows_reads_the_right_ones():
    x, weight, _ = (tensor.to(DEVICE) for tensor in case((3, 4, 16), torch.float32))
    strided = x.transpose(0, 1)  # leading dimensions that do not collapse
    y, _ = kernel(strided, weight, EPS, rows=torch.tensor([5], device=DEVICE))
    torch.testing.assert_close(y[0], kernel(strided.contiguous().view(-1, 16)[5], weight, EPS))


def test_rows_may_be_a_part_of_longer_ones():
    x, weight, _ = (tensor.to(DEVICE) for tensor in case((5, 24), torch.float32))
    rows = torch.tensor([[0, 1, 2], [3, 4, -1]], device=DEVICE)
    for part in (rows[:, 1:], rows.T):
        for got, want in zip(kernel(x, weight, EPS, rows=part), reference(x, weight, EPS, rows=part), strict=True):
            torch.testing.assert_close(got, want)


def test_rows_that_are_no_int64_are_named():
    x, weight, _ = (tensor.to(DEVICE) for tensor in case((5, 24), torch.float32))
    with pytest.raises(ValueError, match=r"rows must be torch.int64 on .*, got torch.int32 on"):
        kernel(x, weight, EPS, rows=torch.zeros(2, dtype=torch.int32, device=DEVICE))

"""swiglu: the reference against the formula in float64, its own claims of the kernel (test_cases.py has the rest)."""

from __future__ import annotations

import pytest
import torch
from _support import CPU, DEVICE, KERNEL_DTYPES, randn, small_cases
from torch import Tensor

from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels.swiglu import select_config
from fastdllm_triton.kernels.swiglu import swiglu as kernel
from fastdllm_triton.reference.swiglu import swiglu as reference
from fastdllm_triton.verify.cases.swiglu import SWIGLU


def formula(gate_up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up, in float64."""
    width = gate_up.shape[-1] // 2
    gate, up = gate_up.double()[..., :width], gate_up.double()[..., width:]
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("case", small_cases("swiglu"), ids=str)
def test_reference_is_the_formula(case):
    x = SWIGLU.inputs(case.sizes, CPU, torch.float64)["gate_up"]
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


def test_kernel_rounds_silu_before_the_product():
    x = randn(16, 512, dtype=torch.float16, device=DEVICE)
    assert (kernel(x) == reference(x)).double().mean() > 0.999


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_saturates_without_nan(dtype):
    gate = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0], dtype=dtype, device=DEVICE)
    assert torch.equal(kernel(torch.cat((gate, torch.ones_like(gate)))), gate.clamp(min=0))


def test_kernel_takes_strided_rows_and_writes_into_out_and_nowhere_else():
    x = randn(6, 3, 80, dtype=torch.float32, device=DEVICE)
    wide = torch.full((3, 3, 48), 7.0, device=DEVICE)
    assert kernel(x[::2], out=wide[..., :40]).data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[..., :40], reference(x[::2]))
    assert (wide[..., 40:] == 7).all()
    assert kernel(x[:0]).shape == (0, 3, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": torch.ones(2, 7)}, "gate_up must be .*, got one of 7"),
        ({"gate_up": torch.ones(2, 16)[:, ::2]}, "gate_up must be .*, got strides"),
        ({"gate_up": torch.ones(2, 8, dtype=torch.float64)}, "gate_up must be .*, got torch.float64"),
        ({"out": torch.ones(2, 8)}, "out must be .*, got shape"),
        ({"out": torch.ones(2, 4, dtype=torch.float16)}, "out must be .*, got torch.float16"),
    ],
)
def test_kernel_names_what_is_wrong(change, message):
    args = {"gate_up": torch.ones(2, 8)} | change
    with pytest.raises(ValueError, match=message):
        kernel(**{name: tensor.to(DEVICE) for name, tensor in args.items()})


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_give_every_thread_work(arch):
    for width in (1, 7, 512, 12_288, 18_944):
        config = select_config(arch, width)
        assert config.num_warps == 1 or config.block_f >= config.num_warps * arch.warp_size

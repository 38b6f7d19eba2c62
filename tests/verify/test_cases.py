"""Every kernel on every case, and the table of the models' sizes that the cases are made of."""

from __future__ import annotations

import pytest
import torch
from _support import DEVICE, assert_case_holds

from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.tools.compile_report import compile_cases, reported_ops
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.cases._base import CASE_MODELS, copy
from fastdllm_triton.verify.cases.linear import PROJECTIONS
from fastdllm_triton.verify.ops import dtypes_of
from fastdllm_triton.verify.tolerance import bitwise

SMALL = [
    pytest.param(op, case, dtype, id=f"{op.op}-{case}-{dtype}")
    for op in OPS.values()
    for case in op.cases
    for dtype in dtypes_of(op.op)
    if case.where in ("quick", "full")
]
LARGE = [
    pytest.param(op, case, str(dtype).removeprefix("torch."), id=f"{op.op}-{case}-{dtype}")
    for op in OPS.values()
    for case in op.cases
    for dtype in op.dtypes
    if case.where in ("key", "gpu")
]


@pytest.mark.parametrize(("op", "case", "dtype"), SMALL)
def test_the_kernel_is_as_close_as_torch_and_twice_the_same(op, case, dtype):
    assert_case_holds(op.op, case, getattr(torch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case", "dtype"), LARGE)
def test_the_kernel_is_as_close_as_torch_at_the_sizes_of_the_models(op, case, dtype):
    assert_case_holds(op.op, case, getattr(torch, dtype))


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [x for x in vars(value).values() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_call_that_is_compared_leaves_the_inputs_as_they_are(op):
    inputs = op.inputs(op.cases[0].sizes, DEVICE, torch.float32)
    before = {name: copy(value) for name, value in inputs.items() if name in op.writes or isinstance(value, torch.Tensor)}
    op.outputs(op.kernel, inputs, **op.common)
    for name, value in before.items():
        for got, want in zip(tensors(inputs[name]), tensors(value), strict=True):
            assert bitwise(got, want), name


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_shapes_that_are_timed_have_the_same_sizes_and_an_axis(op):
    # Some have one more, as the blocks that attention is causal between.
    assert all(set(shape) >= set(op.shapes[0]) for shape in (*op.shapes, *op.key))
    assert op.axis in op.small and set(op.small) <= set(op.shapes[0])
    assert all(op.bytes(shape) > 0 for shape in op.shapes)


def test_the_projections_are_those_of_the_configs():
    assert PROJECTIONS["llada qkv"] == (12_288, 4096, True, None, False)
    assert PROJECTIONS["dream qkv"] == (4608, 3584, True, None, False)
    for model, config in CASE_MODELS.items():
        weights = sum(projection.n * projection.k for key, projection in PROJECTIONS.items() if key.startswith(model))
        assert weights == config.layer_parameters


@pytest.mark.parametrize("op", reported_ops())
@pytest.mark.parametrize("arch", ARCHS)
def test_compile_cases_name_every_argument_once(op, arch):
    cases = compile_cases(op, arch)
    assert len({case.key for case in cases}) == len(cases)
    assert cases or (op, arch) == ("prefetch", "gfx942")
    for case in cases:
        launch = case.launch
        assert launch.signature.keys() | launch.constants.keys() == set(launch.kernel.arg_names)
        assert set(launch.divisible) <= launch.signature.keys()

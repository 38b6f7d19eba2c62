"""What is looked for in compiled kernels is found where it is, and only there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastdllm_triton.tools.assembly import contractions, waits_first

# An fma of three values that are known when the kernel runs only is a sum and a product rounded together.
FUSED = "fma.rn.bf16x2 %r3, %r1, %r2, %r4;"
# How sm_80 spells a product: an fma that adds the constant -0.
PRODUCT = "mov.b32 %r9, -2147450880;\nfma.rn.bf16x2 %r3, %r1, %r2, %r9;"
PRODUCT_OF_HALVES = "mov.b16 %rs1, 0x8000;\nmov.b32 %r9, {%rs1, %rs1};\nfma.rn.f16x2 %r3, %r1, %r2, %r9;"
# ptxas may fuse a product and a sum that carry no rounding mode of their own.
LEFT_TO_PTXAS = "mul.bf16 %rs1, %rs2, %rs3;\nmov.b32 %r1, {%rs1, %rs4};\nneg.bf16x2 %r2, %r1;\nadd.bf16x2 %r3, %r2, %r5;"


@pytest.mark.parametrize(
    ("ptx", "count"),
    [
        (FUSED, 1),
        (f"@%p1 {FUSED}\n{FUSED.replace('bf16x2', 'f16')}", 2),
        (PRODUCT, 0),
        (PRODUCT_OF_HALVES, 0),
        (LEFT_TO_PTXAS, 1),
        (LEFT_TO_PTXAS.replace("mul.bf16", "mul.rn.bf16"), 0),
        (LEFT_TO_PTXAS.replace("%rs1, %rs4", "%rs6, %rs4"), 0),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", 0),
    ],
)
def test_a_lost_rounding_of_ptx_is_counted(ptx, count):
    assert contractions(ptx, "cuda") == count


@pytest.mark.parametrize(
    ("assembly", "count"),
    [
        ("v_fma_f16 v1, v2, v3, v4", 1),
        ("v_pk_fma_f16 v1, v2, v3, v4\nv_fmac_f16_e32 v1, v2, v3", 2),
        ("v_fma_mixlo_f16 v1, v2, v3, v4", 1),
        ("v_fma_mix_f32 v1, v2, v3, v4 op_sel_hi:[1,1,0]", 1),
        ("v_fma_mixlo_f16 v1, v2, v3, 0\nv_fma_mix_f32 v1, v2, v2, v4\nv_fma_mix_f32 v1, -v2, s8, v4", 0),
        ("v_fma_f32 v1, v2, v3, v4\nv_pk_mul_f16 v1, v2, v3\nv_mfma_f32_32x32x8_bf16 a[0:15], v1, v2, a[0:15]", 0),
    ],
)
def test_a_lost_rounding_of_an_amd_gpu_is_counted(assembly, count):
    assert contractions(assembly, "hip") == count


@pytest.mark.parametrize(
    ("ptx", "waits"),
    [
        ("mov.u32 %r1; prefetch.global.L2 [%rd1]; griddepcontrol.wait; ld.global.b32", True),
        ("ld.param.u64 %rd1; griddepcontrol.wait; st.global.b32", True),
        ("ld.global.b32 %r1; griddepcontrol.wait;", False),
        ("cp.async.cg.shared.global [%r1]; griddepcontrol.wait;", False),
        ("@%p1 bra $L1; griddepcontrol.wait;", False),
        ("@%p1 ret; griddepcontrol.wait;", False),
        ("ld.global.b32 %r1;", False),
    ],
)
def test_an_access_or_a_way_out_ahead_of_the_wait_is_seen(ptx, waits):
    assert waits_first(ptx) == waits


COMPILED = """
from dataclasses import replace
from fastdllm_triton.tools.compile_report import compile_case, compile_cases
from fastdllm_triton.kernels._arch import ARCHS

for name in ("sm_80", "sm_90"):
    case = next(case for case in compile_cases("rope_kv_write", name) if "bf16 dream" in case.config)
    for fused in (False, True):
        launch = replace(case.launch, options=case.launch.options | {"enable_fp_fusion": fused})
        print(compile_case(replace(case, launch=launch), ARCHS[name])["contractions"])
cases = compile_cases("linear", "sm_90")
case = next(case for case in cases if case.config.startswith("bf16 K=4096 64x64x64 swapped norm swiglu"))
for swap in (True, False):
    launch = replace(case.launch, arguments=case.launch.arguments | {"SWAP_AB": swap})
    print(compile_case(replace(case, launch=launch), ARCHS["sm_90"])["serialised"])
"""


def test_what_the_compilers_do_to_kernels_of_ours_is_found_out():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    printed = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True)
    # Dream's rotation with fused multiply-adds loses roundings; a norm in front of a gated unit in the plain order serialises.
    assert printed.stdout.split() == ["0", "8", "0", "16", "False", "True"]

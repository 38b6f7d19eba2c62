import pytest
import torch
from _programs import kernel

from fastdllm_triton.ptx.accesses import Access, Space, Use, accesses_of, smallest
from fastdllm_triton.ptx.pointers import LOADED, origins

A, B = "kernel_param_0", "kernel_param_1"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("ld.global.b32 %r10, [%rd0];", [{A}]),
        ("add.s64 %rd5, %rd0, %rd4;\nst.global.b32 [%rd5+8], %r0;", [{A}]),
        ("selp.b64 %rd5, %rd0, %rd1, %p1;\nst.global.b32 [%rd5], %r0;", [{A, B}]),
        ("ld.global.b64 %rd5, [%rd0];\nst.global.b32 [%rd5], %r0;", [{A}, {LOADED}]),
        ("ld.global.b64 %rd5, [%rd0];\nadd.s64 %rd6, %rd5, %rd1;\nst.global.b32 [%rd6], %r0;", [{A}, {B, LOADED}]),
        ("ld.shared.b64 %rd5, [%r10];\nst.global.b32 [%rd5], %r0;", [{LOADED}]),
        ("atom.global.exch.b64 %rd5, [%rd0], %rd1;\nst.global.b32 [%rd5], %r0;", [{A}, {LOADED}]),
        ("mov.b64 {%r10, %r11}, %rd0;\nmov.b64 %rd5, {%r10, %r11};\nst.global.b32 [%rd5], %r0;", [{A, LOADED}]),
        ("ld.shared.v2.b32 {%r10, %r11}, [%r12];\nmov.b64 %rd5, {%r10, %r11};\nst.global.b32 [%rd5], %r0;", [{LOADED}]),
        ("shfl.sync.idx.b32 %r10, %r11, 0, 31, -1;\ncvt.u64.u32 %rd5, %r10;\nst.global.b32 [%rd5], %r0;", [set()]),
        ("cp.async.cg.shared.global [%r10], [%rd1], 16;", [{B}]),
        ("$LOOP:\nst.global.b32 [%rd5], %r0;\nadd.s64 %rd5, %rd6, 4;\nmov.b64 %rd6, %rd0;\n@%p1 bra $LOOP;", [{A}]),
    ],
)
def test_what_flows_into_addresses(body, expected):
    found = origins(kernel(body + "\nret;", parameters=[torch.Tensor, torch.Tensor]))
    assert [origin.parameters for origin in found] == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("ld.param.b64 %rd5, [kernel_param_0]", [(Space.PARAM, Use.READ, 8)]),
        ("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0]", [(Space.GLOBAL, Use.READ, 16)]),
        ("ld.acquire.gpu.global.b32 %r10, [%rd0]", [(Space.GLOBAL, Use.STRONG_READ, 4)]),
        ("st.shared.b8 [%r10], %rs1", [(Space.SHARED, Use.WRITE, 1)]),
        ("st.volatile.global.f64 [%rd0], %rd1", [(Space.GLOBAL, Use.ATOMIC, 8)]),
        ("red.shared.add.noftz.bf16x2 [%r10], %r11", [(Space.SHARED, Use.ATOMIC, 4)]),
        ("cp.async.ca.shared.global [%r10], [%rd0], 8", [(Space.SHARED, Use.WRITE, 8), (Space.GLOBAL, Use.READ, 8)]),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r11]", [(Space.SHARED, Use.READ, 16)]),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r11], {%r10}", [(Space.SHARED, Use.WRITE, 16)]),
        ("add.s32 %r10, %r11, %r12", []),
        ("prefetch.global.L2 [%rd0]", []),
    ],
)
def test_what_instructions_access(instruction, expected):
    found = accesses_of(kernel(f"{instruction};\nret;", parameters=[torch.Tensor]).instructions[-2])
    assert [(access.space, access.use, access.size) for access in found] == expected


def test_the_smallest_access_to_a_space():
    instructions = kernel("st.shared.b64 [%r10], %rd1;\nld.shared.b16 %rs1, [%r10];\nret;").instructions
    assert smallest(instructions, Space.SHARED) == 2
    assert smallest(instructions, Space.GLOBAL) == 16
    assert Access(Space.GLOBAL, Use.ATOMIC, "f16x2", 4).size == 16

"""Every scalar instruction that the project's own kernels have, for sm_80 and sm_90, is known."""

from __future__ import annotations

from pathlib import Path

import _instructions  # noqa: F401  (it registers what is known)
import pytest

from fastdllm_triton.ptx.parser import Instruction, Register, parse
from fastdllm_triton.ptx.semantics import UnknownInstructionError, decode, scalar_of

#: All opcodes of the kernels' PTX, compiled by Triton 3.6.0.
OPCODES = Path(__file__).with_name("opcodes.txt").read_text().split()
#: Names of what is no function of one lane's operands: memory, other lanes, control.
OTHERS = {
    *("bar", "bra", "ret", "cp", "fence", "griddepcontrol", "ld", "ldmatrix", "mma", "prefetch"),
    *("redux", "shfl", "st", "stmatrix", "wgmma"),
}
SCALARS = [opcode for opcode in OPCODES if opcode.split(".")[0] not in OTHERS]


def known(opcode: str) -> list[int]:
    """Numbers of operands with which an opcode is known."""
    registers = (Register("%r0", 0, 32),) * 5
    instructions = {count: Instruction(opcode, registers[:count], None, False, "", 1, opcode) for count in range(1, 6)}
    return [count for count, instruction in instructions.items() if scalar_of(instruction) is not None]


def test_the_list_is_not_empty():
    assert len(SCALARS) > 140
    assert {"fma.rn.bf16x2", "div.full.f32", "setp.num.f32", "cvt.rmi.ftz.f32.f32"} <= set(SCALARS)


@pytest.mark.parametrize("opcode", SCALARS)
def test_opcode_is_known(opcode):
    """With one number of operands and no other."""
    assert len(known(opcode)) == 1


@pytest.mark.parametrize(
    "opcode",
    [
        *("add.cc.s32", "addc.s32", "add.ftz.s32", "add.rn.rz.f32", "add.rz.f64", "add.f32x2", "add.f32.bf16", "add.ftz.f64"),
        *("mul.s32", "mul.lo.hi.s32", "mul.wide.s64", "mad.lo.cc.s32", "mad.f32", "fma.f32", "fma.rn.oob.f16", "div.sat.f32"),
        *(
            "div.f32",
            "div.approx.f64",
            "div.rn.full.f32",
            "sqrt.f32",
            "rcp.f64",
            "min.ftz.s32",
            "max.relu.u32",
            "max.xorsign.f32",
        ),
        *("and.b8", "and.s32", "shl.u32", "shf.l.b32", "bfe.b32", "prmt.b64", "prmt.b32.xyz", "mov.b128", "selp.pred"),
        *("popc.u32", "neg.u32", "neg.sat.f32", "abs.u32", "copysign.f16", "testp.odd.f32", "lop3.or.b32", "dp4a.s32", "foo.b32"),
    ],
)
def test_unknown_modifiers_are_not_ignored(opcode):
    assert known(opcode) == []


def test_the_message_names_kernel_line_and_text():
    text = ".target sm_90a\n.visible .entry some()\n.reqntid 32\n{\n.reg .b32 %r<3>;\nadd.cc.s32 %r0, %r1, %r2;\nret;\n}"
    kernel = parse(text)
    with pytest.raises(UnknownInstructionError, match=r"some, PTX line 6: .*add\.cc\.s32 %r0, %r1, %r2"):
        decode(kernel.instructions[0], kernel)


def test_three_operands_are_not_two():
    """``max.f32 d, a, b, c`` of sm_100."""
    assert known("max.f32") == [3]

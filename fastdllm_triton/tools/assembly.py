"""What to look for in compiled kernels: lost roundings, matrix products that wait for one another, accesses ahead of a wait."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from ..kernels._arch import Arch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: An instruction of PTX: opcode and operands.
_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]+);", re.MULTILINE)
_REGISTER = re.compile(r"%[a-z]+\d+")
_HALF = re.compile(r"\.(?:bf16|f16)(?:x2)?$")
#: What passes a value on as it is, but for its sign: moves, packing and unpacking of halves.
_PASSES = ("mov.", "neg.", "prmt.")


def contractions(assembly: str, backend: str) -> int:
    """Counts 16-bit multiply-adds that leave out a rounding which the kernel's source asks for.

    A kernel that rounds a product to 16 bits and then adds to it must not become one fused multiply-add, which rounds once.
    LLVM narrows such arithmetic and fuses it; ptxas may fuse what LLVM left apart. An fma with a constant operand is how sm_80
    spells a product, a sum or a conversion, and loses nothing.

    Args:
        assembly: PTX, or the assembly of an AMD GPU.
        backend: ``"cuda"`` or ``"hip"``.
    """
    if backend == "hip":
        narrow = re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_b?f16(?:_\w+)?\b", assembly)
        # The mixed forms take 16-bit operands into a float32 product, and round the sum alone. Not counted are products, whose
        # sum is with 0, squares, which kernels sum up in float32 and nowhere round, and products with a scalar, as in exp.
        mixed = re.findall(r"\bv_(?:fma|mad)_mix\w*\s+\w+, ([^,]+), ([^,]+), (\w+)", assembly)
        lossy: list[bool] = [a != b and addend != "0" and "s" not in (a[0], b[0]) for a, b, addend in mixed]
        return len(narrow) + sum(lossy)
    instructions = list(_instructions(assembly))
    written = {operands[0]: (opcode, operands[1:]) for opcode, operands in instructions}
    fused = [ops for opcode, ops in instructions if opcode.startswith("fma.") and _HALF.search(opcode)]
    sums = [ops for opcode, ops in instructions if re.match(r"(?:add|sub)\.(?:bf16|f16)", opcode)]
    return sum(not any(_is_constant(operand, written) for operand in ops[1:]) for ops in fused) + sum(
        any(_is_product(operand, written) for operand in ops[1:]) for ops in sums
    )


def _instructions(ptx: str) -> Iterator[tuple[str, list[str]]]:
    """Opcodes and operands, a tuple of registers counting as one operand."""
    for match in _INSTRUCTION.finditer(ptx):
        yield match[1], [operand.strip() for operand in re.split(r",(?![^{]*\})", match[2])]


def _is_constant(operand: str, written: dict[str, tuple[str, list[str]]]) -> bool:
    """Whether an operand is known when the kernel is compiled."""
    registers = _REGISTER.findall(operand)
    return all(
        (source := written.get(register)) is not None
        and source[0].startswith(_PASSES)
        and all(_is_constant(part, written) for part in source[1])
        for register in registers
    )


def _is_product(operand: str, written: dict[str, tuple[str, list[str]]]) -> bool:
    """Whether an operand is a 16-bit product whose rounding ptxas may drop: one without a rounding mode of its own."""
    for register in _REGISTER.findall(operand):
        opcode, operands = written.get(register, ("", []))
        if re.match(r"mul\.(?:bf16|f16)", opcode):
            return True
        if opcode.startswith(_PASSES) and any(_is_product(part, written) for part in operands):
            return True
    return False


def serialised(ptx: str, arch: Arch) -> bool:
    """Whether ptxas lets every ``wgmma`` wait for the one before, which it says and Triton does not pass on (C7510 to C7520).

    Raises:
        RuntimeError: ptxas does not take the code.
    """
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        options = ["-v", f"--gpu-name={arch.name}a", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        # There are several, and which one takes a kernel's PTX is Triton's business.
        from triton.backends.nvidia.compiler import get_ptxas

        said = subprocess.run([get_ptxas(int(arch.capability)).path, *options], capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"ptxas: {said.stderr.strip()}")
    return "serialized" in said.stderr


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool that comes with Triton says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout


def waits_first(ptx: str) -> bool:
    """Whether every program comes past ``griddepcontrol.wait`` (programmatic dependent launch) before it reads or writes."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    # In the first stretch of code, which no branch enters or leaves.
    return bool(wait) and re.search(r"\b(?:bra|ret|(?:ld|st|atom|red)\.global|cp\.async)\b", before) is None

"""Where addresses come from: which parameters of a kernel flow into the address of each access to global memory.

So an access through one tensor's pointer is not taken for good where it happens to hit another tensor; and what no store can
reach needs no watch for races.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accesses import Access, Space, accesses_of
from .lanes import registers_of
from .parser import Address, Instruction, Kernel, Operand, Register, Symbol, Vector

#: Instead of a parameter's name: an address that was read from memory.
LOADED = "*"

_NO_RESULT = frozenset({"st", "red", "cp", "bra", "ret", "exit", "bar", "barrier", "fence", "membar", "prefetch", "stmatrix"})


@dataclass(frozen=True, slots=True)
class Origin:
    """An access to global memory.

    Attributes:
        instruction, access: which.
        parameters: names of those that flow into its address, and maybe :data:`LOADED`.
    """

    instruction: Instruction
    access: Access
    parameters: frozenset[str]


def origins(kernel: Kernel) -> list[Origin]:
    """The accesses of a kernel to global memory.

    Values are followed through registers of any width, whatever is done to them, but not through memory: a value of 64 bits that
    is loaded, or put together from parts, is :data:`LOADED`.
    """
    flows: list[frozenset[str]] = [frozenset()] * len(kernel.registers)
    instructions = kernel.instructions
    changed = True
    while changed:
        changed = False
        for instruction in instructions:
            results, sources = _operands(instruction)
            if not results:
                continue
            if accesses_of(instruction):  # a value's address does not flow into it
                sources = []
            flow = _brought(instruction).union(*(flows[register.slot] for register in sources))
            for register in results:
                if not flow <= flows[register.slot]:
                    flows[register.slot] |= flow
                    changed = True
    found = []
    for instruction in instructions:
        for access in accesses_of(instruction) or ():
            if access.space is Space.GLOBAL:
                address = [o for o in instruction.operands if isinstance(o, Address)][-1 if instruction.name == "cp" else 0]
                base = address.base
                flow = flows[base.slot] if isinstance(base, Register) else frozenset()
                found.append(Origin(instruction, access, flow))
    return found


def _registers(operand: Operand) -> list[Register]:
    """Those that an address could flow through: no predicates."""
    return [register for register in registers_of(operand) if register.bits > 1]


def _operands(instruction: Instruction) -> tuple[list[Register], list[Register]]:
    """Registers that are written, and those that are read."""
    operands = instruction.operands
    if not operands or instruction.name in _NO_RESULT:
        return [], []
    return _registers(operands[0]), [register for operand in operands[1:] for register in _registers(operand)]


def _brought(instruction: Instruction) -> frozenset[str]:
    """What an instruction's result may be, whatever its registers are."""
    read = accesses_of(instruction)
    if read and read[0].space is Space.PARAM:
        base = next(o.base for o in instruction.operands if isinstance(o, Address))
        return frozenset({base.name}) if isinstance(base, Symbol) else frozenset()
    wide = any(register.bits == 64 for register in _registers(instruction.operands[0]))
    packed = instruction.name == "mov" and isinstance(instruction.operands[1], Vector)
    return frozenset({LOADED}) if wide and (read or packed) else frozenset()

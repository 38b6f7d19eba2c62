"""The threads that run side by side: their registers, and how instructions read and write them.

A register is one numpy array over all threads of many programs (a *lane* is a thread of one of them), of unsigned integers of its
width, or of bools. Arrays are values: nothing is written in place, so two registers may hold the same array. What is the same in
all lanes may be an array of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .findings import Findings, Kind
from .parser import Address, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol

Array = NDArray[Any]
Which = NDArray[np.int64]
#: The lanes in which an instruction runs, ``[N]`` bool; None where it runs in all.
Mask = NDArray[np.bool_] | None
#: What an instruction does.
Step = Callable[["Lanes", Mask], None]

WARP = 32
#: What a byte reads as that may not be read: all of a word is NaN.
POISON = 0xFF
UNSIGNED: dict[int, type[Any]] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def bits_of(type_: str) -> int:
    """Width of ``b32``, ``f16x2``, ``bf16``, ``tf32`` or ``pred``."""
    if type_ == "pred":
        return 1
    if type_.endswith("x2"):
        return 32
    return 32 if type_ == "tf32" else int(type_.lstrip("abcdefghijklmnopqrstuvwxyz"))


def dtype_of(type_: str) -> type[Any]:
    """The numpy type in which an instruction sees a type: its bits where numpy has none (``bf16``, ``f16x2``, ``tf32``)."""
    bits = bits_of(type_)
    if type_ == f"s{bits}":
        return _SIGNED[bits]
    if type_ == f"f{bits}":
        return _FLOAT[bits]
    return UNSIGNED[bits]


def choose(mask: Array, yes: Array, no: Array) -> Array:
    """``np.where`` for two arrays of bools or of one unsigned type, several times as fast where the mask has no pattern."""
    if len(mask) == 1:
        return yes if mask[0] else no
    result: Array = mask * (yes ^ no)
    result ^= no
    return result


class Memory(Protocol):
    """Bytes that addresses lead to, with all checks."""

    def load(self, lanes: Lanes, which: Which, address: Array, size: int) -> Array:
        """``[n, size]`` uint8 that lanes ``which [n]`` read at ``address [n]``; what may not be read is 0xFF."""

    def store(self, lanes: Lanes, which: Which, address: Array, data: Array) -> None:
        """Writes ``data [n, size]`` uint8; what may not be written is dropped."""


State = TypeVar("State")


@dataclass
class Lanes:
    """The state of a batch of programs.

    Attributes:
        kernel: what they run.
        programs: ``[P]`` int64, their linear numbers in the grid.
        registers: by slot, ``[N]`` or ``[1]``.
        special: by name, ``[N]`` or ``[1]`` uint32: ``tid.x``, ``ctaid.x`` and so on.
        parameters: by name, ``[1]``, unsigned of the parameter's width.
        memory, shared: global memory, and the shared memory of each program.
        findings: what is wrong so far.
        here: the instruction that runs.
        intervals: ``[P]`` int64: barriers that each program has passed, from 1.
        random: what interleaving is drawn from; None where threads run in order.
    """

    kernel: Kernel
    programs: NDArray[np.int64]
    parameters: dict[str, Array]
    special: dict[str, Array]
    memory: Memory
    shared: Memory
    findings: Findings
    random: np.random.Generator | None = None
    registers: list[Array] = field(init=False)
    intervals: NDArray[np.int64] = field(init=False)
    here: Instruction = field(init=False)

    def __post_init__(self) -> None:
        threads = self.kernel.threads
        nothing = {bits: np.zeros(1, dtype) for bits, dtype in UNSIGNED.items()}
        self.registers = [nothing[bits] for bits in self.kernel.registers]
        self.intervals = np.ones(len(self.programs), np.int64)
        self.count = len(self.programs) * threads
        #: All lanes: what :meth:`active` gives without a mask, so that ``which is lanes.every`` says that nothing is picked.
        self.every: Which = np.arange(self.count)
        #: Of each lane: its place in the batch of programs, its thread, its warp within the program.
        self.place = np.repeat(np.arange(len(self.programs)), threads)
        self.thread = np.tile(np.arange(threads), len(self.programs))
        self.warp = self.thread // WARP
        self._states: dict[type[Any], Any] = {}

    def state(self, kind: type[State]) -> State:
        """What a part of the semantics remembers of this batch: an instance of a class, made when it is first asked for."""
        if kind not in self._states:
            self._states[kind] = kind()
        found: State = self._states[kind]
        return found

    def note(self, kind: Kind, which: Which, detail: str = "") -> None:
        """A finding about the instruction that runs, in lanes ``which [n]``; none if there is no lane."""
        if len(which):
            program, thread = int(self.programs[self.place[which[0]]]), int(self.thread[which[0]])
            self.findings.add(kind, self.kernel.name, self.here, program, thread, len(which), detail)

    def active(self, mask: Mask) -> Which:
        """``[n]``: the lanes of a mask."""
        return self.every if mask is None else np.flatnonzero(np.broadcast_to(mask, (self.count,)))

    def spread(self, value: Array) -> Array:
        """``[N]`` of ``[N]`` or ``[1]``."""
        return value if len(value) == self.count else np.broadcast_to(value, (self.count,))

    def put(self, register: Operand, value: Array, mask: Mask) -> None:
        """Writes ``[N]`` or ``[1]`` values of the register's own dtype, in the lanes of a mask."""
        if isinstance(register, Sink):
            return
        assert isinstance(register, Register)
        old = self.registers[register.slot]
        self.registers[register.slot] = value if mask is None else choose(mask, value, old)

    def put_some(self, register: Operand, which: Which, values: Array) -> None:
        """Writes values of some lanes, ``which [n]``, of the register's own dtype."""
        if isinstance(register, Sink):
            return
        assert isinstance(register, Register)
        if len(which) == self.count:
            self.registers[register.slot] = np.ascontiguousarray(values)
            return
        new = np.array(self.spread(self.registers[register.slot]))
        new[which] = values
        self.registers[register.slot] = new


def reader(operand: Operand, type_: str) -> Callable[[Lanes], Array]:
    """What gives an operand's values, ``[N]`` or ``[1]``, as :func:`dtype_of` the type.

    Of a register that is wider than the type the low bits count (PTX ISA, 9.4.1, "Operand Size Exceeding Instruction-Type Size").
    """
    dtype, bits = dtype_of(type_), bits_of(type_)
    unsigned = UNSIGNED[bits]
    if isinstance(operand, Register):
        slot = operand.slot
        if operand.bits == bits or bits == 1:
            return (lambda lanes: lanes.registers[slot]) if dtype is unsigned else lambda lanes: lanes.registers[slot].view(dtype)
        return lambda lanes: lanes.registers[slot].astype(unsigned).view(dtype)
    if isinstance(operand, Special):
        name = operand.name
        return lambda lanes: lanes.special[name].astype(unsigned).view(dtype)
    if isinstance(operand, Symbol):  # the only one that is a value is the start of shared memory
        return lambda lanes: np.zeros(1, unsigned).view(dtype)
    assert isinstance(operand, Immediate), operand
    value = bool(operand.value) if bits == 1 else operand.value & (2**bits - 1)
    constant = np.array([value], unsigned).view(dtype)
    return lambda lanes: constant


def writer(operand: Operand, type_: str) -> Callable[[Lanes, Array, Mask], None]:
    """What writes values of a type, widened to the register: with their sign for ``s8`` to ``s64``, with zeros for others."""
    if isinstance(operand, Sink):
        return lambda lanes, value, mask: None
    assert isinstance(operand, Register), operand
    bits, register = bits_of(type_), operand
    same = UNSIGNED[register.bits]
    if bits == register.bits:
        return lambda lanes, value, mask: lanes.put(register, value if value.dtype == same else value.view(same), mask)
    if type_[0] == "s":
        wide = _SIGNED[register.bits]
        return lambda lanes, value, mask: lanes.put(register, value.view(_SIGNED[bits]).astype(wide).view(same), mask)
    return lambda lanes, value, mask: lanes.put(register, value.view(UNSIGNED[bits]).astype(same), mask)


def items(operand: Operand) -> Sequence[Operand]:
    """The registers of a vector; of anything else, itself."""
    return getattr(operand, "items", (operand,))


def registers_of(operand: Operand) -> list[Register]:
    """The registers that an operand names: itself, those of a vector, or that of an address."""
    return [item for item in items(operand.base if isinstance(operand, Address) else operand) if isinstance(item, Register)]

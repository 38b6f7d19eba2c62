"""The tensor cores as a warpgroup uses them: ``wgmma`` of sm_90a (PTX ISA, 9.7.15), with the rules for what is in flight.

Each warp works for itself, on its 16 rows of A and on all of B, so that warps of a group may come one after the other. A
product is computed when it is issued, from operands that are compared at the wait with what they are then; :mod:`.flights` has
the rules for the time between. They are also broken by other instructions: so the machine runs a *guard* before each that may.
One line where it decodes a kernel's instructions, for kernels without ``wgmma`` at no cost::

    slots = wgmma.watched(kernel)              # once a kernel: empty where it has no wgmma
    check = wgmma.guard(instruction, slots)    # a step to run before the instruction's own, with the same mask; mostly None

Guards also tell where ``wgmma.fence`` is missing: before the first product, and after any other use of its registers. A plain
``mov`` may come after the fence: LLVM puts the zeros of unrolled loops there, and ptxas orders them. Not looked at: that a
fence has to be between products of different shapes that have registers in common, too.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from .descriptors import CHUNK, addresses, values
from .findings import Kind
from .flights import Flight, Flights, Shape, at
from .lanes import WARP, Array, Lanes, Mask, Step, Which, bits_of, items, reader, registers_of
from .mma import FORMATS, Format, accumulate, from_registers, matrix_a, product
from .parser import Address, Immediate, Instruction, Kernel, Operand, Register, Vector
from .semantics import effect
from .warp import Warps, lanes_of, of_warps, whole_warps

GROUP = 4
_ROWS = 16  # of a warp

_FLOATS = {("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "bf16", "bf16")}
_FLOAT8 = {(d, a, b) for d in ("f16", "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")}
_INTEGER = {("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")}
#: By the depth of a shape, the types of D, A and B (PTX ISA, 9.7.15.2 and 9.7.15.3).
_KNOWN: dict[str, set[tuple[str, str, str]]] = {"16": _FLOATS, "8": {("f32", "tf32", "tf32")}, "32": _FLOAT8 | _INTEGER}


# Fence, commit and wait ---------------------------------------------------------------------------------------------------------


@effect("wgmma")
def _wgmma(instruction: Instruction) -> Step | None:
    match instruction.parts:
        case ("wgmma", "fence", "sync", "aligned"):
            return _fence
        case ("wgmma", "commit_group", "sync", "aligned"):
            return _commit
        case ("wgmma", "wait_group", "sync", "aligned"):
            return _wait(instruction)
        case ("wgmma", "mma_async", "sync", "aligned", *rest):
            return _mma_async(instruction, rest)
    return None


def _fence(lanes: Lanes, mask: Mask) -> None:
    """PTX ISA, 9.7.15.7.1, wgmma.fence."""
    Flights.of(lanes).fence(whole_warps(lanes, mask))


def _commit(lanes: Lanes, mask: Mask) -> None:
    """PTX ISA, 9.7.15.7.2, wgmma.commit_group."""
    Flights.of(lanes).commit(whole_warps(lanes, mask))


def _wait(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.15.7.3, wgmma.wait_group."""
    (operand,) = instruction.operands
    if not isinstance(operand, Immediate):
        return None
    pending = operand.value
    return lambda lanes, mask: Flights.of(lanes).land(lanes, whole_warps(lanes, mask), pending)


# The product --------------------------------------------------------------------------------------------------------------------


def _shape(parts: list[str]) -> tuple[Shape, str, str] | None:
    """The shape, and the types of A and B, of ``m64n32k16.f32.bf16.bf16``."""
    if len(parts) != 4 or (m := re.match(r"m64n(\d+)k(\d+)$", parts[0])) is None:
        return None
    columns, (d, a, b) = int(m[1]), parts[1:]
    if (d, a, b) not in _KNOWN.get(m[2], ()):
        return None
    if columns % 8 or not 8 <= columns <= 256 or (d == "s32" and columns > 32 and columns % 16):
        return None
    return Shape(columns, int(m[2]), d), a, b


def _constants(operands: tuple[Operand, ...], shape: Shape, in_registers: bool) -> tuple[bool, bool, bool] | None:
    """Whether the product is negated, and whether A and B are transposed; None where something is not known."""
    found = [operand.value for operand in operands if isinstance(operand, Immediate)]
    scales, transposed = found[:2], found[2:]
    wanted = 0 if shape.d == "s32" else 2 if shape.depth != 16 else 3 if in_registers else 4
    if len(found) != len(operands) or len(found) != wanted or any(scale not in (1, -1) for scale in scales):
        return None
    if any(bit not in (0, 1) for bit in transposed):
        return None
    a, b = scales or (1, 1)
    trans_a, trans_b = (0, 0, *transposed)[-2:]
    return a != b, trans_a == 1, trans_b == 1


def _mma_async(instruction: Instruction, parts: list[str]) -> Step | None:
    """PTX ISA, 9.7.15.5.2, wgmma.mma_async."""
    saturate = "satfinite" in parts
    if (found := _shape([part for part in parts if part != "satfinite"])) is None or len(instruction.operands) < 4:
        return None
    shape, a_type, b_type = found
    if saturate and shape.d != "s32":
        return None
    d, a, b, scale, *constants = instruction.operands
    registers, parts_of_a = items(d), items(a) if len(items(a)) > 1 else ()
    known = _constants(tuple(constants), shape, bool(parts_of_a))
    if known is None or len(registers) != shape.columns * bits_of(shape.d) // 64 or len(parts_of_a) not in (0, 4):
        return None
    negated, trans_a, trans_b = known
    a_form, b_form = FORMATS[a_type], FORMATS[b_type]
    read_d, read_a = ([reader(item, "b32") for item in group] for group in (registers, parts_of_a))
    a_descriptor = None if parts_of_a else reader(a, "b64")
    b_descriptor, keep = reader(b, "b64"), reader(scale, "pred")
    slots = tuple(item.slot for item in registers if isinstance(item, Register))
    a_slots = tuple(item.slot for item in parts_of_a if isinstance(item, Register))

    def step(lanes: Lanes, mask: Mask) -> None:
        flights, warps = Flights.of(lanes), whole_warps(lanes, mask)
        flight = flights.find(shape, registers, slots)
        flights.check_use(lanes, mask, (*slots, *a_slots), slots, flight)
        flights.check_fence(lanes, warps, (*slots, *a_slots))
        units = _units(lanes, warps)
        if a_descriptor is None:
            left = matrix_a([of_warps(lanes, read(lanes), warps) for read in read_a], a_form, _ROWS)
        else:
            left = _read_a(lanes, flights, units, _descriptors(lanes, a_descriptor(lanes), units), a_form, trans_a)
        right = _read_b(lanes, flights, units, _descriptors(lanes, b_descriptor(lanes), units), b_form, trans_b, shape.columns)
        if negated:
            left = -left
        terms = product(left.reshape(len(right), -1, left.shape[2]), right, shape.d).reshape(-1, _ROWS, shape.columns)
        kept = of_warps(lanes, keep(lanes), warps)[:, 0]
        total = accumulate(terms, before(lanes, flight, warps, kept), shape.d, saturate)
        flights.depart(lanes, flight, warps, total, a_slots)

    def before(lanes: Lanes, flight: Flight, warps: Warps, kept: NDArray[np.bool_]) -> Array:
        """``[w, 16, columns]``: what is added to: of what is in flight its value, else that of the registers, or nothing."""
        if not kept.any():
            return np.zeros(1, np.int32 if shape.d == "s32" else np.float32)
        flying = flight.group[at(warps)] >= 0
        if flying.all():
            found = flight.value[at(warps)]
        else:
            found = from_registers([of_warps(lanes, read(lanes), warps) for read in read_d], shape.d, _ROWS)
            if flying.any():
                found = np.where(flying[:, None, None], flight.value[at(warps)], found)
        return found if kept.all() else np.where(kept[:, None, None], found, found.dtype.type(0))

    return step


def _units(lanes: Lanes, warps: Warps) -> Which:
    """``[u, 4]``: the warps that execute a wgmma, in groups where these are complete; else ``[w, 1]``."""
    every = np.arange(lanes.count // WARP) if warps is None else warps
    if lanes.kernel.threads % (GROUP * WARP):
        lanes.note(Kind.PART_OF_WARP, lanes.every, "of a warpgroup")
    elif len(every) % GROUP == 0:
        groups = every.reshape(-1, GROUP)
        if (groups[:, 0] % GROUP == 0).all() and (groups[:, -1] == groups[:, 0] + GROUP - 1).all():
            return groups
    return every[:, None]


def _descriptors(lanes: Lanes, value: Array, units: Which) -> Array:
    """``[u]``: a descriptor of each unit; that threads of one have different ones is noted."""
    if len(value) == 1:
        return np.broadcast_to(value, (len(units),))
    rows = value.reshape(-1, WARP)[units].reshape(len(units), -1)
    differ = rows != rows[:, :1]
    if differ.any():
        which = lanes_of(lanes, units.reshape(-1)).reshape(len(units), -1)
        lanes.note(Kind.WGMMA, which[differ], "descriptors differ in a warpgroup")
    return rows[:, 0]


def _places(descriptors: Array, size: int, transposed: bool) -> Array:
    """:func:`~fastdllm_triton.ptx.descriptors.addresses` of 32 bytes of K, computed once of descriptors that are the same."""
    different, which = np.unique(descriptors, return_inverse=True)
    return addresses(different, size, 16 if transposed else 2, transposed)[which]


def _sharers(lanes: Lanes, units: Which, chunks: int) -> Which:
    """``[u, chunks]``: the lanes by which each unit reads chunks; as whichever warp may read each, it is another in each unit."""
    threads = lanes_of(lanes, units.reshape(-1)).reshape(len(units), -1)
    turn = np.arange(chunks) + WARP * np.arange(len(units))[:, None]
    which: Which = np.take_along_axis(threads, turn % threads.shape[1], 1)
    return which


def _read_a(lanes: Lanes, flights: Flights, units: Which, descriptors: Array, form: Format, transposed: bool) -> Array:
    """``[w, 16, K]``: the rows of A of each warp, 32 chunks."""
    places = _places(descriptors, GROUP * _ROWS, transposed).reshape(len(units), GROUP, WARP)
    places = places[np.arange(len(units))[:, None], units % GROUP].reshape(len(units), -1)
    which = _sharers(lanes, units, places.shape[1])
    data = flights.read(lanes, units.reshape(-1), which.reshape(-1), places.reshape(-1))
    return values(data.reshape(-1, WARP, CHUNK), form, _ROWS, transposed)


def _read_b(
    lanes: Lanes, flights: Flights, units: Which, descriptors: Array, form: Format, transposed: bool, columns: int
) -> Array:
    """``[u, columns, K]``: all of B, once for the warps of a unit."""
    places = _places(descriptors, columns, transposed)
    which = _sharers(lanes, units, places.shape[1])
    data = flights.read(lanes, units.reshape(-1), which.reshape(-1), places.reshape(-1))
    return values(data.reshape(*places.shape, CHUNK), form, columns, transposed)


# Guards -------------------------------------------------------------------------------------------------------------------------


def watched(kernel: Kernel) -> frozenset[int]:
    """Slots of the registers that a kernel's wgmmas use: accumulators, and parts of A; none where it has no wgmma."""
    found: set[int] = set()
    for instruction in kernel.instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            for operand in instruction.operands[:2]:
                if isinstance(operand, Vector):
                    found.update(register.slot for register in registers_of(operand))
    return frozenset(found)


def guard(instruction: Instruction, slots: frozenset[int]) -> Step | None:
    """What has to run before an instruction other than a wgmma, in the same lanes, if it names registers of some slots."""
    if instruction.name == "wgmma" or not slots:
        return None
    named: list[int] = []
    for operand in instruction.operands:
        named += _slots(operand, slots)
    if not named:
        return None
    written = tuple(_slots(instruction.operands[0], slots)) if not isinstance(instruction.operands[0], Address) else ()
    every = tuple(dict.fromkeys(named))
    if instruction.name == "mov":
        return lambda lanes, mask: Flights.of(lanes).check_use(lanes, mask, every, written)
    return lambda lanes, mask: Flights.of(lanes).touch(lanes, mask, every, written)


def _slots(operand: Operand, slots: frozenset[int]) -> list[int]:
    return [register.slot for register in registers_of(operand) if register.slot in slots]

"""Loads, stores, and what keeps them in order: ld, st, prefetch, fence, and hints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from .accesses import Access, Space, accesses_of
from .lanes import UNSIGNED, Array, Lanes, Mask, Step, bits_of, items, reader, writer
from .memory import GlobalMemory
from .parser import Address, Immediate, Instruction, Operand, Register, Sink, Symbol
from .semantics import effect
from .shared import SharedMemory

#: What gives the bytes that lanes address.
Addresses = Callable[[Lanes], Array]


def addresses_of(operand: Operand) -> Addresses:
    """What gives the addresses of ``[base + offset]``, ``[N]`` or ``[1]``, uint32 or uint64 as the base is."""
    assert isinstance(operand, Address), operand
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        slot, dtype = base.slot, UNSIGNED[base.bits]
        more = dtype(offset & (2**base.bits - 1))
        return (lambda lanes: lanes.registers[slot] + more) if offset else lambda lanes: lanes.registers[slot]
    fixed = np.array([(base.value if isinstance(base, Immediate) else 0) + offset & (2**64 - 1)], np.uint64)
    return lambda lanes: fixed


def widener(operand: Operand, type_: str) -> Callable[[Array], Array]:
    """What makes values of memory, unsigned of a type's width, those of the register: with their sign for ``s8`` to ``s32``."""
    assert isinstance(operand, Register), operand
    wide, bits = UNSIGNED[operand.bits], bits_of(type_)
    if operand.bits == bits:
        return lambda values: values
    if type_[0] == "s":
        signed: Any = f"i{bits // 8}"
        return lambda values: np.ascontiguousarray(values).view(signed).astype(wide)
    return lambda values: values.astype(wide)


def fits(operand: Operand, type_: str) -> bool:
    """Whether an operand can be the source or the destination of a type (PTX ISA, 9.4.1)."""
    return not isinstance(operand, Register) or (operand.bits > 1 and operand.bits >= bits_of(type_))


@effect("ld")
def _ld(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.8, ld, and 9.7.9.9, ld.global.nc; operands after the address are cache policies."""
    known = accesses_of(instruction)
    if not known:
        return None
    access = known[0]
    results = items(instruction.operands[0])
    if len(results) != access.count or not all(fits(result, access.type) for result in results):
        return None
    if access.space is Space.PARAM:
        return _parameter(instruction, access)
    addresses = addresses_of(instruction.operands[1])
    unsigned: Any = np.dtype(UNSIGNED[bits_of(access.type)])
    wanted = [(n, result, widener(result, access.type)) for n, result in enumerate(results) if not isinstance(result, Sink)]
    shared, size, use, single = access.space is Space.SHARED, access.size, access.use, access.count == 1

    def step(lanes: Lanes, mask: Mask) -> None:
        which = lanes.active(mask)
        address = addresses(lanes)
        if shared:
            address = lanes.spread(address)
            data = lanes.shared.load(lanes, which, address if mask is None else address[which], size)
        else:
            if mask is not None and len(address) > 1:
                address = address[which]
            data = cast(GlobalMemory, lanes.memory).load(lanes, which, address, size, use)
        values = data.reshape(-1).view(unsigned)
        if single:
            (_, result, widen) = wanted[0]
            give(lanes, result, widen(values), which, mask)
            return
        table = values.reshape(len(data), -1)
        for n, result, widen in wanted:
            give(lanes, result, np.ascontiguousarray(widen(table[:, n])), which, mask)

    return step if wanted else lambda lanes, mask: None


def give(lanes: Lanes, result: Operand, values: Array, which: Array, mask: Mask) -> None:
    """Writes what lanes found in memory, or what all of them found at one address."""
    if mask is None or len(values) < len(which):
        lanes.put(result, values, mask)
    else:
        lanes.put_some(result, which, values)


def _parameter(instruction: Instruction, access: Access) -> Step | None:
    """``ld.param``: the same in all lanes."""
    address, results = instruction.operands[1], items(instruction.operands[0])
    if not isinstance(address, Address) or not isinstance(address.base, Symbol) or address.offset or len(results) != 1:
        return None
    name, bits = address.base.name, bits_of(access.type)
    write = writer(results[0], access.type)

    def step(lanes: Lanes, mask: Mask) -> None:
        value = lanes.parameters[name]
        write(lanes, value if 8 * value.itemsize == bits else value.astype(UNSIGNED[bits]), mask)

    return step


@effect("st")
def _st(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.11, st; operands after the values are cache policies."""
    known = accesses_of(instruction)
    if not known:
        return None
    access = known[0]
    addresses, sources = addresses_of(instruction.operands[0]), items(instruction.operands[1])
    if len(sources) != access.count or not all(fits(source, access.type) for source in sources):
        return None
    bits = bits_of(access.type)
    readers = [reader(source, f"b{bits}") for source in sources]
    shared, use, single = access.space is Space.SHARED, access.use, access.count == 1

    def step(lanes: Lanes, mask: Mask) -> None:
        which = lanes.active(mask)
        address = lanes.spread(addresses(lanes))
        if mask is not None:
            address = address[which]
        if single:
            value = lanes.spread(readers[0](lanes))
            data = np.ascontiguousarray(value if mask is None else value[which]).reshape(-1, 1)
        else:
            data = np.empty((len(which), len(readers)), UNSIGNED[bits])
            for n, read in enumerate(readers):
                value = read(lanes)
                data[:, n] = value if mask is None or len(value) == 1 else value[which]
        raw = data.view(np.uint8)
        if shared:
            lanes.shared.store(lanes, which, address, raw)
        else:
            cast(GlobalMemory, lanes.memory).store(lanes, which, address, raw, use)

    return step


def _nothing(lanes: Lanes, mask: Mask) -> None:
    """What has no effect here."""


@effect("prefetch", "prefetchu", "nanosleep", "membar")
def _no_effect(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.16, prefetch and prefetchu, which may address anything; 9.7.19.2, nanosleep; 9.7.13.4, membar.

    Accesses take effect at once here, in an order that all threads see: a fence has nothing to do.
    """
    match instruction.parts:
        case ("prefetch", *spaces, "L1" | "L2" | "L2::evict_last" | "L2::evict_normal") if spaces in ([], ["global"]):
            return _nothing
        case ("prefetchu", "L1") | ("nanosleep", "u32") | ("membar", "cta" | "gl" | "sys"):
            return _nothing
    return None


@effect("fence")
def _fence(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.4, fence; that of the async proxy is remembered for ``wgmma``."""
    match instruction.parts:
        case ("fence", "proxy", "async") | ("fence", "proxy", "async", "shared::cta" | "shared::cluster"):
            return lambda lanes, mask: cast(SharedMemory, lanes.shared).fence(lanes, lanes.active(mask))
        case ("fence", "proxy", "async", "global"):
            return _nothing
        case ("fence", *order, "cta" | "cluster" | "gpu" | "sys") if order in ([], ["sc"], ["acq_rel"], ["acquire"], ["release"]):
            return _nothing
    return None


@effect("griddepcontrol")
def _griddepcontrol(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.13, griddepcontrol: the launch after may begin, which is the driver's affair; the machine does ``wait``."""
    return _nothing if instruction.opcode == "griddepcontrol.launch_dependents" else None


@effect("createpolicy")
def _createpolicy(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.19, createpolicy: a hint for caches, which nothing here asks for."""
    match instruction.parts:
        case ("createpolicy", "fractional", *priorities, "b64") if 1 <= len(priorities) <= 2:
            if not all(priority.startswith("L2::evict_") for priority in priorities):
                return None
        case _:
            return None
    write, policy = writer(instruction.operands[0], "b64"), np.zeros(1, np.uint64)
    return lambda lanes, mask: write(lanes, policy, mask)


class TrapError(RuntimeError):
    """A kernel stopped itself: a failed ``device_assert``, for instance."""


@effect("trap")
def _trap(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.19.4, trap."""
    if instruction.opcode != "trap":
        return None

    def step(lanes: Lanes, mask: Mask) -> None:
        which = lanes.active(mask)
        if len(which):
            program, thread = int(lanes.programs[lanes.place[which[0]]]), int(lanes.thread[which[0]])
            where = f"{lanes.kernel.name}, {instruction.location}, PTX line {instruction.line}"
            raise TrapError(f"{where}: trap [program {program}, thread {thread}]")

    return step

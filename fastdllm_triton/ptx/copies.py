"""Asynchronous copies from global to shared memory: cp.async, its groups, and waiting for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .accesses import accesses_of
from .lanes import Array, Lanes, Mask, Step, Which, reader
from .memory import GlobalMemory
from .parser import Immediate, Instruction, Operand, Register
from .semantics import effect
from .shared import SharedMemory
from .transfers import addresses_of


@dataclass(slots=True)
class _Copy:
    """Copies of one instruction on their way.

    Attributes:
        which, place, size: lanes, and where they write.
        group: that of each lane, ``[n]``, or ``[1]`` where all have the same.
    """

    which: Which
    place: Array
    size: int
    group: NDArray[np.int64]


@dataclass(slots=True)
class _Flight:
    """The copies of a batch that nobody waited for yet.

    Attributes:
        group: which group each lane's next copy belongs to, ``[N]``, or ``[1]`` where all have the same.
        copies: in the order of their start.
    """

    group: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    copies: list[_Copy] = field(default_factory=list)


def _masked(lanes: Lanes, mask: Mask) -> Mask:
    """None also where a mask has all lanes."""
    return None if mask is None or np.broadcast_to(mask, (lanes.count,)).all() else mask


def _commit(lanes: Lanes, mask: Mask) -> None:
    flight = lanes.state(_Flight)
    if _masked(lanes, mask) is None:
        flight.group = flight.group + 1
    else:
        flight.group = lanes.spread(flight.group) + lanes.spread(cast(Array, mask))


def _wait(lanes: Lanes, mask: Mask, behind: int, *, all_: bool = False) -> None:
    """Ends copies of the lanes of a mask: all, or those of groups that ``behind`` others were committed after."""
    flight = lanes.state(_Flight)
    shared = cast(SharedMemory, lanes.shared)
    mask = _masked(lanes, mask)
    left: list[_Copy] = []
    for copy in flight.copies:
        now = flight.group if len(flight.group) == 1 else flight.group[copy.which]
        done = np.ones(1, np.bool_) if all_ else copy.group < now - behind
        if mask is not None:
            done = done & mask[copy.which]
        if done.all():
            shared.end_copy(lanes, copy.which, copy.place, copy.size)
            continue
        if done.any():
            shared.end_copy(lanes, copy.which[done], copy.place[done], copy.size)
            group = copy.group if len(copy.group) == 1 else copy.group[~done]
            copy = _Copy(copy.which[~done], copy.place[~done], copy.size, group)
        left.append(copy)
    flight.copies = left


@effect("cp")
def _cp(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.25.3, cp.async, cp.async.commit_group, cp.async.wait_group and cp.async.wait_all."""
    match instruction.parts:
        case ("cp", "async", "ca" | "cg", *_):
            return _copy(instruction)
        case ("cp", "async", "commit_group"):
            return _commit
        case ("cp", "async", "wait_group"):
            (behind,) = instruction.operands
            if not isinstance(behind, Immediate):
                return None
            number = behind.value
            return lambda lanes, mask: _wait(lanes, mask, number)
        case ("cp", "async", "wait_all"):
            return lambda lanes, mask: _wait(lanes, mask, 0, all_=True)
    return None


def _copy(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.25.3.1, cp.async: bytes beyond ``src-size``, or all where ``ignore-src`` is true, are zero."""
    known = accesses_of(instruction)
    if not known:
        return None
    size = known[0].size
    to, source = addresses_of(instruction.operands[0]), addresses_of(instruction.operands[1])
    more = [operand for operand in instruction.operands[3:] if not _is_policy(operand)]
    if len(more) > 1:
        return None
    ignores = bool(more) and isinstance(more[0], Register) and more[0].bits == 1
    count = reader(more[0], "pred" if ignores else "u32") if more else None

    def step(lanes: Lanes, mask: Mask) -> None:
        which = lanes.active(mask)
        if not len(which):
            return
        address, place = lanes.spread(source(lanes)), lanes.spread(to(lanes))
        if mask is not None:
            address, place = address[which], place[which]
        memory = cast(GlobalMemory, lanes.memory)
        taken: Array | None = None
        if count is not None:
            taken = lanes.spread(count(lanes))[which]
            if ignores:
                taken = np.where(taken, np.uint32(0), np.uint32(size))
            if (taken >= size).all():
                taken = None
        data = memory.load(lanes, which, address, size) if taken is None else _part(lanes, which, address, size, taken)
        begun = cast(SharedMemory, lanes.shared).begin_copy(lanes, which, place, data)
        if begun is not None:
            flight = lanes.state(_Flight)
            group = flight.group if len(flight.group) == 1 else flight.group[begun[0]]
            flight.copies.append(_Copy(*begun, size, group))

    return step


def _is_policy(operand: Operand) -> bool:
    return isinstance(operand, Register) and operand.bits == 64


def _part(lanes: Lanes, which: Which, address: Array, size: int, taken: Array) -> Array:
    """``[n, size]``: the first ``taken [n]`` bytes at addresses, and zeros."""
    memory = cast(GlobalMemory, lanes.memory)
    data = np.zeros((len(which), size), np.uint8)
    full = np.flatnonzero(taken >= size)
    if len(full):
        data[full] = memory.load(lanes, which[full], address[full], size)
    some = np.flatnonzero((taken > 0) & (taken < size))
    if len(some):
        data[some] = memory.load_part(lanes, which[some], address[some], taken[some], size)
    return data

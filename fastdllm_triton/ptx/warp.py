"""Instructions that the threads of a warp execute together: shuffles, votes, reductions, and matrices in shared memory.

Which threads take part is said by ``membermask``, or by the instruction itself, which wants all of a warp. To miss a thread is
a :attr:`~fastdllm_triton.ptx.findings.Kind.PART_OF_WARP`; so the machine brings a warp's threads together first
(:func:`together`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .findings import Kind
from .lanes import WARP, Array, Lanes, Mask, Step, Which, items, reader, writer
from .parser import Immediate, Instruction, Operand
from .semantics import effect
from .transfers import addresses_of

_TOGETHER = frozenset({"shfl", "redux", "vote", "match", "elect", "ldmatrix", "stmatrix", "movmatrix", "mma", "wgmma"})
#: Warps, by their place in the batch; None where it is all of them.
Warps = Which | None

_LANE = np.arange(WARP)
_BIT = (1 << np.arange(WARP, dtype=np.uint64)).astype(np.uint32)
_FULL = 0xFFFFFFFF
#: What a register holds whose value nobody can know.
NANS = np.array([_FULL], np.uint32)


def together(instruction: Instruction) -> bool:
    """Whether the machine has to bring a warp's threads together for an instruction."""
    return instruction.name in _TOGETHER or instruction.opcode.startswith("bar.warp")


def _any(values: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    return np.logical_or.reduce(values, axis)  # type: ignore[no-any-return]


def whole_warps(lanes: Lanes, mask: Mask) -> Warps:
    """The warps that execute an instruction which wants all of their threads; those that do in part are noted, and left out."""
    if mask is None:
        return None
    active = np.broadcast_to(mask, (lanes.count,)).reshape(-1, WARP)
    some, every = _any(active, 1), ~_any(~active, 1)
    if (some != every).any():
        lanes.note(Kind.PART_OF_WARP, np.flatnonzero(active & ~every[:, None]))
    return None if every.all() else np.flatnonzero(every)


def count_of(lanes: Lanes, warps: Warps) -> int:
    """How many warps."""
    return lanes.count // WARP if warps is None else len(warps)


def lanes_of(lanes: Lanes, warps: Warps) -> Which:
    """``[w * 32]``: the lanes of warps."""
    return lanes.every if warps is None else (warps[:, None] * WARP + _LANE).reshape(-1)


def of_warps(lanes: Lanes, value: Array, warps: Warps) -> Array:
    """``[w, 32]``: values of the lanes of warps."""
    if len(value) == 1:
        return np.broadcast_to(value, (count_of(lanes, warps), WARP))
    rows = value.reshape(-1, WARP)
    return rows if warps is None else rows[warps]


def put_warps(lanes: Lanes, register: Operand, warps: Warps, values: Array) -> None:
    """Writes values of the lanes of warps, ``[w, 32]`` or flat, to a register."""
    if warps is None:
        lanes.put(register, values.reshape(-1), None)
    else:
        lanes.put_some(register, lanes_of(lanes, warps), values.reshape(-1))


# Members ------------------------------------------------------------------------------------------------------------------------


def _members(operand: Operand) -> Callable[[Lanes, Mask], NDArray[np.bool_] | None]:
    """What finds with whom each lane works together: ``[W, 32, 32]``, of each lane of each warp, or None where all do with all.

    A lane that is not among its own members, and a member that does not execute the instruction, are noted.
    """
    full = isinstance(operand, Immediate) and operand.value & _FULL == _FULL
    read = reader(operand, "b32")

    def members(lanes: Lanes, mask: Mask) -> NDArray[np.bool_] | None:
        if mask is None:
            if full:
                return None
            wanted = read(lanes)
            if (wanted == _FULL).all():
                return None
        active = lanes.spread(np.ones(1, np.bool_) if mask is None else mask).reshape(-1, WARP)
        if full and bool((active == active[:, :1]).all()):  # whole warps: what the others get is not written
            return None
        wanted = of_warps(lanes, read(lanes), None)
        listed = (wanted[:, :, None] & _BIT) != 0
        missed = _any(listed & ~active[:, None, :], 2) | ~np.diagonal(listed, axis1=1, axis2=2)
        missed &= active
        if missed.any():
            lanes.note(Kind.PART_OF_WARP, np.flatnonzero(missed))
        group: NDArray[np.bool_] = listed & active[:, None, :]
        return group

    return members


def _bits(chosen: NDArray[np.bool_]) -> Array:
    """``[..., 32]`` bools as uint32, the first lowest."""
    packed: Array = np.packbits(chosen, axis=-1, bitorder="little").view("<u4")[..., 0]
    return packed


# Shuffles -----------------------------------------------------------------------------------------------------------------------


def _source(mode: str, b: Array, c: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Of each lane, ``[..., 32]``, from which it reads, and whether that is in range."""
    b, c = b.astype(np.int64), c.astype(np.int64)
    near, clamp, segment = b & 31, c & 31, c >> 8 & 31
    lowest = _LANE & segment
    highest = lowest | (clamp & ~segment)
    if mode == "up":
        source = _LANE - near
        inside = source >= highest
    elif mode == "down":
        source = _LANE + near
        inside = source <= highest
    else:
        source = _LANE ^ near if mode == "bfly" else lowest | (near & ~segment)
        inside = source <= highest
    return np.where(inside, source, _LANE), inside


@effect("shfl")
def _shfl(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.9.6, shfl.sync."""
    match instruction.parts:
        case ("shfl", "sync", ("up" | "down" | "bfly" | "idx") as mode, "b32"):
            pass
        case _:
            return None
    result, a, b, c, mask_ = instruction.operands
    destination, *predicate = items(result)
    read, write, members = reader(a, "b32"), writer(destination, "b32"), _members(mask_)
    tell = writer(predicate[0], "pred") if predicate else None
    read_b, read_c = reader(b, "b32"), reader(c, "b32")
    fixed = None
    if isinstance(b, Immediate) and isinstance(c, Immediate):
        fixed = _source(mode, np.array([b.value & 31]), np.array([c.value & _FULL]))

    def step(lanes: Lanes, mask: Mask) -> None:
        group = members(lanes, mask)
        value = read(lanes)
        source, inside = fixed or _source(mode, of_warps(lanes, read_b(lanes), None), of_warps(lanes, read_c(lanes), None))
        if len(value) > 1:
            rows = value.reshape(-1, WARP)
            value = (rows.take(source, axis=1) if source.ndim == 1 else np.take_along_axis(rows, source, 1)).reshape(-1)
        if group is not None:  # what comes from a lane that takes no part is unknown
            known = np.take_along_axis(group, np.broadcast_to(source, group.shape[:2])[:, :, None], 2).reshape(-1)
            value = np.where(known, value, NANS)
        write(lanes, value, mask)
        if tell is not None:
            tell(lanes, np.broadcast_to(inside, (lanes.count // WARP, WARP)).reshape(-1), mask)

    return step


# Reductions and votes -----------------------------------------------------------------------------------------------------------


def _least(values: Array, axis: int) -> Array:
    """Least of float32 as their bits: of NaN only if there is nothing else, and -0 below +0; a NaN is 0x7FFFFFFF."""
    number = values.view(np.float32)
    signed = values.view(np.int32)
    order = np.where(np.isnan(number), 0x7FFFFFFF, np.where(signed < 0, signed ^ 0x7FFFFFFF, signed))
    least = order.min(axis=axis)
    return np.where(least < 0, least ^ 0x7FFFFFFF, least).view(np.uint32)


def _greatest(values: Array, axis: int) -> Array:
    """As :func:`_least`, the greatest."""
    nan = np.isnan(values.view(np.float32))
    negated: Array = _least(np.where(nan, values, values ^ np.uint32(0x80000000)), axis)
    return np.where(np.isnan(negated.view(np.float32)), negated, negated ^ np.uint32(0x80000000))


_SIGN = np.uint32(0x80000000)
#: By operation and type: how to reduce along an axis of uint32, and what changes nothing.
_REDUCTIONS: dict[tuple[str, str], tuple[Callable[[Array, int], Array], int]] = {
    ("add", "u32"): (lambda x, axis: x.sum(axis, dtype=np.uint32), 0),
    ("add", "s32"): (lambda x, axis: x.sum(axis, dtype=np.uint32), 0),
    ("min", "u32"): (lambda x, axis: x.min(axis), _FULL),
    ("max", "u32"): (lambda x, axis: x.max(axis), 0),
    ("min", "s32"): (lambda x, axis: (x ^ _SIGN).min(axis) ^ _SIGN, 0x7FFFFFFF),
    ("max", "s32"): (lambda x, axis: (x ^ _SIGN).max(axis) ^ _SIGN, 0x80000000),
    ("and", "b32"): (np.bitwise_and.reduce, _FULL),
    ("or", "b32"): (np.bitwise_or.reduce, 0),
    ("xor", "b32"): (np.bitwise_xor.reduce, 0),
    ("min", "f32"): (_least, 0x7FFFFFFF),
    ("max", "f32"): (_greatest, 0x7FFFFFFF),
}


@effect("redux")
def _redux(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.12, redux.sync."""
    _, sync, op, *modifiers, type_ = instruction.parts
    known = _REDUCTIONS.get((op, type_))
    if sync != "sync" or known is None or (modifiers and type_ != "f32"):
        return None
    absolute, nan = "abs" in modifiers, "NaN" in modifiers
    if modifiers != ["abs"] * absolute + ["NaN"] * nan:
        return None
    result, source, mask_ = instruction.operands
    reduce, neutral = known
    read, write, members = reader(source, "b32"), writer(result, "b32"), _members(mask_)

    def step(lanes: Lanes, mask: Mask) -> None:
        group = members(lanes, mask)
        values = of_warps(lanes, read(lanes), None)
        if absolute:
            values = values & ~_SIGN
        chosen = values[:, None, :] if group is None else np.where(group, values[:, None, :], np.uint32(neutral))
        reduced = reduce(chosen, 2)  # [W, 1] where it is the same for all of a warp
        if nan:
            spoilt = np.isnan(values.view(np.float32))[:, None, :]
            reduced = np.where(_any(spoilt if group is None else spoilt & group, 2), np.uint32(0x7FFFFFFF), reduced)
        write(lanes, np.repeat(reduced, WARP // reduced.shape[1], axis=1).reshape(-1), mask)

    return step


@effect("vote")
def _vote(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.9, vote.sync."""
    match instruction.parts:
        case ("vote", "sync", ("all" | "any" | "uni") as mode, ("pred" as type_)):
            pass
        case ("vote", "sync", ("ballot" as mode), ("b32" as type_)):
            pass
        case _:
            return None
    result, source, mask_ = instruction.operands
    read, write, members = reader(source, "pred"), writer(result, type_), _members(mask_)

    def step(lanes: Lanes, mask: Mask) -> None:
        group = members(lanes, mask)
        told = of_warps(lanes, read(lanes), None)
        if group is None:  # [W, 1]: the same for all of a warp
            yes, no = told[:, None, :], ~told[:, None, :]
        else:
            yes, no = told[:, None, :] & group, ~told[:, None, :] & group
        if mode == "ballot":
            answer = _bits(yes)
        elif mode == "any":
            answer = _any(yes, 2)
        elif mode == "all":
            answer = ~_any(no, 2)
        else:
            answer = ~(_any(yes, 2) & _any(no, 2))
        write(lanes, np.repeat(answer, WARP // answer.shape[1], axis=1).reshape(-1), mask)

    return step


@effect("match")
def _match(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.10, match.sync."""
    match instruction.parts:
        case ("match", ("any" | "all") as mode, "sync", ("b32" | "b64") as type_):
            pass
        case _:
            return None
    result, source, mask_ = instruction.operands
    destination, *predicate = items(result)
    if predicate and mode == "any":
        return None
    read, write, members = reader(source, type_), writer(destination, "b32"), _members(mask_)
    tell = writer(predicate[0], "pred") if predicate else None

    def step(lanes: Lanes, mask: Mask) -> None:
        group = members(lanes, mask)
        values = of_warps(lanes, read(lanes), None)
        same = values[:, :, None] == values[:, None, :]
        if group is None:
            group = np.ones(same.shape, np.bool_)
        if mode == "any":
            write(lanes, _bits(same & group).reshape(-1), mask)
            return
        every = ~_any(group & ~same, 2)
        write(lanes, np.where(every, _bits(group), np.uint32(0)).reshape(-1), mask)
        if tell is not None:
            tell(lanes, every.reshape(-1), mask)

    return step


@effect("elect")
def _elect(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.14, elect.sync; the lowest lane is elected, as which one it is is left open."""
    if instruction.opcode != "elect.sync":
        return None
    result, mask_ = instruction.operands
    destination, predicate = items(result)
    write, tell, members = writer(destination, "b32"), writer(predicate, "pred"), _members(mask_)

    def step(lanes: Lanes, mask: Mask) -> None:
        group = members(lanes, mask)
        warps = lanes.count // WARP
        leader = np.zeros((warps, WARP), np.int64) if group is None else group.argmax(2)
        write(lanes, leader.astype(np.uint32).reshape(-1), mask)
        tell(lanes, (leader == _LANE).reshape(-1), mask)

    return step


@effect("activemask")
def _activemask(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.11, activemask."""
    if instruction.opcode != "activemask.b32":
        return None
    write = writer(instruction.operands[0], "b32")

    def step(lanes: Lanes, mask: Mask) -> None:
        active = lanes.spread(np.ones(1, np.bool_) if mask is None else mask).reshape(-1, WARP)
        write(lanes, np.repeat(_bits(active), WARP), mask)

    return step


@effect("bar")
def _bar_warp(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.2, bar.warp.sync: a warp's own accesses are in order here, so that only its members are looked at."""
    if instruction.opcode != "bar.warp.sync":
        return None
    members = _members(instruction.operands[0])

    def step(lanes: Lanes, mask: Mask) -> None:
        members(lanes, mask)

    return step


# Matrices -----------------------------------------------------------------------------------------------------------------------


def _matrices(parts: tuple[str, ...]) -> tuple[int, bool] | None:
    """How many, and whether transposed, of ``m8n8.x4.trans.shared.b16``."""
    match parts:
        case ("sync", "aligned", "m8n8", ("x1" | "x2" | "x4") as number, "trans", "shared" | "shared::cta", "b16"):
            return int(number[1]), True
        case ("sync", "aligned", "m8n8", ("x1" | "x2" | "x4") as number, "shared" | "shared::cta", "b16"):
            return int(number[1]), False
    return None


def _row_lanes(lanes: Lanes, warps: Warps, number: int) -> Which:
    """``[w * number * 8]``: the lanes that have the addresses of rows."""
    return lanes_of(lanes, warps).reshape(-1, WARP)[:, : 8 * number].reshape(-1)


@effect("ldmatrix")
def _ldmatrix(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.14.5.15, ldmatrix, of 16-bit elements."""
    known = _matrices(instruction.parts[1:])
    if known is None:
        return None
    number, transposed = known
    registers, addresses = items(instruction.operands[0]), addresses_of(instruction.operands[1])
    if len(registers) != number:
        return None

    def step(lanes: Lanes, mask: Mask) -> None:
        warps = whole_warps(lanes, mask)
        which = _row_lanes(lanes, warps, number)
        data = lanes.shared.load(lanes, which, lanes.spread(addresses(lanes))[which], 16)
        rows = np.ascontiguousarray(data).view(np.uint16).reshape(-1, number, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows.swapaxes(0, 1)).view(np.uint32).reshape(number, -1)  # lane 4 * row + pair
        for register, values in zip(registers, pairs, strict=True):
            put_warps(lanes, register, warps, values)

    return step


@effect("stmatrix")
def _stmatrix(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.14.5.16, stmatrix, of 16-bit elements."""
    known = _matrices(instruction.parts[1:])
    if known is None:
        return None
    number, transposed = known
    addresses, readers = addresses_of(instruction.operands[0]), [reader(item, "b32") for item in items(instruction.operands[1])]
    if len(readers) != number:
        return None

    def step(lanes: Lanes, mask: Mask) -> None:
        warps = whole_warps(lanes, mask)
        which = _row_lanes(lanes, warps, number)
        pairs = np.stack([of_warps(lanes, read(lanes), warps) for read in readers], axis=1)
        rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, number, 8, 8)
        if transposed:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        data = rows.view(np.uint8).reshape(-1, 16)
        lanes.shared.store(lanes, which, lanes.spread(addresses(lanes))[which], data)

    return step


@effect("movmatrix")
def _movmatrix(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.14.5.17, movmatrix."""
    if instruction.opcode != "movmatrix.sync.aligned.m8n8.trans.b16":
        return None
    destination, source = instruction.operands
    read = reader(source, "b32")

    def step(lanes: Lanes, mask: Mask) -> None:
        warps = whole_warps(lanes, mask)
        matrix: NDArray[Any] = np.ascontiguousarray(of_warps(lanes, read(lanes), warps)).view(np.uint16).reshape(-1, 8, 8)
        put_warps(lanes, destination, warps, np.ascontiguousarray(matrix.swapaxes(1, 2)).view(np.uint32).reshape(-1, WARP))

    return step

"""Atomic operations on memory: atom and red (PTX ISA, 9.7.13.5 and 9.7.13.6).

Lanes that change one address come one after the other: in the order of their number, or in a random one where threads are
interleaved at random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .accesses import Access, Space, accesses_of
from .lanes import UNSIGNED, Array, Lanes, Mask, Step, bits_of, items, reader
from .memory import GlobalMemory
from .parser import Address, Instruction, Sink
from .rounding import canonical, flush, from_bf16, to_bf16, to_f16
from .semantics import effect
from .shared import SharedMemory
from .transfers import addresses_of, fits, give, widener

#: The new value of a place, of the old one and the operands; all unsigned, ``[n]``.
Change = Callable[..., Array]


def _add_f16(old: Array, value: Array) -> Array:
    total = old.view(np.float16).astype(np.float32) + value.view(np.float16).astype(np.float32)
    return to_f16(total).view(np.uint16)  # rounded twice, which is as good as once: see :mod:`.half`


def _add_bf16(old: Array, value: Array) -> Array:
    return to_bf16(from_bf16(old) + from_bf16(value))


def _add_f32(old: Array, value: Array) -> Array:
    return canonical(old.view(np.float32) + value.view(np.float32)).view(np.uint32)


def _add_f32_flushed(old: Array, value: Array) -> Array:
    """In global memory subnormal numbers count as zeros."""
    total = flush(old.view(np.float32)) + flush(value.view(np.float32))
    return flush(canonical(total)).view(np.uint32)


def _signed(operation: Change) -> Change:
    def change(old: Array, value: Array) -> Array:
        signed: Any = f"i{old.itemsize}"
        return operation(old.view(signed), value.view(signed)).view(old.dtype)

    return change


_FLOAT_ADDS: dict[str, Change] = {
    "f16": _add_f16,
    "bf16": _add_bf16,
    "f32": _add_f32,
    "f64": lambda old, value: (old.view(np.float64) + value.view(np.float64)).view(np.uint64),
}
_CHANGES: dict[str, Change] = {
    "add": lambda old, value: old + value,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "cas": lambda old, wanted, value: np.where(old == wanted, value, old),
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype),
    "min": np.minimum,
    "max": np.maximum,
}


def change_of(access: Access) -> Change:
    """What an operation does, on a type's elements."""
    type_ = access.type.removesuffix("x2")
    if access.operation == "add" and type_ in _FLOAT_ADDS:
        return _add_f32_flushed if type_ == "f32" and access.space is Space.GLOBAL else _FLOAT_ADDS[type_]
    change = _CHANGES[access.operation]
    return _signed(change) if access.operation in ("min", "max") and type_[0] == "s" else change


#: Operations on integers as numpy functions, which make all changes of one place at once.
_SCANS: dict[str, Any] = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def apply(
    pieces: Array, place: Array, values: list[Array], change: Change, scan: Any, order: np.random.Generator | None
) -> Array:
    """Changes pieces of memory lane by lane, and returns what each lane found.

    Args:
        pieces: the memory, in elements.
        place: ``[n]``, of each lane.
        values: operands, ``[n]`` each.
        change: the operation.
        scan: the operation as a numpy function to accumulate with, or None where there is none.
        order: what lanes' order is drawn from.
    """
    count = len(place)
    old: NDArray[Any] = np.empty(count, pieces.dtype)
    turn = np.arange(count) if order is None else order.permutation(count)
    turn = turn[np.argsort(place[turn], kind="stable")]  # lanes of one place lie together, in their order
    first = np.flatnonzero(np.diff(place[turn], prepend=-1))
    length = np.diff(first, append=count)
    if scan is not None and length.max() > len(first):  # few places, many lanes
        for start, number in zip(first.tolist(), length.tolist(), strict=True):
            lanes = turn[start : start + number]
            at = place[lanes[0]]
            states = scan.accumulate(np.concatenate([pieces[at : at + 1], values[0][lanes]]), dtype=pieces.dtype)
            old[lanes], pieces[at] = states[:-1], states[-1]
        return old
    for n in range(int(length.max())):
        lanes = turn[first[length > n] + n]
        found = pieces[place[lanes]]
        old[lanes] = found
        pieces[place[lanes]] = change(found, *(value[lanes] for value in values))
    return old


@effect("atom", "red")
def _atom(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.13.5, atom, and 9.7.13.6, red; each element of a vector is changed by itself."""
    known = accesses_of(instruction)
    if not known:
        return None
    access = known[0]
    operands = list(instruction.operands)
    results = items(operands.pop(0)) if instruction.name == "atom" else ()
    address, *rest = operands
    count = 2 if access.operation == "cas" else 1
    sources = [items(operand) for operand in rest[:count]]
    if not isinstance(address, Address) or len(sources) != count or len(rest) > count + 1:
        return None
    if any(len(group) != access.count or not all(fits(o, access.type) for o in group) for group in sources):
        return None
    if results and (len(results) != access.count or not all(fits(result, access.type) for result in results)):
        return None
    return _step(access, address, results, sources)


def _step(access: Access, address: Address, results: Any, sources: list[Any]) -> Step:
    addresses = addresses_of(address)
    bits = bits_of(access.type)
    readers = [[reader(item, f"b{bits}") for item in group] for group in sources]
    wanted = [(n, result, widener(result, f"b{bits}")) for n, result in enumerate(results) if not isinstance(result, Sink)]
    change = change_of(access)
    element: Any = np.dtype(UNSIGNED[bits // 2 if access.type.endswith("x2") else bits])
    elements = access.size // element.itemsize
    scan = None if "f" in access.type else _SCANS.get(access.operation)

    def step(lanes: Lanes, mask: Mask) -> None:
        which = lanes.active(mask)
        where = lanes.spread(addresses(lanes))[which]
        values = [_elements([lanes.spread(read(lanes))[which] for read in group], element) for group in readers]

        def all_elements(pieces: Array, place: Array, chosen: Array) -> Array:
            table = pieces.view(element)
            old = np.empty((len(place), elements), element)
            for n in range(elements):
                given = [value[chosen, n] for value in values]
                old[:, n] = apply(table, place * elements + n, given, change, scan, lanes.random)
            return old

        memory = cast("GlobalMemory | SharedMemory", lanes.shared if access.space is Space.SHARED else lanes.memory)
        found = memory.update(lanes, which, where, access.size, all_elements)
        table = found.reshape(-1).view(UNSIGNED[bits]).reshape(len(which), -1)
        for n, result, widen in wanted:
            give(lanes, result, np.ascontiguousarray(widen(table[:, n])), which, mask)

    return step


def _elements(values: list[Array], element: Any) -> Array:
    """``[n, elements]``, of the operands of a vector, each of which may be two elements."""
    table = np.stack(values, axis=1)
    return table.view(element)

"""Bits: logic, shifts, fields, permutations, counts, and moves (PTX ISA, 9.7.1, 9.7.8 and 9.7.9)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from .integers import INTEGERS, unsigned
from .lanes import UNSIGNED, Array, bits_of, choose, dtype_of
from .parser import Immediate, Instruction, Sink, Vector
from .semantics import Scalar, modifiers, scalar

BITS = ("b16", "b32", "b64")
_LOGIC: dict[str, Callable[..., Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@scalar("and", "or", "xor")
def _logic(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``and``, ``or`` and ``xor``, of predicates too."""
    type_ = instruction.type
    if type_ not in ("pred", *BITS) or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_, type_), _LOGIC[instruction.name])


@scalar("not")
def _not(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``not``."""
    type_ = instruction.type
    if type_ not in ("pred", *BITS) or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_,), np.invert)


@scalar("cnot")
def _cnot(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``cnot``: 1 for 0, and 0 for all else."""
    type_ = instruction.type
    if type_ not in BITS or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_,), lambda a: (a == 0).astype(a.dtype))


@scalar("shl", "shr")
def _shift(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``shl`` and ``shr``: by the width or more, nothing is left but the sign."""
    type_, name = instruction.type, instruction.name
    right = INTEGERS if name == "shr" else ()
    if type_ not in BITS + right or modifiers(instruction, 1) is None:
        return None
    bits, dtype = bits_of(type_), dtype_of(type_)
    move: Callable[..., Array] = np.left_shift if name == "shl" else np.right_shift
    by = instruction.operands[-1]
    if isinstance(by, Immediate):
        amount = np.array([min(by.value & 0xFFFFFFFF, bits)], dtype)
        return Scalar((type_,), (type_, "u32"), lambda a, b: move(a, amount))
    # numpy gives what is wanted for an amount that is the width.
    return Scalar((type_,), (type_, "u32"), lambda a, b: move(a, np.minimum(b, np.uint32(bits)).astype(dtype)))


@scalar("shf")
def _funnel(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``shf``: 32 bits of two registers, of which ``b`` is the upper."""
    known = modifiers(instruction, 1, "l", "r", "wrap", "clamp")
    if instruction.type != "b32" or known is None or len(known) != 2 or not known & {"wrap", "clamp"}:
        return None
    left, wrap = "l" in known, "wrap" in known

    def compute(a: Array, b: Array, c: Array) -> Array:
        amount = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)

    return Scalar(("b32",), ("b32", "b32", "u32"), compute)


def _ones(count: Array, bits: int) -> Array:
    """Unsigned integers with so many ones at their low end, at most all."""
    dtype = UNSIGNED[bits]
    # numpy shifts to 0 by the width or more.
    result: Array = ~(~dtype(0) << np.minimum(count, dtype(bits)))
    return result


def _fields(bits: int, *operands: Array) -> list[Array]:
    """Positions and lengths: their low 8 bits, as unsigned integers of the width."""
    return [(operand & np.uint32(0xFF)).astype(UNSIGNED[bits]) for operand in operands]


@scalar("bfe")
def _bfe(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``bfe``: ``c`` bits from bit ``b`` on, with the sign of the uppermost that is there."""
    type_ = instruction.type
    if type_ not in ("u32", "u64", "s32", "s64") or modifiers(instruction, 1) is None:
        return None
    bits, signed = bits_of(type_), type_[0] == "s"
    dtype = UNSIGNED[bits]

    def compute(a: Array, b: Array, c: Array) -> Array:
        position, length = _fields(bits, b, c)
        mask = _ones(length, bits)
        field: Array = (a >> position) & mask
        if signed:
            last = np.minimum(position + length - dtype(1), dtype(bits - 1))
            sign = ((a >> last) & dtype(1)) * (length != 0)
            # What the field lacks: above its length, and beyond the register's end.
            field |= (~mask | ~_ones(np.maximum(dtype(bits), position) - position, bits)) * sign
        return field

    def constant(position: int, length: int) -> Callable[..., Array]:
        up, down = dtype_of(type_)(bits - position - length), dtype_of(type_)(bits - length)
        return lambda a, b, c: (a.view(dtype_of(type_)) << up) >> down

    fixed = [operand.value & 0xFF for operand in instruction.operands[-2:] if isinstance(operand, Immediate)]
    if len(fixed) == 2 and 0 < fixed[1] <= bits - fixed[0]:  # within the register, as compilers write it
        return Scalar((type_,), (unsigned(type_), "u32", "u32"), constant(*fixed))
    return Scalar((type_,), (unsigned(type_), "u32", "u32"), compute)


@scalar("bfi")
def _bfi(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``bfi``: ``b`` with the low ``d`` bits of ``a`` from bit ``c`` on."""
    type_ = instruction.type
    if type_ not in ("b32", "b64") or modifiers(instruction, 1) is None:
        return None
    bits = bits_of(type_)

    def compute(a: Array, b: Array, c: Array, d: Array) -> Array:
        position, length = _fields(bits, c, d)
        mask = _ones(length, bits) << position
        result: Array = b ^ (((a << position) ^ b) & mask)
        return result

    return Scalar((type_,), (type_, type_, "u32", "u32"), compute)


@scalar("bmsk")
def _bmsk(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``bmsk``: ``b`` ones from bit ``a`` on; a width of 0 gives 0."""
    known = modifiers(instruction, 1, "clamp", "wrap")
    if instruction.type != "b32" or known is None or len(known) != 1:
        return None

    def compute(a: Array, b: Array) -> Array:
        if "wrap" in known:
            a, b = a & np.uint32(31), b & np.uint32(31)
        result: Array = _ones(b, 32) << np.minimum(a, np.uint32(32))
        return result

    return Scalar(("b32",), ("u32", "u32"), compute)


@scalar("szext")
def _szext(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``szext``: the low ``b`` bits of ``a``, with their sign for ``s32``; ``.clamp`` keeps ``a`` from 32 on."""
    type_ = instruction.type
    known = modifiers(instruction, 1, "clamp", "wrap")
    if type_ not in ("u32", "s32") or known is None or len(known) != 1:
        return None
    dtype = dtype_of(type_)

    def compute(a: Array, b: Array) -> Array:
        kept = b & np.uint32(31) if "wrap" in known else np.minimum(b, np.uint32(32))
        away = (np.uint32(32) - kept).astype(dtype)
        result: Array = (a << away) >> away
        return choose(kept == 0, np.zeros(1, np.uint32), result.view(np.uint32))

    return Scalar((type_,), (type_, "u32"), compute)


def count_ones(values: Array) -> Array:
    """Of unsigned integers of 32 or 64 bits, as ``uint32``."""
    if values.itemsize == 8:
        both = count_ones(np.ascontiguousarray(values).view(np.uint32))
        return both[0::2] + both[1::2]
    # Of pairs of bits, of fours, of bytes; then the bytes are added by a product.
    counts: Array = values - ((values >> np.uint32(1)) & np.uint32(0x55555555))
    counts = (counts & np.uint32(0x33333333)) + ((counts >> np.uint32(2)) & np.uint32(0x33333333))
    counts = ((counts + (counts >> np.uint32(4))) & np.uint32(0x0F0F0F0F)) * np.uint32(0x01010101)
    return counts >> np.uint32(24)


def _smear(values: Array) -> Array:
    """Every bit below the uppermost one set too."""
    dtype, shift = values.dtype.type, 1
    while shift < 8 * values.itemsize:
        values = values | (values >> dtype(shift))
        shift *= 2
    return values


@scalar("popc", "clz")
def _count(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``popc`` and ``clz``, into 32 bits."""
    type_ = instruction.type
    if type_ not in ("b32", "b64") or modifiers(instruction, 1) is None:
        return None
    if instruction.name == "popc":
        return Scalar(("u32",), (type_,), count_ones)
    return Scalar(("u32",), (type_,), lambda a: count_ones(~_smear(a)))


@scalar("bfind")
def _bfind(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``bfind``: the uppermost bit that is no sign, all ones where there is none."""
    type_ = instruction.type
    known = modifiers(instruction, 1, "shiftamt")
    if type_ not in ("u32", "u64", "s32", "s64") or known is None:
        return None
    bits = bits_of(type_)

    def compute(a: Array) -> Array:
        if type_[0] == "s":
            a = a ^ (a >> a.dtype.type(bits - 1))
        found = count_ones(_smear(a.view(UNSIGNED[bits]))) - np.uint32(1)
        if "shiftamt" in known:
            found = np.where(found == np.uint32(0xFFFFFFFF), found, np.uint32(bits - 1) - found)
        return found

    return Scalar(("u32",), (type_,), compute)


@scalar("brev")
def _brev(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``brev``: the bits in the other order."""
    type_ = instruction.type
    if type_ not in ("b32", "b64") or modifiers(instruction, 1) is None:
        return None

    def compute(a: Array) -> Array:
        return _REVERSED[a.byteswap().view(np.uint8)].view(a.dtype)

    return Scalar((type_,), (type_,), compute)


_REVERSED = np.array([int(f"{n:08b}"[::-1], 2) for n in range(256)], np.uint8)


@scalar("lop3")
def _lop3(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.8, ``lop3``: any function of three bits, as the table of its 8 results."""
    table = instruction.operands[-1]
    if instruction.type != "b32" or modifiers(instruction, 1) is None or not isinstance(table, Immediate):
        return None
    rows = [n for n in range(8) if table.value >> n & 1]

    def compute(a: Array, b: Array, c: Array, _: Array) -> Array:
        terms = [(a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in rows]
        return reduce(np.bitwise_or, terms) if terms else np.zeros(1, np.uint32)

    return Scalar(("b32",), ("b32", "b32", "b32", "b32"), compute)


#: Of each mode, by the low two bits of the selector: the source bytes of the result, low one first.
_PRMT = {
    "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
    "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
    "rc8": [[n] * 4 for n in range(4)],
    "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
    "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
}


@scalar("prmt")
def _prmt(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.9, ``prmt``: four bytes of eight, or their signs."""
    if instruction.parts[1:2] != ("b32",) or instruction.parts[2:] not in ((), *((mode,) for mode in _PRMT)):
        return None
    mode = instruction.parts[2] if len(instruction.parts) > 2 else None
    selector = instruction.operands[-1]
    if mode is None and isinstance(selector, Immediate) and not selector.value & 0x8888:
        picks = [selector.value >> 4 * n & 7 for n in range(4)]
        return Scalar(("b32",), ("b32",) * 3, lambda a, b, c: _pick(a, b, picks))

    def compute(a: Array, b: Array, c: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros(1, np.uint32)
        for n in range(4):
            if mode is None:
                chosen = (c >> np.uint32(4 * n)) & np.uint32(15)
            else:
                chosen = np.array([row[n] for row in _PRMT[mode]], np.uint32)[c & np.uint32(3)]
            byte = (both >> ((chosen & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint8)
            sign = (byte >> np.uint8(7)) * np.uint8(0xFF)
            result = result | (np.where(chosen > 7, sign, byte).astype(np.uint32) << np.uint32(8 * n))
        return result

    return Scalar(("b32",), ("b32", "b32", "b32"), compute)


def _pick(a: Array, b: Array, picks: list[int]) -> Array:
    sources = np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
    result = np.empty(max(len(a), len(b)), np.uint32)
    for n, pick in enumerate(picks):
        result.view(np.uint8)[n::4] = sources[pick // 4][pick % 4 :: 4]
    return result


@scalar("mov")
def _mov(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.9, ``mov``: a copy, or several registers of one, or one of several, the first being the lowest."""
    type_ = instruction.type
    kinds = ("pred", *BITS, *INTEGERS, "f32", "f64")
    if type_ not in kinds or modifiers(instruction, 1) is None or len(instruction.operands) != 2:
        return None
    to, source = instruction.operands
    if not isinstance(to, Vector) and not isinstance(source, Vector):
        plain = type_ if type_ == "pred" else f"b{bits_of(type_)}"
        return Scalar((plain,), (plain,), lambda a: a)
    if type_ not in BITS or (isinstance(to, Vector) and isinstance(source, Vector)):
        return None
    parts = to.items if isinstance(to, Vector) else source.items if isinstance(source, Vector) else ()
    if len(parts) not in (2, 4) or bits_of(type_) // len(parts) < 8:
        return None
    part = f"b{bits_of(type_) // len(parts)}"
    if isinstance(to, Vector):
        wanted = [not isinstance(item, Sink) for item in parts]
        return Scalar((part,) * len(parts), (type_,), lambda a: _unpack(a, dtype_of(part), wanted))
    return Scalar((type_,), (part,) * len(parts), lambda *values: _pack(values, dtype_of(type_)))


def _unpack(value: Array, dtype: type[Any], wanted: list[bool]) -> list[Array | None]:
    step, one = 8 * dtype().itemsize, value.dtype.type
    parts = [value >> one(step * n) if n and want else value for n, want in enumerate(wanted)]
    return [part.astype(dtype) if want else None for part, want in zip(parts, wanted, strict=True)]


def _pack(values: tuple[Array, ...], dtype: type[Any]) -> Array:
    result = np.empty(max(len(value) for value in values), dtype)
    parts = result.view(values[0].dtype)
    for n, value in enumerate(values):
        parts[n :: len(values)] = value
    return result


@scalar("selp")
def _selp(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.6, ``selp``."""
    type_ = instruction.type
    kinds = (*BITS, *INTEGERS, "f16", "f32", "f64")
    if type_ not in kinds or modifiers(instruction, 1) is None:
        return None
    plain = f"b{bits_of(type_)}"
    return Scalar((plain,), (plain, plain, "pred"), lambda a, b, c: choose(c, a, b))

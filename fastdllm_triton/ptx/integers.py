"""Integer arithmetic (PTX ISA, 9.7.1, "Integer Arithmetic Instructions"): all of it on values, nothing bit by bit.

Where the sign does not matter, unsigned arithmetic is used: numpy wraps it silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .lanes import Array, bits_of, dtype_of
from .parser import Instruction
from .semantics import Scalar, modifiers, scalar

Binary = Callable[[Array, Array], Array]

WIDTHS = (16, 32, 64)
UNSIGNED = tuple(f"u{bits}" for bits in WIDTHS)
SIGNED = tuple(f"s{bits}" for bits in WIDTHS)
INTEGERS = UNSIGNED + SIGNED
#: Two 16-bit integers in one register.
PAIRS = ("u16x2", "s16x2")


def unsigned(type_: str) -> str:
    """``u32`` for ``s32``."""
    return "u" + type_[1:]


def wide(type_: str) -> str:
    """``s64`` for ``s32``."""
    return f"{type_[0]}{2 * bits_of(type_)}"


def clamp(values: Array, type_: str) -> Array:
    """Integers of any dtype, limited to the range of an integer type, in that type."""
    dtype = dtype_of(type_)
    limits, own = np.iinfo(dtype), np.iinfo(values.dtype)
    low, high = max(int(limits.min), int(own.min)), min(int(limits.max), int(own.max))
    clamped: Array = np.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(dtype)
    return clamped


def in_pairs(compute: Binary, type_: str) -> Binary:
    """A function of 16-bit integers, made one of registers that hold two each."""
    dtype = np.int16 if type_[0] == "s" else np.uint16

    def both(a: Array, b: Array) -> Array:
        a, b = halves(a, b)
        result: Array = compute(a.view(dtype), b.view(dtype)).view(np.uint32)
        return result

    return both


def halves(*registers: Array) -> list[Array]:
    """The low and high halves of 32-bit registers, as ``uint16`` one after the other; a single value is repeated."""
    count = max(len(register) for register in registers)
    return [np.ascontiguousarray(r if len(r) == count else np.repeat(r, count)).view(np.uint16) for r in registers]


@scalar("add", "sub")
def _add(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``add`` and ``sub``."""
    type_ = instruction.type
    known = modifiers(instruction, 1, "sat")
    operation: Binary = np.add if instruction.name == "add" else np.subtract
    if type_ in PAIRS and known == frozenset() and instruction.name == "add":
        return Scalar(("b32",), ("b32", "b32"), in_pairs(operation, type_))
    if type_ not in INTEGERS or known is None:
        return None
    if known:
        if type_ != "s32":
            return None
        return Scalar(("s32",), ("s32", "s32"), lambda a, b: clamp(operation(a.astype(np.int64), b), "s32"))
    return Scalar((type_,), (unsigned(type_), unsigned(type_)), operation)


def _high(type_: str) -> Binary:
    """The upper half of a product."""
    bits, dtype = bits_of(type_), dtype_of(type_)
    if bits < 64:
        amount = _product_type(type_)(bits)
        return lambda a, b: (_product(a, b, type_) >> amount).astype(dtype)

    def high(a: Array, b: Array) -> Array:
        # Schoolbook, in halves of 32 bits: the upper ones keep the sign.
        half, low = a.dtype.type(32), a.dtype.type(0xFFFFFFFF)
        (a1, a0), (b1, b0) = (a >> half, a & low), (b >> half, b & low)
        middle = a1 * b0 + ((a0.view(np.uint64) * b0.view(np.uint64)) >> np.uint64(32)).view(a.dtype)
        result: Array = a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)
        return result

    return high


def _product_type(type_: str) -> type[Any]:
    return dtype_of(wide(type_))


def _product(a: Array, b: Array, type_: str) -> Array:
    """The whole product, twice as wide."""
    product: Array = np.multiply(a, b, dtype=_product_type(type_))
    return product


@scalar("mul", "mad")
def _mul(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``mul`` and ``mad``: ``.lo``, ``.hi`` and ``.wide``, and ``mad.hi.sat.s32``."""
    type_ = instruction.type
    known = modifiers(instruction, 1, "lo", "hi", "wide", "sat")
    if type_ not in INTEGERS or not known:
        return None
    plus = instruction.name == "mad"
    if known == {"lo"}:
        sources = (unsigned(type_),) * (3 if plus else 2)
        return Scalar((type_,), sources, (lambda a, b, c: a * b + c) if plus else np.multiply)
    if known == {"wide"} and bits_of(type_) < 64:
        result = wide(type_)
        if plus:
            return Scalar((result,), (type_, type_, result), lambda a, b, c: _product(a, b, type_) + c)
        return Scalar((result,), (type_, type_), lambda a, b: _product(a, b, type_))
    high = _high(type_)
    if known == {"hi"}:
        if plus:
            return Scalar((type_,), (type_, type_, type_), lambda a, b, c: high(a, b) + c)
        return Scalar((type_,), (type_, type_), high)
    if known == {"hi", "sat"} and plus and type_ == "s32":
        return Scalar((type_,), (type_,) * 3, lambda a, b, c: clamp(high(a, b).astype(np.int64) + c, "s32"))
    return None


@scalar("mul24", "mad24")
def _mul24(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``mul24`` and ``mad24``: 24 bits of each factor."""
    type_, plus = instruction.type, instruction.name == "mad24"
    known = modifiers(instruction, 1, "lo", "hi")
    if type_ not in ("s32", "u32") or known is None or len(known) != 1:
        return None
    shift = np.uint64(16 if "hi" in known else 0)
    dtype = dtype_of(type_)

    def product(a: Array, b: Array) -> Array:
        eight = dtype(8)
        whole = np.multiply((a << eight) >> eight, (b << eight) >> eight, dtype=_product_type(type_))
        part: Array = (whole.view(np.uint64) >> shift).astype(dtype)
        return part

    if plus:
        return Scalar((type_,), (type_,) * 3, lambda a, b, c: product(a, b) + c)
    return Scalar((type_,), (type_, type_), product)


@scalar("sad")
def _sad(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``sad``: ``c + |a - b|``."""
    type_ = instruction.type
    if type_ not in INTEGERS or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_,) * 3, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)))


@scalar("div", "rem")
def _div(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``div`` and ``rem``, towards zero.

    By zero both give all ones, one of the values that the ISA leaves open.
    """
    type_ = instruction.type
    if type_ not in INTEGERS or modifiers(instruction, 1) is None:
        return None
    quotient = instruction.name == "div"

    def compute(a: Array, b: Array) -> Array:
        result: Array = np.fmod(a, b)
        if quotient:
            result = (a - result) // b
        if not b.all():
            result = np.where(b == 0, ~b.dtype.type(0), result)
        return result

    return Scalar((type_,), (type_, type_), compute)


@scalar("abs", "neg")
def _abs(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``abs`` and ``neg``; of the least number, itself."""
    type_ = instruction.type
    if type_ not in SIGNED or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_,), np.abs if instruction.name == "abs" else np.negative)


@scalar("min", "max")
def _min(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``min`` and ``max``, with ``.relu`` of ``s32`` and ``s16x2``."""
    type_ = instruction.type
    known = modifiers(instruction, 1, "relu")
    # ``max.s16x2.relu``, as the ISA's example has it.
    if type_ == "relu" and instruction.parts[1:] in (("s16x2", "relu"), ("s32", "relu")):
        type_, known = instruction.parts[1], frozenset({"relu"})
    if type_ not in INTEGERS + PAIRS or known is None or (known and type_ not in ("s32", "s16x2")):
        return None
    extreme: Binary = np.minimum if instruction.name == "min" else np.maximum
    if known:
        compute: Binary = lambda a, b: np.maximum(extreme(a, b), a.dtype.type(0))  # noqa: E731
    else:
        compute = extreme
    if type_ in PAIRS:
        return Scalar(("b32",), ("b32", "b32"), in_pairs(compute, type_))
    return Scalar((type_,), (type_, type_), compute)


@scalar("dp4a")
def _dp4a(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``dp4a``: four products of bytes, added to ``c``."""
    if (kinds := _dot_types(instruction)) is None or modifiers(instruction, 2) is None:
        return None
    left, right = kinds

    def compute(a: Array, b: Array, c: Array) -> Array:
        products = _parts(a, left, 4).astype(np.int32) * _parts(b, right, 4)
        result: Array = products.sum(1, dtype=np.int32).view(np.uint32) + c
        return result

    return Scalar(("b32",), ("b32", "b32", "b32"), compute)


@scalar("dp2a")
def _dp2a(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.1, ``dp2a``: two products of 16 bits of ``a`` and a byte of ``b``'s half, added to ``c``."""
    known = modifiers(instruction, 2, "lo", "hi")
    if (kinds := _dot_types(instruction)) is None or known is None or len(known) != 1:
        return None
    left, right = (np.int16 if kinds[0] is np.int8 else np.uint16), kinds[1]
    part = slice(0, 2) if "lo" in known else slice(2, 4)

    def compute(a: Array, b: Array, c: Array) -> Array:
        products = _parts(a, left, 2).astype(np.int32) * _parts(b, right, 4)[:, part]
        result: Array = products.sum(1, dtype=np.int32).view(np.uint32) + c
        return result

    return Scalar(("b32",), ("b32", "b32", "b32"), compute)


def _dot_types(instruction: Instruction) -> tuple[type[Any], type[Any]] | None:
    kinds = {"s32": np.int8, "u32": np.uint8}
    left, right = instruction.parts[-2:]
    return (kinds[left], kinds[right]) if left in kinds and right in kinds else None


def _parts(registers: Array, dtype: type[Any], count: int) -> Array:
    parts: Array = np.ascontiguousarray(registers).view(dtype).reshape(-1, count)
    return parts

"""Integer arithmetic against Python's integers."""

from __future__ import annotations

import pytest
from _instructions import check, edges, every, run, signed

WIDTHS = {"s16": "h", "u16": "h", "s32": "r", "u32": "r", "s64": "d", "u64": "d"}
TYPES = list(WIDTHS)


def width(type_: str) -> int:
    return int(type_[1:])


def value(bits: int, type_: str) -> int:
    return signed(bits, width(type_)) if type_[0] == "s" else bits


def mask(number: int, bits: int) -> int:
    return number & ((1 << bits) - 1)


def binary(opcode: str, type_: str, expected) -> None:
    """Checks ``opcode d, a, b`` of a type against a function of numbers."""
    n, letter = width(type_), WIDTHS[type_]
    columns = every(edges(n), edges(n, seed=1))
    text = f"{opcode} {letter}0, {letter}1, {letter}2"
    check(text, lambda a, b: mask(expected(value(a, type_), value(b, type_)), n), *columns, result=f"{letter}0")


@pytest.mark.parametrize("type_", TYPES)
def test_add_and_sub_wrap(type_):
    binary(f"add.{type_}", type_, lambda a, b: a + b)
    binary(f"sub.{type_}", type_, lambda a, b: a - b)


def test_add_and_sub_saturate():
    def clamp(n):
        return max(-(2**31), min(2**31 - 1, n))

    binary("add.sat.s32", "s32", lambda a, b: clamp(a + b))
    binary("sub.sat.s32", "s32", lambda a, b: clamp(a - b))


@pytest.mark.parametrize("type_", TYPES)
def test_halves_of_products(type_):
    n = width(type_)
    binary(f"mul.lo.{type_}", type_, lambda a, b: a * b)
    binary(f"mul.hi.{type_}", type_, lambda a, b: (a * b) >> n)


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32"])
def test_wide_products(type_):
    n, letter = width(type_), WIDTHS[type_]
    to = {"h": "r", "r": "d"}[letter]
    columns = every(edges(n), edges(n, seed=1))
    text = f"mul.wide.{type_} {to}0, {letter}1, {letter}2"
    check(text, lambda a, b: mask(value(a, type_) * value(b, type_), 2 * n), *columns, result=f"{to}0")


@pytest.mark.parametrize("type_", TYPES)
def test_mad(type_):
    n, letter = width(type_), WIDTHS[type_]
    columns = every(edges(n, 2), edges(n, 2, seed=1), edges(n, 1, seed=2))

    def product(a, b):
        return value(a, type_) * value(b, type_)

    operands = f"{letter}0, {letter}1, {letter}2, {letter}3"
    check(f"mad.lo.{type_} {operands}", lambda a, b, c: mask(product(a, b) + c, n), *columns, result=f"{letter}0")
    check(f"mad.hi.{type_} {operands}", lambda a, b, c: mask((product(a, b) >> n) + c, n), *columns, result=f"{letter}0")


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32"])
def test_mad_wide(type_):
    n, letter = width(type_), WIDTHS[type_]
    to = {"h": "r", "r": "d"}[letter]
    columns = every(edges(n, 2), edges(n, 2, seed=1), edges(2 * n, 1, seed=2))
    check(
        f"mad.wide.{type_} {to}0, {letter}1, {letter}2, {to}3",
        lambda a, b, c: mask(value(a, type_) * value(b, type_) + c, 2 * n),
        *columns,
        result=f"{to}0",
    )


def test_mad_hi_saturates():
    columns = every(edges(32, 2), edges(32, 2, seed=1), edges(32, 2, seed=2))

    def expected(a, b, c):
        total = ((signed(a, 32) * signed(b, 32)) >> 32) + signed(c, 32)
        return mask(max(-(2**31), min(2**31 - 1, total)), 32)

    check("mad.hi.sat.s32 r0, r1, r2, r3", expected, *columns)


@pytest.mark.parametrize("type_", ["s32", "u32"])
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_products_of_24_bits(type_, half):
    def factor(bits):
        low = mask(bits, 24)
        return signed(low, 24) if type_ == "s32" else low

    def part(a, b):
        return mask(factor(a) * factor(b) >> (16 if half == "hi" else 0), 32)

    columns = every([*edges(32), *edges(24)], edges(24, seed=1))
    check(f"mul24.{half}.{type_} r0, r1, r2", part, *columns)
    check(f"mad24.{half}.{type_} r0, r1, r2, r3", lambda a, b, c: mask(part(a, b) + c, 32), *columns, columns[0])


@pytest.mark.parametrize("type_", TYPES)
def test_sums_of_differences(type_):
    n, letter = width(type_), WIDTHS[type_]
    check(
        f"sad.{type_} {letter}0, {letter}1, {letter}2, {letter}3",
        lambda a, b, c: mask(c + abs(value(a, type_) - value(b, type_)), n),
        *every(edges(n, 2), edges(n, 2, seed=1), edges(n, 1, seed=2)),
        result=f"{letter}0",
    )


@pytest.mark.parametrize("type_", TYPES)
def test_division_is_towards_zero(type_):
    ones = 2 ** width(type_) - 1

    def quotient(a, b):
        return ones if b == 0 else abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)

    def remainder(a, b):
        return ones if b == 0 else a - quotient(a, b) * b

    binary(f"div.{type_}", type_, quotient)
    binary(f"rem.{type_}", type_, remainder)


@pytest.mark.parametrize("type_", ["s16", "s32", "s64"])
def test_abs_and_neg(type_):
    n, letter = width(type_), WIDTHS[type_]
    check(f"abs.{type_} {letter}0, {letter}1", lambda a: mask(abs(signed(a, n)), n), edges(n), result=f"{letter}0")
    check(f"neg.{type_} {letter}0, {letter}1", lambda a: mask(-a, n), edges(n), result=f"{letter}0")


@pytest.mark.parametrize("type_", TYPES)
def test_min_and_max(type_):
    binary(f"min.{type_}", type_, min)
    binary(f"max.{type_}", type_, max)


def test_min_and_max_with_relu():
    binary("min.relu.s32", "s32", lambda a, b: max(min(a, b), 0))
    binary("max.relu.s32", "s32", lambda a, b: max(a, b, 0))


@pytest.mark.parametrize(
    ("name", "type_"),
    [(name, type_) for name in ("add", "min", "max") for type_ in ("s16", "u16")] + [("min.relu", "s16"), ("max.relu", "s16")],
)
def test_pairs(name, type_):
    def one(a, b):
        x, y = value(a, type_), value(b, type_)
        result = {"add": x + y, "min": min(x, y), "max": max(x, y)}[name.split(".")[0]]
        return mask(max(result, 0) if "relu" in name else result, 16)

    def both(a, b):
        return one(a & 0xFFFF, b & 0xFFFF) | one(a >> 16, b >> 16) << 16

    pairs = [x | y << 16 for x, y in zip(*every(edges(16, 1), edges(16, 1)), strict=True)]
    check(f"{name}.{type_}x2 r0, r1, r2", both, pairs, pairs[17:] + pairs[:17])


@pytest.mark.parametrize("left", ["s32", "u32"])
@pytest.mark.parametrize("right", ["s32", "u32"])
def test_dot_products_of_bytes(left, right):
    def parts(bits, count, type_):
        size = 32 // count
        fields = [bits >> size * n & (1 << size) - 1 for n in range(count)]
        return [signed(field, size) if type_ == "s32" else field for field in fields]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    columns = every([0x80FF017F, 0xFFFFFFFF, 0x12345678, 0x80808080], edges(32), [0, 0x7FFFFFFF, 0xFFFFFFFE])
    check(
        f"dp4a.{left}.{right} r0, r1, r2, r3",
        lambda a, b, c: mask(c + dot(parts(a, 4, left), parts(b, 4, right)), 32),
        *columns,
    )
    for half, start in ("lo", 0), ("hi", 2):
        check(
            f"dp2a.{half}.{left}.{right} r0, r1, r2, r3",
            lambda a, b, c, start=start: mask(c + dot(parts(a, 2, left), parts(b, 4, right)[start : start + 2]), 32),
            *columns,
        )


def test_registers_wider_than_the_type():
    """The low bits of a source count; a result is widened by its sign (PTX ISA, 9.4.1)."""
    wide = [0xFFFF_0000_8000_0001, 0x1234_5678_7FFF_FFFF]
    got = run("add.s32 d0, d1, -1", d1=wide)["d0"]
    assert got == [mask(-(2**31), 64), 0x7FFF_FFFE]
    assert run("add.u32 d0, d1, -1", d1=wide)["d0"] == [0x8000_0000, 0x7FFF_FFFE]
    assert run("mul.lo.s16 r0, r1, 2", r1=[0xABCD_4000, 3])["r0"] == [mask(-(2**15), 32), 6]


def test_constants():
    assert run("sub.s32 r0, 5, r1", r1=[7, 3])["r0"] == [mask(-2, 32), 2]
    assert run("mul.wide.s32 d0, r1, -3", r1=[2, 0x80000000])["d0"] == [mask(-6, 64), 3 * 2**31]
    assert run("mad.wide.u32 d0, r1, 4, d2", r1=[2**32 - 1] * 2, d2=[1, 2**64 - 1])["d0"] == [2**34 - 3, 2**34 - 5]

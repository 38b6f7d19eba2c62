"""Arithmetic of single and double precision against exact rational numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import pytest
from _exact import F32, F64, FORMATS, Format, near, samples
from _instructions import check, every, run

LETTERS = {"f32": "r", "f64": "d"}
MODES = ["rn", "rz", "rm", "rp"]
#: ``f64`` is known to nearest even alone.
ROUNDED = [("f64", "rn"), *(("f32", mode) for mode in MODES)]


def columns_of(form: Format, count: int) -> list[list[int]]:
    """All pairs or triples of special numbers, and random ones of moderate size."""
    random = Random(count)
    some = samples(form, 4) if count < 3 else samples(form, 0)[::2]
    columns = every(*[some] * count)
    return [column + [near(form, random) for _ in range(200)] for column in columns]


def compare(instruction: str, type_: str, count: int, expected) -> None:
    """Checks ``opcode d, a, b`` against a function of bits; any NaN of ``f64`` will do."""
    form, letter = FORMATS[type_], LETTERS[type_]
    columns = columns_of(form, count)
    operands = ", ".join(f"{letter}{n}" for n in range(count + 1))
    names = {f"{letter}{n + 1}": column for n, column in enumerate(columns)}
    got = run(f"{instruction} {operands}", **names)[f"{letter}0"]
    for row, value in zip(zip(*columns, strict=True), got, strict=True):
        want = expected(*row)
        assert form.same(value, want), f"{instruction} of {[hex(n) for n in row]} gives {value:#x}, not {want:#x}"


def minus(form: Format, bits: int) -> int:
    return bits if form.is_nan(bits) else bits ^ form.minus


@pytest.mark.parametrize(("type_", "mode"), ROUNDED)
def test_add_sub_mul(type_, mode):
    form = FORMATS[type_]
    compare(f"add.{mode}.{type_}", type_, 2, lambda a, b: form.add(a, b, mode))
    compare(f"sub.{mode}.{type_}", type_, 2, lambda a, b: form.add(a, minus(form, b), mode))
    compare(f"mul.{mode}.{type_}", type_, 2, lambda a, b: form.mul(a, b, mode))


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_rounding_is_to_nearest_by_default(type_):
    form = FORMATS[type_]
    compare(f"add.{type_}", type_, 2, form.add)
    compare(f"mul.{type_}", type_, 2, form.mul)


@pytest.mark.parametrize(("type_", "mode"), ROUNDED)
def test_fma(type_, mode):
    form = FORMATS[type_]
    compare(f"fma.{mode}.{type_}", type_, 3, lambda a, b, c: form.fma(a, b, c, mode))


@pytest.mark.parametrize(("type_", "mode"), ROUNDED)
def test_div_rcp_sqrt(type_, mode):
    form = FORMATS[type_]
    one = form.bias << form.mantissa
    compare(f"div.{mode}.{type_}", type_, 2, lambda a, b: form.div(a, b, mode))
    compare(f"rcp.{mode}.{type_}", type_, 1, lambda a: form.div(one, a, mode))
    compare(f"sqrt.{mode}.{type_}", type_, 1, lambda a: form.sqrt(a, mode))


def flushed(expected):
    """With ``.ftz``: of operands and results."""
    return lambda *operands: F32.flush(expected(*[F32.flush(operand) for operand in operands]))


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_ftz(mode):
    compare(f"add.{mode}.ftz.f32", "f32", 2, flushed(lambda a, b: F32.add(a, b, mode)))
    compare(f"mul.{mode}.ftz.f32", "f32", 2, flushed(lambda a, b: F32.mul(a, b, mode)))
    compare(f"fma.{mode}.ftz.f32", "f32", 3, flushed(lambda a, b, c: F32.fma(a, b, c, mode)))
    compare(f"div.{mode}.ftz.f32", "f32", 2, flushed(lambda a, b: F32.div(a, b, mode)))
    compare(f"sqrt.{mode}.ftz.f32", "f32", 1, flushed(lambda a: F32.sqrt(a, mode)))


def saturated(bits: int) -> int:
    value = F32.number(bits)
    return 0 if value != value or value <= 0 else min(bits, 0x3F800000)


def test_sat():
    compare("add.sat.f32", "f32", 2, lambda a, b: saturated(F32.add(a, b)))
    compare("mul.ftz.sat.f32", "f32", 2, flushed(lambda a, b: saturated(F32.mul(a, b))))
    compare("fma.rn.sat.f32", "f32", 3, lambda a, b, c: saturated(F32.fma(a, b, c)))


def ulps(bits: int, exact: Fraction) -> Fraction:
    """How far a finite result is from the exact one, in units of the last place of the exact one."""
    value = F32.number(bits)
    assert isinstance(value, Fraction)
    near_bits = F32.bits(abs(exact))
    unit = F32.number(near_bits + 1) - F32.number(near_bits)
    return abs(value - exact) / unit


@pytest.mark.parametrize("opcode", ["div.full.f32", "div.full.ftz.f32", "div.approx.f32", "div.approx.ftz.f32"])
def test_approximate_quotients_are_within_2_ulp(opcode):
    random = Random(1)
    a, b = ([random.getrandbits(32) for _ in range(600)] for _ in range(2))
    checked = 0
    for x, y, got in zip(a, b, run(f"{opcode} r0, r1, r2", r1=a, r2=b)["r0"], strict=True):
        want, divisor = F32.number(F32.div(x, y)), abs(F32.number(y))
        normal = not any(F32.is_subnormal(n) for n in (x, y, F32.div(x, y)))
        if isinstance(want, Fraction) and want and normal and Fraction(2) ** -126 <= divisor <= Fraction(2) ** 126:
            assert ulps(got, F32.number(x) / F32.number(y)) <= 2
            checked += 1
    assert checked > 200


def test_approximate_quotients_of_special_operands():
    infinity, nan, one = F32.infinity, F32.nan, 0x3F800000
    great, small = F32.bits(Fraction(3, 2) * 2**126), 0x00400000
    cases = {
        "div.full.f32": [(one, 0, infinity), (0, 0, nan), (infinity, infinity, nan), (one, great, F32.div(one, great))],
        "div.approx.f32": [
            (one, great, 0),
            (F32.minus | one, great, F32.minus),
            (infinity, great, nan),
            (one, infinity, 0),
            (one, F32.minus, F32.minus | infinity),
        ],
        "div.approx.ftz.f32": [(one, small, infinity), (small, one, 0)],
    }
    for opcode, rows in cases.items():
        a, b, want = zip(*rows, strict=True)
        assert run(f"{opcode} r0, r1, r2", r1=a, r2=b)["r0"] == list(want), opcode


def test_approximate_reciprocals_and_roots():
    """1 ulp, and 2**-23 of the result."""
    random = Random(2)
    bits = [random.getrandbits(32) for _ in range(500)] + samples(F32, 0)
    for opcode in ("rcp.approx.f32", "rcp.approx.ftz.f32"):
        for x, got in zip(bits, run(f"{opcode} r0, r1", r1=bits)["r0"], strict=True):
            want = F32.div(0x3F800000, x)
            if "ftz" in opcode:
                want = F32.flush(F32.div(0x3F800000, F32.flush(x)))
            assert got == want or ulps(got, 1 / F32.number(x)) <= 1, hex(x)
    for x, got in zip(bits, run("sqrt.approx.f32 r0, r1", r1=bits)["r0"], strict=True):
        value = F32.number(x)
        if value > 0 and value != math.inf:
            assert abs(Fraction(F32.number(got)) ** 2 / value - 1) <= Fraction(2) ** -22
        else:
            assert got == F32.sqrt(x)
    flushed_root = run("sqrt.approx.ftz.f32 r0, r1", r1=[1, F32.minus | 1, 0x40800000])["r0"]
    assert flushed_root == [0, F32.minus, 0x40000000]


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_signs(type_):
    form, letter = FORMATS[type_], LETTERS[type_]
    bits = samples(form, 10)
    check(f"neg.{type_} {letter}0, {letter}1", lambda a: a ^ form.minus, bits, result=f"{letter}0")
    check(f"abs.{type_} {letter}0, {letter}1", lambda a: a & ~form.minus, bits, result=f"{letter}0")
    check(
        f"copysign.{type_} {letter}0, {letter}1, {letter}2",
        lambda a, b: (a & form.minus) | (b & ~form.minus),
        *every(bits, bits),
        result=f"{letter}0",
    )


def test_signs_with_ftz():
    bits = samples(F32, 10)
    check("neg.ftz.f32 r0, r1", lambda a: F32.flush(a) ^ F32.minus, bits)
    check("abs.ftz.f32 r0, r1", lambda a: F32.flush(a) & ~F32.minus, bits)


@pytest.mark.parametrize("type_", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max(type_, name):
    form = FORMATS[type_]
    compare(f"{name}.{type_}", type_, 2, lambda a, b: form.extreme(name, a, b))


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_with_modifiers(name):
    def crossed(a, b):
        size = F32.extreme(name, a & ~F32.minus, b & ~F32.minus)
        return size if F32.is_nan(size) else size | ((a ^ b) & F32.minus)

    compare(f"{name}.NaN.f32", "f32", 2, lambda a, b: F32.extreme(name, a, b, nan=True))
    compare(f"{name}.ftz.f32", "f32", 2, flushed(lambda a, b: F32.extreme(name, a, b)))
    compare(f"{name}.xorsign.abs.f32", "f32", 2, crossed)


def test_single_precision_returns_one_nan():
    """Whatever the payload; double precision keeps that of an operand."""
    nans = [0x7F800001, 0xFFC12345, 0x7FFFFFFF]
    for text in ("add.f32 r0, r1, 0f3F800000", "mul.f32 r0, r1, r1", "max.f32 r0, r1, r1", "sqrt.rn.f32 r0, r1"):
        assert run(text, r1=nans)["r0"] == [0x7FFFFFFF] * 3, text
    assert run("fma.rn.f32 r0, r1, r1, r1", r1=nans)["r0"] == [0x7FFFFFFF] * 3
    assert run("add.f32 r0, r1, 0f7F800000", r1=[0xFF800000] * 3)["r0"] == [0x7FFFFFFF] * 3
    kept = F64.infinity | 1 << 51 | 0x1234
    assert run("add.f64 d0, d1, 0d3FF0000000000000", d1=[kept])["d0"] == [kept]

"""The approximate functions: within the manual's bounds, and its tables of special operands."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from random import Random

import pytest
from _exact import BF16, F16, F32, F64, Format, near, samples
from _instructions import run

INFINITY, NAN, ONE, MINUS = F32.infinity, F32.nan, 0x3F800000, F32.minus
PI = Fraction("3.14159265358979323846264338327950288")


def decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def exact(name: str, value: Fraction) -> Fraction:
    """To 50 digits, by the series or by :mod:`decimal`."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 50, 10**6, -(10**6)
        x = decimal(value)
        two = Decimal(2).ln()
        if name == "ex2":
            return Fraction((x * two).exp())
        if name == "lg2":
            return Fraction(x.ln() / two)
        if name == "rsqrt":
            return Fraction(1 / x.sqrt())
        if name == "rcp":
            return 1 / value
        if name == "tanh":
            if abs(x) < Decimal("1e-6"):
                return Fraction(x - x**3 / 3)
            grown = (2 * x).exp() if abs(x) < 100 else Decimal("1e80") if x > 0 else Decimal(0)
            return Fraction((grown - 1) / (grown + 1))
    turned = value - round(value / (2 * PI)) * 2 * PI
    term, total, n = (turned, turned, 1) if name == "sin" else (Fraction(1), Fraction(1), 0)
    while abs(term) > Fraction(1, 10**25):
        term = -term * turned * turned / ((n + 1) * (n + 2))
        # Kept short.
        term = Fraction(round(term * 10**40), 10**40)
        total, n = total + term, n + 2
    return total


def operands(form: Format, low: float, high: float, count: int = 150) -> list[int]:
    random = Random(count)
    found = [form.bits(Fraction(random.uniform(low, high))) for _ in range(count)]
    return found + [form.bits(Fraction(n)) for n in range(math.ceil(low), math.floor(high) + 1, max(1, int(high - low) // 20))]


def errors(opcode: str, form: Format, bits: list[int]):
    """The exact result, and how far the one that is returned is from it."""
    letter = {16: "h", 32: "r", 64: "d"}[form.width]
    for one, got in zip(bits, run(f"{opcode} {letter}0, {letter}1", **{f"{letter}1": bits})[f"{letter}0"], strict=True):
        want, value = exact(opcode.split(".")[0], form.number(one)), form.number(got)
        assert isinstance(value, Fraction), f"{opcode} of {one:#x} gives {got:#x}"
        yield want, abs(value - want)


def unit(form: Format, value: Fraction) -> Fraction:
    """Of the last place of a number."""
    bits = form.bits(abs(value), "rz")
    return form.number(bits + 1) - form.number(bits)


@pytest.mark.parametrize("opcode", ["ex2.approx.f32", "ex2.approx.ftz.f32"])
def test_ex2(opcode):
    """2 ulp; here no more than a correctly rounded result has."""
    for want, error in errors(opcode, F32, operands(F32, -125.9, 127.9, 600)):
        assert error <= unit(F32, want) * Fraction("0.50001")


def test_ex2_with_subnormal_results():
    bits = operands(F32, -148.9, -126.1)
    for want, error in errors("ex2.approx.f32", F32, bits):
        assert error <= unit(F32, want) * Fraction("0.50001")
    assert run("ex2.approx.ftz.f32 r0, r1", r1=bits)["r0"] == [0] * len(bits)


@pytest.mark.parametrize("opcode", ["lg2.approx.f32", "lg2.approx.ftz.f32"])
def test_lg2(opcode):
    for _, error in errors(opcode, F32, operands(F32, 0.5, 2.0)):
        assert error <= Fraction(1, 2**22)
    random = Random(2)
    wide = [one for one in (random.getrandbits(31) for _ in range(200)) if F32.normal <= one < INFINITY]
    for want, error in errors(opcode, F32, [one for one in wide if not 0.5 <= F32.number(one) <= 2]):
        assert error <= abs(want) / 2**22
    if "ftz" not in opcode:
        for want, error in errors(opcode, F32, [1, 0x1234, 0x7FFFFF]):
            assert error <= abs(want) / 2**22


@pytest.mark.parametrize("opcode", ["rsqrt.approx.f32", "rsqrt.approx.ftz.f32"])
def test_rsqrt(opcode):
    random = Random(3)
    bits = [one for one in (random.getrandbits(31) for _ in range(300)) if F32.normal <= one < INFINITY]
    for want, error in errors(opcode, F32, bits if "ftz" in opcode else [*bits, 1, 0x1234]):
        assert error <= want * Fraction(2**-22.9)


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sin_and_cos(name):
    for opcode in (f"{name}.approx.f32", f"{name}.approx.ftz.f32"):
        for _, error in errors(opcode, F32, operands(F32, -6.28, 6.28)):
            assert error <= Fraction(2**-20.5)
        for _, error in errors(opcode, F32, operands(F32, -314.0, 314.0)):
            assert error <= Fraction(2**-14.7)


def test_tanh():
    bits = [*operands(F32, -20.0, 20.0), *operands(F32, -0.01, 0.01), 1, MINUS | 0x1234]
    for want, error in errors("tanh.approx.f32", F32, bits):
        assert error <= abs(want) / 2**11


@pytest.mark.parametrize(("form", "type_", "relative"), [(F16, "f16", 2**-9.9), (BF16, "ftz.bf16", 2**-7)])
def test_half_precision_ex2(form, type_, relative):
    bits = operands(form, -13.9, 15.9) if form is F16 else operands(form, -125.0, 127.0)
    for want, error in errors(f"ex2.approx.{type_}", form, bits):
        assert error <= want * Fraction(relative)
    some = samples(form, 0)
    one = run(f"ex2.approx.{type_} h0, h1", h1=some)["h0"]
    pair = run(f"ex2.approx.{type_}x2 r0, r1", r1=[a | b << 16 for a, b in zip(some, some[::-1], strict=True)])["r0"]
    assert pair == [a | b << 16 for a, b in zip(one, one[::-1], strict=True)]


@pytest.mark.parametrize(("form", "type_", "absolute"), [(F16, "f16", 2**-10.987), (BF16, "bf16", 2**-8)])
def test_half_precision_tanh(form, type_, absolute):
    for _, error in errors(f"tanh.approx.{type_}", form, operands(form, -5.0, 5.0)):
        assert error <= Fraction(absolute)
    special = {form.infinity: form.bias << form.mantissa, form.minus: form.minus, 0: 0, form.nan: form.nan}
    assert run(f"tanh.approx.{type_} h0, h1", h1=special)["h0"] == list(special.values())


#: Operands and results, as in the manual's tables.
SPECIAL = {
    "ex2.approx.f32": {MINUS | INFINITY: 0, MINUS: ONE, 0: ONE, INFINITY: INFINITY, NAN: NAN, 0x43000000: INFINITY},
    "ex2.approx.ftz.f32": {MINUS | 1: ONE, 1: ONE, 0xC3800000: 0, 0xFFC00001: NAN},
    "lg2.approx.f32": {MINUS | INFINITY: NAN, MINUS | ONE: NAN, MINUS: MINUS | INFINITY, 0: MINUS | INFINITY, INFINITY: INFINITY},
    "lg2.approx.ftz.f32": {1: MINUS | INFINITY, MINUS | 1: MINUS | INFINITY, ONE: 0, NAN: NAN},
    "rsqrt.approx.f32": {MINUS | INFINITY: NAN, MINUS | ONE: NAN, MINUS: MINUS | INFINITY, 0: INFINITY, INFINITY: 0, NAN: NAN},
    "rsqrt.approx.ftz.f32": {1: INFINITY, MINUS | 1: MINUS | INFINITY, 0x40800000: 0x3F000000},
    "sin.approx.f32": {MINUS | INFINITY: NAN, MINUS: MINUS, 0: 0, INFINITY: NAN, NAN: NAN},
    "cos.approx.f32": {MINUS | INFINITY: NAN, MINUS: ONE, 0: ONE, INFINITY: NAN, NAN: NAN},
    "tanh.approx.f32": {MINUS | INFINITY: MINUS | ONE, MINUS: MINUS, 0: 0, INFINITY: ONE, NAN: NAN},
}


@pytest.mark.parametrize("opcode", SPECIAL)
def test_special_operands(opcode):
    table = SPECIAL[opcode]
    assert run(f"{opcode} r0, r1", r1=table)["r0"] == list(table.values())


GROSS_NAN = 0x7FFFFFFF_00000000


@pytest.mark.parametrize("opcode", ["rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64"])
def test_gross_approximations_of_double_precision(opcode):
    """The upper 32 bits of the operand give the upper 32 bits of the result, here to the nearest of them."""
    random = Random(4)
    # The lower half counts for nothing.
    bits = [near(F64, random) & 0x7FFFFFFF_00000000 for _ in range(200)]
    results = run(f"{opcode} d0, d1", d1=[one | random.getrandbits(32) for one in bits])["d0"]
    assert results == run(f"{opcode} d0, d1", d1=bits)["d0"]
    for one, got in zip(bits, results, strict=True):
        want = exact(opcode.split(".")[0], F64.number(one))
        assert got & 0xFFFFFFFF == 0
        assert abs(F64.number(got) - want) <= want / 2**20


def test_gross_approximations_of_special_operands():
    infinity, minus, one = F64.infinity, F64.minus, 0x3FF << 52
    table = {
        minus | infinity: minus,
        minus | 1 << 40: minus | infinity,
        minus: minus | infinity,
        0: infinity,
        1 << 40: infinity,
        infinity: 0,
        infinity | 1: GROSS_NAN,
        minus | infinity | 1 << 51: GROSS_NAN,
        minus | one: minus | one,
        0x7FE << 52: 0,  # 2**-1023, subnormal
    }
    assert run("rcp.approx.ftz.f64 d0, d1", d1=table)["d0"] == list(table.values())
    del table[0x7FE << 52]
    table |= {minus | infinity: GROSS_NAN, minus | one: GROSS_NAN}
    assert run("rsqrt.approx.ftz.f64 d0, d1", d1=table)["d0"] == list(table.values())


def test_rsqrt_of_double_precision():
    random = Random(5)
    bits = [near(F64, random) & ~F64.minus for _ in range(100)] + [1, 1 << 30]
    for want, error in errors("rsqrt.approx.f64", F64, bits):
        assert error <= want / 2**51


UNKNOWN = [
    "ex2.f32",
    "ex2.approx.f64",
    "tanh.approx.ftz.f32",
    "ex2.approx.bf16",
    "ex2.approx.ftz.f16",
    "rcp.approx.f64",
    "sin.f32",
]


@pytest.mark.parametrize("opcode", UNKNOWN)
def test_what_is_not_known(opcode):
    with pytest.raises(ValueError, match="is not known"):
        run(f"{opcode} d0, d1", d1=[0])

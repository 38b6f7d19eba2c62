"""Conversions against exact rational numbers and Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import pytest
from _exact import F16, F32, FORMATS, Format, near, samples
from _instructions import check, edges, every, run, signed

MODES = ["rn", "rz", "rm", "rp"]
INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
LETTERS = {8: "h", 16: "h", 32: "r", 64: "d"}


def width(type_: str) -> int:
    return FORMATS[type_].width if type_ in FORMATS else int(type_[1:])


def letter(type_: str) -> str:
    return LETTERS[width(type_)]


def number(bits: int, type_: str) -> int:
    """An integer, of the low bits of a register."""
    low = bits & (1 << width(type_)) - 1
    return signed(low, width(type_)) if type_[0] == "s" else low


def limits(type_: str) -> tuple[int, int]:
    top = 1 << width(type_)
    return (-top // 2, top // 2 - 1) if type_[0] == "s" else (0, top - 1)


def convert(opcode: str, to: str, source: str, bits: list[int], expected, form: Format | None = None) -> None:
    """Checks a conversion; of ``f64`` any NaN will do. Integers of 8 bits are in 16-bit registers, widened by their sign."""
    got = run(f"{opcode} {letter(to)}0, {letter(source)}1", **{f"{letter(source)}1": bits})[f"{letter(to)}0"]
    for one, value in zip(bits, got, strict=True):
        want = expected(one)
        if form is None:
            want &= (1 << max(16, width(to))) - 1
        same = form.same(value, want) if form else value == want
        assert same, f"{opcode} of {one:#x} gives {value:#x}, not {want:#x}"


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_between_integers(to, source):
    low, high = limits(to)
    bits = edges(max(16, width(source)), 12)

    def cut(one):
        value = number(one, source) & (1 << width(to)) - 1
        return signed(value, width(to)) if to[0] == "s" else value

    convert(f"cvt.{to}.{source}", to, source, bits, cut)
    convert(f"cvt.sat.{to}.{source}", to, source, bits, lambda one: min(max(number(one, source), low), high))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_from_integers(to, source):
    """Rounded once, ties included."""
    form, size = FORMATS[to], max(16, width(source))
    random = Random(width(source))
    bits = edges(size, 12)
    for _ in range(60):  # half-way between two floats, and beside that
        shift = random.randrange(max(1, size - form.mantissa))
        tie = (2 * random.getrandbits(form.mantissa + 1) + 1 << shift) & (1 << size) - 1
        bits += [tie, (tie + 1) % (1 << size), tie - 1]
    for mode in MODES:

        def once(one, mode=mode):
            return form.bits(Fraction(number(one, source)), mode)

        convert(f"cvt.{mode}.{to}.{source}", to, source, bits, once, form)


ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def float_samples(source: str, to: str) -> list[int]:
    """Numbers, halves, and what is at and beside the limits of an integer type."""
    form, random = FORMATS[source], Random(7)
    values = [Fraction(n, 4) for n in range(-12, 13)]
    values += [limit + part for limit in limits(to) for part in (-2, -1, Fraction(-1, 2), 0, Fraction(1, 2), 1, 2)]
    bits = samples(form, 6) + [form.bits(value) for value in values] + [near(form, random) for _ in range(10)]
    return bits + [one ^ 1 for one in bits]


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", INTEGERS)
def test_to_integers(to, source):
    """Clamped; NaN is 0, or the uppermost bit alone if either has 64 bits (the manual's integer notes)."""
    form = FORMATS[source]
    low, high = limits(to)
    missing = (1 << (width(to) - 1)) if source == "f64" or width(to) == 64 else 0

    def whole(bits, how):
        value = form.number(bits)
        if value != value:
            return number(missing, to)
        return (high if value > 0 else low) if isinstance(value, float) else min(max(ROUND[how](value), low), high)

    bits = float_samples(source, to)
    for how in ROUND:
        convert(f"cvt.{how}.{to}.{source}", to, source, bits, lambda one, how=how: whole(one, how))
    convert(f"cvt.rzi.sat.{to}.{source}", to, source, bits, lambda one: whole(one, "rzi"))
    if source == "f32":
        convert(f"cvt.rpi.ftz.{to}.f32", to, source, bits, lambda one: whole(F32.flush(one), "rpi"))


WIDER = [("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32")]
NARROWER = [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("bf16", "f64"), ("bf16", "f16"), ("f16", "bf16")]


def rounded(to: str, source: str, mode: str = "rn"):
    form, wide = FORMATS[to], FORMATS[source]
    return lambda one: form.bits(wide.number(one), mode, negative_zero=bool(one & wide.minus))


def between(to: str, source: str) -> list[int]:
    """Numbers of the source at, beside and half-way between those of the result."""
    form, wide, random = FORMATS[to], FORMATS[source], Random(8)
    found = samples(wide, 40)
    for one in [*samples(form, 6), *(near(form, random) for _ in range(40))]:
        value, after = form.number(one), form.number(one ^ 1)
        if not isinstance(value, float) and not isinstance(after, float):
            tie = wide.bits((value + after) / 2)
            found += [wide.bits(value), tie, tie ^ 1, (tie - 1) % (1 << wide.width)]
    return found


@pytest.mark.parametrize(("to", "source"), WIDER)
def test_to_wider_floats(to, source):
    """Of bfloat16 the bits move, so that NaN keeps its own."""
    of = (lambda one: one << 16) if (to, source) == ("f32", "bf16") else rounded(to, source)
    convert(f"cvt.{to}.{source}", to, source, samples(FORMATS[source], 60), of, FORMATS[to])


@pytest.mark.parametrize(("to", "source"), NARROWER)
def test_to_narrower_floats(to, source):
    for mode in MODES:
        opcode = f"cvt.{mode}.{to}.{source}"
        convert(opcode, to, source, between(to, source), rounded(to, source, mode), FORMATS[to])


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
def test_to_integral_floats(type_):
    form = FORMATS[type_]
    bits = samples(form, 20) + float_samples(type_, "s16")

    def whole(one, how):
        value = form.number(one)
        if isinstance(value, float):
            return form.bits(value)
        return form.bits(Fraction(ROUND[how](value)), negative_zero=bool(one & form.minus))

    for how in ROUND:
        convert(f"cvt.{how}.{type_}.{type_}", type_, type_, bits, lambda one, how=how: whole(one, how), form)
    if type_ == "f32":
        convert("cvt.rmi.ftz.f32.f32", type_, type_, bits, lambda one: whole(form.flush(one), "rmi"), form)


def clamped(bits: int, form: Format) -> int:
    value = form.number(bits)
    return 0 if value != value or value <= 0 else min(bits, form.bias << form.mantissa)


def test_sat_and_ftz():
    of = rounded("f32", "f64")
    bits = between("f32", "f64")
    convert("cvt.rn.sat.f32.f64", "f32", "f64", bits, lambda one: clamped(of(one), F32), F32)
    convert("cvt.rn.ftz.f32.f64", "f32", "f64", bits, lambda one: F32.flush(of(one)), F32)
    convert("cvt.sat.f32.f32", "f32", "f32", samples(F32, 40), lambda one: clamped(one, F32), F32)
    convert("cvt.ftz.f64.f32", "f64", "f32", samples(F32, 40), lambda one: rounded("f64", "f32")(F32.flush(one)), FORMATS["f64"])
    convert("cvt.rn.ftz.f16.f32", "f16", "f32", samples(F32, 40), lambda one: rounded("f16", "f32")(F32.flush(one)), F16)
    convert("cvt.rn.sat.f16.f32", "f16", "f32", samples(F32, 40), lambda one: clamped(rounded("f16", "f32")(one), F16), F16)
    convert("cvt.rn.sat.f32.s32", "f32", "s32", edges(32), lambda one: 0x3F800000 if signed(one, 32) > 0 else 0, F32)


@pytest.mark.parametrize("to", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_pairs_relu_and_satfinite(to, mode):
    """Of two sources the first is the upper half."""
    form, bits = FORMATS[to], between(to, "f32")
    of = rounded(to, "f32", mode)

    def relu(one):
        return form.nan if form.is_nan(of(one)) else 0 if of(one) & form.minus else of(one)

    def finite(one):
        result = of(one)
        return result - 1 if result & (form.minus - 1) == form.infinity else result

    def finite_relu(one):
        return relu(one) - 1 if relu(one) == form.infinity else relu(one)

    turned = bits[5:] + bits[:5]
    for modifiers, one in {"": of, ".relu": relu, ".satfinite": finite, ".relu.satfinite": finite_relu}.items():
        convert(f"cvt.{mode}{modifiers}.{to}.f32", to, "f32", bits, one, form)
        check(f"cvt.{mode}{modifiers}.{to}x2.f32 r0, r1, r2", lambda a, b, one=one: one(a) << 16 | one(b), bits, turned)


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode):
    """8 and 10 bits, in the upper 19 bits of 32."""
    form, bits = Format(8, 10, None), [one for one in between("bf16", "f32") if not F32.is_nan(one)]
    for one in list(bits):  # ties
        bits += [(one & 0xFFFFE000) | 0x1000, (one & 0xFFFFE000) | 0x3000]
    bits = [one for one in bits if not F32.is_nan(one)]

    def of(one):
        return form.bits(F32.number(one), mode, negative_zero=bool(one >> 31)) << 13

    check(f"cvt.{mode}.tf32.f32 r0, r1", of, bits)
    if mode != "rna":
        check(f"cvt.{mode}.relu.tf32.f32 r0, r1", lambda one: 0 if one >> 31 else of(one), bits)
    check(
        f"cvt.{mode}.satfinite.tf32.f32 r0, r1",
        lambda one: of(one) if of(one) & 0x7FFFFFFF != F32.infinity else of(one) - 0x2000,
        bits,
    )
    assert run(f"cvt.{mode}.tf32.f32 r0, r1", r1=[0x7F800001, 0xFFFFFFFF])["r0"] == [0x7FFFFFFF] * 2


def test_8_bits():
    """Spot checks; all codes are in test_rounding.py."""
    values = {"e4m3": {1.0: 0x38, -0.5: 0xB0, 448.0: 0x7E, 1e9: 0x7E, 0.0: 0, 2.0**-9: 1, 1.0625: 0x38, 1.1875: 0x3A}}
    values["e5m2"] = {1.0: 0x3C, -0.5: 0xB8, 57344.0: 0x7B, -1e9: 0xFB, 2.0**-16: 1, 1.125: 0x3C, 1.375: 0x3E}
    for kind, table in values.items():
        bits, codes = [F32.bits(Fraction(value)) for value in table], list(table.values())
        other = codes[1:] + codes[:1]
        got = run(f"cvt.rn.satfinite.{kind}x2.f32 h0, r1, r2", r1=bits, r2=bits[1:] + bits[:1])["h0"]
        assert got == [high << 8 | low for high, low in zip(codes, other, strict=True)]
        halves = [F16.bits(Fraction(value)) for value in table]
        pairs = [high << 16 | low for high, low in zip(halves, halves[1:] + halves[:1], strict=True)]
        assert run(f"cvt.rn.satfinite.{kind}x2.f16x2 h0, r1", r1=pairs)["h0"] == got
        relu = [0 if code & 0x80 else code for code in codes]
        got = run(f"cvt.rn.satfinite.relu.{kind}x2.f32 h0, r1, r1", r1=bits)["h0"]
        assert got == [code << 8 | code for code in relu]
        exact = [(code, half) for code, value, half in zip(codes, table, halves, strict=True) if value in (1.0, -0.5)]
        words = run(f"cvt.rn.f16x2.{kind}x2 r0, h1", h1=[code << 8 | 0 for code, _ in exact])["r0"]
        assert words == [half << 16 for _, half in exact]
        words = run(f"cvt.rn.relu.f16x2.{kind}x2 r0, h1", h1=[code for code, _ in exact])["r0"]
        assert words == [0 if half & 0x8000 else half for _, half in exact]


def test_packed_integers():
    columns = every(edges(32), edges(32, seed=1), [0, 0x1234ABCD])
    for type_ in ("u16", "s16", "u8", "s8"):
        low, high = limits(type_)
        size = width(type_)

        def part(bits, low=low, high=high, size=size):
            return min(max(signed(bits, 32), low), high) & (1 << size) - 1

        if size == 16:
            check(f"cvt.pack.sat.{type_}.s32 r0, r1, r2", lambda a, b, part=part: part(a) << 16 | part(b), *columns[:2])
        else:
            check(
                f"cvt.pack.sat.{type_}.s32.b32 r0, r1, r2, r3",
                lambda a, b, c, part=part: (c & 0xFFFF) << 16 | part(a) << 8 | part(b),
                *columns,
            )


def test_addresses():
    for opcode in ("cvta.to.global.u64", "cvta.global.u64", "cvta.to.shared.u64", "cvta.shared::cta.u64"):
        check(f"{opcode} d0, d1", lambda a: a, edges(64), result="d0")


def test_registers_wider_than_the_types():
    """The low bits of the source count; the result is widened by its sign, or with zeros."""
    assert run("cvt.s64.s32 d0, d1", d1=[0x1_8000_0000, 5])["d0"] == [2**64 - 2**31, 5]
    assert run("cvt.s8.s32 r0, r1", r1=[0x1FF, 0x17F])["r0"] == [0xFFFFFFFF, 0x7F]
    assert run("cvt.u8.u32 r0, r1", r1=[0x1FF, 0x17F])["r0"] == [0xFF, 0x7F]
    assert run("cvt.rn.f16.f32 r0, r1", r1=[0xBF800000])["r0"] == [0xBC00]


@pytest.mark.parametrize(
    "opcode",
    [
        "cvt.f16.f32",  # needs a rounding modifier
        "cvt.rn.f64.f32",  # must have none
        "cvt.s32.f32",
        "cvt.rn.s32.f32",
        "cvt.f32.s32",
        "cvt.rni.f16.f32",
        "cvt.rn.relu.f32.f64",
        "cvt.rn.ftz.f16.f64",
        "cvt.rna.f16.f32",
        "cvt.rn.rz.f16.f32",
        "cvt.ftz.s64.s32",
        "cvt.rn.e4m3x2.f32",
        "cvt.rs.f16x2.f32",
        "cvt.rn.satfinite.e2m1x2.f32",
        "cvt.pack.u8.s32.b32",
        "cvta.texture.u64",
    ],
)
def test_what_is_not_known(opcode):
    for count in range(2, 5):
        with pytest.raises(ValueError, match="is not known"):
            run(f"{opcode} " + ", ".join(["d1"] * count), d1=[0])

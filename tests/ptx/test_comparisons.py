"""Comparisons and tests, from their definition."""

from __future__ import annotations

import math

import pytest
from _exact import BF16, F16, F32, FORMATS, samples
from _instructions import check, edges, every, run, signed

LETTERS = {8: "h", 16: "h", 32: "r", 64: "d"}
PLAIN = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def compare(opcode: str, letter: str, columns: list[list[int]], expected) -> None:
    check(f"{opcode} p0, {letter}1, {letter}2", lambda a, b: int(expected(a, b)), *columns, result="p0")


@pytest.mark.parametrize("width", [16, 32, 64])
def test_integers(width):
    columns = every(edges(width), edges(width))
    letter = LETTERS[width]
    for name, of in PLAIN.items():
        compare(f"setp.{name}.u{width}", letter, columns, of)
        compare(f"setp.{name}.s{width}", letter, columns, lambda a, b, of=of: of(signed(a, width), signed(b, width)))
    for name, other in UNSIGNED.items():
        compare(f"setp.{name}.u{width}", letter, columns, PLAIN[other])
    for name in ("eq", "ne"):
        compare(f"setp.{name}.b{width}", letter, columns, PLAIN[name])


def floats(form, name):
    """The manual's table: false with NaN, but for the names that end in ``u`` and for ``nan``."""

    def expected(a, b):
        x, y = form.number(a), form.number(b)
        unordered = x != x or y != y
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        plain = name.removesuffix("u")
        return name != plain if unordered else PLAIN[plain](x, y)

    return expected


FLOAT_NAMES = [*PLAIN, *(f"{name}u" for name in PLAIN), "num", "nan"]


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_floats(type_, name):
    form = FORMATS[type_]
    letter = LETTERS[form.width]
    compare(f"setp.{name}.{type_}", letter, every(samples(form, 2), samples(form, 2)), floats(form, name))


@pytest.mark.parametrize("form", [F16, F32])
def test_ftz(form):
    type_ = "f16" if form is F16 else "f32"
    columns = every(samples(form, 2), samples(form, 2))
    for name in ("eq", "lt", "geu", "num"):
        of = floats(form, name)
        compare(f"setp.{name}.ftz.{type_}", LETTERS[form.width], columns, lambda a, b, of=of: of(form.flush(a), form.flush(b)))


def test_opposites_and_boolean_operators():
    a, b, c = every([0, 5, 2**32 - 1], [0, 5, 2**32 - 1], [0, 1])
    less = [int(signed(x, 32) < signed(y, 32)) for x, y in zip(a, b, strict=True)]
    got = run("setp.lt.s32 p0|p1, r2, r3", r2=a, r3=b)
    assert got["p0"] == less and got["p1"] == [1 - x for x in less]
    assert run("setp.lt.s32 _|p1, r2, r3", r2=a, r3=b)["p1"] == [1 - x for x in less]
    for name, of in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        first = [of(x, y) for x, y in zip(less, c, strict=True)]
        second = [of(1 - x, y) for x, y in zip(less, c, strict=True)]
        assert run(f"setp.lt.{name}.s32 p0, r2, r3, p4", r2=a, r3=b, p4=c)["p0"] == first
        got = run(f"setp.lt.{name}.s32 p0|p1, r2, r3, p4", r2=a, r3=b, p4=c)
        assert got["p0"] == first and got["p1"] == second
    got = run("setp.gt.and.f32 p0, r2, 0f00000000, p4", r2=[0x3F800000, 0x3F800000, 0x7FC00000], p4=[1, 0, 1])
    assert got["p0"] == [1, 0, 0]


@pytest.mark.parametrize(("type_", "form"), [("f16", F16), ("bf16", BF16)])
def test_pairs(type_, form):
    low, high = every(samples(form, 0)[::3], samples(form, 0)[::3])
    words, others = [a | b << 16 for a, b in zip(low, high, strict=True)], [b | a << 16 for a, b in zip(low, high, strict=True)]
    of = floats(form, "leu")
    got = run(f"setp.leu.{type_}x2 p0|p1, r2, r3", r2=words, r3=others)
    assert got["p0"] == [int(of(a, b)) for a, b in zip(low, high, strict=True)]
    assert got["p1"] == [int(of(b, a)) for a, b in zip(low, high, strict=True)]
    mask = [n % 2 for n in range(len(words))]
    combined = run(f"setp.leu.and.{type_}x2 p0|p1, r2, r3, p4", r2=words, r3=others, p4=mask)
    assert combined["p0"] == [a & b for a, b in zip(got["p0"], mask, strict=True)]
    assert combined["p1"] == [a & b for a, b in zip(got["p1"], mask, strict=True)]


def test_set():
    columns = every(edges(32), edges(32))
    check("set.lt.u32.s32 r0, r1, r2", lambda a, b: 0xFFFFFFFF * (signed(a, 32) < signed(b, 32)), *columns)
    check("set.eq.f32.u32 r0, r1, r2", lambda a, b: 0x3F800000 * (a == b), *columns)
    of = floats(F32, "gtu")
    columns = every(samples(F32, 0), samples(F32, 0), [0, 1])
    check("set.gtu.xor.s32.f32 r0, r1, r2, p3", lambda a, b, c: 0xFFFFFFFF * (of(a, b) ^ c), *columns)


def test_slct():
    columns = every([1, 2], [3], edges(32))
    check("slct.b32.s32 r0, r1, r2, r3", lambda a, b, c: a if signed(c, 32) >= 0 else b, *columns)
    columns = every([1, 2**64 - 1], [3], samples(F32, 2))
    check("slct.u64.f32 d0, d1, d2, r3", lambda a, b, c: a if F32.number(c) >= 0 else b, *columns, result="d0")
    check("slct.ftz.u64.f32 d0, d1, d2, r3", lambda a, b, c: a if F32.number(F32.flush(c)) >= 0 else b, *columns, result="d0")


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_testp(type_):
    form = FORMATS[type_]
    bits = samples(form, 10)
    tests = {
        "finite": lambda a: not isinstance(form.number(a), float),
        "infinite": lambda a: form.number(a) in (math.inf, -math.inf),
        "number": lambda a: not form.is_nan(a),
        "notanumber": form.is_nan,
        "normal": lambda a: not isinstance(form.number(a), float) and not form.is_subnormal(a),
        "subnormal": form.is_subnormal,
    }
    for name, of in tests.items():
        text = f"testp.{name}.{type_} p0, {LETTERS[form.width]}1"
        check(text, lambda a, of=of: int(of(a)), bits, result="p0")


UNKNOWN = ["lt.b32", "lo.s32", "ltu.u32", "eq.ftz.f64", "eq.ftz.s32", "nand.f32", "eq.sat.f32"]


@pytest.mark.parametrize("opcode", UNKNOWN)
def test_what_has_no_comparison(opcode):
    letter = "d" if opcode.endswith("f64") else "r"
    with pytest.raises(ValueError, match="is not known"):
        run(f"setp.{opcode} p0, {letter}1, {letter}1", **{f"{letter}1": [0]})

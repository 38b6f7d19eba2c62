"""Half precision, one and two in a register, against exact rational numbers."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
from _exact import FORMATS, Format, near, samples
from _instructions import every, run

TYPES = ["f16", "bf16"]


def columns_of(form: Format, count: int) -> list[list[int]]:
    random = Random(count)
    some = samples(form, 4) if count < 3 else samples(form, 0)[::2]
    columns = [column + [near(form, random) for _ in range(400)] for column in every(*[some] * count)]
    return [column + [random.getrandbits(16) for _ in range(400)] for column in columns]


def compare(opcode: str, type_: str, count: int, expected) -> None:
    """Checks an opcode, given without its type, of one value and of two in a register."""
    form = FORMATS[type_]
    columns = columns_of(form, count)
    want = [expected(*row) for row in zip(*columns, strict=True)]
    operands = ", ".join(f"h{n}" for n in range(count + 1))
    got = run(f"{opcode}.{type_} {operands}", **{f"h{n + 1}": column for n, column in enumerate(columns)})["h0"]
    for row, one, value in zip(zip(*columns, strict=True), got, want, strict=True):
        assert form.same(one, value), f"{opcode} of {[hex(n) for n in row]} gives {one:#x}, not {value:#x}"
    # Two in a register: each with the one that is seven places on.
    pairs = {f"r{n + 1}": [a | b << 16 for a, b in zip(column, turned(column), strict=True)] for n, column in enumerate(columns)}
    both = run(f"{opcode}.{type_}x2 {operands.replace('h', 'r')}", **pairs)["r0"]
    assert both == [a | b << 16 for a, b in zip(got, turned(got), strict=True)]


def turned(column: list[int]) -> list[int]:
    return column[7:] + column[:7]


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("rn", ["", ".rn"])
def test_add_sub_mul(type_, rn):
    form = FORMATS[type_]
    compare(f"add{rn}", type_, 2, form.add)
    compare(f"sub{rn}", type_, 2, lambda a, b: form.add(a, b ^ form.minus))
    compare(f"mul{rn}", type_, 2, form.mul)


def test_products_at_the_smallest_bfloat16():
    """2**-134 is a tie between 0 and that."""
    form = FORMATS["bf16"]
    above, tie = (form.bits(Fraction(2) ** -67 * n) for n in (1 + Fraction(1, 64), 1))
    below = form.bits(Fraction(2) ** -67 * (1 - Fraction(1, 64)))
    cases = {(tie, tie): 0, (above, tie): 1, (above, below): 0}
    for (a, b), want in cases.items():
        assert run("mul.bf16 h0, h1, h2", h1=[a], h2=[b])["h0"] == [want]


@pytest.mark.parametrize("type_", TYPES)
def test_fma(type_):
    compare("fma.rn", type_, 3, FORMATS[type_].fma)


def relu(form: Format, bits: int) -> int:
    return form.nan if form.is_nan(bits) else 0 if bits & form.minus else bits


@pytest.mark.parametrize("type_", TYPES)
def test_fma_with_relu(type_):
    form = FORMATS[type_]
    compare("fma.rn.relu", type_, 3, lambda a, b, c: relu(form, form.fma(a, b, c)))


def test_ftz_and_sat():
    form = FORMATS["f16"]

    def saturated(bits):
        value = form.number(bits)
        return 0 if value != value or value <= 0 else min(bits, form.bias << form.mantissa)

    def flushed(expected):
        return lambda *operands: form.flush(expected(*[form.flush(operand) for operand in operands]))

    compare("add.ftz", "f16", 2, flushed(form.add))
    compare("mul.rn.ftz.sat", "f16", 2, flushed(lambda a, b: saturated(form.mul(a, b))))
    compare("fma.rn.ftz", "f16", 3, flushed(form.fma))
    compare("fma.rn.sat", "f16", 3, lambda a, b, c: saturated(form.fma(a, b, c)))
    compare("neg.ftz", "f16", 1, lambda a: form.flush(a) ^ form.minus)
    compare("abs.ftz", "f16", 1, lambda a: form.flush(a) & ~form.minus)
    compare("max.ftz", "f16", 2, flushed(lambda a, b: form.extreme("max", a, b)))


@pytest.mark.parametrize("type_", TYPES)
def test_signs(type_):
    form = FORMATS[type_]
    compare("neg", type_, 1, lambda a: a ^ form.minus)
    compare("abs", type_, 1, lambda a: a & ~form.minus)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max(type_, name):
    form = FORMATS[type_]

    def crossed(a, b):
        size = form.extreme(name, a & ~form.minus, b & ~form.minus)
        return size if form.is_nan(size) else size | ((a ^ b) & form.minus)

    compare(name, type_, 2, lambda a, b: form.extreme(name, a, b))
    compare(f"{name}.NaN", type_, 2, lambda a, b: form.extreme(name, a, b, nan=True))
    compare(f"{name}.xorsign.abs", type_, 2, crossed)


@pytest.mark.parametrize("opcode", ["add.ftz.bf16", "add.sat.bf16", "add.rz.f16", "fma.f16", "fma.rn.sat.relu.f16", "min.rn.f16"])
def test_what_half_precision_lacks(opcode):
    operands = ", ".join(["h1"] * (4 if opcode.startswith("fma") else 3))
    with pytest.raises(ValueError, match="is not known"):
        run(f"{opcode} {operands}", h1=[0])

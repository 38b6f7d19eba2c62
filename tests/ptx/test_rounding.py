"""Rounding and the fused multiply-add against exact rational numbers."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from _exact import BF16, F16, F32, F64, FORMATS, Format, near, samples, ties

from fastdllm_triton.ptx import fused, rounding

MODES = ["rn", "rz", "rm", "rp"]
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def array(bits: list[int], form: Format) -> np.ndarray:
    """As the package sees a format: numpy's floats, or the bits of bfloat16."""
    values = np.array(bits, DTYPES[form.width])
    return values if form is BF16 else values.view(FLOATS[form.width])


def same(got: np.ndarray, want: list[int], form: Format, *operands: list[int]) -> None:
    """Compares bits; of a format without a canonical NaN any NaN will do."""
    found = [int(bits) for bits in got.view(DTYPES[form.width])]
    for at, (one, other) in enumerate(zip(found, want, strict=True)):
        shown = ", ".join(f"{column[at]:#x}" for column in operands)
        assert form.same(one, other), f"{shown}: {one:#x}, not {other:#x}"


def between(narrow: Format, wide: Format, count: int = 300) -> list[int]:
    """Numbers of the wider format that lie at, beside and half-way between those of the narrower one, and beyond its limits."""
    random = Random(count)
    found = samples(wide)
    for base in [*samples(narrow, 20), *(near(narrow, random) for _ in range(count))]:
        low, high = narrow.number(base), narrow.number(base + 1 if base & 1 else base ^ 1)
        if isinstance(low, float) or isinstance(high, float):
            continue
        for at in (low, (low + high) / 2, (low + 3 * high) / 4):
            bits = wide.bits(at)
            found += [bits, bits + 1, max(bits - 1, 0)]
    limit = narrow.number(narrow.infinity - 1)
    unit = limit - narrow.number(narrow.infinity - 2)
    found += [wide.bits(limit + unit * part) + step for part in (Fraction(1, 2), Fraction(1, 4), 1) for step in (-1, 0, 1)]
    return [*found, *(wide.minus ^ bits for bits in found)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("to", "source"), [("f32", "f64"), ("f16", "f32"), ("bf16", "f32")])
def test_narrowing(to, source, mode):
    narrow, wide = FORMATS[to], FORMATS[source]
    bits = between(narrow, wide)
    function = {"f32": rounding.to_f32, "f16": rounding.to_f16, "bf16": rounding.to_bf16}[to]
    got = function(array(bits, wide), mode)
    form = Format(narrow.exponent, narrow.mantissa, None) if to == "f32" else narrow
    same(got, [form.bits(wide.number(one), mode, negative_zero=bool(one & wide.minus)) for one in bits], form, bits)


@pytest.mark.parametrize("to", ["f16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_narrowing_twice_by_way_of_odd(to, mode):
    """Rounded to odd in float32, a float64 rounds to 16 bits as it would by itself."""
    narrow = FORMATS[to]
    bits = between(narrow, F64)
    function = {"f16": rounding.to_f16, "bf16": rounding.to_bf16}[to]
    got = function(rounding.narrow_odd(array(bits, F64)), mode)
    same(got, [narrow.bits(F64.number(one), mode, negative_zero=bool(one >> 63)) for one in bits], narrow, bits)


def test_narrowing_by_way_of_nearest_is_wrong():
    """So the detour is needed: 1 + 2**-8 + 2**-40 is above a tie of bfloat16, and float32 drops what tells."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert rounding.to_bf16(value.astype(np.float32)) == 0x3F80
    assert rounding.to_bf16(rounding.narrow_odd(value)) == 0x3F81


@pytest.mark.parametrize("form", [F32, F64])
def test_odd_sums(form):
    """Rounded to odd: exact, or the odd neighbour of what is exact."""
    random = Random(3)
    a = [near(form, random) for _ in range(400)]
    b = [form.bits(form.number(near(form, random)) / 2 ** random.randrange(0, 2 * form.mantissa)) for _ in a]
    got = rounding.odd(*rounding.two_sum(array(a, form), array(b, form)))
    for x, y, result in zip(a, b, got.view(DTYPES[form.width]), strict=True):
        exact, found = form.number(x) + form.number(y), form.number(int(result))
        low, high = (form.number(form.bits(exact, mode)) for mode in ("rm", "rp"))
        assert found == exact if low == high else found in (low, high) and result & 1


def test_odd_keeps_infinities_and_nan():
    total = np.array([np.inf, -np.inf, np.nan, 1.0])
    got = rounding.odd_if_finite(total, np.array([np.nan, np.nan, np.nan, 2.0**-60]))
    assert np.array_equal(got[:3], total[:3], equal_nan=True)
    assert got[3] == 1 + 2.0**-52


@pytest.mark.parametrize("form", [F16, F32])
def test_flush(form):
    bits = samples(form, 40)
    same(rounding.flush(array(bits, form)), [form.flush(one) for one in bits], form, bits)
    normal = [one for one in bits if not form.is_subnormal(one)]
    same(rounding.flush(array(normal, form)), normal, form, normal)


@pytest.mark.parametrize("form", [F16, F32])
def test_canonical_nan(form):
    bits = samples(form, 40)
    same(rounding.canonical(array(bits, form)), [form.nan if form.is_nan(one) else one for one in bits], form, bits)


@pytest.mark.parametrize("form", [F16, F32, F64])
def test_saturate_and_relu(form):
    bits = samples(form, 40)
    one = form.bias << form.mantissa

    def saturated(x):
        value = form.number(x)
        return 0 if value != value or value <= 0 else min(x, one)

    same(rounding.saturate(array(bits, form)), [saturated(x) for x in bits], form, bits)
    if form.nan is not None:
        want = [form.nan if form.is_nan(x) else 0 if x & form.minus else x for x in bits]
        same(rounding.relu(array(bits, form)), want, form, bits)


def test_tf32():
    """A format of 8 and 10 bits, in the upper 19 bits of 32."""
    narrow = Format(8, 10, None)
    bits = between(narrow, F32)
    for mode in ("rn", "rz", "rna"):
        got = rounding.to_tf32(array(bits, F32), mode)
        want = [
            0x7FFFFFFF if F32.is_nan(one) else narrow.bits(F32.number(one), mode, negative_zero=bool(one >> 31)) << 13
            for one in bits
        ]
        same(got, want, F32, bits)


def fp8_number(code: int, kind: str) -> Fraction | float:
    exponent_bits, mantissa = (4, 3) if kind == "e4m3" else (5, 2)
    size = code & 0x7F
    exponent, fraction = divmod(size, 1 << mantissa)
    bias = (1 << (exponent_bits - 1)) - 1
    if kind == "e4m3" and size == 0x7F:
        return float("nan")
    if kind == "e5m2" and size >= 0x7C:
        return float("inf") * (-1 if code & 0x80 else 1) if size == 0x7C else float("nan")
    lead = 1 << mantissa if exponent else 0
    value = (lead + fraction) * Fraction(2) ** (max(exponent, 1) - bias - mantissa)
    return -value if code & 0x80 else value


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_from_8_bits(kind):
    codes = list(range(256))
    got = rounding.from_fp8(np.array(codes, np.uint8), kind)
    same(got, [F16.bits(fp8_number(c, kind), negative_zero=bool(c & 0x80)) for c in codes], F16, codes)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_to_8_bits(kind):
    """To the nearest of all codes, the even one of two; what is greater than the greatest becomes that."""
    finite = {code: fp8_number(code, kind) for code in range(0x7F) if isinstance(fp8_number(code, kind), Fraction)}
    narrow = Format(4, 3, None) if kind == "e4m3" else Format(5, 2, None)
    bits = [one for one in between(narrow, F32, 60) if not F32.is_nan(one)]
    got = rounding.to_fp8(array(bits, F32), kind)
    values = list(finite.values())  # in the order of their codes
    for one, code in zip(bits, got, strict=True):
        value = F32.number(one & 0x7FFFFFFF)
        above = bisect_left(values, value)
        beside = [c for c in (above - 1, above) if c in finite]
        best = min(beside, key=lambda c: (abs(values[c] - value), c & 1)) if isinstance(value, Fraction) else max(finite)
        assert code == best | (0x80 if one >> 31 else 0), hex(one)
    assert set(rounding.to_fp8(np.array([np.nan, -np.nan], np.float32), kind)) == {0x7F}


def fused_in(form: Format, mode: str = "rn"):
    """The package's fma of a format, to its bits; NaN of float32 may be any."""
    if form is F32:
        return lambda a, b, c: fused.fma32(a, b, c, mode)
    return {
        F16: lambda a, b, c: rounding.to_f16(fused.fma16(a, b, c)),
        BF16: lambda a, b, c: rounding.to_bf16(fused.fma_bf16(a, b, c)),
        F64: fused.fma64,
    }[form]


CASES = [("f16", "rn"), ("bf16", "rn"), ("f64", "rn"), *(("f32", mode) for mode in MODES)]


def assert_fused(form: Format, mode: str, columns: tuple[list[int], ...]) -> None:
    """All in one call, and some by themselves: a call takes the path that its least convenient operand asks for."""
    loose = Format(form.exponent, form.mantissa, None) if form is F32 else form
    want = [loose.fma(a, b, c, mode) for a, b, c in zip(*columns, strict=True)]
    function = fused_in(form, mode)
    same(function(*[array(column, form) for column in columns]), want, loose, *columns)
    for n in range(0, len(want), 7):
        same(function(*[array(column[n : n + 1], form) for column in columns]), want[n : n + 1], loose, *columns)


@pytest.mark.parametrize(("type_", "mode"), CASES)
def test_fma_of_special_operands(type_, mode):
    form = FORMATS[type_]
    some = samples(form, 0)
    assert_fused(form, mode, tuple(map(list, zip(*((a, b, c) for a in some for b in some for c in some[::2]), strict=True))))


@pytest.mark.parametrize(("type_", "mode"), CASES)
def test_fma_near_ties(type_, mode):
    assert_fused(FORMATS[type_], mode, ties(FORMATS[type_], 1500))


@pytest.mark.parametrize(("type_", "mode"), CASES)
def test_fma_at_the_ends_of_the_range(type_, mode):
    """Each by itself: products that over- or underflow on their own, with all signs."""
    form = FORMATS[type_]
    root, small = form.bits(Fraction(2) ** ((form.bias + 1) // 2)), form.bits(Fraction(2) ** (form.least // 2 - 2))
    most = form.infinity - 1
    rows = [
        (root, root, form.minus | form.infinity - form.normal),  # 2**128 - 2**127
        (root, root, form.minus | form.infinity),
        (most, most, form.minus | form.infinity),
        (most, most, form.minus | most),
        (small, small, 0),
        (small, small, 1),
        (small, small + 1, form.bits(Fraction(1))),
        (0, root, 0),
    ]
    signs = [(a, b, c) for a in (0, form.minus) for b in (0, form.minus) for c in (0, form.minus)]
    for row in rows:
        for sign in signs:
            assert_fused(form, mode, tuple([bits ^ flip] for bits, flip in zip(row, sign, strict=True)))


@pytest.mark.parametrize(("type_", "mode"), CASES)
def test_fma_of_random_bits(type_, mode):
    form, random = FORMATS[type_], Random(5)
    assert_fused(form, mode, tuple([random.getrandbits(form.width) for _ in range(1500)] for _ in range(3)))


@pytest.mark.parametrize(("type_", "mode"), CASES)
def test_fma_with_subnormal_results(type_, mode):
    """The product lies about the smallest normal number, and the addend is subnormal, or cancels it."""
    form, random = FORMATS[type_], Random(6)
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    while len(columns[0]) < 1000:
        a = random.getrandbits(form.width)
        x = form.number(a)
        if isinstance(x, float) or x == 0:
            continue
        target = Fraction(random.getrandbits(2 * form.mantissa)) * Fraction(2) ** (
            form.least - form.mantissa - random.randrange(4)
        )
        b = form.bits(target / x)
        y = form.number(b)
        c = random.getrandbits(form.mantissa) | random.getrandbits(1) * form.minus
        if random.random() < 0.3 and not isinstance(y, float):
            c = form.bits(-x * y)
        if not isinstance(y, float):
            for column, bits in zip(columns, (a, b, c), strict=True):
                column.append(bits)
    assert_fused(form, mode, columns)


def test_fma64_rounds_its_correction_once():
    """1.5 + 2**-52 and a product just below half a unit, 2**-53 - 2**-113: the sum lies below the tie."""
    a, b, c = np.array([1 - 2.0**-30]), np.array([2.0**-53 * (1 + 2.0**-30)]), np.array([1.5 + 2.0**-52])
    assert a[0] * b[0] == 2.0**-53
    assert a[0] * b[0] + c[0] == 1.5 + 2.0**-51
    assert fused.fma64(a, b, c)[0] == 1.5 + 2.0**-52


def test_fma32_rounds_once():
    """1 + 2**-23 and a product just below half a unit: float64 drops what tells that from a tie."""
    a, b, c = (np.array([n], np.float32) for n in (1 - 2.0**-20, 2.0**-24 * (1 + 2.0**-20), 1 + 2.0**-23))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice == np.float32(1 + 2.0**-22)
    assert fused.fma32(a, b, c) == c


def test_fma32_rounds_a_subnormal_result_once():
    """2**-127 + 2**-149 and a product just below half a unit, which is 2**-150 here."""
    a, b, c = (np.array([n], np.float32) for n in (2.0**-75 * (1 + 2.0**-16), 2.0**-75 * (1 - 2.0**-16), 2.0**-127 + 2.0**-149))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice == np.float32(2.0**-127 + 2.0**-148)
    assert fused.fma32(a, b, c) == c

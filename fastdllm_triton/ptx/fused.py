"""The fused multiply-add, rounded once, in every format (PTX ISA, 9.7.3 and 9.7.4, ``fma``).

numpy has none. Each is made of exact steps: products that a wider format holds, sums with their rounding error, rounding to odd.
All ranges are right, subnormal numbers and overflow included; :func:`fma64` is some four times slower for a call in which any
operand is not 0 and beyond 2 ** ± 400.
"""

from __future__ import annotations

import numpy as np

from .lanes import Array, choose
from .rounding import (
    f32,
    f64,
    from_bf16,
    narrow_odd,
    odd,
    odd_if_finite,
    to_f32,
    two_sum,
    u16,
    u32,
    u64,
)


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """Of float32. The sign, the infinities and that NaN is NaN are right; which NaN is left open."""
    product = np.multiply(a, b, dtype=f64)  # exact: 48 bits
    total = product + c
    if mode != "rn":
        return _directed(product, total, c, mode)
    result = total.astype(f32)
    # Two roundings differ from one only where the first stops half-way between two float32, which show as 28 zeros after
    # a one; of subnormal results, where fewer bits count, all are looked at.
    ties = (total.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
    twice = result.view(u32) << u32(1)  # without the sign
    if np.minimum.reduce(twice) <= 0x01000000:
        twice -= u32(1)  # zeros are now the greatest of all
        ties |= twice < u32(0x01000000)
    if ties.any():
        some = np.flatnonzero(ties)
        exact = odd_if_finite(*two_sum(_some(product, some), _some(c, some).astype(f64)))
        result[some] = exact.astype(f32)
    return result


def _directed(product: Array, total: Array, c: Array, mode: str) -> Array:
    wide = c.astype(f64)
    result = to_f32(odd_if_finite(*two_sum(product, wide)), mode)
    if mode == "rm":  # where unlike signs cancel, the zero is negative
        bits = result.view(u32)
        minus = (total == 0) & (np.signbit(product) | np.signbit(wide))
        result = choose(minus, np.array([0x80000000], u32), bits).view(f32)
    return result


def _some(values: Array, which: Array) -> Array:
    """Some elements; of a single value, that value."""
    return values if len(values) == 1 else values[which]


def fma16(a: Array, b: Array, c: Array) -> Array:
    """Of float16, to nearest even, as float32 rounded to odd: to be narrowed by :func:`~.rounding.to_f16`."""
    product = a.astype(f32) * b.astype(f32)  # exact: 22 bits, and no exponent of float16 is near float32's limits
    return _odd_sum(product, c.astype(f32))


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    """Of the bits of bfloat16, as float32 rounded to odd: to be narrowed by :func:`~.rounding.to_bf16`."""
    x, y, z = from_bf16(a), from_bf16(b), from_bf16(c)
    if _moderate16(a) and _moderate16(b):
        return _odd_sum(x * y, z)  # exact: 16 bits
    product = np.multiply(x, y, dtype=f64)
    return narrow_odd(odd_if_finite(*two_sum(product, z.astype(f64))))


def _odd_sum(product: Array, c: Array) -> Array:
    total, error = two_sum(product, c)
    if np.isfinite(np.maximum.reduce(total)) and np.isfinite(np.minimum.reduce(total)):
        return odd(total, error)
    return odd_if_finite(total, error)


def _moderate16(bits: Array) -> bool:
    """Whether all are 0 or of size 2**-60 to 2**60, so that float32 holds their products."""
    twice = bits << u16(1)
    return bool(np.maximum.reduce(twice) <= 187 << 8 and np.minimum.reduce(twice - u16(1)) >= (67 << 8) - 1)


#: Sizes within which factors may lie, an addend, and a product that is not 0, so that no step leaves float64's range.
_FACTOR, _ADDEND, _PRODUCT = 2.0**400, 2.0**900, f64(2.0**-800).view(u64)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Of float64, to nearest even."""
    if _below(a, _FACTOR) and _below(b, _FACTOR) and _below(c, _ADDEND):
        product = a * b
        if np.minimum.reduce((product.view(u64) << u64(1)) - u64(1)) >= (_PRODUCT << u64(1)) - u64(1):
            return _fma64(a, b, c, product)
    a, b, c = np.broadcast_arrays(a, b, c)
    plain: Array = a * b + c
    finite = np.isfinite(a) & np.isfinite(b)
    # A product that overflows by itself must not meet an infinite c.
    result = np.where(finite & ~np.isfinite(c), c, plain)
    some = np.flatnonzero(finite & np.isfinite(c) & (a != 0) & (b != 0))
    result[some] = _fma64_scaled(a[some], b[some], c[some])
    return result


def _below(values: Array, most: float) -> bool:
    """Whether all are smaller than that; not if any is NaN."""
    return bool(np.maximum.reduce(values) < most and np.minimum.reduce(values) > -most)


def _two_product(a: Array, b: Array, product: Array) -> Array:
    """What a rounded product lacks (Dekker)."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error: Array = a_high * b_high
    error -= product
    error += a_low * b_high
    error += a_high * b_low
    error += a_low * b_low
    return error


def _halves(values: Array) -> tuple[Array, Array]:
    """Float64 as a sum of two with 26 bits each."""
    high = values.view(u64) + u64(1 << 26)
    high &= u64(-(1 << 27) % (1 << 64))
    return high.view(f64), values - high.view(f64)


def _fma64(a: Array, b: Array, c: Array, product: Array) -> Array:
    error = _two_product(a, b, product)
    total, rest = two_sum(product, c)
    correction = rest + error
    result: Array = total + correction
    # The correction was rounded too. That matters where it stopped half-way between two results, which is at a multiple,
    # by a small odd number, of a power of 2.
    doubtful = ((correction.view(u64) << u64(14)) == 0) & (correction != 0)
    if doubtful.any():
        some = np.flatnonzero(doubtful)
        top, rest = _exact_sum(_some(product, some), _some(error, some), _some(c, some))
        result[some] = top + rest
    zero = result == 0
    if zero.any():
        # Of two zeros, the sum's sign is lost among the errors; a product that became 0 was not one.
        vanished = (a != 0) & (b != 0) & (product == 0) & (c == 0)
        result = np.where(zero, np.where(vanished, product, product + c), result)
    return result


def _exact_sum(product: Array, error: Array, c: Array) -> tuple[Array, Array]:
    """``product + error + c`` as a float64 and one rounded to odd, of whose sum the rounding is right."""
    upper, lower = two_sum(c, error)
    top, rest = two_sum(product, upper)
    return top, odd(*two_sum(rest, lower))


def _fma64_scaled(a: Array, b: Array, c: Array) -> Array:
    """Of finite a and b that are not 0, of any size: scaled so that the greater of product and addend is about 1."""
    (a, a_exponent), (b, b_exponent), (c, c_exponent) = np.frexp(a), np.frexp(b), np.frexp(c)
    product = a * b
    error = _two_product(a, b, product)
    exponent = a_exponent + b_exponent
    # Below 2**-1200 all rounds to 0 alike.
    unit = np.maximum(np.where(c == 0, exponent, np.maximum(exponent, c_exponent)), -1200)
    # What is 2**-300 of the other is below all its bits and counts by its sign alone.
    down = np.maximum(exponent - unit, -300)
    c = np.ldexp(c, np.maximum(c_exponent - unit, -300))
    top, rest = _exact_sum(np.ldexp(product, down), np.ldexp(error, down), c)
    result: Array = top + rest
    # Subnormal: rounded at 2**-1074, by adding what has its last bit there.
    small = np.flatnonzero(np.frexp(result)[1] + unit < -1021)
    if len(small):
        anchor = np.copysign(np.ldexp(f64(2.0**52), -1074 - unit[small]), result[small])
        total, left = two_sum(anchor, top[small])
        rounded = (total + odd(*two_sum(left, rest[small]))) - anchor
        result[small] = np.copysign(rounded, anchor)
    scaled: Array = np.ldexp(result, unit)
    return scaled

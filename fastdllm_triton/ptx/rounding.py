"""Rounding to the bit: between the floating-point formats, with every rounding modifier, and of exact results.

A result that numpy computes in a wider format and then narrows is rounded twice. Where that can differ from rounding once, the
wider value is *rounded to odd*: cut off, with its last bit set if anything was cut off. Rounding such a value again, to at least
two bits less and in any direction, is as good as rounding the exact one (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd", 2008).

NaN: single precision and narrower formats return one canonical NaN, as NVIDIA's hardware does (the ISA leaves it open, PTX ISA,
9.7.3, "Floating-Point Instructions"); numpy's would have the sign and payload that the CPU gives it.

Nothing here writes into its arguments. Bits are taken to be little endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .lanes import Array, choose

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
f16, f32, f64 = np.float16, np.float32, np.float64

#: Rounding modifiers: to nearest even, towards zero, minus infinity, plus infinity.
MODES = ("rn", "rz", "rm", "rp")

_UNSIGNED: dict[int, type[Any]] = {2: u16, 4: u32, 8: u64}
#: By size in bytes: the canonical NaN, and the bits of the smallest normal number.
_NAN: dict[int, Array] = {2: np.array([0x7FFF], u16), 4: np.array([0x7FFFFFFF], u32)}
_NORMAL: dict[int, Any] = {2: u16(0x0400), 4: u32(0x00800000)}


def bits_of_floats(values: Array) -> Array:
    """The bits of floats, as unsigned integers."""
    return values.view(_UNSIGNED[values.itemsize])


def has_nan(values: Array) -> bool:
    """Whether any is NaN."""
    if values.dtype == f16:  # as bits, for want of speed
        return bool(np.maximum.reduce(values.view(u16) << u16(1)) > 0xF800)
    top = np.maximum.reduce(values)
    return bool(top != top)


def canonical(values: Array) -> Array:
    """Floats with the one NaN that the hardware returns: ``0x7FFFFFFF``, ``0x7FFF``."""
    if not has_nan(values):
        return values
    result: Array = choose(np.isnan(values), _NAN[values.itemsize], bits_of_floats(values)).view(values.dtype)
    return result


def has_subnormal(values: Array) -> bool:
    """Whether any is subnormal."""
    bits, size = bits_of_floats(values), values.itemsize
    one, limit = _UNSIGNED[size](1), 2 * int(_NORMAL[size])
    twice = bits << one  # without the sign
    if np.minimum.reduce(twice) >= limit:
        return False
    twice -= one  # zeros are now the greatest of all
    return bool(np.minimum.reduce(twice) < limit - 1)


def flush(values: Array) -> Array:
    """``.ftz``: subnormal numbers become zeros of their sign (PTX ISA, 9.7.3, "Floating-Point Instructions").

    Results are flushed after they are rounded: what rounds up to the smallest normal number stays.
    """
    if not has_subnormal(values):
        return values
    bits, size = bits_of_floats(values), values.itemsize
    normal, sign = _NORMAL[size], _UNSIGNED[size](1 << (8 * size - 1))
    result: Array = choose((bits & ~sign) < normal, bits & sign, bits).view(values.dtype)
    return result


def saturate(values: Array) -> Array:
    """``.sat``: within 0 and 1, and +0 for NaN (PTX ISA, 9.7.3, "Floating-Point Instructions")."""
    zero, one = values.dtype.type(0), values.dtype.type(1)
    kept: Array = (bits_of_floats(np.minimum(values, one)) * (values > zero)).view(values.dtype)
    return kept


def relu(values: Array) -> Array:
    """``.relu``: +0 for what is negative; NaN becomes the canonical one."""
    kept: Array = (bits_of_floats(values) * ~(values <= values.dtype.type(0))).view(values.dtype)
    return canonical(kept)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum, and what it lacks: exact unless it overflows (Knuth)."""
    total = a + b
    part = total - a
    # (a - (total - part)) + (b - part), with few new arrays.
    error: Array = total - part
    np.subtract(a, error, out=error)
    np.subtract(b, part, out=part)
    error += part
    return total, error


def odd(total: Array, error: Array) -> Array:
    """Rounds ``total + error`` to odd, where ``total`` is finite and the sum rounded to nearest."""
    missing = error != 0
    if not missing.any():
        return total
    bits = bits_of_floats(total)
    inexact = missing.astype(bits.dtype)
    # Cut off: one less in size where the error has the other sign.
    less = (bits ^ bits_of_floats(error)) >> bits.dtype.type(8 * bits.itemsize - 1)
    less &= inexact
    result = bits - less
    result |= inexact
    odd_one: Array = result.view(total.dtype)
    return odd_one


def odd_if_finite(total: Array, error: Array) -> Array:
    """:func:`odd`; infinities and NaN stay as they are."""
    return odd(total, np.where(np.isfinite(total), error, total.dtype.type(0)))


def narrow_odd(values: Array) -> Array:
    """Float64 to float32, rounded to odd."""
    near = values.astype(f32)
    back = near.astype(f64)
    bits = near.view(u32) - ((np.abs(back) > np.abs(values)) & np.isfinite(values)).astype(u32)
    result: Array = (bits | ((back != values) & ~np.isnan(values)).astype(u32)).view(f32)
    return result


def step_towards(nearest: Array, above: Array, below: Array, mode: str) -> Array:
    """Turns results that were rounded to nearest into ones rounded by ``mode``.

    ``above`` and ``below`` say where ``nearest`` is more or less than the exact result.
    """
    if mode == "rn":
        return nearest
    bits = bits_of_floats(nearest)
    negative = np.signbit(nearest)
    inward = {"rz": (above & ~negative) | (below & negative), "rm": above & ~negative, "rp": below & negative}[mode]
    outward = {"rz": np.zeros(1, bool), "rm": above & negative, "rp": below & ~negative}[mode]
    result: Array = (bits - inward.astype(bits.dtype) + outward.astype(bits.dtype)).view(nearest.dtype)
    return result


def to_f32(values: Array, mode: str = "rn") -> Array:
    """Float64, exact or rounded to odd, to float32."""
    near = values.astype(f32)
    if mode == "rn":
        return near
    back = near.astype(f64)
    return step_towards(near, back > values, back < values, mode)


def to_f16(values: Array, mode: str = "rn") -> Array:
    """Float32, exact or rounded to odd, to float16."""
    near = values.astype(f16)
    if mode == "rn":
        return canonical(near)
    back = near.astype(f32)
    return canonical(step_towards(near, back > values, back < values, mode))


def to_bf16(values: Array, mode: str = "rn") -> Array:
    """Float32, exact or rounded to odd, to the bits of bfloat16."""
    return (_upper_half(values, mode) >> u32(16)).astype(u16)


def to_bf16_pair(high: Array, low: Array, mode: str = "rn") -> Array:
    """Two float32 to one register with both as bfloat16."""
    result = _upper_half(high, mode) & u32(0xFFFF0000)
    return result | (_upper_half(low, mode) >> u32(16))


def _upper_half(values: Array, mode: str) -> Array:
    """Float32 rounded to bfloat16, which is the upper half; the lower one is anything."""
    bits = values.view(u32)
    if mode == "rn":
        rounded = bits >> u32(16)
        rounded &= u32(1)
        rounded += bits
        rounded += u32(0x7FFF)
    elif mode == "rz":
        rounded = bits
    else:
        away = np.signbit(values) == (mode == "rm")
        rounded = bits + away * u32(0xFFFF)
    return choose(np.isnan(values), _NAN[4], rounded) if has_nan(values) else rounded


def from_bf16(bits: Array) -> Array:
    """The bits of bfloat16 to float32."""
    return (bits.astype(u32) << u32(16)).view(f32)


def to_tf32(values: Array, mode: str) -> Array:
    """Float32 to tf32, the float32 with 13 zeros at its end: ``rn``, ``rz``, or ``rna``, where ties go away from zero.

    NaN becomes the canonical one, for which the ISA gives no encoding.
    """
    bits = values.view(u32)
    if mode == "rna":
        bits = bits + u32(0x1000)
    elif mode == "rn":
        bits = bits + ((bits >> u32(13)) & u32(1)) + u32(0xFFF)
    rounded = bits & u32(0xFFFFE000)
    return choose(np.isnan(values), _NAN[4], rounded) if has_nan(values) else rounded


#: Of each 8-bit format: bits of the mantissa, the smallest exponent of a normal number, the greatest finite number, NaN.
FP8 = {"e4m3": (3, -6, 0x7E, 0x7F), "e5m2": (2, -14, 0x7B, 0x7F)}


def to_fp8(values: Array, kind: str) -> Array:
    """Float32 to ``e4m3`` or ``e5m2``, to nearest even and ``.satfinite``: what is too great becomes the greatest number.

    PTX ISA, 5.2.3, "Alternate Floating-Point Data Formats", and 9.7.9, ``cvt``.
    """
    mantissa, least, greatest, nan = FP8[kind]
    # Beyond 2**20 all is too great; the cut keeps infinity out of frexp.
    size = np.minimum(np.abs(values), f32(2.0**20))
    exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, least), least)
    steps = np.rint(np.ldexp(size.astype(f64), mantissa - exponent))
    # The leading one counts as one more exponent, and a mantissa that rounds up carries into it.
    code = np.minimum(((exponent - least) << mantissa) + np.nan_to_num(steps).astype(np.int32), greatest)
    code = np.where(np.isnan(values), nan, code | (np.signbit(values).astype(np.int32) << 7))
    return code.astype(u8)


def _fp8_table(kind: str) -> Array:
    mantissa, least, greatest, _ = FP8[kind]
    codes = np.arange(128)
    exponent, fraction = codes >> mantissa, codes & ((1 << mantissa) - 1)
    leading = np.where(exponent > 0, 1 << mantissa, 0)
    values = np.ldexp((leading + fraction).astype(f32), np.maximum(exponent, 1) - 1 + least - mantissa)
    values[greatest + 1 :] = np.nan
    if kind == "e5m2":
        values[greatest + 1] = np.inf
    return canonical(np.concatenate([values, -values]).astype(f16))


_FROM_FP8 = {kind: _fp8_table(kind) for kind in FP8}


def from_fp8(codes: Array, kind: str) -> Array:
    """``e4m3`` or ``e5m2`` to float16, exactly."""
    return _FROM_FP8[kind][codes]

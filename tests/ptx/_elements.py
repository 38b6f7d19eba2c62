"""Elements of matrices: numbers as bits of each format, by the formats' definitions, one at a time."""

from __future__ import annotations

import struct
from fractions import Fraction
from functools import cache

import numpy as np


@cache
def to_bits(kind, number):
    """The bits of a number that the format holds exactly."""
    if kind == "s32":
        return int(number) & 0xFFFFFFFF
    if kind in ("s8", "u8"):
        return int(number) & 0xFF
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", number))[0]
    if kind == "f64":
        return struct.unpack("<Q", struct.pack("<d", number))[0]
    word = struct.unpack("<I", struct.pack("<f", number))[0]
    if kind == "bf16":
        assert word & 0xFFFF == 0
        return word >> 16
    if kind in ("tf32", "f32"):
        return word
    return next(bits for bits in range(256) if from_float8(kind, bits) == Fraction(number))


def from_float8(kind, bits):
    """e4m3 and e5m2 (PTX ISA, 5.2.3): a Fraction, or None of what is no number."""
    exponent, mantissa = (4, 3) if kind == "e4m3" else (5, 2)
    sign, field, fraction = bits >> 7, bits >> mantissa & (2**exponent - 1), bits & (2**mantissa - 1)
    if (kind == "e5m2" and field == 31) or (kind == "e4m3" and bits & 0x7F == 0x7F):
        return None
    scale = Fraction(2) ** (max(field, 1) - (2 ** (exponent - 1) - 1))
    return (-1) ** sign * scale * (Fraction(fraction, 2**mantissa) + (field > 0))


def some(kind, shape, seed=0):
    """Numbers that every format holds, small enough for sums to be exact; with a sign where the format has one."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 8, shape)
    if kind != "u8":
        numbers = numbers * random.choice([-1, 1], shape)
    return numbers if kind in ("u8", "s8", "s32") else numbers * 0.5


BITS = {"f64": 64, "tf32": 32, "f32": 32, "s32": 32, "bf16": 16, "f16": 16, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}

"""Conversions (PTX ISA, 9.7.9, ``cvt``, ``cvt.pack`` and ``cvta``).

Every value goes through one that holds it without loss, or is rounded to odd: integers through int64, uint64 or float64, floats
through float32 or float64. What occurs most has a shorter way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .half import NARROW, WIDEN
from .integers import clamp, halves
from .lanes import Array, bits_of, dtype_of
from .parser import Instruction
from .rounding import (
    FP8,
    MODES,
    canonical,
    f16,
    f32,
    f64,
    flush,
    from_bf16,
    from_fp8,
    narrow_odd,
    odd,
    relu,
    saturate,
    step_towards,
    to_bf16_pair,
    to_f32,
    to_fp8,
    to_tf32,
    two_sum,
    u16,
    u32,
)
from .semantics import Compute, Scalar, scalar

_INTEGERS = tuple(f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64))
_FLOATS = ("bf16", "f16", "f32", "f64")
#: To an integer: nearest even, towards zero, minus infinity, plus infinity.
_TO_INTEGRAL: dict[str, Compute] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
#: Conversions that lose nothing, and have no rounding modifier.
_WIDER = {("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")}


@scalar("cvt")
def _cvt(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.9, ``cvt``: between two types, by the kinds of both."""
    if len(instruction.parts) < 3:
        return None
    if instruction.parts[1] == "pack":
        return _pack(instruction)
    to, source = instruction.parts[-2:]
    known = frozenset(instruction.parts[1:-2])
    if to == "tf32" and source == "f32":
        return _to_tf32(known)
    if "x2" in to or "x2" in source:
        return _pairs(to, source, known)
    if to in _INTEGERS and source in _INTEGERS:
        return _between_integers(to, source, known)
    if to in _INTEGERS and source in _FLOATS:
        return _to_integer(to, source, known)
    if to in _FLOATS and source in _INTEGERS:
        return _from_integer(to, source, known)
    if to in _FLOATS and source in _FLOATS:
        return _between_floats(to, source, known)
    return None


def _between_integers(to: str, source: str, known: frozenset[str]) -> Scalar | None:
    """Cut off or extended by the source's sign; ``.sat`` clamps."""
    if not known <= {"sat"}:
        return None
    dtype = dtype_of(to)
    if known:
        return Scalar((to,), (source,), lambda a: clamp(a, to))
    return Scalar((to,), (source,), lambda a: a.astype(dtype))


def _take(known: frozenset[str], of: dict[str, Compute] | tuple[str, ...]) -> tuple[str | None, frozenset[str]]:
    """The one of several modifiers that is there, and the others; None if there is not exactly one."""
    found = [name for name in of if name in known]
    return (found[0], known - set(found)) if len(found) == 1 else (None, known)


def _to_integer(to: str, source: str, known: frozenset[str]) -> Scalar | None:
    """Rounded to an integer, then clamped to the range, ``.sat`` or not. NaN is 0, or of 64 bits the uppermost bit."""
    how, rest = _take(known, _TO_INTEGRAL)
    if how is None or not rest <= ({"ftz", "sat"} if source == "f32" else {"sat"}):
        return None
    integral, dtype = _TO_INTEGRAL[how], dtype_of(to)
    limits = np.iinfo(dtype)
    # The range's ends in float64. The upper end of 64 bits is not one: the float64 below it is taken, and then corrected.
    low = f64(limits.min)
    high = np.nextafter(f64(limits.max), f64(0)) if bits_of(to) == 64 else f64(limits.max)
    missing = 1 << (bits_of(to) - 1) if source == "f64" or bits_of(to) == 64 else 0
    nan = np.array([missing], f"u{dtype().itemsize}").view(dtype)

    def compute(a: Array) -> Array:
        if source == "bf16":
            a = WIDEN[source](a)
        if "ftz" in rest:
            a = flush(a)
        whole = integral(a.astype(f64))
        result: Array = np.minimum(np.maximum(whole, low), high).astype(dtype)
        if bits_of(to) == 64:
            result = np.where(whole > high, dtype(limits.max), result)
        return np.where(np.isnan(whole), nan, result)

    return Scalar((to,), (source,), compute)


def _from_integer(to: str, source: str, known: frozenset[str]) -> Scalar | None:
    """Rounded as told, once."""
    mode, rest = _take(known, MODES)
    if mode is None or not rest <= _saturates(to):
        return None
    after = _clamps(rest)
    # An integer is never subnormal, so that there is nothing to flush.
    if to in ("f32", "f64") and mode == "rn":
        dtype = dtype_of(to)
        return Scalar((to,), (source,), lambda a: after(a.astype(dtype)))
    if to == "f64":
        return Scalar((to,), (source,), lambda a: after(_to_double(a, mode)))
    if to == "f32":
        return Scalar((to,), (source,), lambda a: after(to_f32(_to_double(a), mode)))
    narrow = NARROW[to]
    return Scalar((to,), (source,), lambda a: narrow(after(narrow_odd(_to_double(a))), mode))


def _to_double(values: Array, mode: str = "odd") -> Array:
    """Integers as float64, rounded by a modifier, or to odd."""
    if values.itemsize < 8:
        return values.astype(f64)
    # Both halves are exact in float64.
    high = (values >> values.dtype.type(32)).astype(f64) * f64(2.0**32)
    total, error = two_sum(high, (values & values.dtype.type(0xFFFFFFFF)).astype(f64))
    return odd(total, error) if mode == "odd" else step_towards(total, error < 0, error > 0, mode)


def _saturates(to: str) -> set[str]:
    """What a float may have besides its rounding."""
    return {"f32": {"ftz", "sat"}, "bf16": set()}.get(to, {"sat"})


def _clamps(known: frozenset[str]) -> Compute:
    """``.sat`` and ``.relu``, which may be applied before rounding."""
    return saturate if "sat" in known else relu if "relu" in known else lambda a: a


def _between_floats(to: str, source: str, known: frozenset[str]) -> Scalar | None:
    integral, rest = _take(known, _TO_INTEGRAL)
    if integral is not None:
        return _rounded_to_integral(to, source, integral, rest) if to == source else None
    mode, rest = _take(known, MODES)
    loses = to != source and (source, to) not in _WIDER
    if (mode is None) == loses:
        return None
    allowed = {"ftz"} if "f32" in (to, source) else set()
    if to in ("f16", "bf16") and source == "f32":
        allowed |= {"relu", "satfinite"}
    if to != "bf16":
        allowed |= {"sat"}
    if not rest <= allowed or {"sat", "relu"} <= rest or {"sat", "satfinite"} <= rest:
        return None
    return Scalar((to,), (source,), _float_to_float(to, source, mode or "rn", rest))


def _float_to_float(to: str, source: str, mode: str, known: frozenset[str]) -> Compute:
    """A conversion between formats. ``.ftz`` concerns what is ``f32``."""
    clamps, ftz = _clamps(known), "ftz" in known
    into = flush if ftz and source == "f32" else lambda a: a
    out = flush if ftz and to == "f32" else lambda a: a
    if to == "f64":
        widen: Compute = WIDEN.get(source, lambda a: a)
        return lambda a: clamps(widen(into(a)).astype(f64))
    if to == "f32":
        if source == "f64":
            return lambda a: out(canonical(clamps(to_f32(a, mode))))
        if source == "bf16" and not known:  # the hardware moves the bits, those of NaN too
            return from_bf16
        widen = WIDEN.get(source, lambda a: a)
        return lambda a: out(canonical(clamps(widen(into(a)))))
    narrow = NARROW[to]
    single = narrow_odd if source == "f64" else WIDEN.get(source, lambda a: a)
    if to == source:
        return lambda a: narrow(clamps(single(into(a))))
    limit = _limit(to) if "satfinite" in known else clamps
    if "satfinite" in known and "relu" in known:
        return lambda a: narrow(limit(relu(into(a))), mode)
    return lambda a: narrow(limit(single(into(a))), mode)


def _limit(to: str) -> Compute:
    """``.satfinite``: what is greater than the greatest number becomes it; NaN stays."""
    most = f32({"f16": 65504.0, "bf16": float.fromhex("0x1.fep127"), "tf32": float.fromhex("0x1.ffcp127")}[to])
    return lambda a: np.minimum(np.maximum(a, -most), most)


def _rounded_to_integral(to: str, source: str, how: str, rest: frozenset[str]) -> Scalar | None:
    """Rounded to an integer that stays a float; zeros keep their sign."""
    if not rest <= _saturates(to):
        return None
    integral, ftz = _TO_INTEGRAL[how], "ftz" in rest
    clamps = _clamps(rest)
    if to in WIDEN:
        widen, narrow = WIDEN[to], NARROW[to]
        return Scalar((to,), (source,), lambda a: narrow(clamps(integral(widen(a)))))
    if to == "f64":
        return Scalar((to,), (source,), lambda a: clamps(integral(a)))
    return Scalar((to,), (source,), lambda a: canonical(clamps(integral(flush(a) if ftz else a))))


def _to_tf32(known: frozenset[str]) -> Scalar | None:
    """``cvt.rna.tf32.f32`` and its like: float32 with a mantissa of 10 bits."""
    mode, rest = _take(known, ("rna", "rn", "rz"))
    if mode is None or not rest <= {"satfinite", "relu"}:
        return None
    first = relu if "relu" in rest else lambda a: a
    limit = _limit("tf32") if "satfinite" in rest else lambda a: a
    return Scalar(("b32",), ("f32",), lambda a: to_tf32(limit(first(a)), mode))


def _pairs(to: str, source: str, known: frozenset[str]) -> Scalar | None:
    """Two values into or out of one register; the first source, or the upper half, is the upper one."""
    if to in ("f16x2", "bf16x2") and source == "f32":
        mode, rest = _take(known, ("rn", "rz"))
        if mode is None or not rest <= {"relu", "satfinite"}:
            return None
        if to == "bf16x2" and not rest:
            return Scalar(("b32",), ("f32", "f32"), lambda a, b: to_bf16_pair(a, b, mode))
        one = _float_to_float(to.removesuffix("x2"), "f32", mode, rest)
        return Scalar(("b32",), ("f32", "f32"), lambda a, b: _join(one(a).view(u16), one(b).view(u16), u32))
    eight = to.removesuffix("x2")
    clamps = relu if "relu" in known else lambda a: a
    if eight in FP8 and to != eight:
        if not {"rn", "satfinite"} <= known <= {"rn", "satfinite", "relu"}:
            return None
        if source == "f32":
            return Scalar(("b16",), ("f32", "f32"), lambda a, b: _join(to_fp8(clamps(a), eight), to_fp8(clamps(b), eight), u16))
        if source == "f16x2":
            return Scalar(("b16",), ("b32",), lambda a: to_fp8(clamps(halves(a)[0].view(f16).astype(f32)), eight).view(u16))
    eight = source.removesuffix("x2")
    if eight in FP8 and source != eight and to == "f16x2" and {"rn"} <= known <= {"rn", "relu"}:
        return Scalar(("b32",), ("b16",), lambda a: clamps(from_fp8(np.ascontiguousarray(a).view(np.uint8), eight)).view(u32))
    return None


def _join(high: Array, low: Array, dtype: type[Any]) -> Array:
    """Two parts in one register."""
    result: Array = (high.astype(dtype) << dtype(8 * high.itemsize)) | low
    return result


def _pack(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.9, ``cvt.pack``: two ``s32``, clamped, side by side; of 8 bits, the low half of ``c`` above them."""
    kinds = instruction.parts[2:]
    if kinds in (("sat", "u16", "s32"), ("sat", "s16", "s32")):
        to = kinds[1]
        return Scalar(("b32",), ("s32", "s32"), lambda a, b: _join(clamp(a, to).view(u16), clamp(b, to).view(u16), u32))
    if kinds in (("sat", "u8", "s32", "b32"), ("sat", "s8", "s32", "b32")):
        to, eight = kinds[1], np.uint8

        def compute(a: Array, b: Array, c: Array) -> Array:
            both = _join(clamp(a, to).view(eight), clamp(b, to).view(eight), u16)
            return _join((c & u32(0xFFFF)).astype(u16), both, u32)

        return Scalar(("b32",), ("s32", "s32", "b32"), compute)
    return None


@scalar("cvta")
def _cvta(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.9, ``cvta``: the identity, since generic addresses are global ones here.

    A generic address of shared memory comes back from ``cvta.to.shared`` as it was; an access through it is one to global
    memory, outside of every tensor.
    """
    parts = instruction.parts[1:]
    spaces = ("global", "shared", "shared::cta", "local", "const", "param")
    if len(parts) not in (2, 3) or parts[-2] not in spaces or parts[:-2] not in ((), ("to",)) or parts[-1] not in ("u32", "u64"):
        return None
    return Scalar((parts[-1],), (parts[-1],), lambda a: a)

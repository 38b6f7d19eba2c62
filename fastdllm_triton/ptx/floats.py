"""Arithmetic of single and double precision (PTX ISA, 9.7.3, "Floating-Point Instructions").

All that is not called ``.approx`` or ``.full`` is correctly rounded: numpy's own arithmetic is, to nearest even; the other
rounding modifiers take the exact result in float64, or its side of what was rounded to nearest. They are known of ``f32`` alone.

In single precision NaN is always ``0x7FFFFFFF``; double precision keeps the payload of an operand (which one, the CPU says).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .fused import fma32, fma64
from .lanes import Array, choose
from .parser import Instruction
from .rounding import (
    MODES,
    bits_of_floats,
    canonical,
    f64,
    flush,
    saturate,
    step_towards,
    to_f32,
)
from .semantics import Compute, Scalar, modifiers, scalar

FLOATS = ("f32", "f64")


def finish(compute: Compute, type_: str, known: frozenset[str]) -> Compute:
    """A function with what modifiers add to it: ``.ftz``, ``.sat``, and the canonical NaN of what is narrower than ``f64``.

    ``compute`` may return any NaN.
    """
    if type_ == "f64":
        return compute
    if "sat" in known:
        return _flushed(lambda *values: saturate(compute(*values)), "ftz" in known)
    return _flushed(lambda *values: canonical(compute(*values)), "ftz" in known)


def _flushed(compute: Compute, ftz: bool) -> Compute:
    return (lambda *values: flush(compute(*[flush(value) for value in values]))) if ftz else compute


def rounding_of(known: frozenset[str]) -> str | None:
    """The one rounding modifier among them, ``rn`` where there is none; None of several."""
    modes = known.intersection(MODES)
    return None if len(modes) > 1 else next(iter(modes), "rn")


def _read(instruction: Instruction, *known: str) -> tuple[str, frozenset[str], str] | None:
    """Type, modifiers and rounding of an instruction; None where it is not known."""
    type_, found = instruction.type, modifiers(instruction, 1, *known, *MODES)
    if type_ not in FLOATS or found is None or (mode := rounding_of(found)) is None:
        return None
    if type_ == "f64" and (mode != "rn" or found & {"ftz", "sat"}):
        return None
    return type_, found, mode


def _exact_add(a: Array, b: Array, mode: str) -> Array:
    return fma32(a, np.ones(1, np.float32), b, mode)


def _exact_mul(a: Array, b: Array, mode: str) -> Array:
    return to_f32(np.multiply(a, b, dtype=f64), mode)


@scalar("add", "sub", "mul")
def _add(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``add``, ``sub`` and ``mul``."""
    if (read := _read(instruction, "ftz", "sat")) is None:
        return None
    type_, known, mode = read
    nearest: dict[str, Compute] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    directed: dict[str, Compute] = {
        "add": lambda a, b: _exact_add(a, b, mode),
        "sub": lambda a, b: _exact_add(a, -b, mode),
        "mul": lambda a, b: _exact_mul(a, b, mode),
    }
    compute = (nearest if mode == "rn" else directed)[instruction.name]
    return Scalar((type_,), (type_, type_), finish(compute, type_, known))


@scalar("fma", "mad")
def _fma(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``fma`` and ``mad``, which is the same: rounded once, with a mandatory modifier."""
    if (read := _read(instruction, "ftz", "sat")) is None or not read[1].intersection(MODES):
        return None
    type_, known, mode = read
    compute: Compute = fma64 if type_ == "f64" else lambda a, b, c: fma32(a, b, c, mode)
    return Scalar((type_,), (type_,) * 3, finish(compute, type_, known))


def divide(a: Array, b: Array, mode: str) -> Array:
    """The quotient of two float32, correctly rounded."""
    nearest: Array = a / b
    if mode == "rn":
        return nearest
    # Both sides of the comparisons are exact. An infinite operand gives what is equal, or NaN, which is neither more nor less.
    product, wanted = np.multiply(nearest, b, dtype=f64), a.astype(f64)
    more, less, negative = product > wanted, product < wanted, np.signbit(b)
    return step_towards(nearest, np.where(negative, less, more), np.where(negative, more, less), mode)


def root(a: Array, mode: str) -> Array:
    """The square root of float32, correctly rounded."""
    nearest: Array = np.sqrt(a)
    if mode == "rn":
        return nearest
    square, wanted = np.multiply(nearest, nearest, dtype=f64), a.astype(f64)
    return step_towards(nearest, square > wanted, square < wanted, mode)


def _given(known: frozenset[str], *, approximate: tuple[str, ...] = ()) -> bool:
    """Whether there is exactly one of a rounding modifier and the names of approximations."""
    return len(known.intersection((*MODES, *approximate))) == 1


@scalar("div")
def _div(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``div``.

    ``div.full.f32`` may be 2 ulp off, and ``div.approx.f32`` where the divisor is of size 2**-126 to 2**126; they are correctly
    rounded here. The hardware's bits may differ within that.
    """
    if (read := _read(instruction, "ftz", "approx", "full")) is None:
        return None
    type_, known, mode = read
    if not _given(known, approximate=("approx", "full") if type_ == "f32" else ()) or (type_ == "f64" and len(known) > 1):
        return None
    if type_ == "f64":
        return Scalar((type_,), (type_, type_), np.divide)
    compute: Compute = _approximate_quotient if "approx" in known else lambda a, b: divide(a, b, mode)
    return Scalar((type_,), (type_, type_), finish(compute, type_, known))


def _approximate_quotient(a: Array, b: Array) -> Array:
    """The reciprocal of a divisor beyond 2**126 is 0, by which infinity gives NaN."""
    quotient: Array = a / b
    great = np.abs(b) > np.float32(2.0**126)
    if great.any():
        quotient = np.where(great, a * np.copysign(np.float32(0), b), quotient)
    return quotient


@scalar("rcp")
def _rcp(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``rcp``. ``rcp.approx.f32`` may be 1 ulp off; it is correctly rounded here."""
    if (read := _read(instruction, "ftz", "approx")) is None:
        return None
    type_, known, mode = read
    if not _given(known, approximate=("approx",) if type_ == "f32" else ()) or (type_ == "f64" and known != {"rn"}):
        return None
    if type_ == "f64":
        return Scalar((type_,), (type_,), np.reciprocal)
    one = np.ones(1, np.float32)
    return Scalar((type_,), (type_,), finish(lambda a: divide(one, a, mode), type_, known))


@scalar("sqrt")
def _sqrt(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``sqrt``. ``sqrt.approx.f32`` may be off by 2**-23 of the result; it is correctly rounded here."""
    if (read := _read(instruction, "ftz", "approx")) is None:
        return None
    type_, known, mode = read
    if not _given(known, approximate=("approx",) if type_ == "f32" else ()) or (type_ == "f64" and known != {"rn"}):
        return None
    compute: Compute = np.sqrt if type_ == "f64" else lambda a: root(a, mode)
    return Scalar((type_,), (type_,), finish(compute, type_, known))


def flip_sign(values: Array) -> Array:
    """The sign bit inverted, of NaN too."""
    bits = bits_of_floats(values)
    result: Array = (bits ^ _sign(bits)).view(values.dtype)
    return result


def _sign(bits: Array) -> Any:
    return bits.dtype.type(1 << (8 * bits.itemsize - 1))


@scalar("neg", "abs")
def _neg(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``neg`` and ``abs``: they touch the sign alone, of NaN too."""
    type_, known = instruction.type, modifiers(instruction, 1, "ftz")
    if type_ not in FLOATS or known is None or (known and type_ == "f64"):
        return None
    compute: Compute = np.abs if instruction.name == "abs" else flip_sign
    return Scalar((type_,), (type_,), (lambda a: compute(flush(a))) if known else compute)


def extreme(name: str, known: frozenset[str]) -> Compute:
    """``min`` and ``max`` of floats: of two zeros the one with the fitting sign, of one NaN the other operand.

    ``.NaN`` is NaN if any is; ``.xorsign.abs`` gives the extreme size the sign of the product.
    """
    plain: Compute = {
        ("min", False): np.fmin,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("max", True): np.maximum,
    }[name, "NaN" in known]
    merge: Compute = np.bitwise_or if name == "min" else np.bitwise_and

    def compute(a: Array, b: Array) -> Array:
        result: Array = plain(a, b)
        if _has_minus_zero(a) or _has_minus_zero(b):
            x, y = bits_of_floats(a), bits_of_floats(b)
            result = choose((a == b) & (a == 0), merge(x, y), bits_of_floats(result)).view(a.dtype)
        return result

    if "xorsign" not in known:
        return compute

    def with_sign(a: Array, b: Array) -> Array:
        size = compute(np.abs(a), np.abs(b))
        bits = bits_of_floats(size)
        sign = (bits_of_floats(a) ^ bits_of_floats(b)) & _sign(bits)
        return choose(np.isnan(size), bits, bits | sign).view(a.dtype)

    return with_sign


def _has_minus_zero(values: Array) -> bool:
    """The bits of -0 are the least of all signed integers."""
    signed, least = _SIGNED[values.itemsize]
    return bool(np.minimum.reduce(values.view(signed)) == least)


_SIGNED = {4: (np.int32, -(2**31)), 8: (np.int64, -(2**63))}


@scalar("min", "max")
def _min(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``min`` and ``max`` of two operands."""
    type_, known = instruction.type, modifiers(instruction, 1, "ftz", "NaN", "xorsign", "abs")
    if type_ not in FLOATS or known is None or ("xorsign" in known) != ("abs" in known) or (known and type_ == "f64"):
        return None
    return Scalar((type_,), (type_, type_), finish(extreme(instruction.name, known), type_, known))


@scalar("copysign")
def _copysign(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``copysign``: the sign of ``a``, the size of ``b``."""
    type_ = instruction.type
    if type_ not in FLOATS or modifiers(instruction, 1) is None:
        return None
    return Scalar((type_,), (type_, type_), lambda a, b: np.copysign(b, a))

"""The approximate functions: ``ex2``, ``lg2``, ``rsqrt``, ``sin``, ``cos``, ``tanh``, and the gross ones of ``f64``.

The ISA gives them bounds of error and the results of special operands, not bits (PTX ISA, 9.7.3 and 9.7.4). Here each is computed
in float64 and rounded, so that it is the correctly rounded result but for one in some 10**8 operands. What the hardware returns
may differ from that, and between architectures, within the bound:

=========================================  =====================================================================
``ex2.approx.f32``                          2 ulp
``lg2.approx.f32``                          2**-22, of 1 where the operand is in (0.5, 2), of the result elsewhere
``rsqrt.approx.f32``                        2**-22.9 of the result
``sin.approx.f32``, ``cos.approx.f32``      2**-20.5 up to 2 pi, 2**-14.7 up to 100 pi
``tanh.approx.f32``                         2**-11 of the result
``tanh.approx.f16``, ``.bf16``              2**-10.987, 2**-8
``ex2.approx.f16``, ``.bf16``               2**-9.9, 2**-7 of the result
``rcp.approx.ftz.f64``, ``rsqrt`` alike     20 bits of the mantissa; no bound is given
=========================================  =====================================================================
"""

from __future__ import annotations

import numpy as np

from .floats import finish
from .half import HALVES, WIDEN, half
from .lanes import Array, choose
from .parser import Instruction
from .rounding import f32, f64, from_bf16, u64
from .semantics import Compute, Scalar, modifiers, scalar


def _in_double(function: Compute) -> Compute:
    def compute(a: Array) -> Array:
        result: Array = function(a.astype(f64)).astype(f32)
        return result

    return compute


def _reciprocal_root(a: Array) -> Array:
    result: Array = 1 / np.sqrt(a)
    return result


_SINGLE: dict[str, Compute] = {
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rsqrt": _in_double(_reciprocal_root),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
}


@scalar(*_SINGLE)
def _single(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``ex2``, ``lg2``, ``rsqrt``, ``sin``, ``cos`` and ``tanh`` of ``f32``."""
    known = modifiers(instruction, 1, "approx", "ftz")
    if instruction.type != "f32" or known is None or "approx" not in known:
        return None
    if instruction.name == "tanh" and "ftz" in known:
        return None
    return Scalar(("f32",), ("f32",), finish(_SINGLE[instruction.name], "f32", known))


@scalar("ex2", "tanh")
def _half(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.4, ``ex2`` and ``tanh`` of ``f16`` and ``bf16``. Only ``ex2`` of ``bf16`` flushes, and must."""
    known = modifiers(instruction, 1, "approx", "ftz")
    if instruction.type not in HALVES or known is None or "approx" not in known:
        return None
    base = instruction.type.removesuffix("x2")
    flushes = instruction.name == "ex2" and base == "bf16"
    if ("ftz" in known) != flushes:
        return None
    widen, compute = WIDEN[base], _SINGLE[instruction.name]
    if flushes:
        # bfloat16 has float32's exponents, so that its subnormal numbers are float32's.
        compute, widen = finish(compute, "f32", known), from_bf16
    return half(instruction, 1, lambda a: compute(widen(a)))


_NAN = np.array([0x7FFFFFFF00000000], u64)
_UPPER = u64(0xFFFFFFFF00000000)
_SIGN = u64(1 << 63)


def _flush(bits: Array) -> Array:
    """Subnormal numbers of double precision become zeros of their sign."""
    return choose((bits & ~_SIGN) < u64(1 << 52), bits & _SIGN, bits)


def _gross(function: Compute) -> Compute:
    """A function of the upper 32 bits of float64, into the upper 32 bits, to nearest."""

    def compute(a: Array) -> Array:
        operand = _flush(a.view(u64) & _UPPER).view(f64)
        exact = _flush(function(operand).view(u64))
        nan = np.isnan(a) | np.isnan(exact.view(f64))
        return choose(nan, _NAN, (exact + u64(1 << 31)) & _UPPER).view(f64)

    return compute


_DOUBLE: dict[str, Compute] = {"rcp": np.reciprocal, "rsqrt": _reciprocal_root}


@scalar("rcp", "rsqrt")
def _double(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``rcp.approx.ftz.f64``, ``rsqrt.approx.ftz.f64`` and ``rsqrt.approx.f64``."""
    if instruction.type != "f64" or instruction.parts[1:-1] not in (("approx",), ("approx", "ftz")):
        return None
    function = _DOUBLE[instruction.name]
    if "ftz" in instruction.parts:
        return Scalar(("f64",), ("f64",), _gross(function))
    return Scalar(("f64",), ("f64",), function) if instruction.name == "rsqrt" else None

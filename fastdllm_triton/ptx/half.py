"""Half precision: ``f16`` and ``bf16``, one or two in a register (PTX ISA, 9.7.4, "Half Precision Floating-Point Instructions").

They are computed in float32 and rounded to 16 bits. Of a sum, rounding twice is as good as once, since float32 has more than
twice the bits; a product is exact in float32, or, of ``bf16``, so far below its smallest number that it becomes 0. The fused
multiply-add is rounded to odd first.
"""

from __future__ import annotations

import numpy as np

from .floats import extreme, rounding_of
from .fused import fma16, fma_bf16
from .integers import halves
from .lanes import Array, dtype_of
from .parser import Instruction
from .rounding import f32, flush, from_bf16, relu, saturate, to_bf16, to_f16, u32
from .semantics import Compute, Scalar, modifiers, scalar

HALVES = ("f16", "bf16", "f16x2", "bf16x2")

WIDEN: dict[str, Compute] = {"f16": lambda a: a.astype(f32), "bf16": from_bf16}
NARROW: dict[str, Compute] = {"f16": to_f16, "bf16": to_bf16}


def half(instruction: Instruction, count: int, wide: Compute, known: frozenset[str] = frozenset()) -> Scalar:
    """A function of the 16-bit values of ``count`` sources, whose float32 result is narrowed; done twice for ``x2``.

    ``known`` may have ``ftz``, ``sat`` and ``relu``.
    """
    type_ = instruction.type
    base = type_.removesuffix("x2")
    narrow = NARROW[base]
    # Rounding changes neither what is clamped nor to what, so that it may follow.
    clamp: Compute | None = saturate if "sat" in known else relu if "relu" in known else None
    compute: Compute = (lambda *values: narrow(clamp(wide(*values)))) if clamp else lambda *values: narrow(wide(*values))
    if "ftz" in known:
        unflushed = compute
        compute = lambda *values: flush(unflushed(*[flush(value) for value in values]))  # noqa: E731
    if base == type_:
        return Scalar((type_,), (type_,) * count, compute)
    dtype = dtype_of(base)

    def both(*values: Array) -> Array:
        result: Array = compute(*[value.view(dtype) for value in halves(*values)]).view(u32)
        return result

    return Scalar(("b32",), ("b32",) * count, both)


def _read(instruction: Instruction, *known: str) -> tuple[str, frozenset[str]] | None:
    """The type of one value, and modifiers, of which ``f16`` alone has ``ftz`` and ``sat``."""
    found = modifiers(instruction, 1, "rn", *known)
    if instruction.type not in HALVES or found is None or rounding_of(found) is None:
        return None
    base = instruction.type.removesuffix("x2")
    return None if base == "bf16" and found & {"ftz", "sat"} else (base, found)


@scalar("add", "sub", "mul")
def _add(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.4, ``add``, ``sub`` and ``mul``."""
    if (read := _read(instruction, "ftz", "sat")) is None:
        return None
    base, known = read
    widen = WIDEN[base]
    operation: Compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[instruction.name]
    return half(instruction, 2, lambda a, b: operation(widen(a), widen(b)), known)


@scalar("fma")
def _fma(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.4, ``fma``: rounded once."""
    if (read := _read(instruction, "ftz", "sat", "relu")) is None or "rn" not in read[1] or {"sat", "relu"} <= read[1]:
        return None
    base, known = read
    return half(instruction, 3, fma16 if base == "f16" else fma_bf16, known)


@scalar("min", "max")
def _min(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.4, ``min`` and ``max``."""
    read = _read(instruction, "ftz", "NaN", "xorsign", "abs")
    if read is None or "rn" in read[1] or ("xorsign" in read[1]) != ("abs" in read[1]):
        return None
    base, known = read
    widen, compute = WIDEN[base], extreme(instruction.name, known)
    return half(instruction, 2, lambda a, b: compute(widen(a), widen(b)), known & {"ftz"})


@scalar("neg", "abs")
def _neg(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.4, ``neg`` and ``abs``: they touch the sign alone."""
    if (read := _read(instruction, "ftz")) is None or "rn" in read[1]:
        return None
    type_ = instruction.type
    pair = type_.endswith("x2")
    plain = "b32" if pair else "b16"
    dtype = dtype_of(plain)
    signs = dtype(0x80008000 if pair else 0x8000)
    compute: Compute = (lambda a: a & ~signs) if instruction.name == "abs" else lambda a: a ^ signs
    if read[1]:
        unflushed = compute
        compute = lambda a: unflushed(flush(np.ascontiguousarray(a).view(np.float16)).view(dtype))  # noqa: E731
    return Scalar((plain,), (plain,), compute)

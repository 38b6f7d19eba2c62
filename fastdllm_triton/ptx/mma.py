"""The tensor cores as a warp uses them: ``mma.sync``, and how its threads hold the parts of matrices (PTX ISA, 9.7.14.5).

Products of bfloat16, float16, tf32, float8 and integers are exact, and so are sums of integers. Sums of floats are rounded to
float32 in an order of numpy's choosing: the tensor cores' own order, and that they cut off low bits of terms first, is not
modelled, as the manual leaves both open. In float64, products are rounded before they are added, unlike on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .lanes import WARP, Array, Lanes, Mask, Step, bits_of, dtype_of, items, reader
from .parser import Instruction
from .rounding import canonical, from_bf16, from_fp8
from .semantics import effect
from .warp import of_warps, put_warps, whole_warps

# Formats of elements ------------------------------------------------------------------------------------------------------------


def _from_tf32(bits: Array) -> Array:
    """The 13 low bits do not count: so says the manual of ``wgmma`` (PTX ISA, 9.7.15.5.2), and nothing of ``mma``."""
    cut: Array = bits & np.uint32(0xFFFFE000)
    return cut.view(np.float32)


@dataclass(frozen=True)
class Format:
    """How an element of a matrix is written.

    Attributes:
        bits: its width.
        decode: from unsigned integers of that width to float32, or float64 for itself, exactly.
    """

    bits: int
    decode: Callable[[Array], Array]


FORMATS = {
    "bf16": Format(16, from_bf16),
    "f16": Format(16, lambda bits: bits.view(np.float16).astype(np.float32)),
    "tf32": Format(32, _from_tf32),
    "e4m3": Format(8, lambda bits: from_fp8(bits, "e4m3").astype(np.float32)),
    "e5m2": Format(8, lambda bits: from_fp8(bits, "e5m2").astype(np.float32)),
    "s8": Format(8, lambda bits: bits.view(np.int8).astype(np.float32)),
    "u8": Format(8, lambda bits: bits.astype(np.float32)),
    "f64": Format(64, lambda bits: bits.view(np.float64)),
}


def elements(words: Array, form: Format) -> Array:
    """``[..., n * 32 / bits]`` values of ``[..., n]`` registers or bytes, low bits first."""
    unsigned = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[form.bits]
    return form.decode(np.ascontiguousarray(words).view(unsigned))


# Fragments ----------------------------------------------------------------------------------------------------------------------


def matrix_a(words: Sequence[Array], form: Format, rows: int) -> Array:
    """``[w, rows, K]``: matrix A, of ``[w, 32]`` registers (PTX ISA, 9.7.14.5.2 to 9.7.14.5.10; of 16 rows a warp, 9.7.15.5.1.1).

    All shapes follow one rule: a register has, of 8 rows, the t-th part in lane 4 * row + t; registers go down first, then right.
    """
    values = elements(np.stack(words, axis=1), form)
    values = values.reshape(len(values), len(words) * 8 // rows, rows // 8, 8, -1)
    return values.transpose(0, 2, 3, 1, 4).reshape(len(values), rows, -1)


def matrix_b(words: Sequence[Array], form: Format) -> Array:
    """``[w, 8, K]``: matrix B, transposed, of ``[w, 32]`` registers: each has the t-th part of column c in lane 4 * c + t."""
    values = elements(np.stack(words, axis=1), form)
    return values.reshape(len(values), len(words), 8, -1).transpose(0, 2, 1, 3).reshape(len(values), 8, -1)


def to_registers(matrix: Array, dtype: str) -> Array:
    """``[registers, w * 32]`` unsigned: an accumulator ``[w, rows, columns]``; a lane has pairs of a row, next to each other.

    Registers first go along the pair, then down by 8 rows, then right by 8 columns; those of float16 hold a pair each. Every NaN
    becomes the canonical one, which is what tensor cores give.
    """
    warps, rows, columns = matrix.shape
    if dtype in ("f16", "f32"):
        matrix = canonical(matrix.reshape(-1)).reshape(matrix.shape)
    parts = matrix.reshape(warps, rows // 8, 8, columns // 8, 4, 2)
    if dtype == "f16":
        ordered = np.ascontiguousarray(parts.transpose(3, 1, 0, 2, 4, 5).astype(np.float16))
        return ordered.view(np.uint32).reshape(-1, warps * WARP)
    ordered = np.ascontiguousarray(parts.transpose(3, 1, 5, 0, 2, 4))
    return ordered.view(np.uint64 if dtype == "f64" else np.uint32).reshape(-1, warps * WARP)


def from_registers(words: Sequence[Array], dtype: str, rows: int) -> Array:
    """``[w, rows, columns]`` of ``[w, 32]`` registers: the reverse of :func:`to_registers`; float16 becomes float32."""
    stacked = np.stack(words)
    warps = stacked.shape[1]
    if dtype == "f16":
        pairs = stacked.view(np.float16).astype(np.float32).reshape(-1, rows // 8, warps, 8, 4, 2)
        return pairs.transpose(2, 1, 3, 0, 4, 5).reshape(warps, rows, -1)
    parts: Array = stacked.view(dtype_of(dtype)).reshape(-1, rows // 8, 2, warps, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(warps, rows, -1)


def product(a: Array, b: Array, dtype: str) -> Array:
    """``[w, rows, columns]``: A times B, of ``a [w, rows, K]`` and ``b [w, columns, K]``, for an accumulator of a type."""
    with np.errstate(invalid="ignore", over="ignore"):
        result: Array = np.matmul(a, b.swapaxes(1, 2))
    # Of 8-bit integers a float32 holds all products and sums of 256 of them exactly.
    return result.astype(np.int32) if dtype == "s32" else result


def accumulate(terms: Array, accumulator: Array, dtype: str, saturate: bool = False) -> Array:
    """The sum, rounded, wrapped or limited as the accumulator's type says; ``terms`` may be overwritten."""
    if dtype == "s32":
        if not saturate:
            return terms + accumulator
        return np.clip(terms.astype(np.int64) + accumulator, -(2**31), 2**31 - 1).astype(np.int32)
    with np.errstate(invalid="ignore", over="ignore"):
        total: Array = np.add(terms, accumulator, out=terms)
        return total.astype(np.float16).astype(np.float32) if dtype == "f16" else total


# mma.sync -----------------------------------------------------------------------------------------------------------------------

_DOUBLE = {("f64", "f64", "f64", "f64")}
_FLOAT16 = {(d, "f16", "f16", c) for d in ("f16", "f32") for c in ("f16", "f32")}
_FLOAT8 = {(d, a, b, c) for d in ("f16", "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for c in ("f16", "f32")}
_INTEGER = {("s32", a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")}
_BFLOAT16, _TF32 = ({("f32", t, t, "f32")} for t in ("bf16", "tf32"))
#: By shape, the types of D, A, B and C.
_KNOWN: dict[str, set[tuple[str, str, str, str]]] = {
    "m16n8k32": _FLOAT8 | _INTEGER,
    "m16n8k16": _FLOAT16 | _BFLOAT16 | _FLOAT8 | _INTEGER | _DOUBLE,
    "m16n8k8": {types for types in _FLOAT16 if types[0] == types[3]} | _BFLOAT16 | _TF32 | _DOUBLE,
    "m16n8k4": _TF32 | _DOUBLE,
    "m8n8k16": _INTEGER,
    "m8n8k4": _DOUBLE,
}


@effect("mma")
def _mma(instruction: Instruction) -> Step | None:
    """PTX ISA, 9.7.14.5.14, mma."""
    match instruction.parts:
        case ("mma", "sync", "aligned", shape, "row", "col", "satfinite", "s32" as d_type, a_type, b_type, c_type):
            saturate = True
        case ("mma", "sync", "aligned", shape, "row", "col", d_type, a_type, b_type, c_type):
            saturate = False
        case _:
            return None
    if (d_type, a_type, b_type, c_type) not in _KNOWN.get(shape, ()):
        return None
    rows, depth = (int(size) for size in re.findall(r"[mk](\d+)", shape))
    a_form, b_form = FORMATS[a_type], FORMATS[b_type]
    d, a, b, c = (items(operand) for operand in instruction.operands)
    bits = [bits_of(d_type) * 8 * rows, a_form.bits * rows * depth, b_form.bits * 8 * depth, bits_of(c_type) * 8 * rows]
    width = 64 if a_type == "f64" else 32
    if [len(operand) * width * WARP for operand in (d, a, b, c)] != bits:
        return None
    read_a, read_b, read_c = ([reader(item, f"b{width}") for item in operand] for operand in (a, b, c))

    def step(lanes: Lanes, mask: Mask) -> None:
        warps = whole_warps(lanes, mask)
        left, right, added = ([of_warps(lanes, read(lanes), warps) for read in readers] for readers in (read_a, read_b, read_c))
        terms = product(matrix_a(left, a_form, rows), matrix_b(right, b_form), d_type)
        total = accumulate(terms, from_registers(added, c_type, rows), d_type, saturate)
        for register, values in zip(d, to_registers(total, d_type), strict=True):
            put_warps(lanes, register, warps, values)

    return step

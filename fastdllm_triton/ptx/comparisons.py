"""Comparisons and tests (PTX ISA, 9.7.6, "Comparison and Selection Instructions", and 9.7.7, of half precision)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import BITS
from .integers import INTEGERS, halves
from .lanes import Array, choose, dtype_of
from .parser import Instruction, Vector
from .rounding import flush, from_bf16
from .semantics import Scalar, scalar

Compare = Callable[[Array, Array], Array]

_FLOATS = ("f16", "bf16", "f32", "f64")
_PAIRS = ("f16x2", "bf16x2")

_ORDERED: dict[str, Compare] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
#: Unsigned integers' own names.
_LOWER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _neither_is_nan(a: Array, b: Array) -> Array:
    ordered: Array = (a == a) & (b == b)
    return ordered


def _not(compare: Compare) -> Compare:
    return lambda a, b: ~compare(a, b)


#: Of floats: those without ``u`` are false where either is NaN, those with it true.
_FLOAT_COMPARISONS: dict[str, Compare] = {
    **_ORDERED,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": _not(np.greater_equal),
    "leu": _not(np.greater),
    "gtu": _not(np.less_equal),
    "geu": _not(np.less),
    "num": _neither_is_nan,
    "nan": _not(_neither_is_nan),
}
_BOOLEAN: dict[str, Compare] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(operator: str, type_: str, ftz: bool) -> Compare | None:
    """A comparison of two arrays of a type, or None where the type has none of that name."""
    if type_ in _FLOATS:
        compare = _FLOAT_COMPARISONS.get(operator)
        if ftz and (compare is None or type_ not in ("f16", "f32")):
            return None
        if compare is not None and type_ == "bf16":
            return _of_each(from_bf16, compare)
        return _of_each(flush, compare) if ftz and compare is not None else compare
    if ftz:
        return None
    if operator == "ne" and type_ in BITS + INTEGERS:
        return np.not_equal
    if operator == "eq" and type_ in BITS:
        return np.equal
    if type_ in INTEGERS:
        return _ORDERED.get(_LOWER.get(operator, operator) if type_[0] == "u" else operator)
    return None


def _of_each(prepare: Callable[[Array], Array], compare: Compare) -> Compare:
    return lambda a, b: compare(prepare(a), prepare(b))


def _parse(instruction: Instruction, types: int) -> tuple[Compare, str | None] | None:
    """The comparison of ``set`` and ``setp``, and the boolean operator after it."""
    operator, *more = instruction.parts[1 : len(instruction.parts) - types]
    boolean = more.pop(0) if more and more[0] in _BOOLEAN else None
    if more not in ([], ["ftz"]):
        return None
    compare = _comparison(operator, instruction.type.removesuffix("x2"), bool(more))
    return None if compare is None else (compare, boolean)


@scalar("setp")
def _setp(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.6 and 9.7.7, ``setp``: a comparison, its opposite, and both combined with a predicate.

    Of two halves, the results are the low half's and the high half's.
    """
    if len(instruction.parts) < 3 or (parsed := _parse(instruction, 1)) is None:
        return None
    (compare, boolean), type_ = parsed, instruction.type
    two = bool(instruction.operands) and isinstance(instruction.operands[0], Vector)
    if type_ in _PAIRS:
        return _setp_pairs(compare, boolean, type_) if two else None
    if boolean is None:
        if not two:
            return Scalar(("pred",), (type_, type_), compare)
        return Scalar(("pred", "pred"), (type_, type_), lambda a, b: _with_opposite(compare(a, b)))
    combine = _BOOLEAN[boolean]
    if not two:
        return Scalar(("pred",), (type_, type_, "pred"), lambda a, b, c: combine(compare(a, b), c))

    def both(a: Array, b: Array, c: Array) -> tuple[Array, ...]:
        return tuple(combine(result, c) for result in _with_opposite(compare(a, b)))

    return Scalar(("pred", "pred"), (type_, type_, "pred"), both)


def _with_opposite(result: Array) -> tuple[Array, Array]:
    return result, ~result


def _setp_pairs(compare: Compare, boolean: str | None, type_: str) -> Scalar:
    dtype = dtype_of(type_.removesuffix("x2"))

    def both(a: Array, b: Array) -> tuple[Array, Array]:
        a, b = halves(a, b)
        result = compare(a.view(dtype), b.view(dtype))
        return result[0::2].copy(), result[1::2].copy()

    if boolean is None:
        return Scalar(("pred", "pred"), ("b32", "b32"), both)
    combine = _BOOLEAN[boolean]
    return Scalar(("pred", "pred"), ("b32", "b32", "pred"), lambda a, b, c: tuple(combine(result, c) for result in both(a, b)))


@scalar("set")
def _set(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.6, ``set``: a comparison as all ones or 1.0, and 0 otherwise."""
    if len(instruction.parts) < 4 or instruction.type in _PAIRS or (parsed := _parse(instruction, 2)) is None:
        return None
    (compare, boolean), (result, type_) = parsed, instruction.parts[-2:]
    true = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "f32": 0x3F800000}.get(result)
    if true is None:
        return None
    value = np.uint32(true)
    if boolean is None:
        return Scalar(("b32",), (type_, type_), lambda a, b: compare(a, b) * value)
    combine = _BOOLEAN[boolean]
    return Scalar(("b32",), (type_, type_, "pred"), lambda a, b, c: combine(compare(a, b), c) * value)


@scalar("slct")
def _slct(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.6, ``slct``: ``a`` where ``c`` is at least 0, which NaN is not."""
    *more, result, type_ = instruction.parts[1:]
    if result not in (*BITS, *INTEGERS, "f32", "f64") or type_ not in ("s32", "f32"):
        return None
    if more not in ([], ["ftz"]) or (more and type_ == "s32"):
        return None
    plain = f"b{result.lstrip('busf')}"
    # Flushing changes no comparison with 0 but that of negative subnormal numbers.
    prepare = flush if more else (lambda c: c)
    return Scalar((plain,), (plain, plain, type_), lambda a, b, c: choose(prepare(c) >= 0, a, b))


#: Of ``testp``. Zeros are normal.
_TESTS: dict[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & ~_subnormal(a),
    "subnormal": lambda a: _subnormal(a),
}


def _subnormal(values: Array) -> Array:
    subnormal: Array = (np.abs(values) < np.finfo(values.dtype).tiny) & (values != 0)
    return subnormal


@scalar("testp")
def _testp(instruction: Instruction) -> Scalar | None:
    """PTX ISA, 9.7.3, ``testp``."""
    if len(instruction.parts) != 3 or instruction.type not in ("f32", "f64") or instruction.parts[1] not in _TESTS:
        return None
    return Scalar(("pred",), (instruction.type,), _TESTS[instruction.parts[1]])

"""Checks of options that users give. Numbers of numpy and torch are numbers: data sets and tensors are full of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

#: Far beyond what leaves anything of a model's choice, and far below where float32 logits with noise overflow.
MAX_TEMPERATURE = 1_000_000


def require(name: str, value: object, allowed: str, ok: bool) -> None:
    """Raises ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {short_repr(value)}")


def known_names(argument: str, names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Those of the known names that are asked for, in their order; all if none are.

    Raises:
        ValueError: a name is unknown.
    """
    known, wanted = list(known), set(names or ())
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"{argument}: got {', '.join(unknown)}, needs names among {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def short_repr(value: object) -> str:
    """A value as an error tells of it: in one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_bool(value: object) -> bool:
    """``True`` or ``False``, of Python or numpy; nothing that is merely truthy."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def is_number(value: Any) -> bool:
    """A number of Python, numpy or torch that is finite as a float, without dimensions; a bool does not count."""
    of_array = getattr(value, "shape", None) == () and "float" in str(getattr(value, "dtype", ""))
    if not (of_array or isinstance(value, float) or is_int(value)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer beyond the floats.
        return False


def to_number(value: Any) -> int | float:
    """A number for which :func:`is_number` holds, as Python's own."""
    number: int | float = value.item() if hasattr(value, "item") else value
    return number


def is_int(value: object) -> TypeGuard[int]:
    """An integer of Python, numpy or torch, without dimensions; a bool does not count."""
    if is_bool(value) or getattr(value, "shape", ()) != () or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def to_int(value: Any) -> int:
    """An integer for which :func:`is_int` holds, as Python's own."""
    return operator.index(value)


def to_ints(name: str, values: Any, allowed: str = "a sequence of integers") -> tuple[int, ...]:
    """The integers of a list, a tuple, a range, or an array or tensor of one dimension, as Python's own.

    Raises:
        ValueError: it is none of these, or holds something else; says ``name must be {allowed}``.
    """
    ok = isinstance(values, Iterable) and not isinstance(values, (str, bytes, bytearray)) and getattr(values, "ndim", 1) == 1
    entries = list(values) if ok else []
    require(name, values, allowed, ok and all(map(is_int, entries)))
    return tuple(map(to_int, entries))


def to_path(name: str, value: Any) -> Path:
    """A path from a string or a path; the empty string is none, though Python takes it for the current folder.

    Raises:
        TypeError: it is neither.
        ValueError: it is empty.
    """
    if not isinstance(value, str | Path):
        raise TypeError(f"{name} must be a string or a path, got {short_repr(value)}")
    require(name, value, "a path", str(value) != "")
    return Path(value)


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """Raises ``ValueError`` unless Gumbel-max can draw with it; a scale of guidance has the same bounds."""
    require(name, temperature, "0 or more", is_number(temperature) and temperature >= 0)
    require(name, temperature, f"at most {MAX_TEMPERATURE:,}", temperature <= MAX_TEMPERATURE)

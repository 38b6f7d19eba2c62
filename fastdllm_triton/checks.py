"""Checks of options that users give."""

from __future__ import annotations

import math


def require(name: str, value: object, allowed: str, ok: bool) -> None:
    """Raises ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def is_number(value: object) -> bool:
    """A finite number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_int(value: object) -> bool:
    """An integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)

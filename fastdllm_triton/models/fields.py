"""Fields of configs that come from outside: each has its type and its range, or is refused in a line that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import CheckpointError, shown

#: The largest size, count or id: what 32-bit indices of kernels reach.
MOST = 2**31 - 1

#: What to do about an option that is not supported, where there is more to say than :meth:`Fields.supported` does.
_ADVICE = {
    "use_sliding_window": "attention has no limit of distance here; set it to false if the weights were trained that way",
    "rope_scaling": "set it to null to use the model within the length it was trained on",
}

_REQUIRED: Any = object()


class Fields:
    """The fields of a ``config.json``, of another file of a checkpoint, or of a loaded module's config.

    Every method reads one field. A field that is absent has the default, if there is one; null is a value like any other.

    Attributes:
        raw: all fields.
        source: how errors name where they come from.

    Raises:
        CheckpointError: (each method) the field is missing, of another type, or out of its range.
    """

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json") -> None:
        self.raw = raw
        self.source = source

    def __contains__(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.raw.get(name) is not None

    def refuse(self, name: str, allowed: str) -> CheckpointError:
        """The error for a field whose value is not allowed."""
        return CheckpointError(f"{self.source}: {name} must be {allowed}, got {shown(self.raw[name])}")

    def integer(self, name: str, default: int = _REQUIRED, low: int = 1, high: int = MOST) -> int:
        """An integer from ``low`` to ``high``, bounds included."""
        value = self._value(name, default)
        if not _is_integer(value) or value < low:
            raise self.refuse(name, f"an integer of {low} or more")
        if value > high:
            raise self.refuse(name, f"an integer from {low} to {high}")
        return int(value)

    def number(self, name: str, default: float, high: float) -> float:
        """A number above 0, ``high`` at most."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
            raise self.refuse(name, f"a number above 0 and at most {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        """True or false; nothing else counts as either."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(name, "a list of strings")
        return tuple(value)

    def object(self, name: str) -> Fields:
        """An object, whose fields are named after it in errors. One that is absent or null is empty."""
        value = self.raw[name] if name in self else {}
        if not isinstance(value, Mapping):
            raise self.refuse(name, "null or an object")
        return Fields(value, f"{self.source}: {name}")

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self._value(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_integer(token) and 0 <= token < vocab_size for token in ids):
            raise self.refuse(name, f"token ids in the vocabulary [0, {vocab_size})")
        return tuple(ids)

    def supported(self, values: Mapping[str, Any]) -> None:
        """Refuses a config that asks for a variant which the runtime would silently leave out.

        Args:
            values: field to the one value that is supported, which is also the default where it is absent or null.

        Raises:
            CheckpointError: a field has another value; says what to do.
        """
        for name, value in values.items():
            asked = self.raw.get(name)
            if asked is not None and not (isinstance(asked, type(value)) and asked == value):
                advice = _ADVICE.get(name, "use the code that the model was released with")
                raise CheckpointError(f"{self.source}: {name} = {shown(asked)} is not supported, only {value!r}; {advice}")

    def rope_theta(self, default: float) -> float:
        """The base of the rotary frequencies, from ``rope_theta`` or from the ``rope_parameters`` that transformers 5 writes.

        Raises:
            CheckpointError: it is no such number; or the frequencies are scaled (linear, dynamic, YaRN ...), which is not
                implemented.
        """
        for name in ("rope_scaling", "rope_parameters"):
            options = self.object(name)
            kind = options.raw.get("rope_type", options.raw.get("type", "default"))
            if kind != "default":
                raise CheckpointError(
                    f"{self.source}: {name} of type {shown(kind)} is not supported, only 'default'; {_ADVICE['rope_scaling']}"
                )
        options = self.object("rope_parameters")
        return (options if "rope_theta" in options else self).number("rope_theta", default, high=1e12)

    def _value(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.raw.get(name, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.source}: the field {name!r} is missing")
        return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

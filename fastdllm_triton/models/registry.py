"""The model families: which module reads which ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import dream, llada
from .config import CheckpointError, shown
from .fields import Fields

#: ``model_type`` of a ``config.json``, in lower case, to the module with its config and name map.
ARCHITECTURES: dict[str, ModuleType] = {"llada": llada, "dream": dream}


def architecture_of(raw: Mapping[str, Any], source: str = "config.json") -> ModuleType:
    """The module that reads a config.

    Args:
        raw: its fields.
        source: how errors name it.

    Raises:
        CheckpointError: its ``model_type`` is missing or not known.
    """
    kind = Fields(raw, source).text("model_type")
    if (name := kind.lower()) not in ARCHITECTURES:  # Dream's configs write it with a capital
        raise CheckpointError(f"{source}: model_type {shown(kind)} is not known; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]

"""Runs generations: which rows decode what and when, the buffers that they decode in, and what comes out.

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Committed, Forward, Generation, run
    from .outputs import GenerationOutput

__all__ = ["Committed", "Forward", "Generation", "GenerationOutput", "run"]

_HOMES = {"GenerationOutput": "outputs"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports a name of :data:`__all__` (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES.get(name, 'engine')}", __name__), name)

"""Models: a transformer runtime, and for each architecture a config and a name map.

A config needs no torch; :class:`Transformer`, which does, is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import CheckpointError, ModelConfig

if TYPE_CHECKING:
    from .transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports :class:`Transformer` (PEP 562)."""
        if name != "Transformer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .transformer import Transformer

        return Transformer

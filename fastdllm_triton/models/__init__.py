"""Models: a transformer runtime, and for each architecture a config and a name map."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CheckpointError, ModelConfig
    from .transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports a name when it is first used: the command line asks for sizes of models, and does not wait for torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".transformer" if name == "Transformer" else ".config", __name__), name)

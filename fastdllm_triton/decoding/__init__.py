"""How a block is decoded: strategies, the options of a generation, tokens that are fixed.

Strategies and cache policies need no torch; :class:`GenerationConfig`, which does, is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cache_policy import CacheName, CachePolicy, Window
from .strategies import CappedThreshold, DenoisingSteps, EntropyBudget, Factor, FixedSteps, Strategy, Threshold, Timesteps

if TYPE_CHECKING:
    from .config import GenerationConfig

__all__ = [
    "CacheName",
    "CachePolicy",
    "CappedThreshold",
    "DenoisingSteps",
    "EntropyBudget",
    "Factor",
    "FixedSteps",
    "GenerationConfig",
    "Strategy",
    "Threshold",
    "Timesteps",
    "Window",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports :class:`GenerationConfig` (PEP 562)."""
        if name != "GenerationConfig":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .config import GenerationConfig

        return GenerationConfig

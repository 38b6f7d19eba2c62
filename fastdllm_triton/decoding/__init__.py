"""How a block is decoded: strategies, the options of a generation, tokens that are fixed."""

from .cache_policy import CacheName, CachePolicy, Window
from .config import GenerationConfig
from .strategies import EntropyBudget, Factor, FixedSteps, Strategy, Threshold

__all__ = [
    "CacheName",
    "CachePolicy",
    "EntropyBudget",
    "Factor",
    "FixedSteps",
    "GenerationConfig",
    "Strategy",
    "Threshold",
    "Window",
]

"""How a block is decoded: strategies, the options of a generation, tokens that are fixed."""

from .config import CacheName, GenerationConfig
from .strategies import EntropyBudget, Factor, FixedSteps, Strategy, Threshold

__all__ = ["CacheName", "EntropyBudget", "Factor", "FixedSteps", "GenerationConfig", "Strategy", "Threshold"]

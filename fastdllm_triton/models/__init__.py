"""Models: a transformer runtime, and for each architecture a config and a name map."""

from .config import CheckpointError, ModelConfig
from .transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer"]

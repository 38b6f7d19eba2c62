"""Fast-dLLM decoding of masked-diffusion language models at the speed the hardware allows.

>>> import fastdllm_triton as fdt
>>> model = fdt.load("tiny")
>>> out = model.generate("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?", gen_length=48, block_length=16)
>>> out.texts[0][-7:]
'#### 59'

Names and submodules are imported when they are first used: ``import fastdllm_triton`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .utils.moved import install

if TYPE_CHECKING:
    from .decoding.config import GenerationConfig
    from .decoding.strategies import (
        CappedThreshold,
        DenoisingSteps,
        EntropyBudget,
        Factor,
        FixedSteps,
        Strategy,
        Threshold,
        Timesteps,
    )
    from .engine.engine import Engine
    from .engine.generation import Forward, Generation
    from .engine.outputs import Committed, GenerationOutput, StepOutput
    from .engine.prefix_store import PrefixStore
    from .engine.request import Request
    from .integrations.transformers.accelerate import accelerate, restore
    from .loading import load
    from .model import MaskedDiffusionLM
    from .models import CheckpointError

__version__ = "0.1.0"

install()

__all__ = [
    "CappedThreshold",
    "CheckpointError",
    "Committed",
    "DenoisingSteps",
    "Engine",
    "EntropyBudget",
    "Factor",
    "FixedSteps",
    "Forward",
    "Generation",
    "GenerationConfig",
    "GenerationOutput",
    "MaskedDiffusionLM",
    "PrefixStore",
    "Request",
    "StepOutput",
    "Strategy",
    "Threshold",
    "Timesteps",
    "accelerate",
    "load",
    "restore",
]

_HOMES = {
    "CappedThreshold": "decoding",
    "CheckpointError": "models",
    "Committed": "engine",
    "DenoisingSteps": "decoding",
    "Engine": "engine",
    "EntropyBudget": "decoding",
    "Factor": "decoding",
    "FixedSteps": "decoding",
    "Forward": "engine",
    "Generation": "engine",
    "GenerationConfig": "decoding",
    "GenerationOutput": "engine",
    "MaskedDiffusionLM": "model",
    "PrefixStore": "engine",
    "Request": "engine",
    "StepOutput": "engine",
    "Strategy": "decoding",
    "Threshold": "decoding",
    "Timesteps": "decoding",
    "accelerate": "integrations.transformers",
    "load": "loading",
    "restore": "integrations.transformers",
}

if not TYPE_CHECKING:  # A type checker would take any name for one that is there.

    def __getattr__(name: str) -> Any:
        """Imports a name of :data:`__all__`, or a submodule such as ``fastdllm_triton.ops`` (PEP 562)."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        else:
            missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
            if name.startswith("_"):
                raise missing
            try:
                value = importlib.import_module(f".{name}", __name__)
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
                raise missing from None
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

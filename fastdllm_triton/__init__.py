"""Fast-dLLM decoding of masked-diffusion language models at the speed the hardware allows.

>>> import fastdllm_triton as fdt
>>> model = fdt.load("tiny")
>>> out = model.generate("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?", gen_length=48, block_length=16)
>>> out.texts[0][-7:]
'#### 59'
"""

from .decoding import EntropyBudget, Factor, FixedSteps, GenerationConfig, GenerationOutput, Strategy, Threshold
from .engine import Forward
from .loading import load
from .model import MaskedDiffusionLM
from .models import CheckpointError
from .swap import accelerate, restore

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EntropyBudget",
    "Factor",
    "FixedSteps",
    "Forward",
    "GenerationConfig",
    "GenerationOutput",
    "MaskedDiffusionLM",
    "Strategy",
    "Threshold",
    "accelerate",
    "load",
    "restore",
]

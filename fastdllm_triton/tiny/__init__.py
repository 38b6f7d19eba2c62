"""The model that ships with the package: a small masked-diffusion model in LLaDA's format, its tokenizer and its task.

See ``MODEL_CARD.md`` beside this file for what it was trained on and what it scores.
"""

from pathlib import Path

#: The checkpoint's folder: ``config.json``, ``model.safetensors`` and the tokenizer's files.
PATH = Path(__file__).parent

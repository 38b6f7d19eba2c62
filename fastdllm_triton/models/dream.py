"""Dream (Ye et al., arXiv 2508.15487) and the models of its family, such as DiffuCoder: a config and a name map, nothing else.

A Qwen2 transformer without the causal mask: grouped queries, biases on q, k and v. Predictions are shifted: the hidden state
of position ``i - 1`` predicts the token at position ``i``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .fields import Fields
from .qwen import name_map, qwen_config

NAMES = name_map(qkv_bias=True)


def config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads Dream's ``config.json``.

    Args:
        raw: its fields.
        source: how errors name it.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    return qwen_config(Fields(raw, source), architecture="dream", qkv_bias=True, shift=True)

"""Fast-dLLM v2 (Wu et al., arXiv 2509.26328): a config and a name map, nothing else.

Dream's network, tensor by tensor, with block-causal attention: a position attends its own block and the blocks before it,
counted from position 0 of the prompt. Predictions are shifted as Dream's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .fields import Fields
from .qwen import name_map, qwen_config
from .special_tokens import SpecialTokens

NAMES = name_map(qkv_bias=True)

#: The published configs have no mask; the published code has it as the default of an argument. Of end tokens the code reads the
#: config's alone, not those that Qwen's ``generation_config.json`` adds.
TOKENS = SpecialTokens(mask="|<MASK>|", mask_id=151_665, vocab_sizes=(151_936, 152_064))


def config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the ``config.json`` of Fast-dLLM v2, whose block length is ``bd_size``.

    Args:
        raw: its fields, the mask's id among them.
        source: how errors name it.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    fields = Fields(raw, source)
    length = fields.integer("bd_size", 32)
    return qwen_config(fields, architecture="fast_dllm_qwen", qkv_bias=True, shift=True, block_length=length)

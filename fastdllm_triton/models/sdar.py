"""SDAR (Cheng et al., arXiv 2510.06303): a config and a name map, nothing else.

Qwen3's network with block-causal attention: RMS norms of every query and key head before the rotation, no biases, and a head
dim that does not follow from the width. A position attends its own block and the blocks before it, counted from position 0 of
the prompt; the hidden state of a position predicts its own token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .fields import Fields
from .qwen import name_map, qwen_config
from .special_tokens import SpecialTokens

NAMES = name_map(qk_norm=True)

#: Some of the published configs lack the mask. The published loops end at the tokens of ``generation_config.json``.
TOKENS = SpecialTokens(mask="<MASK>", mask_id=151_669, vocab_sizes=(151_936,), ends_by_generation_config=True)


def config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads SDAR's ``config.json``, whose block length is ``block_size``.

    Args:
        raw: its fields, the mask's id among them.
        source: how errors name it.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    fields = Fields(raw, source)
    return qwen_config(
        fields,
        architecture="sdar",
        qkv_bias=False,
        own_head_dim=True,
        qk_norm=True,
        norm_rounding="flash_attn",
        block_length=fields.integer("block_size", 4),
    )

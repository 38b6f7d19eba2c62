"""The model families: which module reads which ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from . import dream, fast_dllm_v2, llada, sdar
from .config import CheckpointError, ModelConfig, shown
from .fields import Fields
from .special_tokens import SpecialTokens

#: ``model_type`` of a ``config.json``, in lower case, to the module with its config and name map.
ARCHITECTURES: dict[str, ModuleType] = {"llada": llada, "dream": dream, "fast_dllm_qwen": fast_dllm_v2, "sdar": sdar}


def architecture_of(raw: Mapping[str, Any], source: str = "config.json") -> ModuleType:
    """The module that reads a config.

    Args:
        raw: its fields.
        source: how errors name it.

    Raises:
        CheckpointError: its ``model_type`` is missing or not known.
    """
    kind = Fields(raw, source).text("model_type")
    if (name := kind.lower()) not in ARCHITECTURES:  # Dream's configs write it with a capital
        raise CheckpointError(f"{source}: model_type {shown(kind)} is not known; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def config_of(raw: Mapping[str, Any], source: str = "config.json", folder: Path | None = None) -> ModelConfig:
    """Reads a config.

    Args:
        raw: its fields.
        source: how errors name it.
        folder: of the checkpoint, if there is one: other files there have special tokens that some families' configs lack.

    Raises:
        CheckpointError: the family is not known; a field is missing, of another type or out of its range, or asks for a variant
            that is not supported; or a file beside the config is damaged.
    """
    architecture = architecture_of(raw, source)
    tokens: SpecialTokens | None = getattr(architecture, "TOKENS", None)
    config: ModelConfig = architecture.config(raw if tokens is None else tokens.complete(raw, source, folder), source)
    return config

"""What is refused before anything is computed: prompts and options that a model or the kernels do not take."""

from __future__ import annotations

from collections.abc import Sequence

from ..decoding.config import GenerationConfig, ResolvedIds
from ..kernels._limits import MAX_BLOCK, MAX_EOS, MAX_FORBIDDEN, MAX_ROWS
from ..models.config import ModelConfig
from ..models.token_ids import check_range
from ..models.transformer import Transformer


def check_prompts(prompts: Sequence[list[int]], config: GenerationConfig, network: Transformer, *, whole: bool = False) -> None:
    """Raises ``ValueError`` for prompts that a model cannot continue or, where they are ``whole`` texts, cannot take."""
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for row, prompt in enumerate(prompts):
        check_prompt(f"prompts: row {row}", prompt, config, network.config, whole=whole)


def check_prompt(name: str, prompt: list[int], config: GenerationConfig, model: ModelConfig, *, whole: bool = False) -> None:
    """Raises ``ValueError`` for a prompt that a model cannot continue; ``name`` is what errors call it."""
    most = model.max_length if whole else model.max_length - config.gen_length
    if not whole and config.gen_length >= model.max_length:
        raise ValueError(f"gen_length must be below the {model.max_length} tokens that the model takes, got {config.gen_length}")
    if not prompt:
        raise ValueError(f"{name} is empty; every prompt needs at least one token")
    if len(prompt) > most:
        beside = "" if whole else f"with gen_length = {config.gen_length} "
        raise ValueError(f"{name} has {len(prompt)} tokens; {beside}the model takes at most {most}")
    check_range(name, prompt, model)


def check_kernel_limits(network: Transformer, rows: int, block_length: int, ids: ResolvedIds, *, name: str = "prompts") -> None:
    """Raises ``ValueError`` for what is valid but more than the selection kernels take, where they run."""
    if network.ops.name != "triton":
        return
    for argument, count, most in (
        (name, rows, MAX_ROWS),
        ("block_length", block_length, MAX_BLOCK),
        ("forbidden", len(ids.forbidden), MAX_FORBIDDEN),
        ("commit_last and forbidden", len(ids.never_or_last), MAX_FORBIDDEN),
        ("eos_ids", len(ids.eos_ids), MAX_EOS),
    ):
        if count > most:
            raise ValueError(f"{argument}: the Triton kernels take at most {most}, got {count} (forbidden counts [MASK])")

"""d1's function for LLaDA: signature and return value of its ``eval/generate.py`` (github.com/dllm-reasoning/d1).

``from fastdllm_triton.compat.d1 import generate`` in place of ``from generate import generate``. No process group is needed.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..model import MaskedDiffusionLM
from ..utils.checks import is_int
from . import llada


def generate(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    tokenizer: object,
    steps: int = 64,
    gen_length: int = 128,
    block_length: int = 32,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
) -> Tensor:
    """Decodes without a cache: :func:`fastdllm_triton.compat.llada.generate` with steps that need not divide.

    The official code runs under autocast; here the model's own dtype decides.

    Args:
        model: as there.
        prompt: ``[B, P]`` int64. All of it is attended.
        tokenizer: not used, here as there.
        steps: forwards for the whole generation; each block has ``steps // blocks`` of them, one at least.
        gen_length, block_length, temperature, cfg_scale, remasking, mask_id: as there.

    Returns:
        ``x [B, P + gen_length]``.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    if all(map(is_int, (steps, gen_length, block_length))) and 0 < block_length <= gen_length:
        blocks = gen_length // block_length
        steps = max(steps // blocks, 1) * blocks
    return llada.generate(
        model,
        prompt,
        steps=steps,
        gen_length=gen_length,
        block_length=block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        mask_id=mask_id,
    )

"""Fast-dLLM's functions for LLaDA: signatures and return values of ``llada/generate.py`` (tree of 2025-11-28)."""

from __future__ import annotations

from torch import Tensor, nn

from ..decoding import CacheName, GenerationConfig
from ..decoding.config import official_logits_dtype
from ..decoding.strategies import Factor, FixedSteps, Strategy, Threshold
from ..integrations.transformers import runtime_of
from ..model import MaskedDiffusionLM
from ..utils.checks import check_temperature
from ._official import score_of, seed_of


def generate(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Decodes without a cache.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or a loaded module, which is accelerated on first use.
        prompt: ``[B, P]`` int64. All of it is attended.
        steps: forwards for the whole generation, a multiple of the number of blocks (with a threshold or a factor it
            decides nothing).
        gen_length: tokens to generate, a multiple of ``block_length``.
        block_length: slots of a block.
        temperature: of the Gumbel noise; draws are seeded from torch's global generator.
        remasking: ``low_confidence`` or ``random``.
        mask_id: the model's if not given.
        threshold: commit every token whose confidence reaches it, in (0, 1]: what the official code would do beyond these is
            a block at once, or one token a forward.
        factor: commit by the factor rule; wins over ``threshold``.

    Returns:
        ``(x [B, P + gen_length], nfe)``.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    return _generate(
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, cache="none"
    )


def generate_with_prefix_cache(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Decodes with the cache over everything before the block. Arguments and result as :func:`generate`."""
    return _generate(
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, cache="prefix"
    )


def generate_with_dual_cache(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Decodes with the cache over everything but the block. Arguments and result as :func:`generate`."""
    return _generate(
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, cache="dual"
    )


def _generate(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int | None,
    threshold: float | None,
    factor: float | None,
    *,
    cache: CacheName,
) -> tuple[Tensor, int]:
    lm = runtime_of(model)
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt must be a tensor [B, P], got {type(prompt).__name__}")
    check_temperature(temperature)
    score = score_of(remasking)
    strategy: Strategy = FixedSteps(steps, score=score)
    if factor is not None:
        strategy = Factor(factor, score=score)
    elif threshold is not None:
        strategy = Threshold(threshold, score=score)
    # Here as in the official code the blocks must divide the steps even where those decide nothing.
    config = GenerationConfig(gen_length=gen_length, block_length=block_length, strategy=FixedSteps(steps))
    output = lm.generate(
        prompt,
        config,
        cache=cache,
        strategy=strategy,
        temperature=temperature,
        seed=seed_of(temperature, score),
        stop_at_eos=False,
        lockstep=True,
        mask_id=mask_id,
        logits_dtype=official_logits_dtype(lm.dtype),
    )
    return output.sequences, output.nfe

"""ML-GSAI's function for LLaDA: signature and return value of its ``generate.py`` (github.com/ML-GSAI/LLaDA, tree of 2025-10).

``from fastdllm_triton.compat.llada import generate`` in place of ``from generate import generate``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoding.config import GenerationConfig, official_logits_dtype
from ..decoding.strategies import FixedSteps
from ..engine.dream.arguments import first_slots
from ..integrations.transformers import runtime_of
from ..model import MaskedDiffusionLM
from ..utils.checks import is_number
from ._official import score_of, seed_of

#: ``<|eot_id|>`` of LLaDA's vocabulary, which ends a turn and which no config names.
_END_OF_TURN = 126348


def generate(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """Decodes without a cache.

    Where the official code fails, this one does not: guidance works without an ``attention_mask``, and every row of a batch
    gets the tokens it would get alone. The official code ranks by a softmax in the logits' dtype, where confident tokens tie
    (in bfloat16 many are), and takes any of equals. Here logits are rounded to that dtype, ranks are those of exact
    probabilities, and of equals the first position is taken. Masks in the prompt stay masks. ``[MASK]`` is never committed.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or a module that :func:`fastdllm_triton.accelerate` was called on.
        prompt: ``[B, P]`` int64.
        attention_mask: ``[B, P]``, 0 for padding, which must be on the left. Padding is neither attended nor counted as
            positions (rotary attention knows distances alone). Everything is attended if not given.
        steps: forwards for the whole generation, a multiple of the number of blocks.
        gen_length: tokens to generate, a multiple of ``block_length``.
        block_length: slots of a block.
        temperature: of the Gumbel noise; draws are seeded from torch's global generator.
        cfg_scale: classifier-free guidance; none at 0 or below.
        remasking: ``low_confidence`` or ``random``.
        mask_id: the model's if not given.
        logits_eos_inf: never commit the model's end tokens.
        confidence_eos_eot_inf: commit them, and ``<|eot_id|>`` (126348, where the vocabulary has it), once nothing else in the
            block is left. At any temperature; the official code leaves the end token out above 0. Means nothing with
            ``remasking="random"``.

    Returns:
        ``x [B, P + gen_length]``.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    lm = runtime_of(model)
    score = score_of(remasking)
    first = first_slots(prompt, attention_mask, lm.config.vocab_size, "prompt")
    eos = lm.config.eos_ids
    if (logits_eos_inf or confidence_eos_eot_inf) and not eos:
        name = "logits_eos_inf" if logits_eos_inf else "confidence_eos_eot_inf"
        raise ValueError(f"{name} needs an end token, and the model's config names none")
    last = (*eos, _END_OF_TURN) if lm.config.vocab_size > _END_OF_TURN else eos
    config = GenerationConfig(
        gen_length=gen_length,
        block_length=block_length,
        cache="none",
        strategy=FixedSteps(steps, score=score),
        temperature=temperature,
        cfg_scale=0.0 if is_number(cfg_scale) and cfg_scale < 0 else cfg_scale,
        stop_at_eos=False,
        forbidden=eos if logits_eos_inf else (),
        commit_last=last if confidence_eos_eot_inf and score == "confidence" else (),
        lockstep=True,
        mask_id=mask_id,
        logits_dtype=official_logits_dtype(lm.dtype),
    )
    rows = [ids[start:] for ids, start in zip(prompt.tolist(), first.tolist(), strict=True)]
    generated = lm.generate(rows, config, seed=seed_of(temperature, score)).generated
    return torch.cat((prompt.to(generated), generated), dim=1)

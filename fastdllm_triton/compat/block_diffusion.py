"""The official functions of block-causal models: Fast-dLLM v2's ``generate`` and ``batch_sample`` (arXiv 2509.26328, the hub's
``modeling.py`` and ``v2/generation_functions.py`` of 2025-10-11), and SDAR's ``block_diffusion_generate`` (arXiv 2510.06303,
``generate.py`` of 2025-12-15).

Greedy at temperature 0. Every row gets what it gets alone: errors of the official batches (docs/switching.md) are not
reproduced. ``[MASK]`` is never committed, where the official loops would not end or fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.config import official_logits_dtype
from ..decoding.strategies import DenoisingSteps, Strategy, Threshold
from ..engine.outputs import GenerationOutput
from ..integrations.transformers import runtime_of
from ..model import MaskedDiffusionLM
from ..models.token_ids import id_rows
from ..utils.checks import check_temperature, is_int, is_number, require
from ._official import seed_of

#: SDAR's strategies: whether they have a threshold, and what they rank by.
_REMASKING = {
    "low_confidence_static": (False, "confidence"),
    "low_confidence_dynamic": (True, "confidence"),
    "sequential": (False, "leftmost"),
}


def fast_dllm_v2_generate(
    model: MaskedDiffusionLM | nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    tokenizer: object | None = None,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 1.0,
    use_block_cache: bool = False,
    mask_id: int | None = None,
    stop_token: int | None = None,
    temperature: float = 0.0,
    top_p: float = 0.95,
) -> tuple[Tensor, int]:
    """Fast-dLLM v2's ``generate``, for one row.

    The official code ignores a prompt of exactly one block; here it is like any other.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or a loaded module, which is accelerated on first use.
        input_ids: ``[1, P]`` int64.
        max_new_tokens: of which the whole blocks are decoded.
        tokenizer: not used.
        block_size: tokens of a block, counted from the prompt's first.
        small_block_size: tokens of a sub-block; divides ``block_size``.
        threshold: commit every token whose confidence is above it, in (0, 1]; at 1 one token a forward.
        use_block_cache: recompute the sub-block alone where its first token is known.
        mask_id: the model's if not given.
        stop_token: the model's end token if not given.
        temperature: of the Gumbel noise; draws are seeded from torch's global generator. Tokens are ranked by the tempered
            distribution.
        top_p: of no effect at temperature 0. Above, 1: other values would need the order of all logits.

    Returns:
        ``(sequences [1, P + n], nfe)``: up to and with the first stop token; without one ``n`` fills the block behind the last
        of ``max_new_tokens // block_size`` blocks by one token, as in the official code.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    del tokenizer
    prompts = _rows("input_ids", input_ids, rows=1)
    check = {"block_size": block_size, "small_block_size": small_block_size, "threshold": threshold}
    lm = runtime_of(model)
    options = _v2_options(lm, check, use_block_cache, mask_id, stop_token, temperature, top_p)
    length = _v2_length(len(prompts[0]), max_new_tokens, block_size)
    if length < 1:  # No block, and no token of a prefill.
        return input_ids.clone(), int(len(prompts[0]) >= block_size)
    output = lm.generate(prompts, gen_length=length, **options)
    return torch.tensor([prompts[0] + _up_to_stop(output, 0)], dtype=torch.int64, device=lm.device), output.nfe


def batch_sample(
    model: MaskedDiffusionLM | nn.Module,
    input_ids: Tensor,
    tokenizer: object | None = None,
    *,
    block_size: int = 32,
    max_new_tokens: int,
    small_block_size: int = 8,
    min_len: int | None = None,
    seq_len: Tensor | None = None,
    mask_id: int | None = None,
    threshold: float = 0.95,
    stop_token: int | None = None,
    use_block_cache: bool = False,
    top_p: float = 0.95,
    temperature: float = 0.0,
) -> dict[int, Tensor]:
    """Fast-dLLM v2's ``batch_sample``, for a batch of prompts that are padded on the right.

    Args:
        model: as of :func:`fast_dllm_v2_generate`.
        input_ids: ``[B, T]`` int64, padded on the right.
        tokenizer: not used.
        max_new_tokens: as of :func:`fast_dllm_v2_generate`, counted for each row from its own prompt.
        min_len: not used: rows of any lengths are decoded together.
        seq_len: ``[B]`` lengths of the prompts; all of ``input_ids`` if not given.
        block_size, small_block_size, mask_id, threshold, stop_token, use_block_cache, top_p, temperature: as of
            :func:`fast_dllm_v2_generate`.

    Returns:
        By row its sequence ``[P + n]``, up to and with its first stop token.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    del tokenizer, min_len
    prompts = _rows("input_ids", input_ids)
    if seq_len is not None:
        lengths = [int(length) for length in torch.as_tensor(seq_len).flatten().tolist()]
        ok = len(lengths) == len(prompts) and all(1 <= n <= len(row) for n, row in zip(lengths, prompts, strict=True))
        require("seq_len", lengths, f"{len(prompts)} lengths from 1 to {input_ids.shape[1]}", ok)
        prompts = [row[:n] for row, n in zip(prompts, lengths, strict=True)]
    check = {"block_size": block_size, "small_block_size": small_block_size, "threshold": threshold}
    lm = runtime_of(model)
    options = _v2_options(lm, check, use_block_cache, mask_id, stop_token, temperature, top_p)
    wanted = [_v2_length(len(row), max_new_tokens, block_size) for row in prompts]
    sequences: dict[int, Tensor] = {i: torch.tensor(row, device=lm.device) for i, row in enumerate(prompts)}
    if max(wanted) < 1:
        return sequences
    output = lm.generate(prompts, gen_length=max(wanted), **options)
    for i, (row, length) in enumerate(zip(prompts, wanted, strict=True)):
        ids = _up_to_stop(output, i)[: max(length, 0)]
        sequences[i] = torch.tensor(row + ids, dtype=torch.int64, device=lm.device)
    return sequences


def block_diffusion_generate(
    model: MaskedDiffusionLM | nn.Module,
    prompt: Tensor | dict[str, Tensor],
    mask_id: int | None = None,
    gen_length: int = 128,
    block_length: int | None = None,
    denoising_steps: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    stopping_criteria_idx: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """SDAR's ``block_diffusion_generate``, for one row.

    A finished block is stored together with the first step of the next one, which changes no token; ``nfe`` counts forwards as
    the official code takes them.

    Args:
        model: as of :func:`fast_dllm_v2_generate`.
        prompt: ``[1, P]`` int64, or a dict with it as ``input_ids``, as a tokenizer gives it.
        mask_id: the model's if not given.
        gen_length: tokens to generate, to the end of a block.
        block_length: of the weights if not given.
        denoising_steps: forwards that a block is spread over; ``block_length`` if not given.
        temperature: 0, or above with ``top_k=1`` as in the official evaluation, takes the likeliest token; else it is that of the
            Gumbel noise, and tokens are ranked by the tempered distribution. Draws are seeded from torch's global generator.
        top_k: 0 (all tokens) or 1.
        top_p: 1; other values would need the order of all logits.
        remasking_strategy: ``low_confidence_static``, ``low_confidence_dynamic`` or ``sequential``.
        confidence_threshold: of ``low_confidence_dynamic``: commits every token above it, in (0, 1].
        stopping_criteria_idx: ids that end the generation after the block that holds one; none if not given.

    Returns:
        ``(sequences [1, P + n], nfe)``, up to the end of the last block that was decoded.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
    """
    ids = prompt["input_ids"] if isinstance(prompt, dict) else prompt
    (row,) = _rows("prompt", ids, rows=1)
    lm = runtime_of(model)
    length = (lm.config.block_length or 0) if block_length is None else block_length
    require("block_length", length, "an integer of 1 or more", is_int(length) and length >= 1)
    require("gen_length", gen_length, "an integer of 1 or more", is_int(gen_length) and gen_length >= 1)
    require("top_k", top_k, "0 or 1", top_k in (0, 1))
    require("top_p", top_p, "1", top_p == 1)
    allowed = ", ".join(_REMASKING)
    require("remasking_strategy", remasking_strategy, f"one of {allowed}", remasking_strategy in _REMASKING)
    check_temperature(temperature)
    has_threshold, score = _REMASKING[remasking_strategy]
    steps = length if denoising_steps is None else denoising_steps
    if has_threshold:
        ok = is_number(confidence_threshold) and 0 < confidence_threshold <= 1
        require("confidence_threshold", confidence_threshold, "in (0, 1]", ok)
    strategy = DenoisingSteps(steps, confidence_threshold if has_threshold else None, score=score)  # type: ignore[arg-type]
    stops = tuple(stopping_criteria_idx or ())
    blocks_end = -(-(len(row) + gen_length) // length) * length
    output = lm.generate(
        [row],
        gen_length=blocks_end - len(row),
        block_length=length,
        cache="block_causal",
        strategy=strategy,
        mask_id=mask_id,
        eos_ids=stops or None,
        stop_at_eos=bool(stops),
        **_sampling(lm, 0.0 if top_k == 1 else temperature),
    )
    # What was decoded, by blocks: those behind a stop token have no forward.
    decoded = (output.step_map[0] >= 0).nonzero()[:, 0]
    last = (len(row) + int(decoded.max())) // length
    blocks = last - len(row) // length + 1
    nfe = int(output.row_forwards[0]) + blocks + (len(row) >= length)
    return output.sequences[:, : (last + 1) * length], nfe


def _rows(name: str, ids: object, rows: int | None = None) -> list[list[int]]:
    """The rows of a tensor, checked."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor [B, P], got {type(ids).__name__}")
    if ids.dim() != 2 or (rows is not None and len(ids) != rows) or not ids.numel():
        shape = "[B, P]" if rows is None else f"[{rows}, P]"
        raise ValueError(f"{name} must be of shape {shape}, P of 1 or more, got {list(ids.shape)}")
    return id_rows(name, ids)


def _sampling(lm: MaskedDiffusionLM, temperature: float) -> dict[str, Any]:
    """Options of the engine at a temperature."""
    return {
        "temperature": temperature,
        "tempered": temperature > 0,
        "seed": seed_of(temperature, "confidence"),
        "logits_dtype": official_logits_dtype(lm.dtype),
    }


def _v2_options(
    lm: MaskedDiffusionLM,
    checked: dict[str, Any],
    use_block_cache: bool,
    mask_id: int | None,
    stop_token: int | None,
    temperature: float,
    top_p: float,
) -> dict[str, Any]:
    """The options of a generation, from arguments that are named as they were typed."""
    block, sub = checked["block_size"], checked["small_block_size"]
    require("block_size", block, "an integer of 1 or more", is_int(block) and block >= 1)
    require("small_block_size", sub, f"a divisor of block_size = {block}", is_int(sub) and sub >= 1 and block % sub == 0)
    check_temperature(temperature)
    require("top_p", top_p, "1 with a temperature above 0", temperature == 0 or top_p == 1)
    strategy: Strategy = Threshold(checked["threshold"], strict=True)
    return {
        "block_length": block,
        "sub_block_length": sub,
        "sub_block_cache": use_block_cache,
        "cache": "block_causal",
        "strategy": strategy,
        "mask_id": mask_id,
        "eos_ids": None if stop_token is None else (stop_token,),
        **_sampling(lm, temperature),
    }


def _v2_length(prompt: int, max_new_tokens: int, block: int) -> int:
    """Tokens that the official code generates where nothing stops it."""
    require("max_new_tokens", max_new_tokens, "an integer of 0 or more", is_int(max_new_tokens) and max_new_tokens >= 0)
    return (prompt // block + max_new_tokens // block) * block + 1 - prompt


def _up_to_stop(output: GenerationOutput, row: int) -> list[int]:
    """What was generated, up to and with the first stop token."""
    ids: list[int] = output.generated[row].tolist()
    return ids[: len(output.ids(row)) + 1]

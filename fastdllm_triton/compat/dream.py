"""Dream's ``diffusion_generate``, as its authors and Fast-dLLM have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoding import CacheName
from ..diffusion import DiffusionConfig, DiffusionOutput
from ..diffusion_arguments import cache_name, first_slots, merged, new_tokens
from ..diffusion_engine import diffuse
from ..model import MaskedDiffusionLM
from ..swap import runtime_of
from ._rounding import logits_dtype


def diffusion_generate(
    model: MaskedDiffusionLM | nn.Module,
    inputs: Tensor,
    generation_config: object | None = None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    steps: int | None = None,
    eps: float | None = None,
    alg: str | None = None,
    alg_temp: float | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    threshold: float = 0.9,
    block_length: int = 32,
    cache: CacheName | None = None,
    use_cache: bool | None = None,
    dual_cache: bool | None = None,
    num_return_sequences: int | None = None,
    return_dict_in_generate: bool | None = None,
    output_history: bool | None = None,
    mask_token_id: int | None = None,
    seed: int | None = None,
) -> Tensor | DiffusionOutput:
    """Dream's ``diffusion_generate``: without a cache along the timesteps over the whole sequence, with one block by block.

    What is None comes from ``generation_config``, and what that does not have or leaves None, from Dream's defaults.

    Without a cache every forward chooses among all masked tokens, and there are exactly ``steps`` of them (``origin`` ends
    when nothing is masked; ``confidence_threshold`` takes more while tokens below the threshold are left over). With a
    cache, a block's refresh commits its first token alone; then ``confidence_threshold`` commits what reaches the threshold,
    and every other ``alg``, as in the official code, the surest tokens by entropy along the block's timesteps.

    Where the official code fails, this one does not: batches of any size work in every mode, each row getting the tokens it
    would get alone; padding is neither attended nor counted as positions; a block whose share is one step is finished;
    ``[MASK]`` has probability zero. Its ``sample_tokens`` computes in the model's dtype: in bfloat16, confidences there have
    8 bits and many are equal, and 0.9 as a threshold means 0.8984. Here logits are rounded to that dtype and everything
    after is float32, ties going to the lower position. In float32 both are the same.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or a module that :func:`fastdllm_triton.accelerate` was called on.
        inputs: ``[B, P]`` integers, left padded where ``attention_mask`` says so.
        generation_config: any object with the attributes of Dream's ``DreamGenerationConfig``.
        attention_mask: ``[B, P]``, 0 for padding, which must be on the left; everything is attended if not given.
        max_new_tokens: tokens to generate; wins over ``max_length``. 20 if neither is given.
        max_length: of prompt and generation together.
        steps: forwards; with a cache a multiple of the number of blocks. 512.
        eps: the last timestep. 0.001.
        alg: ``origin`` (the default), ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``confidence_threshold``. The last,
            without a cache, needs ``steps`` to divide the number of masks.
        alg_temp: draws the order of confidences at this temperature; None or 0 ranks them.
        temperature: of the tokens; 0 takes the likeliest.
        top_p, top_k: of the tokens. These alone materialise logits, and are slower.
        threshold: in (0, 1].
        block_length: with a cache, divides the new tokens.
        cache: ``none`` (the default), ``prefix`` or ``dual``.
        use_cache, dual_cache: the official way to say it: ``use_cache`` is ``prefix``, ``dual_cache`` is ``dual``.
        num_return_sequences: continuations of each prompt, next to each other in the result.
        return_dict_in_generate: return a :class:`~fastdllm_triton.diffusion.DiffusionOutput`.
        output_history: with it, keep the sequences after each forward.
        mask_token_id: the model's if not given.
        seed: of every draw; taken from torch's global generator if not given. Row ``b`` of the result draws with
            ``seed + b``, so that it depends neither on the batch nor on the backend.

    Returns:
        ``[B * num_return_sequences, P + max_new_tokens]`` int64, or the output with these ``sequences``, ``history`` and
        ``nfe``.

    Raises:
        ValueError: an argument is not valid; raised before any forward.
        FloatingPointError: a forward gave logits that are NaN or nowhere finite.
    """
    lm = runtime_of(model)
    first = first_slots(inputs, attention_mask, lm.config.vocab_size)
    given = {
        "steps": steps,
        "eps": eps,
        "alg": alg,
        "alg_temp": alg_temp,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_return_sequences": num_return_sequences,
        "return_dict_in_generate": return_dict_in_generate,
        "output_history": output_history,
        "mask_token_id": mask_token_id,
    }
    options = merged(given, generation_config)
    copies, as_dict = options["num_return_sequences"], options["return_dict_in_generate"]
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"num_return_sequences must be an integer of 1 or more, got {copies!r}")
    config = DiffusionConfig(
        max_new_tokens=new_tokens(max_new_tokens, max_length, generation_config, inputs.shape[1]),
        **{name: options[name] for name in ("steps", "eps", "alg", "temperature", "top_p", "top_k")},
        alg_temp=options["alg_temp"] or 0.0,
        threshold=threshold,
        block_length=block_length,
        cache=cache_name(cache, use_cache, dual_cache),
        seed=seed,
        history=bool(as_dict and options["output_history"]),
        logits_dtype=logits_dtype(lm),
    )
    x = inputs.to(lm.device, torch.int64).repeat_interleave(copies, dim=0)
    first = first.to(lm.device).repeat_interleave(copies)
    output = diffuse(lm.network, x, first, config, options["mask_token_id"])
    return output if as_dict else output.sequences

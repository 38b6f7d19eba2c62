"""Dream's ``diffusion_generate``, as its authors and Fast-dLLM have it, for a model that is opened when its turn comes.

:func:`fastdllm_triton.compat.diffusion_generate` is this function of any model that a user holds.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding import CacheName
from ...decoding.config import official_logits_dtype
from ...utils.checks import is_int
from ..engine import HasNetwork
from .arguments import UNSET, cache_name, first_slots, new_tokens, plain, refuse_unknown, resolved
from .config import DiffusionConfig, DiffusionOutput, Hooks
from .engine import diffuse


class DreamModel(NamedTuple):
    """A model, and what it says of its decoding.

    Attributes:
        lm: the model.
        config: the fields of its ``config.json``, as a mapping or as attributes.
        cache: the cache where the caller does not say.
    """

    lm: HasNetwork
    config: object
    cache: CacheName


def diffusion_generate(
    model: Callable[[], DreamModel],
    /,
    inputs: Tensor,
    generation_config: object | None = None,
    *,
    attention_mask: Tensor | str | None = None,
    max_new_tokens: int | None = UNSET,
    max_length: int | None = UNSET,
    steps: int = UNSET,
    eps: float = UNSET,
    alg: str = UNSET,
    alg_temp: float | None = UNSET,
    temperature: float = UNSET,
    top_p: float | None = UNSET,
    top_k: float | None = UNSET,
    threshold: float = 0.9,
    block_length: int | None = 32,
    cache: CacheName | None = None,
    use_cache: bool | None = None,
    dual_cache: bool | None = None,
    num_return_sequences: int = UNSET,
    return_dict_in_generate: bool = UNSET,
    output_history: bool = UNSET,
    mask_token_id: int | None = UNSET,
    generation_tokens_hook_func: Callable[[int | None, Tensor, Tensor | None], Tensor] | None = None,
    generation_logits_hook_func: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    seed: int | None = None,
    **stored: object,
) -> Tensor | DiffusionOutput:
    """Dream's ``diffusion_generate``: without a cache along the timesteps over the whole sequence, with one block by block.

    What is not given comes from where the official code takes it: from ``generation_config`` and, for what that does not have,
    Dream's defaults; or, without one, from the model's config and, for what that does not have, the defaults that transformers
    4.46 to 4.57 keep in every config. **Those sample**: ``temperature=1.0``, ``top_p=1.0``, ``top_k=50``. An explicit None wins
    over both, so ``top_k=None`` takes the whole vocabulary, which is faster.

    Without a cache every forward chooses among all masked tokens, and there are exactly ``steps`` of them (fewer where nothing
    is masked any more and no hook looks on; ``confidence_threshold`` takes more while tokens below the threshold are left
    over). With a cache, a block's refresh commits its first token alone; then ``confidence_threshold`` commits what reaches the
    threshold, and every other ``alg``, as in the official code, the surest tokens by entropy along the block's timesteps.

    Where the official code fails, this one does not: batches of any size work in every mode, each row getting the tokens it
    would get alone; padding is neither attended nor counted as positions; a block whose share is one step is finished;
    ``[MASK]`` has probability zero. Its ``sample_tokens`` computes in the model's dtype: in bfloat16, confidences there have
    8 bits and many are equal, and 0.9 as a threshold means 0.8984. Here logits are rounded to that dtype and everything
    after is float32, ties going to the lower position. In float32 both are the same.

    Args:
        model: a Dream: what :func:`fastdllm_triton.load` returns, or a loaded module, which is accelerated on first use.
        inputs: ``[B, P]`` integers, left padded where ``attention_mask`` says so.
        generation_config: any object with the attributes of Dream's ``DreamGenerationConfig``.
        attention_mask: ``[B, P]``, 0 for padding, which must be on the left; everything is attended if not given or ``"full"``.
        max_new_tokens: tokens to generate; wins over ``max_length``. 20 if neither is given.
        max_length: of prompt and generation together.
        steps: forwards; with a cache a multiple of the number of blocks. 512.
        eps: the last timestep. 0.001.
        alg: ``origin`` (the default), ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``confidence_threshold``. The last,
            without a cache, needs ``steps`` to divide the number of masks.
        alg_temp: draws the order of confidences at this temperature; None or 0 ranks them.
        temperature: of the tokens; 0 takes the likeliest.
        top_p, top_k: of the tokens. These materialise logits, and are slower.
        threshold: in (0, 1].
        block_length: with a cache, divides the new tokens; None is one block.
        cache: ``none``, ``prefix`` or ``dual``. If not given, ``prefix`` where the module's own ``diffusion_generate`` is that of
            ``generation_utils_block``, ``none`` otherwise.
        use_cache, dual_cache: the official way to say it: ``use_cache`` is ``prefix``, ``dual_cache`` is ``dual``.
        num_return_sequences: continuations of each prompt, next to each other in the result.
        return_dict_in_generate: return a :class:`~fastdllm_triton.engine.dream.config.DiffusionOutput`.
        output_history: with it, keep the sequences after each forward; with a cache too, where the official code keeps none.
        mask_token_id: the model's if not given or None.
        generation_tokens_hook_func: ``(step, x, logits) -> x``, see :class:`~fastdllm_triton.engine.dream.config.Hooks`. Called
            without a cache alone, as in the official code; with one, a warning says that it is not.
        generation_logits_hook_func: ``(step, x, logits) -> logits``, likewise.
        seed: of every draw; taken from torch's global generator if not given. Row ``b`` of the result draws with
            ``seed + b``, so that it depends neither on the batch nor on the backend.
        stored: what transformers' ``GenerationConfig`` has besides (``eos_token_id``, ``pad_token_id``, ``do_sample``, ...). It
            decides nothing, as in the official code.

    Returns:
        ``[B * num_return_sequences, P + max_new_tokens]`` int64, or the output with these ``sequences``, ``history`` and
        ``nfe``.

    Raises:
        TypeError: ``model`` is no Dream, or an argument is unknown.
        ValueError: an argument is not valid, or the module cannot be accelerated; raised before any forward. Or a hook returned
            something else than it must.
        FloatingPointError: a forward gave logits that are NaN or nowhere finite.
    """
    if stored:
        refuse_unknown(stored, inspect.signature(diffusion_generate).parameters)
    lm, model_config, default_cache = model()
    network = lm.network
    if not network.config.shift or network.config.block_causal:
        raise TypeError(f"model must be a Dream for diffusion_generate, got a {network.config.architecture}; generate decodes it")
    hooks = None
    if generation_tokens_hook_func is not None or generation_logits_hook_func is not None:
        hooks = Hooks(generation_tokens_hook_func, generation_logits_hook_func)
    first = first_slots(inputs, attention_mask, network.config.vocab_size)
    arguments = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
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
    options = resolved(arguments, generation_config, model_config)
    copies, as_dict = options["num_return_sequences"], options["return_dict_in_generate"]
    if not is_int(copies) or copies < 1:
        raise ValueError(f"num_return_sequences must be an integer of 1 or more, got {copies!r}")
    generated = new_tokens(
        options["max_new_tokens"],
        options["max_length"],
        length_is_given=max_length is not UNSET,
        prompt=inputs.shape[1],
        most=network.config.max_length,
    )
    config = DiffusionConfig(
        max_new_tokens=generated,
        **{name: options[name] for name in ("steps", "eps", "alg", "temperature", "top_p", "top_k")},
        alg_temp=options["alg_temp"] or 0.0,
        threshold=plain(threshold),
        block_length=generated if block_length is None else plain(block_length),
        cache=cache_name(cache, use_cache, dual_cache, default_cache),
        seed=plain(seed),
        history=bool(as_dict and options["output_history"]),
        logits_dtype=official_logits_dtype(network.dtype),
    )
    if hooks and config.cache != "none":
        warnings.warn(f"hooks are not called with cache={config.cache!r}, as in the official code", stacklevel=3)
        hooks = None
    x = inputs.to(network.device, torch.int64).repeat_interleave(copies, dim=0)
    first = first.to(network.device).repeat_interleave(copies)
    output = diffuse(lm, x, first, config, options["mask_token_id"], hooks)
    return output if as_dict else output.sequences

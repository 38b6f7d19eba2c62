"""The arguments of Dream's ``diffusion_generate``, in all the ways they can be given, as the one way that decoding takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...decoding import CacheName
from ...utils.checks import is_int
from .config import described


class _Unset:
    """The default of an argument whose explicit None means something else."""

    def __repr__(self) -> str:
        return "<from the config>"


UNSET: Any = _Unset()

#: ``max_length`` of a generation config in which nobody has set one, and the new tokens that are then made.
_UNSET_LENGTH = 20

#: Dream's ``DreamGenerationConfig`` where nothing is set.
_DREAM: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": _UNSET_LENGTH,
    "steps": 512,
    "eps": 1e-3,
    "alg": "origin",
    "alg_temp": None,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_history": False,
    "mask_token_id": None,
}

#: The same made from a model's config: transformers 4.46 to 4.57 keep defaults of their own in every config.
_MODEL = _DREAM | {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


def resolved(arguments: Mapping[str, Any], generation_config: object | None, model_config: object) -> dict[str, Any]:
    """Every option: what the caller gave, None included; else what a config says; else the default.

    The config is ``generation_config`` or, without one, the model's. That is the order of the official code, which does not
    look at the model's own ``generation_config`` for any of these.

    Args:
        arguments: options of the call; :data:`UNSET` is "not given".
        generation_config: an object with attributes such as ``steps``.
        model_config: the fields of a ``config.json``, as a mapping or as attributes.

    Returns:
        A value for each option of ``DreamGenerationConfig`` that decides something.

    Raises:
        TypeError: ``generation_config`` is not a config.
    """
    if generation_config is not None and not any(hasattr(generation_config, name) for name in _DREAM):
        raise TypeError(
            f"generation_config must be an object with attributes such as steps and alg, got {type(generation_config).__name__}; "
            "give single parameters by keyword"
        )
    source, defaults = (model_config, _MODEL) if generation_config is None else (generation_config, _DREAM)
    options = {}
    for name, default in defaults.items():
        value = arguments.get(name, UNSET)
        if value is UNSET:
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            value = default if value is None else value
        options[name] = plain(value)
    if isinstance(options["top_k"], float) and options["top_k"].is_integer():
        options["top_k"] = int(options["top_k"])
    return options


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's, anything else as it is."""
    scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0)
    return value.item() if scalar else value


def new_tokens(max_new_tokens: int | None, max_length: int | None, *, length_is_given: bool, prompt: int, most: int) -> int:
    """How many tokens to generate: ``max_new_tokens``, or what ``max_length`` leaves.

    Args:
        max_new_tokens, max_length: resolved.
        length_is_given: the caller gave ``max_length``. A config's 20 is its default and means 20 new tokens.
        prompt: slots of the prompts.
        most: slots that the model takes.

    Raises:
        ValueError: ``max_length`` leaves no room.
    """
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length == _UNSET_LENGTH and not length_is_given:
        return max(1, min(_UNSET_LENGTH, most - prompt))
    if max_length is None or not is_int(max_length) or max_length <= prompt:
        raise ValueError(
            f"max_length must be an integer above the {prompt} tokens of inputs, got {max_length!r}; or give max_new_tokens"
        )
    return max_length - prompt


def cache_name(cache: CacheName | None, use_cache: bool | None, dual_cache: bool | None, default: CacheName) -> CacheName:
    """The cache that is asked for under its own name or by the official switches.

    Args:
        cache, use_cache, dual_cache: None where not given; ``dual_cache=False`` alone asks for nothing.
        default: where nothing is asked for.

    Raises:
        ValueError: they contradict each other.
    """
    if use_cache is False and dual_cache:
        raise ValueError("dual_cache = True contradicts use_cache = False")
    switched: CacheName | None = "dual" if dual_cache else None
    if switched is None and use_cache is not None:
        switched = "prefix" if use_cache else "none"
    if cache is None:
        return switched or default
    if switched not in (None, cache) or (cache == "dual" and dual_cache is False):
        raise ValueError(f"cache = {cache!r} contradicts use_cache = {use_cache} and dual_cache = {dual_cache}")
    return cache


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Lets pass, unread, what transformers' ``GenerationConfig`` has: the official code stores it and never looks at it.

    Args:
        names: of arguments that decide nothing.
        known: of those that do.

    Raises:
        TypeError: a name is neither; says which one is like it.
    """
    from transformers import GenerationConfig

    stored = vars(GenerationConfig())
    for name in names:
        if name not in stored:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"diffusion_generate() got an unexpected keyword argument {name!r}{hint}")


def first_slots(inputs: Tensor, attention_mask: Tensor | str | None, vocabulary: int, name: str = "inputs") -> Tensor:
    """Where each prompt of a batch begins.

    Args:
        inputs: ``[B, P]`` integers.
        attention_mask: ``[B, P]``, 0 for padding; none if not given or ``"full"``.
        vocabulary: tokens ``V``.
        name: of ``inputs``, as the caller knows it.

    Returns:
        ``[B]`` int32: the first slot of each row that is not padding.

    Raises:
        ValueError: an argument is not valid.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
        raise ValueError(f"{name} must be a tensor of integers of shape [B, P], got {described(inputs)}")
    if 0 in inputs.shape:
        raise ValueError(f"{name} must hold at least one prompt of at least one token, got shape {list(inputs.shape)}")
    outside = inputs[(inputs < 0) | (inputs >= vocabulary)]
    if len(outside):
        raise ValueError(f"{name} holds token id {int(outside[0])}, outside the vocabulary [0, {vocabulary})")

    padding = torch.zeros_like(inputs, dtype=torch.bool)
    if attention_mask is not None and not (isinstance(attention_mask, str) and attention_mask == "full"):
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != inputs.shape:
            raise ValueError(
                f"attention_mask must have the shape of {name}, {list(inputs.shape)}, got {described(attention_mask)}"
            )
        padding = attention_mask.to(inputs.device) == 0
        if (padding[:, 1:] > padding[:, :-1]).any():
            row = int((padding[:, 1:] > padding[:, :-1]).any(1).nonzero()[0, 0])
            raise ValueError(f"attention_mask: row {row} has padding after a token; prompts must be padded on the left")
        if padding[:, -1].any():
            raise ValueError(f"attention_mask: row {int(padding[:, -1].nonzero()[0, 0])} is all padding")
    return padding.sum(1, dtype=torch.int32)

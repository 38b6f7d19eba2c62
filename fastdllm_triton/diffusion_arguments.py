"""The arguments of Dream's ``diffusion_generate``, in all the ways they can be given, as the one way that decoding takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import is_int
from .decoding import CacheName

#: ``max_length`` of a generation config in which nobody has set one, and the new tokens that are then made.
_UNSET_LENGTH = 20

#: What of Dream's generation config decides something besides the length, and the defaults.
DEFAULTS: dict[str, Any] = {
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


def merged(given: dict[str, Any], generation_config: object | None) -> dict[str, Any]:
    """What the caller gave, then what the config says, then the defaults; None is "not given".

    Raises:
        TypeError: ``generation_config`` is not a config.
    """
    names = (*DEFAULTS, "max_new_tokens", "max_length")
    if generation_config is not None and not any(hasattr(generation_config, name) for name in names):
        raise TypeError(
            f"generation_config must be an object with attributes such as steps and alg, got {type(generation_config).__name__}; "
            "give single parameters by keyword"
        )
    options = {}
    for name, default in DEFAULTS.items():
        found = (given.get(name), getattr(generation_config, name, None), default)
        options[name] = next((value for value in found if value is not None), None)
    return options


def new_tokens(given: int | None, max_length: int | None, generation_config: object | None, prompt: int) -> int:
    """How many tokens to generate after a prompt of so many slots: ``max_new_tokens`` of the caller or of the config, or what
    ``max_length`` leaves, or 20.

    Raises:
        ValueError: ``max_length`` leaves no room.
    """
    if given is None:
        given = getattr(generation_config, "max_new_tokens", None)
    if given is not None:
        return given
    if max_length is None:
        max_length = getattr(generation_config, "max_length", None)
        if max_length in (None, _UNSET_LENGTH):
            return _UNSET_LENGTH
    if not is_int(max_length) or max_length <= prompt:
        raise ValueError(
            f"max_length must be an integer above the {prompt} tokens of inputs, got {max_length!r}; or give max_new_tokens"
        )
    return max_length - prompt


def cache_name(cache: CacheName | None, use_cache: bool | None, dual_cache: bool | None) -> CacheName:
    """The cache that is asked for under its own name or by the official switches.

    Raises:
        ValueError: they contradict each other.
    """
    if use_cache is False and dual_cache:
        raise ValueError("dual_cache = True contradicts use_cache = False")
    switched: CacheName = "dual" if dual_cache else "prefix" if use_cache else "none"
    if use_cache is None and dual_cache is None:
        return "none" if cache is None else cache
    if cache is not None and cache != switched:
        raise ValueError(f"cache = {cache!r} contradicts use_cache = {use_cache} and dual_cache = {dual_cache}")
    return switched


def first_slots(inputs: Tensor, attention_mask: Tensor | None, vocabulary: int, name: str = "inputs") -> Tensor:
    """Where each prompt of a batch begins.

    Args:
        inputs: ``[B, P]`` integers.
        attention_mask: ``[B, P]``, 0 for padding; none if not given.
        vocabulary: tokens ``V``.
        name: of ``inputs``, as the caller knows it.

    Returns:
        ``[B]`` int32: the first slot of each row that is not padding.

    Raises:
        ValueError: an argument is not valid.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
        found = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"{name} must be a tensor of integers of shape [B, P], got {found}")
    if 0 in inputs.shape:
        raise ValueError(f"{name} must hold at least one prompt of at least one token, got shape {list(inputs.shape)}")
    outside = inputs[(inputs < 0) | (inputs >= vocabulary)]
    if len(outside):
        raise ValueError(f"{name} holds token id {int(outside[0])}, outside the vocabulary [0, {vocabulary})")

    padding = torch.zeros_like(inputs, dtype=torch.bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != inputs.shape:
            found = str(list(attention_mask.shape)) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"attention_mask must have the shape of {name}, {list(inputs.shape)}, got {found}")
        padding = attention_mask.to(inputs.device) == 0
        if (padding[:, 1:] > padding[:, :-1]).any():
            row = int((padding[:, 1:] > padding[:, :-1]).any(1).nonzero()[0, 0])
            raise ValueError(f"attention_mask: row {row} has padding after a token; prompts must be padded on the left")
        if padding[:, -1].any():
            raise ValueError(f"attention_mask: row {int(padding[:, -1].nonzero()[0, 0])} is all padding")
    return padding.sum(1, dtype=torch.int32)

"""Dream's decoding (Ye et al., arXiv 2508.15487): its options, its timestep schedule, and its result.

Tokens are committed along a schedule of timesteps from 1 down to ``eps``: going from ``t`` to ``s`` unmasks the share
``1 - s / t`` of what is still masked. Fast-dLLM (arXiv 2505.22618) adds blocks with a cache, and a threshold on the confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...decoding import CacheName
from ...decoding.strategies import CappedThreshold, Strategy, Threshold, Timesteps
from ...types import ScoreName
from ...utils.checks import is_int, is_number, require, to_number

#: What ranks tokens without a cache.
_SCORES: dict[str, ScoreName] = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "neg_entropy"}

AlgName = Literal["origin", "maskgit_plus", "topk_margin", "entropy", "confidence_threshold"]


@dataclass(frozen=True)
class DiffusionConfig:
    """Options of Dream's decoding, under their official names.

    Attributes:
        max_new_tokens: tokens to generate.
        steps: timesteps. Without a cache, over the whole sequence, one forward each; with one, a multiple of the number of
            blocks, and each block has its share.
        eps: the last timestep, in (0, 1).
        alg: what a step commits. Without a cache: ``origin`` each masked token with the same probability;
            ``maskgit_plus``, ``topk_margin`` and ``entropy`` the surest ones by the schedule; ``confidence_threshold`` those
            that reach ``threshold``, at most ``masks / steps`` a step and what earlier steps left over. With a cache:
            ``confidence_threshold`` those of the block that reach ``threshold``; any other, as in the official code, the
            surest ones by entropy.
        alg_temp: draws which tokens are the surest ones with this temperature instead of ranking them; 0 ranks.
        temperature: of the tokens; 0 takes the likeliest.
        top_p: keeps the likeliest tokens that together have this probability; 0 the likeliest alone.
        top_k: keeps this many of the likeliest tokens.
        threshold: in (0, 1].
        block_length: slots of a block, with a cache; divides ``max_new_tokens``.
        cache: ``none``, ``prefix`` or ``dual``.
        seed: row ``b`` draws with ``seed + b``, so that its draws do not depend on its batch; taken from torch's global
            generator if not given and needed.
        history: whether to keep the sequences as they were after each forward.
        logits_dtype: rounds logits before anything is decided.
    """

    max_new_tokens: int
    steps: int = 512
    eps: float = 1e-3
    alg: AlgName = "origin"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    threshold: float = 0.9
    block_length: int = 32
    cache: CacheName = "none"
    seed: int | None = None
    history: bool = False
    logits_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length"):
            value = getattr(self, name)
            require(name, value, "an integer of 1 or more", is_int(value) and value >= 1)
        require("eps", self.eps, "above 0 and below 1", is_number(self.eps) and 0 < self.eps < 1)
        for name, names in (("alg", get_args(AlgName)), ("cache", ("none", "prefix", "dual"))):
            value = getattr(self, name)
            require(name, value, f"one of {', '.join(names)}", value in names)
        for name in ("alg_temp", "temperature"):
            value = getattr(self, name)
            require(name, value, "0 or more", is_number(value) and value >= 0)
        ok = self.top_p is None or (is_number(self.top_p) and 0 <= self.top_p <= 1)
        require("top_p", self.top_p, "None or in [0, 1]", ok)
        ok = self.top_k is None or (is_int(self.top_k) and self.top_k >= 1)
        require("top_k", self.top_k, "None or an integer of 1 or more", ok)
        require("threshold", self.threshold, "in (0, 1]", is_number(self.threshold) and 0 < self.threshold <= 1)
        ok = self.seed is None or (is_int(self.seed) and abs(self.seed) <= 2**62)  # which leaves room for a row's index
        require("seed", self.seed, "None or an integer in [-2^62, 2^62]", ok)
        for name, value in tuple(vars(self).items()):
            if is_number(value):
                object.__setattr__(self, name, to_number(value))
        if self.cache != "none":
            if self.max_new_tokens % self.block_length:
                raise ValueError(
                    f"block_length must divide the {self.max_new_tokens} new tokens if there is a cache, got {self.block_length}"
                )
            if self.steps % self.blocks:
                raise ValueError(
                    f"steps must be a multiple of the number of blocks, {self.blocks} "
                    f"(new tokens / block_length), got {self.steps}"
                )

    @property
    def blocks(self) -> int:
        """Number of blocks; one where there is no cache."""
        return 1 if self.cache == "none" else self.max_new_tokens // self.block_length

    @property
    def filtered(self) -> bool:
        """Whether ``top_p`` or ``top_k`` can remove a token."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    @property
    def strategy(self) -> Strategy | None:
        """The strategy of the engine that decodes so, or None where there is none: top-p and top-k, what ranks by chance
        (``origin`` without a cache, ``alg_temp``).
        """
        threshold, ranks_by_chance = self.alg == "confidence_threshold", self.alg_temp > 0
        if self.filtered or (ranks_by_chance and not threshold):
            return None
        if self.cache != "none":
            return Threshold(self.threshold) if threshold else Timesteps(self.steps, self.eps, score="neg_entropy")
        if threshold:
            return CappedThreshold(self.steps, self.threshold)
        return Timesteps(self.steps, self.eps, score=_SCORES[self.alg]) if self.alg in _SCORES else None

    @property
    def engine_block_length(self) -> int:
        """Slots that the engine decodes together: everything, where there is no cache."""
        return self.max_new_tokens if self.cache == "none" else self.block_length

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        origin = self.alg == "origin" and self.cache == "none"
        return self.temperature > 0 or origin or (self.alg_temp > 0 and self.alg != "confidence_threshold")


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller that control a decoding without a cache, as Dream's authors have them.

    Logits are ``[B, L, V]`` in the model's dtype; ``[:, i]`` are those that predict slot ``i``. Each call costs all of them in
    memory and a synchronisation.

    Attributes:
        tokens: ``(step, x, logits) -> x``, once with step and logits None before the first forward and then after the commits of
            every one. What it returns, ``[B, L]`` int64, is decoded on: ``x`` itself, which it may write into, or another tensor.
        logits: ``(step, x, logits) -> logits``, after every forward. What it returns is what is decided on.
    """

    tokens: Callable[[int | None, Tensor, Tensor | None], Tensor] | None = None
    logits: Callable[[int, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "logits"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(f"generation_{name}_hook_func must be a function or None, got {type(hook).__name__}")


def described(value: object) -> str:
    """What a value is, for an error: a tensor's dtype, shape and device, or a type's name."""
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


@dataclass
class DiffusionOutput:
    """What :func:`fastdllm_triton.compat.diffusion_generate` returns with ``return_dict_in_generate``.

    Attributes:
        sequences: ``[B, P + max_new_tokens]`` int64.
        history: the sequences after each forward, if they were asked for.
        nfe: forwards of the batch.
    """

    sequences: Tensor
    history: tuple[Tensor, ...] | None
    nfe: int

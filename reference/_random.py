"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., SC 2011), the generator behind ``triton.language.philox``.

A number is a function of what it is for (seed, row position, forward, token id), so a draw depends neither on how a kernel
tiles its work nor on which rows share a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

#: Fourth word of the counter: what the number is for.
STREAM_TOKEN, STREAM_SCORE = 0, 1


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        seed: int64, its low and high words are the key.
        c0: int64, as are ``c1``, ``c2`` and ``c3``: the counter, its words taken modulo 2^32. All broadcast together.

    Returns:
        Four int64 tensors in ``[0, 2^32)``.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    words = (c0 & _WORD, c1 & _WORD, c2 & _WORD, torch.tensor(c3, device=c0.device))
    c0, c1, c2, w3 = torch.broadcast_tensors(*words)  # type: ignore[no-untyped-call]
    for _ in range(10):
        # The product of two words wraps in int64, which keeps its bits; the mask undoes the sign of the shift.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, w3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ w3 ^ k1, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, w3


def uniform(bits: Tensor) -> Tensor:
    """float32 in (0, 1): the centre of each of 2^32 cells, rounded, and kept below 1."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def slot_uniform(seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """The number that a slot draws in a forward, apart from those of its tokens.

    Args:
        seed: ``[B]`` int64.
        position: ``[B, N]`` integers.
        step: integers that broadcast with ``[B, N]``, key of the forward.

    Returns:
        ``[B, N]`` float32 in (0, 1).
    """
    zero = torch.zeros_like(position)
    return uniform(philox(seed[:, None], zero, position, step.long(), STREAM_SCORE)[0])


def gumbel_of(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers, ``-log(-log1p(-u))``.

    This form resolves the upper tail to 22.9 in float32, where ``-log(-log(u))`` ends at 16.6 and lowers the effective
    temperature of masked diffusion models (Zheng et al., arXiv 2409.02908).
    """
    return -torch.log(-torch.log1p(-u))


def gumbel(seed: Tensor, position: Tensor, step: Tensor, vocabulary: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise for every token of rows of logits.

    Args:
        seed: ``[R]`` int64.
        position: ``[R]`` integers, key of the row.
        step: ``[R]`` integers, key of the forward.
        vocabulary: tokens ``V``.
        first: id of the first of them, a multiple of 4.

    Returns:
        ``[R, V]`` float32; token ``t`` uses word ``t % 4`` of counter ``t // 4``.
    """
    block = torch.arange(first // 4, (first + vocabulary + 3) // 4, device=seed.device)
    words = philox(seed[:, None], block[None], position[:, None].long(), step[:, None].long(), STREAM_TOKEN)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocabulary]
    return gumbel_of(uniform(bits))

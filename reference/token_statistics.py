"""What a masked-diffusion decoder needs to know about each row of logits, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import TokenStatistics
from ._common import accumulate
from ._random import gumbel


def row_keys(key: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """A per-row int64 key from a scalar or a tensor of ``rows`` entries."""
    return torch.as_tensor(key, dtype=torch.int64, device=device).expand(rows)


def token_statistics(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    out: TokenStatistics | None = None,
) -> TokenStatistics:
    """Statistics of each row of logits.

    The chosen token is the one with the largest logit, ties going to the lowest id. With ``temperature > 0`` it is a
    sample from ``softmax(logits / temperature)`` by Gumbel-max; as in LLaDA's decoding, every statistic stays that of the
    distribution at temperature 1, so the confidence is the model's own.

    Forbidden tokens are removed from the distribution before anything is computed, as if their logits were -inf. Rows
    with a NaN or without a finite allowed logit have ``token = -1``, ``rest = inf`` and the other entries -inf or NaN.

    Args:
        logits: ``[R, V]``.
        temperature: 0 for the argmax.
        seed: scalar or ``[R]`` int64; needed with ``temperature > 0``.
        position: ``[R]`` integers, key of each row's noise; its index if not given.
        step: scalar or ``[R]``, key of the forward, so that a row draws anew in each.
        forbidden: token ids.
        out: receives the result.

    Returns:
        :class:`TokenStatistics` with entries ``[R]``.

    Raises:
        ValueError: ``temperature`` is negative, or positive without a ``seed``.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if temperature > 0 and seed is None:
        raise ValueError("temperature > 0 needs a seed")
    rows, vocabulary = logits.shape
    values = accumulate(logits)
    if forbidden is not None:
        ids = torch.as_tensor(forbidden, dtype=torch.int64, device=logits.device)
        values = values.index_fill(1, ids, -torch.inf)

    noisy = values
    if temperature > 0 and seed is not None:
        device = logits.device
        position = torch.arange(rows, device=device) if position is None else position
        noise = gumbel(row_keys(seed, rows, device), position, row_keys(step, rows, device), vocabulary)
        noisy = values + temperature * noise

    best = noisy.max(dim=1, keepdim=True).values
    ids = torch.arange(vocabulary, device=logits.device)
    token = torch.where(noisy == best, ids, vocabulary - 1).min(dim=1, keepdim=True).values  # the lowest id of a tie
    logit = values.gather(1, token)
    others = values.scatter(1, token, -torch.inf)
    logsumexp = values.logsumexp(1)

    surprise = logsumexp[:, None] - values
    entropy = torch.where(surprise == torch.inf, 0, torch.exp(-surprise) * surprise).sum(1)
    choice = (logit[:, 0] > -torch.inf) & ~values.isnan().any(1)
    result = TokenStatistics(
        token=torch.where(choice, token[:, 0], -1),
        logit=logit[:, 0],
        second_logit=others.max(dim=1).values,
        logsumexp=logsumexp,
        rest=torch.where(choice, torch.exp(others - logit).sum(1), torch.inf),
        entropy=entropy,
    )
    return result if out is None else out.copy_(result)

"""Token statistics from hidden states: the language-model head and :func:`token_statistics` in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import TokenStatistics
from ._common import accumulate
from .token_statistics import row_keys, token_statistics


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    logits_dtype: torch.dtype | None = None,
    out: TokenStatistics | None = None,
) -> TokenStatistics:
    """Statistics of ``hidden[rows] @ weight.T``.

    Args:
        hidden: ``[N, E]``.
        weight: ``[V, E]``.
        rows: ``[R]`` int64 indices into ``hidden``; ``-1`` asks for nothing (its entries are ``token = -1``, ``rest = inf``,
            NaN elsewhere). All rows in order if not given.
        bias: ``[V]``.
        temperature: as in :func:`token_statistics`, like ``seed``, ``position`` and ``step`` (scalars or ``[R]``).
        forbidden: token ids that take no part, ``[F]`` for all rows or ``[R, F]``, padded with -1.
        logits_dtype: rounds each logit to this dtype first, to agree with a model that materialises such logits. Logits
            are float32 otherwise (float64 for float64).
        out: receives the result.

    Returns:
        :class:`TokenStatistics` with entries ``[R]``.
    """
    if rows is None:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
    asked = (rows >= 0).nonzero()[:, 0]
    logits = accumulate(hidden[rows[asked]]) @ accumulate(weight).T
    if bias is not None:
        logits = logits + accumulate(bias)
    if logits_dtype is not None:
        logits = logits.to(logits_dtype).to(logits.dtype)
    index = torch.arange(len(rows), device=rows.device)
    statistics = token_statistics(
        logits,
        temperature=temperature[asked] if isinstance(temperature, Tensor) else temperature,
        seed=None if seed is None else row_keys(seed, len(rows), rows.device)[asked],
        position=(index if position is None else position)[asked],
        step=row_keys(step, len(rows), rows.device)[asked],
        forbidden=forbidden[asked] if isinstance(forbidden, Tensor) and forbidden.dim() == 2 else forbidden,
    )
    result = spread(statistics, asked, len(rows))
    return result if out is None else out.copy_(result)


def spread(statistics: TokenStatistics, asked: Tensor, count: int) -> TokenStatistics:
    """Entries ``[count]`` with those of ``statistics [A]`` where ``asked [A]``, int64, says; the others ask for nothing."""

    def entries(given: Tensor, missing: float) -> Tensor:
        return given.new_full((count,), missing).index_copy(0, asked, given)

    missing = {"token": -1, "rest": torch.inf}
    return TokenStatistics(**{name: entries(given, missing.get(name, torch.nan)) for name, given in vars(statistics).items()})

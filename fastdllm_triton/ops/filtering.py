"""Top-p and top-k: token statistics of what is left of a distribution.

Both need the order of a row's logits, which a streaming pass does not have. So here logits are materialised: of the rows that
are asked for, some at a time. Slower than :func:`fastdllm_triton.ops.head_statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..types import TokenStatistics
from . import Ops

#: Rows of logits that are in memory at once: 64 of Dream's, sorted, take some 300 MB.
_ROWS = 64


def filter_logits(logits: Tensor, top_p: float | None = None, top_k: int | None = None) -> Tensor:
    """Sets logits outside the nucleus to -inf (Holtzman et al., arXiv 1904.09751), and then all below the k-th largest.

    Args:
        logits: ``[R, V]``.
        top_p: keeps, likeliest first, every token before which less than or exactly this probability has been reached, the
            first one always.
        top_k: keeps tokens whose logit is at least the k-th largest, so more than k where several are equal.

    Returns:
        ``[R, V]``.
    """
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(dim=1, descending=True, stable=True)
        reached = ordered.softmax(1).cumsum(1)
        outside = torch.cat((torch.zeros_like(reached[:, :1], dtype=torch.bool), reached[:, :-1] > top_p), dim=1)
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, ids, outside), -torch.inf)
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    return logits


def filtered_statistics(
    ops: Ops,
    logits_of: Callable[[Tensor], Tensor],
    *,
    rows: Tensor,
    top_p: float | None,
    top_k: int | None,
    forbidden: Tensor,
    logits_dtype: torch.dtype | None,
    dtype: torch.dtype,
    temperature: float,
    seed: Tensor,
    position: Tensor,
    step: int,
) -> TokenStatistics:
    """:func:`fastdllm_triton.ops.head_statistics` of the filtered distribution.

    Args:
        ops: the backend.
        logits_of: the logits ``[r, V]`` of ``r`` indices.
        rows: ``[R]`` int64 such indices, ``-1`` asks for nothing. Which those are is read by the host.
        top_p, top_k: as in :func:`filter_logits`; forbidden tokens are removed before.
        dtype: of the statistics, and of what they are computed in.
        forbidden, logits_dtype, temperature, seed, position, step: as in ``head_statistics``.

    Returns:
        :class:`TokenStatistics` with entries ``[R]``.
    """
    result = TokenStatistics(
        token=torch.full_like(rows, -1),
        rest=torch.full(rows.shape, torch.inf, dtype=dtype, device=rows.device),
        **{
            name: torch.full(rows.shape, torch.nan, dtype=dtype, device=rows.device)
            for name in ("logit", "second_logit", "logsumexp", "entropy")
        },
    )
    asked = (rows >= 0).nonzero()[:, 0]
    for begin in range(0, len(asked), _ROWS):
        part = asked[begin : begin + _ROWS]
        logits = logits_of(rows[part])
        logits = logits.to(logits_dtype or logits.dtype).to(dtype, copy=True)
        logits[:, forbidden] = -torch.inf
        keys: dict[str, Any] = {"seed": seed[part], "position": position[part], "step": step}
        statistics = ops.token_statistics(filter_logits(logits, top_p, top_k), temperature=temperature, **keys)
        for field in fields(result):
            getattr(result, field.name)[part] = getattr(statistics, field.name)
    return result

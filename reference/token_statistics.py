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


def draws(temperature: float | Tensor) -> bool:
    """Whether tokens are drawn with noise: a temperature a row may be 0 for any of them.

    Raises:
        ValueError: it is negative.
    """
    if isinstance(temperature, Tensor):
        return True
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    return temperature > 0


def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
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

    Forbidden tokens are removed from the distribution before anything is computed, as if their logits were -inf. Two kinds
    of rows have no choice, ``token = -1`` and ``rest = inf``: in a row whose allowed logits are all -inf, ``logit``,
    ``second_logit`` and ``logsumexp`` are -inf and ``entropy`` is NaN; in a row with an allowed NaN or +inf all four are NaN.

    Args:
        logits: ``[R, V]``.
        temperature: 0 for the argmax; a scalar or ``[R]`` float32.
        seed: scalar or ``[R]`` int64; needed with ``temperature > 0`` and with a temperature a row.
        position: ``[R]`` integers, key of each row's noise; its index if not given.
        step: scalar or ``[R]``, key of the forward, so that a row draws anew in each.
        forbidden: token ids, ``[F]`` for all rows or ``[R, F]`` int64, padded with -1.
        out: receives the result.

    Returns:
        :class:`TokenStatistics` with entries ``[R]``.

    Raises:
        ValueError: ``temperature`` is negative, or draws without a ``seed``.
    """
    sample = draws(temperature)
    if sample and seed is None:
        raise ValueError("temperature > 0 needs a seed")
    rows, vocabulary = logits.shape
    values = accumulate(logits)
    if forbidden is not None:
        ids = torch.as_tensor(forbidden, dtype=torch.int64, device=logits.device).expand(rows, -1)
        # A column behind the others takes what is padded.
        hidden = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=logits.device).scatter(
            1, torch.where(ids < 0, vocabulary, ids), True
        )
        values = values.masked_fill(hidden[:, :vocabulary], -torch.inf)

    noisy = values
    if sample and seed is not None:
        device = logits.device
        position = torch.arange(rows, device=device) if position is None else position
        noise = gumbel(row_keys(seed, rows, device), position, row_keys(step, rows, device), vocabulary)
        noisy = values + (temperature[:, None] if isinstance(temperature, Tensor) else temperature) * noise

    best = noisy.max(dim=1, keepdim=True).values
    ids = torch.arange(vocabulary, device=logits.device)
    token = torch.where(noisy == best, ids, vocabulary - 1).min(dim=1, keepdim=True).values  # the lowest id of a tie
    logit = values.gather(1, token)
    others = values.scatter(1, token, -torch.inf)
    logsumexp = values.logsumexp(1)

    # Relative to the largest logit, whose own term of the sums is exactly 1 and 0 and is left out: the rounding of a
    # log-sum-exp in the tens would be larger than a small entropy.
    top, first = values.max(dim=1, keepdim=True)
    below = values.scatter(1, first, -torch.inf) - top
    odds = torch.exp(below).sum(1)
    entropy = torch.log1p(odds) - torch.where(below == -torch.inf, 0, torch.exp(below) * below).sum(1) / (1 + odds)
    broken = (values.isnan() | (values == torch.inf)).any(1)
    choice = (logit[:, 0] > -torch.inf) & ~broken
    result = TokenStatistics(
        token=torch.where(choice, token[:, 0], -1),
        logit=torch.where(broken, torch.nan, logit[:, 0]),
        second_logit=torch.where(broken, torch.nan, others.max(dim=1).values),
        logsumexp=torch.where(broken, torch.nan, logsumexp),
        rest=torch.where(choice, torch.exp(others - logit).sum(1), torch.inf),
        entropy=torch.where(choice, entropy, torch.nan),
    )
    return result if out is None else out.copy_(result)


def statistics_merge(a: TokenStatistics, b: TokenStatistics) -> TokenStatistics:
    """Statistics of the union of two disjoint parts of a vocabulary, from those of the parts.

    Lets ranks that hold shards of the head exchange a few bytes a row instead of logits. Associative, and commutative, up
    to rounding. Both parts are statistics at temperature 0, their token ids those of the whole vocabulary.

    Args:
        a, b: entries of one shape.

    Returns:
        :class:`TokenStatistics` of that shape.
    """
    a_first = (a.logit > b.logit) | ((a.logit == b.logit) & (a.token < b.token))
    none_a, none_b = a.logsumexp == -torch.inf, b.logsumexp == -torch.inf
    broken = a.logsumexp.isnan() | b.logsumexp.isnan()

    def ordered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(a_first, x, y), torch.where(a_first, y, x)

    (logit, lower), (token, _) = ordered(a.logit, b.logit), ordered(a.token, b.token)
    (second, _), (entropy, entropy_lower) = ordered(a.second_logit, b.second_logit), ordered(a.entropy, b.entropy)
    rest, rest_lower = ordered(a.rest, b.rest)

    # Mass of the part with the lower maximum in units of exp(logit); an empty part has none.
    added = torch.where(none_a | none_b, 0, torch.exp(lower - logit) * (1 + rest_lower))
    rest = rest + added
    share = added / (1 + rest)  # of that part
    mixed = (1 - share) * entropy + torch.where(share > 0, share * (entropy_lower - torch.log(share)), 0)
    return TokenStatistics(
        token=torch.where(broken, -1, token),
        logit=torch.where(broken, torch.nan, logit),
        second_logit=torch.where(broken, torch.nan, torch.maximum(second, lower)),
        logsumexp=torch.where(broken, torch.nan, logit + torch.log1p(rest)).where(~(none_a & none_b), -torch.inf),
        rest=torch.where(broken, torch.inf, rest),
        entropy=torch.where(broken, torch.nan, mixed - (1 - share) * torch.log1p(-share)),
    )

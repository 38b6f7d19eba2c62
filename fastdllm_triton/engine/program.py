"""What a captured forward has fixed. Everything else that differs between requests is data of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decoding.cache_policy import RefreshCommits
from ..types import EndName, RuleName, ScoreName
from .request import Request


@dataclass(frozen=True)
class Program:
    """What a captured forward has fixed. All else is data on the device, or the host's business alone.

    Attributes:
        block_length: slots that are decoded together: of a block, or of a sub-block.
        score, rule: of the strategy.
        ends: when an end token ends a row.
        refresh_commits: what a refresh commits.
        causal: tokens of the blocks that attention is causal between, where it is.
        logits_dtype: rounds logits.
        mask_id: the token of a masked slot.
        commit_last, never_or_last: token ids that are committed once nothing else is left; those and the forbidden ones.
        cfg_scale: of guidance.
        temperature: of the noise, where all rows have the same; None where each has its own.
        tempered: whether tokens are ranked by the distribution at that temperature.
        forbidden: token ids, where all rows have the same; else how many a row has at most.
        eos_count, share_count: end tokens that a row has at most, and forwards that a schedule spreads a block over at most.
    """

    block_length: int
    score: ScoreName
    rule: RuleName
    ends: EndName
    refresh_commits: RefreshCommits
    causal: int
    logits_dtype: torch.dtype | None
    mask_id: int
    commit_last: tuple[int, ...]
    never_or_last: tuple[int, ...]
    cfg_scale: float
    temperature: float | None
    tempered: bool
    forbidden: tuple[int, ...] | int
    eos_count: int
    share_count: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Program:
        """The program of requests that share a forward."""
        config, ids = requests[0].config, requests[0].ids
        temperatures = {request.config.temperature for request in requests}
        forbidden = {request.forbidden for request in requests}
        return cls(
            block_length=config.decoded_length,
            score=config.strategy.score,
            rule=config.strategy.rule,
            ends="token" if requests[0].policy.refresh_commits == "first" else "block",
            refresh_commits=requests[0].refresh_commits,
            causal=requests[0].causal,
            logits_dtype=config.logits_dtype,
            mask_id=ids.mask_id,
            commit_last=ids.commit_last,
            never_or_last=ids.never_or_last if ids.commit_last else (),
            cfg_scale=config.cfg_scale,
            temperature=temperatures.pop() if len(temperatures) == 1 else None,
            tempered=config.tempered and any(request.config.temperature > 0 for request in requests),
            forbidden=forbidden.pop() if len(forbidden) == 1 else _width(max(map(len, forbidden))),
            eos_count=max(_width(len(request.eos_ids)) for request in requests),
            share_count=max(_width(len(request.shares)) for request in requests),
        )


@dataclass(frozen=True)
class ForwardShape:
    """What one captured forward has fixed.

    Attributes:
        kind: ``refresh``, ``block_step`` or ``step``.
        program: what its rows have in common.
        first, last: the rows ``[first, last)``.
        window: slots that are recomputed of each row.
        predicted: slots that are predicted, at most.
        causal: tokens of the blocks that attention is causal between, where a window is of several; else 0.
        span: what all rows attend, where the host knows that it is the same.
    """

    kind: str
    program: Program
    first: int
    last: int
    window: int
    predicted: int
    causal: int = 0
    span: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Of the windows of all rows."""
        return (self.last - self.first) * self.window


def _width(count: int) -> int:
    """A few widths for all counts, so that few programs serve: 0 and powers of two."""
    return 1 << (count - 1).bit_length() if count else 0


#: Tables with a line a row, as wide as a program asks for, by the attribute of a request that a line holds: dtype and padding.
ROW_TABLES: dict[str, tuple[torch.dtype, float]] = {
    "eos_ids": (torch.int64, -1),
    "shares": (torch.float32, 1.0),
    "forbidden": (torch.int64, -1),
}


def table_line(name: str, width: int, request: Request) -> list[Any]:
    """What a table of some width says of a request; what does not fit is for a wider table."""
    _, padding = ROW_TABLES[name]
    line = list(getattr(request, name))[:width]
    return line + [padding] * (width - len(line))

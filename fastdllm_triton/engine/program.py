"""What a captured forward has fixed. Everything else that differs between requests is data of their rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..types import RuleName, ScoreName
from .request import Request


@dataclass(frozen=True)
class Program:
    """What a captured forward has fixed. All else is data on the device, or the host's business alone.

    Attributes:
        block_length: slots of a block.
        score, rule: of the strategy.
        commits_first_alone: whether a refresh commits the first token of its block alone.
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
    commits_first_alone: bool
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
        forbidden = {request.ids.forbidden for request in requests}
        return cls(
            block_length=config.block_length,
            score=config.strategy.score,
            rule=config.strategy.rule,
            commits_first_alone=config.commits_first_alone,
            logits_dtype=config.logits_dtype,
            mask_id=ids.mask_id,
            commit_last=ids.commit_last,
            never_or_last=ids.never_or_last if ids.commit_last else (),
            cfg_scale=config.cfg_scale,
            temperature=temperatures.pop() if len(temperatures) == 1 else None,
            tempered=config.tempered and any(request.config.temperature > 0 for request in requests),
            forbidden=forbidden.pop() if len(forbidden) == 1 else _width(max(map(len, forbidden))),
            eos_count=max(_width(len(_eos_ids(request))) for request in requests),
            share_count=max(_width(len(_shares(request))) for request in requests),
        )


@dataclass(frozen=True)
class ForwardShape:
    """What one captured forward has fixed.

    Attributes:
        kind: ``refresh`` or ``step``.
        program: what its rows have in common.
        first, last: the rows ``[first, last)``.
        window: slots that are recomputed of each row.
        predicted: slots that are predicted, at most.
        span: what all rows attend, where the host knows that it is the same.
    """

    kind: str
    program: Program
    first: int
    last: int
    window: int
    predicted: int
    span: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Of the windows of all rows."""
        return (self.last - self.first) * self.window


def group_of(request: Request) -> Hashable:
    """What of a request's program cannot differ between rows of a forward, and its cache."""
    config, ids = request.config, request.ids
    return (
        request.policy.name,
        config.block_length,
        config.strategy.score,
        config.strategy.rule,
        config.commits_first_alone,
        config.logits_dtype,
        ids.mask_id,
        ids.commit_last,
        ids.never_or_last if ids.commit_last else (),
        config.cfg_scale,
        config.tempered,
    )


def _width(count: int) -> int:
    """A few widths for all counts, so that few programs serve: 0 and powers of two."""
    return 1 << (count - 1).bit_length() if count else 0


def _eos_ids(request: Request) -> tuple[int, ...]:
    return request.ids.eos_ids if request.config.stop_at_eos else ()


def _shares(request: Request) -> tuple[float, ...]:
    return request.config.shares


def _forbidden(request: Request) -> tuple[int, ...]:
    return request.ids.forbidden


#: Tables with a line a row, as wide as a program asks for: what the line of a request holds, its dtype, and what pads it.
ROW_TABLES: dict[str, tuple[Callable[[Request], tuple[Any, ...]], torch.dtype, float]] = {
    "eos_ids": (_eos_ids, torch.int64, -1),
    "shares": (_shares, torch.float32, 1.0),
    "forbidden": (_forbidden, torch.int64, -1),
}


def table_line(name: str, width: int, request: Request) -> list[Any]:
    """What a table of some width says of a request; what does not fit is for a wider table."""
    values, _, padding = ROW_TABLES[name]
    line = list(values(request))[:width]
    return line + [padding] * (width - len(line))

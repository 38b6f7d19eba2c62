"""Which rows decode what and when: rows, policies and budgets, no tensors.

Algorithm 1 of Fast-dLLM (arXiv 2505.22618) row by row: a row begins a block, its first forward is a refresh, steps follow until
nothing in the block is masked. Rows need not stand at the same block. Those that can share a forward are neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from ..decoding.cache_policy import NoCache, Window
from .request import Request


@dataclass(frozen=True)
class ForwardPlan:
    """A forward over neighbouring rows.

    Attributes:
        kind: ``refresh``, ``block_step`` or ``step``.
        first, last: the rows ``[first, last)`` of the batch.
        requests: those of them that take part: the others have nothing masked in their block.
        windows: what is recomputed of each request that takes part.
        masked: slots that are predicted in these rows, at most.
        is_last_group: whether no row behind these belongs to anybody.
    """

    kind: str
    first: int
    last: int
    requests: tuple[Request, ...]
    windows: tuple[Window, ...]
    masked: int
    is_last_group: bool


@dataclass(frozen=True)
class Plan:
    """What an iteration does, in this order.

    Attributes:
        begun: indices of rows that begin a block.
        requests: of all rows, before the swaps.
        swaps: pairs of rows that change places, after that.
        forwards: at least one, where there is a row.
    """

    begun: list[int]
    requests: list[Request]
    swaps: list[tuple[int, int]]
    forwards: list[ForwardPlan]


@dataclass(frozen=True)
class RowFlags:
    """What the host reads of a row after the forwards of an iteration.

    Attributes:
        masked: slots of its block that are still masked.
        ended: whether a finished block of it holds an end token.
        invalid: whether a masked slot had no token to commit.
        forwards: that it has had.
        starts_masked: whether the first token of its block is masked; not known where nobody asked.
    """

    masked: int
    ended: bool
    invalid: bool
    forwards: int
    starts_masked: bool = False


class Scheduler:
    """First come, first served.

    Attributes:
        rows: requests that run, in the order of the batch's rows.
        waiting: requests that do not run yet.

    Args:
        max_rows: rows that run at a time.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows: list[Request] = []
        self.waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Takes a request in."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Gives the rows behind those that run to requests that wait, and returns these."""
        admitted = [self.waiting.popleft() for _ in range(min(self.max_rows - len(self.rows), len(self.waiting)))]
        self.rows += admitted
        return admitted

    def schedule(self) -> Plan:
        """What the next iteration does."""
        begun = [i for i, request in enumerate(self.rows) if request.block_done and not self._waits(request)]
        for i in begun:
            self.rows[i].begin_block()
        return Plan(begun, list(self.rows), self._sort(), list(self._forwards()))

    @property
    def mask_ids(self) -> list[int]:
        """The mask of each row, if the host is to know which blocks have their first token; else nothing."""
        if any(request.policy.has_block_steps for request in self.rows):
            return [request.ids.mask_id for request in self.rows]
        return []

    def update(self, flags: Sequence[RowFlags]) -> list[int]:
        """Takes in what the forwards did.

        Returns:
            Rows that are finished, the last one first. Each is to be retired.
        """
        finished = []
        for i, (request, row) in enumerate(zip(self.rows, flags, strict=True)):
            # A step behind the refresh that completed the block is none of the row's.
            request.history += request.pending[: row.forwards - len(request.history)]
            if row.invalid:
                request.error = FloatingPointError("logits are NaN or nowhere finite")
            elif request.pending and 0 < request.masked <= row.masked and request.config.strategy.always_commits:
                request.error = RuntimeError("a forward committed nothing although slots are masked")
            request.pending.clear()
            request.masked, request.starts_masked = row.masked, row.starts_masked
            if request.error or (request.block_done and (row.ended or request.block == request.blocks[-1])):
                finished.append(i)
        return finished[::-1]

    def retire(self, row: int) -> int | None:
        """Gives the place of a row to the last one.

        Returns:
            The row that moves there, if one does.
        """
        last = self.rows.pop()
        if row == len(self.rows):
            return None
        self.rows[row] = last
        return len(self.rows)

    def _waits(self, request: Request) -> bool:
        """Whether a row with a finished block waits for others of its cohort."""
        if not request.config.lockstep or request.cohort is None:
            return False
        return any(other.cohort is request.cohort and not other.block_done for other in self.rows)

    def _sort(self) -> list[tuple[int, int]]:
        """Makes rows that share forwards neighbours, those to refresh in front; the swaps that this takes."""
        groups: dict[Hashable, int] = {}
        keys = [(groups.setdefault(request.group, len(groups)), _turn(request)) for request in self.rows]
        swaps, wanted = [], sorted(keys)
        for i, key in enumerate(wanted):
            if keys[i] != key:
                # A row that belongs here, and not where it is.
                j = next(j for j in range(i + 1, len(keys)) if keys[j] == key != wanted[j])
                self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
                keys[i], keys[j] = keys[j], keys[i]
                swaps.append((i, j))
        return swaps

    def _forwards(self) -> Iterator[ForwardPlan]:
        first = 0
        while first < len(self.rows):
            group = self.rows[first].group
            last = next((i for i in range(first, len(self.rows)) if self.rows[i].group != group), len(self.rows))
            yield from self._group_forwards(first, last)
            first = last

    def _group_forwards(self, first: int, last: int) -> Iterator[ForwardPlan]:
        """The forwards of the neighbours ``[first, last)``: refreshes, then a step of all that can take one."""
        turns = [_turn(request) for request in self.rows[first:last]]
        policy = self.rows[first].policy
        if isinstance(policy, NoCache):  # Every forward recomputes everything: a refresh is a step.
            yield self._forward("refresh" if min(turns) < BLOCK_STEP else "step", first, last)
            return
        begin = first
        for turn in (REFRESH, REFRESH_GENERATION):
            end = begin + turns.count(turn)
            if begin < end:
                yield self._forward("refresh", begin, end)
            begin = end
        # Rows that were refreshed take a step with the others, unless one of them is to be refreshed again.
        again = any(request.policy.needs_refresh(request.block_state) for request in self.rows[first:begin])
        waiting = begin if again or not policy.steps_after_refresh else first
        steps = begin + turns.count(BLOCK_STEP)
        if begin < steps:
            yield self._forward("block_step", waiting, steps)
        if policy.has_block_steps:
            waiting = begin = steps
        if any(not request.block_done for request in self.rows[begin:last]):
            yield self._forward("step", waiting, last)

    def _forward(self, kind: str, first: int, last: int) -> ForwardPlan:
        requests = tuple(request for request in self.rows[first:last] if not request.block_done)
        windows = tuple(request.next_window() for request in requests)
        of_refresh = kind == "refresh" and self.rows[first].refresh_commits != "rule"
        masked = sum(not request.skips_commit if of_refresh else request.masked for request in requests)
        return ForwardPlan(kind, first, last, requests, windows, masked, last == len(self.rows))


#: What a row's next forward is, in the order in which neighbours stand. What follows a prompt is refreshed apart from prompts,
#: which are longer.
REFRESH, REFRESH_GENERATION, BLOCK_STEP, STEP = range(4)


def _turn(request: Request) -> int:
    block, policy = request.block_state, request.policy
    if request.block_done:
        return STEP
    if not policy.needs_refresh(block):
        return BLOCK_STEP if policy.step(block).kind == "block_step" else STEP
    return REFRESH if policy.refreshes_prompt(block) else REFRESH_GENERATION

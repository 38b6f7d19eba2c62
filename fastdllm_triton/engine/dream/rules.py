"""What a step of Dream's decoding commits. Statistics of a step are small, ``[B, K]``, and nothing here reads the device.

The engine decodes what ``commit_tokens`` has a rule for. These are for what it has none for: ranks that are drawn, tokens that
every masked slot commits with the same probability, a budget that grows with what earlier steps left over; and for tokens of
filtered distributions and hooks, under any rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from ...decoding.strategies import Timesteps
from ...kernels._limits import MAX_BLOCK, MAX_ROWS
from ...ops import Ops
from ...reference._random import gumbel_of, slot_uniform
from ...types import PolicyState, TokenStatistics
from .config import AlgName, DiffusionConfig


@dataclass
class Candidates:
    """The slots that a step may commit, where they are masked. ``K`` of each row, in ascending order.

    Attributes:
        slots: ``[B, K]`` int64.
        masked: ``[B, K]`` bool.
        position: ``[B, K]``, of the slots in their rows.
        statistics: entries ``[B, K]``; those of slots that are not masked mean nothing.
    """

    slots: Tensor
    masked: Tensor
    position: Tensor
    statistics: TokenStatistics


class Rule(Protocol):
    """Commits some of the candidates of a step."""

    def commit(self, x: Tensor, candidates: Candidates, step: int) -> tuple[Tensor, Tensor]:
        """Writes the chosen tokens into ``x [B, L]``.

        Returns:
            ``[B]``: candidates that are still masked; ``[B]`` bool: whether a masked one has no token (NaN logits).
        """
        ...


def check_kernel_limits(ops: Ops, rows: int, config: DiffusionConfig) -> None:
    """Raises ``ValueError`` for what is valid but more than ``commit_tokens`` takes as a kernel."""
    if ops.name == "triton" and config.alg == "confidence_threshold" and config.cache != "none":
        for name, count, most in (("inputs", rows, MAX_ROWS), ("block_length", config.block_length, MAX_BLOCK)):
            if count > most:
                raise ValueError(f"{name}: the Triton kernels take at most {most}, got {count}")


class BlockThreshold:
    """Every token of the block that reaches the threshold, and the surest one always: ``commit_tokens`` as it stands."""

    def __init__(self, ops: Ops, config: DiffusionConfig, x: Tensor, kv_start: Tensor, seed: Tensor, mask_id: int) -> None:
        self._ops = ops
        self._state = PolicyState.create(
            "confidence",
            "threshold",
            value=config.threshold,
            mask_id=mask_id,
            kv_start=kv_start,
            seed=seed,
            slots=x.shape[1],
        )

    def commit(self, x: Tensor, candidates: Candidates, step: int) -> tuple[Tensor, Tensor]:
        """See :class:`Rule`; the candidates are contiguous."""
        self._ops.commit_tokens(x, candidates.statistics, candidates.slots[:, 0].int(), self._state)
        return self._state.remaining, self._state.invalid


class Choice(ABC):
    """A rule that is a function from candidates to those that are chosen.

    Args:
        steps: how many steps the schedule has.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def open(self, step: int) -> bool:
        """Whether a step may still commit tokens."""
        return step < self._steps

    @abstractmethod
    def choose(self, candidates: Candidates, step: int) -> Tensor:
        """``[B, K]`` bool, true for masked slots alone."""

    def commit(self, x: Tensor, candidates: Candidates, step: int) -> tuple[Tensor, Tensor]:
        """See :class:`Rule`."""
        token, masked = candidates.statistics.token, candidates.masked
        chosen = self.choose(candidates, step) & (token >= 0)
        x.scatter_(1, candidates.slots, torch.where(chosen, token, x.gather(1, candidates.slots)))
        return masked.sum(1) - chosen.sum(1), (masked & (token < 0)).any(1)


class Schedule(Choice):
    """``maskgit_plus``, ``topk_margin`` and ``entropy``: a share of the masked tokens in each step, the surest ones.

    Args:
        alg: what "sure" means.
        alg_temp: above 0, tokens are drawn without replacement from ``softmax(score / alg_temp)`` (Gumbel top-k, Kool et al.,
            arXiv 1903.06059) instead of ranked.
        shares: of each step.
        seed: ``[B]`` int64.
        first: step 0 commits one token, whatever its share.
    """

    def __init__(self, alg: AlgName, alg_temp: float, shares: Sequence[float], seed: Tensor, *, first: bool = False) -> None:
        super().__init__(len(shares))
        self._alg, self._alg_temp, self._shares, self._seed, self._first = alg, alg_temp, shares, seed, first

    def choose(self, candidates: Candidates, step: int) -> Tensor:
        """See :class:`Rule`."""
        statistics = candidates.statistics
        if self._alg_temp > 0:
            noise = gumbel_of(slot_uniform(self._seed, candidates.position, torch.full_like(candidates.position, step)))
            cost = -(_score(self._alg, statistics) / self._alg_temp + noise)
        elif self._alg == "maskgit_plus":
            cost = statistics.rest  # the order of the confidences, without their ties near 1
        else:
            cost = -_score(self._alg, statistics)
        count: Tensor | int = 1
        if step or not self._first:
            count = transfer_count(candidates.masked.sum(1, keepdim=True), self._shares[step])
        return candidates.masked & (_rank(cost, candidates.masked) < count)


class Budget(Choice):
    """``confidence_threshold`` without a cache: a threshold under a budget.

    A step may commit ``masks / steps`` tokens and what earlier steps left of theirs. Of these, surest first, it commits the
    first one always and the others where they reach the threshold. Steps beyond the last one have only what was left over; a
    row that has nothing masked leaves nothing over.

    Args:
        masks: masked tokens of each row before the first step, each a multiple of ``steps``.
        steps: timesteps.
        threshold: of the confidence.
        device: of the candidates.
    """

    def __init__(self, masks: Sequence[int], steps: int, threshold: float, device: torch.device) -> None:
        super().__init__(steps)
        self._base = torch.tensor(masks, device=device) // steps
        self._threshold = threshold
        self._left = torch.zeros_like(self._base)

    def open(self, step: int) -> bool:
        """See :class:`Choice`."""
        return super().open(step) or bool(self._left.any())

    def choose(self, candidates: Candidates, step: int) -> Tensor:
        """See :class:`Rule`."""
        masked, rest = candidates.masked, candidates.statistics.rest
        budget = self._left + self._base if step < self._steps else self._left
        rank = _rank(rest, masked)
        sure = (rank == 0) | ((1 + rest.double()) * self._threshold <= 1)
        chosen = masked & sure & (rank < budget[:, None])
        self._left = torch.where(masked.any(1), budget - chosen.sum(1), 0)
        return chosen


class Origin(Choice):
    """``origin``: every masked token with the same probability, ``1 - s / t``, whatever the model says of it.

    Args:
        shares: the probability of each step, 1 in the last.
        seed: ``[B]`` int64.
    """

    def __init__(self, shares: Sequence[float], seed: Tensor) -> None:
        super().__init__(len(shares))
        self._shares, self._seed = shares, seed

    def choose(self, candidates: Candidates, step: int) -> Tensor:
        """See :class:`Rule`."""
        draw = slot_uniform(self._seed, candidates.position, torch.full_like(candidates.position, step))
        return candidates.masked & (draw < self._shares[step])


def transfer_count(masks: Tensor, share: float) -> Tensor:
    """How many of so many masked tokens a step commits: ``int(masks * share)``.

    The product is taken in float32 as in the official code, which decides where one falls just short of an integer.

    Args:
        masks: integers.
        share: of the step; 1 commits all of them.

    Returns:
        int32 of the shape of ``masks``.
    """
    return (masks.to(torch.float32) * share).int()


def check_steps(config: DiffusionConfig, masks: Sequence[int]) -> None:
    """Raises ``ValueError`` where a threshold without a cache has steps that do not divide the masked tokens of some row."""
    capped = config.alg == "confidence_threshold" and config.cache == "none"
    for m in masks if capped else ():
        if m % config.steps:
            raise ValueError(
                f"steps must divide the number of masked tokens, {m}, for alg = 'confidence_threshold' without a cache, "
                f"got {config.steps}"
            )


def whole_sequence_rule(config: DiffusionConfig, masks: Sequence[int], seed: Tensor) -> Choice:
    """The rule without a cache, for rows with so many masks."""
    if config.alg == "confidence_threshold":
        check_steps(config, masks)
        return Budget(masks, config.steps, config.threshold, seed.device)
    shares = Timesteps(config.steps, config.eps).shares(config.blocks)
    if config.alg == "origin":
        return Origin(shares, seed)
    return Schedule(config.alg, config.alg_temp, shares, seed)


def block_rule(config: DiffusionConfig, ops: Ops, x: Tensor, kv_start: Tensor, seed: Tensor, mask_id: int) -> Rule:
    """The rule of every block with a cache. Its step 0, the refresh, commits one token."""
    if config.alg == "confidence_threshold":
        return BlockThreshold(ops, config, x, kv_start, seed, mask_id)
    shares = Timesteps(config.steps, config.eps).shares(config.blocks, after_first=True)
    return Schedule("entropy", config.alg_temp, shares, seed, first=True)


def _score(alg: AlgName, statistics: TokenStatistics) -> Tensor:
    """``[B, K]``, larger is surer."""
    if alg == "entropy":
        return statistics.neg_entropy
    if alg == "topk_margin":  # float64: rounding must not make ties that the statistics do not have
        return TokenStatistics(*(getattr(statistics, field.name).double() for field in fields(statistics))).margin
    return statistics.confidence


def _rank(cost: Tensor, masked: Tensor) -> Tensor:
    """``[B, K]``: place of each masked slot among those of its row, least cost first, ties by slot."""
    cost = torch.where(masked, cost.clamp(max=torch.finfo(cost.dtype).max), torch.inf)
    return cost.argsort(dim=1, stable=True).argsort(dim=1)

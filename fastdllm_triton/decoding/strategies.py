"""Decoding strategies: a score that ranks the masked tokens of a block, and a rule that says how many of them to commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..types import RuleName, ScoreName
from ..utils.checks import is_int, is_number, require, to_int, to_number


@dataclass(frozen=True)
class Strategy:
    """A score and a rule: what ranks the masked tokens of a block, and how many of them a forward commits.

    Use one of the subclasses. Every rule commits at least one token in each unfinished row.
    """

    rule: ClassVar[RuleName]
    scores: ClassVar[tuple[ScoreName, ...]]
    #: Whether every forward commits a token of each row that has a masked one.
    always_commits: ClassVar[bool] = True

    score: ScoreName = field(default="confidence", kw_only=True)

    def __post_init__(self) -> None:
        if self.score not in self.scores:
            raise ValueError(f"score must be one of {', '.join(self.scores)} for {type(self).__name__}, got {self.score!r}")

    @property
    def value(self) -> float:
        """The rule's parameter."""
        return 0.0

    def steps_per_block(self, blocks: int) -> int:
        """Forwards that a block is spread over; means something for :class:`FixedSteps` only."""
        return 1

    def shares(self, blocks: int) -> tuple[float, ...]:
        """The share of a block's masked tokens that each of its forwards commits; means something for the rule ``schedule``."""
        return ()


@dataclass(frozen=True)
class FixedSteps(Strategy):
    """LLaDA's schedule: every block is spread evenly over its share of ``steps`` forwards (arXiv 2502.09992, appendix B).

    Attributes:
        steps: forwards for the whole generation, a multiple of the number of blocks. ``gen_length`` of them is one token
            a forward.
        score: ``confidence`` (LLaDA's ``low_confidence`` remasking), ``random``, ``margin`` or ``neg_entropy``.
    """

    rule: ClassVar[RuleName] = "quota"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "random", "margin", "neg_entropy")

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require("steps", self.steps, "an integer of 1 or more", is_int(self.steps) and self.steps >= 1)
        object.__setattr__(self, "steps", to_int(self.steps))

    def steps_per_block(self, blocks: int) -> int:
        """``steps / blocks``.

        Raises:
            ValueError: the blocks do not divide the steps.
        """
        if self.steps < blocks or self.steps % blocks:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {blocks} (gen_length / block_length), got {self.steps}"
            )
        return self.steps // blocks


@dataclass(frozen=True)
class Threshold(Strategy):
    """Commits every token whose score reaches ``t`` (Fast-dLLM, arXiv 2505.22618, section 3.3).

    Attributes:
        t: in (0, 1]. 0.9 is the paper's choice.
        score: ``confidence``, ``margin`` or ``random``.
    """

    rule: ClassVar[RuleName] = "threshold"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "margin", "random")

    t: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", self.t, "in (0, 1]", is_number(self.t) and 0 < self.t <= 1)
        object.__setattr__(self, "t", to_number(self.t))

    @property
    def value(self) -> float:
        """The rule's parameter."""
        return float(self.t)


@dataclass(frozen=True)
class Factor(Strategy):
    """Commits the n best tokens while ``(n + 1) (1 - score_n) <= f``: fewer at once, the less sure the least sure of them is
    (Fast-dLLM, arXiv 2505.22618, factor-based decoding; the exact edge cases are those of the official code).

    Attributes:
        f: above 0. 1.0 is the official default.
        score: ``confidence``, ``margin`` or ``random``.
    """

    rule: ClassVar[RuleName] = "factor"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "margin", "random")

    f: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("factor", self.f, "above 0", is_number(self.f) and self.f > 0)
        object.__setattr__(self, "f", to_number(self.f))

    @property
    def value(self) -> float:
        """The rule's parameter."""
        return float(self.f)


@dataclass(frozen=True)
class EntropyBudget(Strategy):
    """Commits the best tokens while the entropies of all but the most uncertain of them sum to at most ``gamma``: a bound on
    what committing them together can lose (EB-Sampler, arXiv 2505.24857).

    Attributes:
        gamma: nats, 0 or more.
        score: ``neg_entropy``, ``confidence`` or ``margin``.
    """

    rule: ClassVar[RuleName] = "entropy_budget"
    scores: ClassVar[tuple[ScoreName, ...]] = ("neg_entropy", "confidence", "margin")

    gamma: float
    score: ScoreName = field(default="neg_entropy", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require("gamma", self.gamma, "0 or more", is_number(self.gamma) and self.gamma >= 0)
        object.__setattr__(self, "gamma", to_number(self.gamma))

    @property
    def value(self) -> float:
        """The rule's parameter."""
        return float(self.gamma)

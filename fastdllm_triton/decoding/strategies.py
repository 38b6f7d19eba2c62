"""Decoding strategies: a score that ranks the masked tokens of a block, and a rule that says how many of them to commit.

A strategy is one class and its entry in :data:`STRATEGIES`. The command line, settings of a conversation, the grid of an
evaluation and its plots read the class attributes, so that a new strategy needs no edit there. What its rule does on the device
is in ``kernels/commit_tokens.py`` and ``reference/commit_tokens.py``. Importing this needs neither torch nor numpy.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..utils.checks import is_bool, is_int, is_number, require, to_int, to_number

if TYPE_CHECKING:
    from ..types import RuleName, ScoreName


@dataclass(frozen=True)
class Strategy(ABC):
    """A score and a rule: what ranks the masked tokens of a block, and how many of them a forward commits.

    Use one of the subclasses. Class attributes say how each is asked for:

    * ``name``, ``symbol``, ``gloss``: as text it is ``name:symbol``, such as ``threshold:T``; the gloss says more where needed.
    * ``option``, ``number``, ``help``: the option of the command line, and the setting, that takes its parameter as a number.
    * ``label``: in the legend of a plot.
    * ``rule``, ``scores``: the rule of ``commit_tokens``, and the scores that it can rank by.
    * ``always_commits``: whether every forward commits a token of each row that has a masked one.
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    gloss: ClassVar[str] = ""
    option: ClassVar[str]
    number: ClassVar[type[int] | type[float]] = float
    help: ClassVar[str]
    label: ClassVar[str]
    rule: ClassVar[RuleName]
    scores: ClassVar[tuple[ScoreName, ...]]
    always_commits: ClassVar[bool] = True

    score: ScoreName = field(default="confidence", kw_only=True)

    def __post_init__(self) -> None:
        if self.score not in self.scores:
            raise ValueError(f"score must be one of {', '.join(self.scores)} for {type(self).__name__}, got {self.score!r}")

    @classmethod
    def from_text(cls, value: float, gen_length: int, block_length: int, **score: Any) -> Strategy:
        """The strategy that ``name:value`` asks for in a generation of these lengths.

        Raises:
            ValueError: the value or the score is not allowed.
        """
        return cls(value, **score)  # type: ignore[call-arg, arg-type]

    @classmethod
    def parameter_name(cls) -> str:
        """The field that ``option`` sets: the first."""
        return next(entry.name for entry in fields(cls) if entry.name != "score")

    @property
    def parameter(self) -> Any:
        return getattr(self, self.parameter_name())

    @property
    def value(self) -> float:
        """What the rule compares with; 0 where it compares with nothing."""
        return 0.0

    def steps_per_block(self, blocks: int) -> int:
        """Forwards that a block is spread over, for strategies that fix them (:class:`FixedSteps`, :class:`Timesteps`)."""
        return 1

    def shares(self, blocks: int, *, after_first: bool = False) -> tuple[float, ...]:
        """The share of its masked tokens that each forward of a block commits; of the rule ``schedule`` only.

        Args:
            blocks: of the generation.
            after_first: whether a forward that commits the block's first token alone comes before.
        """
        return ()

    def expected_forwards(self, gen_length: int) -> float:
        """A guess of the forwards that a generation takes: 4 tokens each, where the model's confidence decides."""
        return gen_length / 4


@dataclass(frozen=True)
class SpreadStrategy(Strategy):
    """A strategy that spreads a generation over a number of forwards.

    Attributes:
        steps: forwards for the whole generation, a multiple of the number of blocks.
    """

    number: ClassVar[type[int] | type[float]] = int

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.option, self.steps, "an integer of 1 or more", is_int(self.steps) and self.steps >= 1)
        object.__setattr__(self, "steps", to_int(self.steps))

    @classmethod
    def from_text(cls, value: float, gen_length: int, block_length: int, **score: Any) -> Strategy:
        """Of K tokens a forward."""
        if not (value >= 1 and float(value).is_integer()):
            raise ValueError("K must be a whole number of tokens a forward, 1 or more")
        return cls(math.ceil(gen_length / block_length) * math.ceil(block_length / value), **score)

    def steps_per_block(self, blocks: int) -> int:
        """``steps / blocks``.

        Raises:
            ValueError: the blocks do not divide the steps.
        """
        if self.steps < blocks or self.steps % blocks:
            multiple = f"a multiple of the number of blocks, {blocks} (gen_length / block_length)"
            raise ValueError(f"{self.option} must be {multiple}, got {self.steps}")
        return self.steps // blocks

    def expected_forwards(self, gen_length: int) -> float:
        return self.steps


@dataclass(frozen=True)
class FixedSteps(SpreadStrategy):
    """LLaDA's schedule: every block is spread evenly over its share of ``steps`` forwards (arXiv 2502.09992, appendix B).

    As text it is ``fixed:K`` with K tokens a forward: ``ceil(block_length / K)`` forwards a block, which is
    ``FixedSteps(gen_length / K)`` where K divides the block.

    Attributes:
        steps: forwards for the whole generation, a multiple of the number of blocks. ``gen_length`` of them is one token
            a forward.
        score: ``confidence`` (LLaDA's ``low_confidence`` remasking), ``random``, ``margin`` or ``neg_entropy``.
    """

    name: ClassVar[str] = "fixed"
    symbol: ClassVar[str] = "K"
    gloss: ClassVar[str] = "K tokens a forward"
    option: ClassVar[str] = "steps"
    help: ClassVar[str] = "Spread the generation evenly over this many forwards."
    label: ClassVar[str] = "fixed k tokens a forward"
    rule: ClassVar[RuleName] = "quota"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "random", "margin", "neg_entropy")


@dataclass(frozen=True)
class Threshold(Strategy):
    """Commits every token whose score reaches ``t`` (Fast-dLLM, arXiv 2505.22618, section 3.3), and always the best one.

    Attributes:
        t: in (0, 1]. 0.9 is the paper's choice.
        strict: a score must be above ``t``, not only reach it, as in Fast-dLLM v2 (arXiv 2509.26328): at 1 one token a forward.
        score: ``confidence``, ``margin`` or ``random``.
    """

    name: ClassVar[str] = "threshold"
    symbol: ClassVar[str] = "T"
    option: ClassVar[str] = "threshold"
    help: ClassVar[str] = "Commit every token of at least this confidence, in (0, 1]. The default, at 0.9."
    label: ClassVar[str] = "threshold t"
    rule: ClassVar[RuleName] = "threshold"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "margin", "random")

    t: float = 0.9
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", self.t, "in (0, 1]", is_number(self.t) and 0 < self.t <= 1)
        object.__setattr__(self, "t", to_number(self.t))
        require("strict", self.strict, "True or False", is_bool(self.strict))

    @property
    def value(self) -> float:
        return _above(self.t) if self.strict else float(self.t)


@dataclass(frozen=True)
class Factor(Strategy):
    """Commits the n best tokens while ``(n + 1) (1 - score_n) <= f``: the less confident the last of them is, the fewer at once
    (Fast-dLLM, arXiv 2505.22618, factor-based decoding; the exact edge cases are those of the official code).

    Attributes:
        f: above 0. 1.0 is the official default.
        score: ``confidence``, ``margin`` or ``random``.
    """

    name: ClassVar[str] = "factor"
    symbol: ClassVar[str] = "F"
    option: ClassVar[str] = "factor"
    help: ClassVar[str] = "Commit by the factor rule, above 0."
    label: ClassVar[str] = "factor f"
    rule: ClassVar[RuleName] = "factor"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "margin", "random")

    f: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("factor", self.f, "above 0", is_number(self.f) and self.f > 0)
        object.__setattr__(self, "f", to_number(self.f))

    @property
    def value(self) -> float:
        return float(self.f)


@dataclass(frozen=True)
class EntropyBudget(Strategy):
    """Commits the best tokens while the entropies of all but the most uncertain of them sum to at most ``gamma``: a bound on
    what committing them together can lose (EB-Sampler, arXiv 2505.24857).

    Attributes:
        gamma: nats, 0 or more.
        score: ``neg_entropy``, ``confidence`` or ``margin``.
    """

    name: ClassVar[str] = "entropy"
    symbol: ClassVar[str] = "NATS"
    option: ClassVar[str] = "entropy_budget"
    help: ClassVar[str] = "Commit while the entropies sum to this many nats."
    label: ClassVar[str] = "entropy budget (nats)"
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
        return float(self.gamma)


@dataclass(frozen=True)
class Timesteps(SpreadStrategy):
    """Dream's schedule (arXiv 2508.15487): timesteps go down evenly from 1 to ``eps``. The forward from ``t`` to ``s`` commits
    the share ``1 - s / t`` of the tokens that are still masked, rounded down, and the last one all of them. A forward may
    commit nothing.

    Attributes:
        steps: timesteps for the whole generation, a multiple of the number of blocks. Each block goes through its share of them,
            from 1 to ``eps``; with one block this is Dream's own decoding.
        eps: the last timestep, in (0, 1).
        score: ``confidence`` (Dream's ``maskgit_plus``), ``margin`` (``topk_margin``) or ``neg_entropy`` (``entropy``).
    """

    name: ClassVar[str] = "timesteps"
    symbol: ClassVar[str] = "N"
    gloss: ClassVar[str] = "Dream's schedule of N forwards"
    option: ClassVar[str] = "timesteps"
    help: ClassVar[str] = "Commit along Dream's schedule of this many timesteps."
    label: ClassVar[str] = "n timesteps"
    always_commits: ClassVar[bool] = False
    rule: ClassVar[RuleName] = "schedule"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "margin", "neg_entropy")

    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require("eps", self.eps, "above 0 and below 1", is_number(self.eps) and 0 < self.eps < 1)
        object.__setattr__(self, "eps", to_number(self.eps))

    @classmethod
    def from_text(cls, value: float, gen_length: int, block_length: int, **score: Any) -> Strategy:
        return cls(int(value) if float(value).is_integer() else value, **score)  # type: ignore[arg-type]

    def shares(self, blocks: int, *, after_first: bool = False) -> tuple[float, ...]:
        import torch

        steps = self.steps_per_block(blocks)
        timesteps = torch.linspace(1, self.eps, steps + 1, dtype=torch.float32, device="cpu")
        if after_first:  # The official code gives the refresh the first timestep, and the last forward all that is left.
            timesteps = timesteps[1:]
        shares = [*(1 - timesteps[1:] / timesteps[:-1]).tolist()[:-1], 1.0]
        return (1.0, *shares) if after_first else tuple(shares)


@dataclass(frozen=True)
class CappedThreshold(Threshold, SpreadStrategy):
    """Commits every token whose score reaches ``t``, and always the best one, but no more than an even spread over ``steps``
    would have committed by then: what a forward leaves of its share is for later ones. Fast-dLLM decodes Dream so without a
    cache (``alg="confidence_threshold"``).

    As text it is ``capped:K`` with K tokens a forward, at the default threshold.

    Attributes:
        steps: forwards for the whole generation, a multiple of the number of blocks.
        t: in (0, 1].
        score: ``confidence``, ``margin`` or ``random``.
    """

    name: ClassVar[str] = "capped"
    symbol: ClassVar[str] = "K"
    gloss: ClassVar[str] = "threshold 0.9, K tokens a forward at most"
    option: ClassVar[str] = "capped_steps"
    help: ClassVar[str] = "Commit every token of at least 0.9, but no faster than evenly over this many forwards."
    label: ClassVar[str] = "threshold 0.9, at most k a forward"
    rule: ClassVar[RuleName] = "capped_threshold"

    def expected_forwards(self, gen_length: int) -> float:
        return max(self.steps, gen_length / 4)


@dataclass(frozen=True)
class DenoisingSteps(Strategy):
    """SDAR's schedules (arXiv 2510.06303): each block is spread evenly over ``steps`` forwards, by its length and not by what is
    masked in it. Without a threshold that is ``low_confidence_static``, by position ``sequential``. With one a forward commits
    every token above it, where these are more (``low_confidence_dynamic``).

    Attributes:
        steps: forwards a block, SDAR's ``denoising_steps``; the block's length of them, or more, is one token a forward.
        t: in (0, 1], which a confidence must be above, or None.
        score: ``confidence``, or ``leftmost`` without a threshold.
    """

    name: ClassVar[str] = "denoising"
    symbol: ClassVar[str] = "N"
    gloss: ClassVar[str] = "N forwards a block"
    option: ClassVar[str] = "denoising_steps"
    number: ClassVar[type[int] | type[float]] = int
    help: ClassVar[str] = "Spread each block evenly over this many forwards, whatever is given of it."
    label: ClassVar[str] = "n forwards a block"
    rule: ClassVar[RuleName] = "floored_threshold"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence", "leftmost")

    steps: int
    t: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.option, self.steps, "an integer of 1 or more", is_int(self.steps) and self.steps >= 1)
        object.__setattr__(self, "steps", to_int(self.steps))
        if self.t is not None:
            require("threshold", self.t, "None or in (0, 1]", is_number(self.t) and 0 < self.t <= 1)
            object.__setattr__(self, "t", to_number(self.t))
            if self.score == "leftmost":
                raise ValueError(f"threshold must be None with score='leftmost', which is no probability, got {self.t}")

    @classmethod
    def from_text(cls, value: float, gen_length: int, block_length: int, **score: Any) -> Strategy:
        return cls(int(value) if float(value).is_integer() else value, **score)  # type: ignore[arg-type]

    @property
    def value(self) -> float:
        return math.inf if self.t is None else _above(self.t)

    def steps_per_block(self, blocks: int) -> int:
        return self.steps


def _above(t: float) -> float:
    """What a score reaches if it is above ``t``: rules compare in float64."""
    return math.nextafter(t, math.inf)


#: The strategies by name, in the order in which they are listed everywhere.
STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind for kind in (FixedSteps, Threshold, CappedThreshold, DenoisingSteps, Factor, EntropyBudget, Timesteps)
}


def strategy_names() -> str:
    """The classes, for an error: ``FixedSteps, Threshold or Factor``."""
    return _alternatives([kind.__name__ for kind in STRATEGIES.values()])


def strategy_forms(*, glosses: bool = False) -> str:
    """How strategies are written: ``fixed:K, threshold:T or factor:F``."""
    forms = [f"{kind.name}:{kind.symbol}" for kind in STRATEGIES.values()]
    if glosses:
        forms = [f"{form} ({kind.gloss})" if kind.gloss else form for form, kind in zip(forms, STRATEGIES.values(), strict=True)]
    return _alternatives(forms)


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join((", ".join(names[:-1]), names[-1]))


@dataclass(frozen=True)
class StrategySpec:
    """A strategy as text: ``fixed:4``, ``threshold:0.9``, ``factor:1.0``, ``entropy:0.3``, or with a score, ``fixed:4:margin``.

    It becomes a :class:`Strategy` once the lengths of a generation are known.

    Attributes:
        kind: the class.
        value: the number after its name.
        score: what ranks the tokens; the strategy's default if None.
        text: as it was written.
    """

    kind: type[Strategy]
    value: float
    score: str | None
    text: str

    @classmethod
    def parse(cls, text: str) -> StrategySpec:
        """Reads ``name:value`` or ``name:value:score``.

        Raises:
            ValueError: it is not of that form, or its value or score is not allowed.
        """
        name, *rest = text.strip().split(":")
        if name not in STRATEGIES or len(rest) not in (1, 2):
            raise ValueError(f"strategy must be {strategy_forms()}, each with an optional :score, got {text!r}")
        try:
            value = float(rest[0])
        except ValueError:
            raise ValueError(f"strategy: {text!r} needs a number after its name, got {rest[0]!r}") from None
        spec = cls(STRATEGIES[name], value, rest[1] if len(rest) == 2 else None, text.strip())
        try:
            spec.strategy(1, 1)
        except ValueError as error:
            raise ValueError(f"strategy: {text!r}: {error}") from None
        return spec

    def __str__(self) -> str:
        return self.text

    def strategy(self, gen_length: int, block_length: int) -> Strategy:
        score = {"score": self.score} if self.score else {}
        return self.kind.from_text(self.value, gen_length, block_length, **score)

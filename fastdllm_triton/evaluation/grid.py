"""The grid of an evaluation: strategy x cache x block length, as text on the command line and as options of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ..decoding import CacheName, GenerationConfig
from ..decoding.strategies import EntropyBudget, Factor, FixedSteps, Strategy, Threshold
from ..utils.checks import is_int, require

#: The strategies by name. ``fixed:k`` is here for its name only: it needs the lengths, see :meth:`Way.config`.
_RULES: dict[str, Callable[..., Strategy]] = {"threshold": Threshold, "factor": Factor, "entropy": EntropyBudget}
FAMILIES = ("fixed", *_RULES)

#: Options of a generation that a cache may carry, as in ``dual+refresh_every=4``.
KNOBS = ("refresh_every", "suffix_window", "look_back", "look_ahead", "prompt_refresh")


@dataclass(frozen=True)
class StrategySpec:
    """A strategy as text: ``fixed:4``, ``threshold:0.9``, ``factor:1.0``, ``entropy:0.3``, or with a score, ``fixed:4:margin``.

    Attributes:
        family: ``fixed``, ``threshold``, ``factor`` or ``entropy``.
        value: tokens a forward, or the rule's parameter.
        score: what ranks the tokens; the strategy's own if None.
        text: as given.
    """

    family: str
    value: float
    score: str | None
    text: str

    @classmethod
    def parse(cls, text: str) -> StrategySpec:
        """Reads one.

        Raises:
            ValueError: it is not of that form, or its value or score is not allowed.
        """
        family, *rest = text.strip().split(":")
        allowed = "fixed:K, threshold:T, factor:F or entropy:NATS, each with an optional :score"
        if family not in FAMILIES or len(rest) not in (1, 2):
            raise ValueError(f"strategy must be {allowed}, got {text!r}")
        try:
            value = float(rest[0])
        except ValueError:
            raise ValueError(f"strategy: {text!r} needs a number after its name, got {rest[0]!r}") from None
        spec = cls(family, value, rest[1] if len(rest) == 2 else None, text.strip())
        if family == "fixed" and not (value >= 1 and value == int(value)):
            raise ValueError(f"strategy: {text!r} must commit a whole number of tokens a forward, 1 or more")
        try:
            spec.strategy(1, 1)
        except ValueError as error:
            raise ValueError(f"strategy: {text!r}: {error}") from None
        return spec

    def __str__(self) -> str:
        return self.text

    def strategy(self, gen_length: int, block_length: int) -> Strategy:
        """The strategy for these lengths.

        ``fixed:k`` spreads each block over ``ceil(block_length / k)`` forwards, so it is ``FixedSteps(gen_length / k)`` where
        ``k`` divides the block, and a little slower where it does not.
        """
        score: dict[str, Any] = {"score": self.score} if self.score else {}
        if self.family == "fixed":
            return FixedSteps(gen_length // block_length * math.ceil(block_length / self.value), **score)
        return _RULES[self.family](self.value, **score)


@dataclass(frozen=True)
class CacheSpec:
    """A cache as text: ``none``, ``prefix``, ``dual``, or with options, ``dual+refresh_every=4``.

    Attributes:
        name: the cache.
        knobs: options of :class:`~fastdllm_triton.GenerationConfig` that go with it, in the order given.
    """

    name: CacheName
    knobs: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Reads one.

        Raises:
            ValueError: it is not of that form.
        """
        name, *given = text.strip().split("+")
        if name not in get_args(CacheName):
            raise ValueError(f"cache must be one of {', '.join(get_args(CacheName))}, got {text!r}")
        knobs = []
        for option in given:
            knob, _, number = option.partition("=")
            if knob not in KNOBS or not number.isdecimal():
                raise ValueError(f"cache: after + comes OPTION=INTEGER with an option of {', '.join(KNOBS)}, got {text!r}")
            knobs.append((knob, int(number)))
        return cls(name, tuple(knobs))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return "+".join((self.name, *(f"{knob}={value}" for knob, value in self.knobs)))


@dataclass(frozen=True)
class Way:
    """One cell of the grid: a way to decode.

    Attributes:
        strategy, cache, block_length: what is varied.
    """

    strategy: StrategySpec
    cache: CacheSpec
    block_length: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        text = f"{self.strategy}_{self.cache}_block={self.block_length}"
        object.__setattr__(self, "name", text.replace(":", "="))

    def config(self, gen_length: int) -> GenerationConfig:
        """The options of its generations.

        Raises:
            ValueError: they do not fit each other.
        """
        try:
            return GenerationConfig(
                gen_length=gen_length,
                block_length=self.block_length,
                cache=self.cache.name,
                strategy=self.strategy.strategy(gen_length, self.block_length),
                **dict(self.cache.knobs),  # type: ignore[arg-type]
            )
        except ValueError as error:
            raise ValueError(f"{self.strategy} with {self.cache} and blocks of {self.block_length}: {error}") from None

    def cost(self, prompt_length: float, gen_length: int) -> float:
        """A guess of what a request takes, in recomputed slots: what the time left is estimated with."""
        forwards = gen_length / (self.strategy.value if self.strategy.family == "fixed" else 4)
        slots = prompt_length + gen_length
        refreshes = min(gen_length / self.block_length, forwards)
        window = {"none": slots, "prefix": gen_length / 2 + self.block_length / 2, "dual": self.block_length}[self.cache.name]
        return refreshes * slots + (forwards - refreshes) * window


def parse_grid(strategies: str, caches: str, block_lengths: str | Sequence[int], gen_length: int) -> list[Way]:
    """Every combination, block lengths outermost, strategies innermost, each once.

    Args:
        strategies, caches: comma-separated, as :class:`StrategySpec` and :class:`CacheSpec` read them.
        block_lengths: comma-separated integers, or a list of them.
        gen_length: what the options are checked with.

    Raises:
        ValueError: an entry cannot be read, or a combination is not valid.
    """
    require("gen_length", gen_length, "an integer of 1 or more", is_int(gen_length) and gen_length >= 1)
    if isinstance(block_lengths, str):
        lengths = []
        for text in block_lengths.split(","):
            if not text.strip().isdecimal() or int(text) < 1:
                raise ValueError(f"block_lengths must be a list of integers of 1 or more, got {block_lengths!r}")
            lengths.append(int(text))
    else:
        lengths = list(block_lengths)
    ways = [
        Way(StrategySpec.parse(strategy), CacheSpec.parse(cache), length)
        for length in lengths
        for cache in caches.split(",")
        for strategy in strategies.split(",")
    ]
    for way in ways:
        way.config(gen_length)
    return list(dict.fromkeys(ways))

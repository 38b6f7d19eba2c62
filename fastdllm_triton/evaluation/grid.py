"""The grid of an evaluation: strategy x cache x block length, as text on the command line and as options of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..decoding import CacheName, GenerationConfig
from ..decoding.cache_policy import CACHE_OPTIONS, CACHE_POLICIES, play
from ..decoding.strategies import StrategySpec
from ..utils.checks import is_int, require


@dataclass(frozen=True)
class CacheSpec:
    """A cache as text: ``none``, ``prefix``, ``dual``, or with options, ``dual+refresh_every=4``.

    Attributes:
        name: the cache.
        options: fields of :class:`~fastdllm_triton.GenerationConfig` that go with it, in the order given.
    """

    name: CacheName
    options: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Reads a cache.

        Raises:
            ValueError: it is not of that form.
        """
        name, *words = text.strip().split("+")
        if name not in CACHE_POLICIES:
            raise ValueError(f"cache must be one of {', '.join(CACHE_POLICIES)}, got {text!r}")
        options = []
        for word in words:
            option, _, number = word.partition("=")
            if option not in CACHE_OPTIONS[name] or not number.isdecimal():
                allowed = ", ".join(CACHE_OPTIONS[name])
                raise ValueError(f"cache: after {name}+ comes OPTION=INTEGER with an option of {allowed}, got {text!r}")
            options.append((option, int(number)))
        return cls(name, tuple(options))

    def __str__(self) -> str:
        return "+".join((self.name, *(f"{option}={value}" for option, value in self.options)))


@dataclass(frozen=True)
class Variant:
    """One cell of the grid.

    Attributes:
        strategy, cache, block_length: what is varied.
    """

    strategy: StrategySpec
    cache: CacheSpec
    block_length: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.strategy}_{self.cache}_block={self.block_length}".replace(":", "=")

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
                **dict(self.cache.options),  # type: ignore[arg-type]
            )
        except ValueError as error:
            raise ValueError(f"{self.strategy} with {self.cache} and blocks of {self.block_length}: {error}") from None

    def cost(self, prompt_length: float, gen_length: int) -> int:
        """A guess of what a request takes, in recomputed slots; the time left is estimated with it."""
        config = self.config(gen_length)
        forwards = max(round(config.strategy.expected_forwards(gen_length) / config.blocks), 1)
        windows = play(config.cache_policy(), round(prompt_length), gen_length, self.block_length, [forwards] * config.blocks)
        return sum(map(len, windows))


def parse_grid(strategies: str, caches: str, block_lengths: str | Sequence[int], gen_length: int) -> list[Variant]:
    """Every combination, block lengths outermost, strategies innermost, each once.

    Args:
        strategies, caches: comma-separated, as :class:`~fastdllm_triton.decoding.strategies.StrategySpec` and
            :class:`CacheSpec` read them.
        block_lengths: comma-separated integers, or a list of them.
        gen_length: what the options are checked with.

    Raises:
        ValueError: an entry cannot be read, or a combination is not valid.
    """
    require("gen_length", gen_length, "an integer of 1 or more", is_int(gen_length) and gen_length >= 1)
    texts = block_lengths.split(",") if isinstance(block_lengths, str) else list(map(str, block_lengths))
    are_lengths = all(text.strip().isdecimal() and int(text) for text in texts)
    require("block_lengths", block_lengths, "a list of integers of 1 or more", are_lengths)
    variants = [
        Variant(StrategySpec.parse(strategy), CacheSpec.parse(cache), length)
        for length in map(int, texts)
        for cache in caches.split(",")
        for strategy in strategies.split(",")
    ]
    for variant in variants:
        variant.config(gen_length)
    return list(dict.fromkeys(variants))

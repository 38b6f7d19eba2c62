"""The grid of an evaluation: strategy x cache x block length, as text on the command line and as options of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..decoding import CacheName, GenerationConfig
from ..decoding.cache_policy import CACHE_OPTIONS, CACHE_POLICIES, cache_options, decoded_blocks, play
from ..decoding.options import changed
from ..decoding.strategies import StrategySpec
from ..models.config import ModelConfig
from ..utils.checks import is_int, require


@dataclass(frozen=True)
class CacheSpec:
    """A cache as text: ``none``, ``dual``, or with options, ``dual+refresh_every=4``, ``block_causal+sub_block_cache``.

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
        options: list[tuple[str, int]] = []
        flags = [option for option in CACHE_OPTIONS[name] if cache_options()[option].default is False]
        numbers = [option for option in CACHE_OPTIONS[name] if option not in flags]
        for word in words:
            option, _, number = word.partition("=")
            if word in flags:
                options.append((word, True))
            elif option in numbers and number.isdecimal():
                options.append((option, int(number)))
            else:
                forms = [f"OPTION=INTEGER with an option of {', '.join(numbers)}"] if numbers else []
                forms += [", ".join(flags)] if flags else []
                raise ValueError(f"cache: after {name}+ comes {' or '.join(forms) or 'nothing'}, got {text!r}")
        return cls(name, tuple(options))

    def __str__(self) -> str:
        return "+".join((self.name, *(name if value is True else f"{name}={value}" for name, value in self.options)))


@dataclass(frozen=True)
class Variant:
    """One cell of the grid.

    Attributes:
        strategy, cache, block_length: what is varied.
        base: all other options.
    """

    strategy: StrategySpec
    cache: CacheSpec
    block_length: int
    base: GenerationConfig = GenerationConfig()  # noqa: RUF009 (it is frozen)

    @property
    def name(self) -> str:
        """The name of its file."""
        sub = "" if self.base.sub_block_length is None else f"_sub={self.base.sub_block_length}"
        return f"{self.strategy}_{self.cache}_block={self.block_length}{sub}".replace(":", "=")

    def config(self, gen_length: int) -> GenerationConfig:
        """The options of its generations.

        Raises:
            ValueError: they do not fit each other.
        """
        try:
            varied = {"block_length": self.block_length, "cache": self.cache.name, "strategy": str(self.strategy)}
            return changed(self.base, {"gen_length": gen_length, **varied, **dict(self.cache.options)})
        except ValueError as error:
            raise ValueError(f"{self.strategy} with {self.cache} and blocks of {self.block_length}: {error}") from None

    def cost(self, prompt_length: float, gen_length: int, model: ModelConfig | None = None) -> int:
        """A guess of what a request takes, in recomputed slots; the time left is estimated with it."""
        config, prompt = self.config(gen_length), round(prompt_length)
        is_causal = model is not None and model.block_causal
        policy = config.cache_policy(shift=is_causal and model is not None and model.shift, block_causal=is_causal)
        lengths = prompt, gen_length, config.decoded_length
        blocks = len(decoded_blocks(*lengths, self.block_length if is_causal else 0))
        forwards = max(round(config.strategy.expected_forwards(gen_length) / blocks), 1)
        return sum(map(len, play(policy, *lengths, [forwards] * blocks, self.block_length if is_causal else 0)))


def parse_grid(
    strategies: str, caches: str, block_lengths: str | Sequence[int], gen_length: int, base: GenerationConfig | None = None
) -> list[Variant]:
    """Every combination, block lengths outermost, strategies innermost, each once.

    Args:
        strategies, caches: comma-separated, as :class:`~fastdllm_triton.decoding.strategies.StrategySpec` and
            :class:`CacheSpec` read them.
        block_lengths: comma-separated integers, or a list of them.
        gen_length: what the options are checked with.
        base: all other options; the library's if not given.

    Raises:
        ValueError: an entry cannot be read, or a combination is not valid.
    """
    require("gen_length", gen_length, "an integer of 1 or more", is_int(gen_length) and gen_length >= 1)
    texts = block_lengths.split(",") if isinstance(block_lengths, str) else list(map(str, block_lengths))
    are_lengths = all(text.strip().isdecimal() and int(text) for text in texts)
    require("block_lengths", block_lengths, "a list of integers of 1 or more", are_lengths)
    variants = [
        Variant(StrategySpec.parse(strategy), CacheSpec.parse(cache), length, base or GenerationConfig())
        for length in map(int, texts)
        for cache in caches.split(",")
        for strategy in strategies.split(",")
    ]
    for variant in variants:
        variant.config(gen_length)
    return list(dict.fromkeys(variants))

"""The caches of Fast-dLLM (arXiv 2505.22618, section 3.2) as policies: which window of a row its next forward recomputes.

Pure Python without tensors. Positions are those of one row, counted from its first token. The scheduler, the roofline, the
evaluation and the pictures of the docs ask the same objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

CacheName = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class Window:
    """What a forward recomputes of a row, in positions.

    Attributes:
        start, end: ``[start, end)`` is recomputed, and its keys and values are written.
        attend_end: the end of the keys that are attended; they begin at 0.
        kind: ``refresh``: a forward that rebuilds the cache; ``step``: any other.
    """

    start: int
    end: int
    attend_end: int
    kind: Literal["refresh", "step"]

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class BlockState:
    """Where a row stands: all that a policy may know of it.

    Attributes:
        prompt_length, length: positions of the prompt, and of prompt and generation together.
        start, end: ``[start, end)`` are the positions of the block that is being decoded.
        ordinal: blocks that the row has begun before this one.
        forwards: that the row has had in this block.
    """

    prompt_length: int
    length: int
    start: int
    end: int
    ordinal: int = 0
    forwards: int = 0


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Which window comes next.

    Attributes:
        name: what the option ``cache`` calls it.
        reuses: whether a step attends keys and values that an earlier forward wrote.
        recomputes: what a step recomputes, in words.
        refresh_every: forwards from one refresh to the next within a block; only at its start if None.
        suffix_window: masked slots after the block that are computed and attended (cf. DPad, arXiv 2508.14148); all if None.
    """

    name: ClassVar[CacheName]
    reuses: ClassVar[bool]
    recomputes: ClassVar[str]

    refresh_every: int | None = field(
        default=None, metadata={"help": "Forwards between refreshes of the cache within a block (only at its start)."}
    )
    suffix_window: int | None = field(
        default=None, metadata={"help": "Masked slots after the block that are computed (all of them)."}
    )

    def next_window(self, block: BlockState) -> Window:
        """The window of a row's next forward."""
        return self.refresh(block) if self.needs_refresh(block) else self.step(block)

    def needs_refresh(self, block: BlockState) -> bool:
        """Whether the next forward is a refresh: the first of a block, and those asked for within it."""
        return block.forwards % self.refresh_every == 0 if self.refresh_every else block.forwards == 0

    def attend_end(self, block: BlockState) -> int:
        """The end of what is computed and attended."""
        return block.length if self.suffix_window is None else min(block.length, block.end + self.suffix_window)

    def refresh(self, block: BlockState) -> Window:
        """The window of a refresh: everything."""
        end = self.attend_end(block)
        return Window(0, end, end, "refresh")

    @abstractmethod
    def step(self, block: BlockState) -> Window:
        """The window of a step."""


@dataclass(frozen=True, kw_only=True)
class NoCache(CachePolicy):
    """Every forward recomputes everything. The first one of a block counts as its refresh."""

    name: ClassVar[CacheName] = "none"
    reuses: ClassVar[bool] = False
    recomputes: ClassVar[str] = "everything"

    def step(self, block: BlockState) -> Window:
        """The window of a step: everything."""
        end = self.attend_end(block)
        return Window(0, end, end, "step")


@dataclass(frozen=True, kw_only=True)
class PrefixCache(CachePolicy):
    """A step recomputes from the block's start on; what is before it comes from the cache.

    Attributes:
        prompt_refresh: blocks from one refresh of the prompt to the next; refreshes in between recompute the generated part
            alone (cf. dLLM-Cache, arXiv 2506.06295). At every block if None.
        look_back: slots before the block that a step recomputes with it (vicinity refresh, dInfer, arXiv 2510.08666,
            section 3).
    """

    name: ClassVar[CacheName] = "prefix"
    reuses: ClassVar[bool] = True
    recomputes: ClassVar[str] = "from the block on"

    prompt_refresh: int | None = field(
        default=None, metadata={"help": "Blocks between refreshes of the prompt's part of the cache (every block)."}
    )
    look_back: int = field(default=0, metadata={"help": "Slots before the block that a step recomputes with it."})

    def refresh(self, block: BlockState) -> Window:
        """The window of a refresh: everything, or everything after the prompt."""
        end = self.attend_end(block)
        return Window(0 if self.refreshes_prompt(block) else block.prompt_length, end, end, "refresh")

    def refreshes_prompt(self, block: BlockState) -> bool:
        """Whether a refresh recomputes the prompt as well."""
        return block.ordinal % (self.prompt_refresh or 1) == 0

    def step(self, block: BlockState) -> Window:
        """The window of a step: from the block on."""
        end = self.attend_end(block)
        return Window(max(block.start - self.look_back, 0), end, end, "step")


@dataclass(frozen=True, kw_only=True)
class DualCache(PrefixCache):
    """A step recomputes the block alone; prefix and masked suffix come from the cache.

    Attributes:
        look_ahead: slots after the block that a step recomputes with it.
    """

    name: ClassVar[CacheName] = "dual"
    recomputes: ClassVar[str] = "the block"

    look_ahead: int = field(default=0, metadata={"help": "Slots after the block that a step recomputes with it (dual cache)."})

    def step(self, block: BlockState) -> Window:
        """The window of a step: the block."""
        end = self.attend_end(block)
        return Window(max(block.start - self.look_back, 0), min(block.end + self.look_ahead, end), end, "step")


#: The policies by the names that the option ``cache`` takes.
CACHE_POLICIES: dict[CacheName, type[CachePolicy]] = {kind.name: kind for kind in (NoCache, PrefixCache, DualCache)}

#: The options of each policy.
CACHE_OPTIONS = {name: tuple(option.name for option in fields(kind)) for name, kind in CACHE_POLICIES.items()}


def cache_options() -> dict[str, Field[Any]]:
    """The options of all policies by name, each with its default and, as ``metadata["help"]``, what it does."""
    return {option.name: option for kind in CACHE_POLICIES.values() for option in fields(kind)}


def cache_policy(name: CacheName, **options: Any) -> CachePolicy:
    """The policy of a name.

    Raises:
        ValueError: there is no such cache.
        TypeError: it has no such option.
    """
    if name not in CACHE_POLICIES:
        raise ValueError(f"cache must be one of {', '.join(CACHE_POLICIES)}, got {name!r}")
    return CACHE_POLICIES[name](**options)


def play(
    policy: CachePolicy, prompt_length: int, gen_length: int, block_length: int, forwards: Sequence[int]
) -> Iterator[Window]:
    """The windows of a whole generation of one row.

    Args:
        policy: the cache.
        prompt_length, gen_length, block_length: in tokens.
        forwards: that each block takes, in the order of the blocks. A block that takes none is passed over.
    """
    ordinal = 0
    for index, count in enumerate(forwards):
        start = prompt_length + index * block_length
        for done in range(count):
            block = BlockState(prompt_length, prompt_length + gen_length, start, start + block_length, ordinal, done)
            yield policy.next_window(block)
        ordinal += count > 0

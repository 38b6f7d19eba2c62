"""The caches of Fast-dLLM (arXiv 2505.22618, section 3.2) and of block-causal models (Fast-dLLM v2, arXiv 2509.26328; SDAR,
arXiv 2510.06303) as policies: which window of a row its next forward recomputes.

Pure Python without tensors. Positions are those of one row, counted from its first token. The scheduler, the roofline, the
evaluation and the pictures of the docs ask the same objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

CacheName = Literal["none", "prefix", "dual", "block_causal"]

#: What the forward that begins a block commits: what the rule says, the first token of the block alone, or nothing.
RefreshCommits = Literal["rule", "first", "nothing"]


@dataclass(frozen=True)
class Window:
    """What a forward recomputes of a row, in positions.

    Attributes:
        start, end: ``[start, end)`` is recomputed, and its keys and values are written.
        attend_end: the end of the keys that are attended; they begin at 0.
        kind: ``refresh``: a forward that rebuilds the cache, or adds to it what is final; ``step``: any other;
            ``block_step``: one over the whole block where others are over a sub-block of it.
        stored: the end of the positions whose keys and values are final behind it, where some are.
    """

    start: int
    end: int
    attend_end: int
    kind: Literal["refresh", "block_step", "step"]
    stored: int = 0

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class BlockState:
    """Where a row stands: all that a policy may know of it.

    Attributes:
        prompt_length, length: positions of the prompt, and of prompt and generation together.
        start, end: ``[start, end)`` are the positions that are being decoded: a block, or a sub-block of one.
        ordinal: blocks that the row has begun before this one.
        forwards: that the row has had in this block.
        causal: tokens of the blocks, counted from position 0, that attention is causal between; 0 where it is bidirectional.
        stored: positions from 0 on whose keys and values are final (block-causal models only).
        cached_block: where the last block begins that a forward recomputed as a whole; -1 before the first.
        starts_masked: whether the token at ``start`` was still masked when the host last looked.
    """

    prompt_length: int
    length: int
    start: int
    end: int
    ordinal: int = 0
    forwards: int = 0
    causal: int = 0
    stored: int = 0
    cached_block: int = -1
    starts_masked: bool = True

    @property
    def causal_start(self) -> int:
        """First position of the block that attention is causal between; where it is bidirectional, of the block."""
        return self.start // self.causal * self.causal if self.causal else self.start

    @property
    def causal_end(self) -> int:
        """The end of that block."""
        return self.causal_start + self.causal if self.causal else self.end

    def behind(self, window: Window) -> tuple[int, int]:
        """``stored`` and ``cached_block`` behind a forward over a window."""
        is_whole = self.causal and window.start <= self.causal_start and window.end >= self.causal_end
        return max(self.stored, window.stored), self.causal_start if is_whole else self.cached_block


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Which window comes next.

    Attributes:
        name: what the option ``cache`` calls it.
        reuses: whether a step attends keys and values that an earlier forward wrote.
        recomputes: what a step recomputes, in words.
        refresh_commits: what a refresh commits.
        steps_after_refresh: whether a row that was refreshed takes a step with the others, before the host looks at it.
        has_block_steps: whether some steps are over a whole block, and others over a sub-block of it.
    """

    name: ClassVar[CacheName]
    reuses: ClassVar[bool]
    recomputes: ClassVar[str]

    @property
    def refresh_commits(self) -> RefreshCommits:
        return "rule"

    @property
    def steps_after_refresh(self) -> bool:
        return True

    @property
    def has_block_steps(self) -> bool:
        return False

    def refreshes_prompt(self, block: BlockState) -> bool:
        """Whether a refresh recomputes the prompt as well."""
        return True

    def next_window(self, block: BlockState) -> Window:
        """The window of a row's next forward."""
        return self.refresh(block) if self.needs_refresh(block) else self.step(block)

    @abstractmethod
    def needs_refresh(self, block: BlockState) -> bool:
        """Whether the next forward is a refresh."""

    @abstractmethod
    def attend_end(self, block: BlockState) -> int:
        """The end of what is computed and attended."""

    @abstractmethod
    def refresh(self, block: BlockState) -> Window:
        """The window of a refresh."""

    @abstractmethod
    def step(self, block: BlockState) -> Window:
        """The window of a step."""


@dataclass(frozen=True, kw_only=True)
class BidirectionalCache(CachePolicy):
    """Caches of models whose positions attend all others: what a block changes makes everything before and behind it stale.

    Attributes:
        refresh_every: forwards from one refresh to the next within a block; only at its start if None.
        suffix_window: masked slots after the block that are computed and attended (cf. DPad, arXiv 2508.14148); all if None.
    """

    refresh_every: int | None = field(
        default=None, metadata={"help": "Forwards between refreshes of the cache within a block (only at its start)."}
    )
    suffix_window: int | None = field(
        default=None, metadata={"help": "Masked slots after the block that are computed (all of them)."}
    )

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


@dataclass(frozen=True, kw_only=True)
class NoCache(BidirectionalCache):
    """Every forward recomputes everything. The first one of a block counts as its refresh."""

    name: ClassVar[CacheName] = "none"
    reuses: ClassVar[bool] = False
    recomputes: ClassVar[str] = "everything"

    def step(self, block: BlockState) -> Window:
        """The window of a step: everything."""
        end = self.attend_end(block)
        return Window(0, end, end, "step")


@dataclass(frozen=True, kw_only=True)
class PrefixCache(BidirectionalCache):
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


@dataclass(frozen=True, kw_only=True)
class BlockCausal(CachePolicy):
    """The cache of models that are bidirectional inside a block and causal between blocks: a finished block's keys and values
    are final. They are stored by one forward over it, which is one with the first step of the next block unless
    ``separate_store`` or the next block's first token keeps them apart.

    Attributes:
        sub_block_cache: a step recomputes its sub-block alone, once a forward has recomputed the whole block, and the first token
            of the sub-block is known (Fast-dLLM v2's ``use_block_cache``). The rest of the block is stale meanwhile.
        separate_store: a forward of its own stores a finished block, as in SDAR's official code. The tokens are the same.
        first_from_store: the last position of a finished block predicts the first token of the next one, which the store commits
            (models with shifted predictions).
    """

    name: ClassVar[CacheName] = "block_causal"
    reuses: ClassVar[bool] = True
    recomputes: ClassVar[str] = "the block"

    sub_block_cache: bool = field(
        default=False, metadata={"help": "Recompute the sub-block alone where its first token is known (block-causal models)."}
    )
    separate_store: bool = field(
        default=False, metadata={"help": "Store a finished block by a forward of its own (block-causal models)."}
    )
    first_from_store: bool = False

    @property
    def refresh_commits(self) -> RefreshCommits:
        return "first" if self.first_from_store else "nothing" if self.separate_store else "rule"

    @property
    def steps_after_refresh(self) -> bool:
        """Blocks are short: one that a refresh has finished should not take a step for nothing."""
        return self.refresh_commits != "rule"

    @property
    def has_block_steps(self) -> bool:
        return self.sub_block_cache

    def refreshes_prompt(self, block: BlockState) -> bool:
        """Whether a refresh is a prefill."""
        return block.ordinal == 0

    def needs_refresh(self, block: BlockState) -> bool:
        """Whether something before the block is not stored."""
        return block.stored < block.causal_start

    def attend_end(self, block: BlockState) -> int:
        """The end of the block."""
        return block.causal_end

    def refresh(self, block: BlockState) -> Window:
        """What is not stored of the blocks before, and the block itself if it can be decoded in the same forward."""
        end = block.causal_end if self.refresh_commits == "rule" else block.causal_start
        return Window(block.stored, end, end, "refresh", stored=block.causal_start)

    def step(self, block: BlockState) -> Window:
        """The block; or the sub-block."""
        start, end = block.causal_start, block.causal_end
        if not self.sub_block_cache:
            return Window(start, end, end, "step")
        if block.starts_masked or block.cached_block != start:
            return Window(start, end, end, "block_step")
        return Window(block.start, block.end, end, "step")


@dataclass(frozen=True, kw_only=True)
class NoBlockCausalCache(BlockCausal):
    """No cache for such models: every forward recomputes everything up to the end of the block."""

    name: ClassVar[CacheName] = "none"
    reuses: ClassVar[bool] = False
    recomputes: ClassVar[str] = NoCache.recomputes

    def needs_refresh(self, block: BlockState) -> bool:
        """Whether the first token of the block is to come from the blocks before."""
        return self.first_from_store and block.stored < block.causal_start

    def refresh(self, block: BlockState) -> Window:
        """All blocks before."""
        return replace(super().refresh(block), start=0)

    def step(self, block: BlockState) -> Window:
        """Everything up to the end of the block."""
        return Window(0, block.causal_end, block.causal_end, "step")


#: The policies by the names that the option ``cache`` takes.
CACHE_POLICIES: dict[CacheName, type[CachePolicy]] = {kind.name: kind for kind in (NoCache, PrefixCache, DualCache, BlockCausal)}


def _options(kind: type[CachePolicy]) -> list[Field[Any]]:
    """What of a policy is for its user to say."""
    return [option for option in fields(kind) if "help" in option.metadata]


#: The options of each policy.
CACHE_OPTIONS = {name: tuple(option.name for option in _options(kind)) for name, kind in CACHE_POLICIES.items()}


def cache_options() -> dict[str, Field[Any]]:
    """The options of all policies by name, each with its default and, as ``metadata["help"]``, what it does."""
    return {option.name: option for kind in CACHE_POLICIES.values() for option in _options(kind)}


def cache_policy(name: CacheName, **options: Any) -> CachePolicy:
    """The policy of a name.

    Raises:
        ValueError: there is no such cache.
        TypeError: it has no such option.
    """
    if name not in CACHE_POLICIES:
        raise ValueError(f"cache must be one of {', '.join(CACHE_POLICIES)}, got {name!r}")
    return CACHE_POLICIES[name](**options)


def decoded_blocks(prompt_length: int, gen_length: int, length: int, causal: int = 0) -> list[tuple[int, int]]:
    """The positions ``[start, end)`` of the blocks of a generation, left to right.

    Args:
        prompt_length, gen_length: in tokens.
        length: of a block that is decoded; of a sub-block, where blocks have some.
        causal: tokens of the blocks that attention is causal between. They are counted from position 0, so that the first block
            may begin with the end of the prompt, and the last one end behind the generation. 0: blocks begin with the generation.
    """
    first = prompt_length // length * length if causal else prompt_length
    return [(start, start + length) for start in range(first, prompt_length + gen_length, length)]


def play(
    policy: CachePolicy, prompt_length: int, gen_length: int, block_length: int, forwards: Sequence[int], causal: int = 0
) -> Iterator[Window]:
    """The windows of a whole generation of one row.

    Args:
        policy: the cache.
        prompt_length, gen_length, block_length, causal: as of :func:`decoded_blocks`.
        forwards: that each block takes, in the order of the blocks. A block that takes none is passed over.
    """
    ordinal, stored, cached = 0, 0, -1
    for (start, end), count in zip(decoded_blocks(prompt_length, gen_length, block_length, causal), forwards, strict=True):
        for done in range(count):
            block = BlockState(
                prompt_length, prompt_length + gen_length, start, end, ordinal, done, causal, stored, cached, done == 0
            )
            window = policy.next_window(block)
            stored, cached = block.behind(window)
            yield window
        ordinal += count > 0

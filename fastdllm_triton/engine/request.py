"""A request: what it asks for, where it stands, and what came of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..decoding.cache_policy import BlockState, CachePolicy, RefreshCommits, Window, decoded_blocks
from ..decoding.config import GenerationConfig, ResolvedIds
from ..models.config import ModelConfig
from .outputs import GenerationOutput, RowRecord
from .prefix_store import PrefixStore


class Aborted(RuntimeError):
    """A request was ended by its caller."""


@dataclass(eq=False)
class Request:
    """A sequence to decode.

    Attributes:
        request_id: what its caller calls it.
        tokens: prompt and generation as they are at the start; what is to be decoded is ``[MASK]``. Of a block-causal model up to
            the end of a block, which may lie behind the generation.
        prompt_length: tokens before the generation; negative for a text that is shorter than ``gen_length``.
        config: the options.
        ids: token ids that the options mean.
        seed: key of every random number that is drawn for it.
        policy: which windows its forwards recompute.
        causal: tokens of the blocks that attention is causal between; 0 where it is bidirectional.
        cohort: requests of one cohort begin each block together, if their options say ``lockstep``.
        tokenizer: what the output's ``texts`` decode with, or None.
        reuse: where finished blocks are taken over from and kept, or None.
        ordinal: how many of them it has begun, less one.
        block_forwards: forwards that it has had in its block.
        stored: positions from 0 on whose keys and values are final (block-causal models).
        cached_block: where the last block begins that a forward recomputed as a whole.
        starts_masked: whether the first token of its block was masked when the host last looked.
        masked: slots of its block that are still masked, at most.
        history: indices of the engine's forwards that it took part in: the device numbers those of a row by themselves.
        pending: those of the forwards since the host last read how many of them the row still needed.
        refresh_indices: those of the forwards that rebuilt its cache.
        record: its row as it was when it left; None before.
        error: what stopped it, if something did.
        started: when its first forward began.
        seconds: wall time from then on.
    """

    request_id: int | str
    tokens: list[int]
    prompt_length: int
    config: GenerationConfig
    ids: ResolvedIds
    seed: int
    policy: CachePolicy
    causal: int = 0
    cohort: object = None
    tokenizer: object | None = None
    reuse: PrefixStore | None = None
    ordinal: int = -1
    block_forwards: int = 0
    stored: int = 0
    cached_block: int = -1
    starts_masked: bool = True
    masked: int = 0
    history: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    refresh_indices: set[int] = field(default_factory=set)
    record: RowRecord | None = None
    error: Exception | None = None
    started: float | None = None
    seconds: float = 0.0

    def __len__(self) -> int:
        return self.prompt_length + self.config.gen_length

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The positions ``[start, end)`` of its blocks, or of their sub-blocks."""
        return decoded_blocks(self.prompt_length, self.config.gen_length, self.config.decoded_length, self.causal)

    @cached_property
    def blocks(self) -> Sequence[int]:
        """The blocks that have something masked, from 0, up to one that has nothing masked and ends the row."""
        blocks = []
        for block in range(len(self.bounds)):
            tokens = self.block_tokens(block)
            if self.ids.mask_id in tokens:
                blocks.append(block)
            elif self.config.stop_at_eos and not set(tokens).isdisjoint(self.ids.eos_ids):
                break
        return blocks

    @cached_property
    def group(self) -> Hashable:
        """What of a forward's program cannot differ between rows, and the cache: those with equal ones can share forwards."""
        config, ids = self.config, self.ids
        return (
            self.policy.name,
            config.decoded_length,
            self.policy if self.causal else None,
            config.strategy.score,
            config.strategy.rule,
            self.refresh_commits,
            config.logits_dtype,
            ids.mask_id,
            ids.commit_last,
            ids.never_or_last if ids.commit_last else (),
            config.cfg_scale,
            config.tempered,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end it; none if it is decoded to its last block whatever is in it."""
        return self.ids.eos_ids if self.config.stop_at_eos else ()

    @property
    def forbidden(self) -> tuple[int, ...]:
        """The tokens that are never committed."""
        return self.ids.forbidden

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The share of its masked tokens that each forward of a block commits; of the rule ``schedule`` only."""
        return self.config.shares

    def block_tokens(self, block: int) -> list[int]:
        """The tokens of a block as they are at the start; fewer where the row is shorter than its generation."""
        start, end = self.bounds[block]
        return self.tokens[max(start, 0) : max(end, 0)]

    @property
    def block(self) -> int:
        """The block that it stands at."""
        return self.blocks[max(self.ordinal, 0)]

    @property
    def span(self) -> tuple[int, int]:
        """The slots of that block, counted from the first generated one."""
        start, end = self.bounds[self.block]
        return start - self.prompt_length, end - self.prompt_length

    @property
    def block_state(self) -> BlockState:
        """Where it stands, as cache policies know it."""
        return BlockState(
            self.prompt_length,
            len(self),
            *self.bounds[self.block],
            ordinal=self.ordinal,
            forwards=self.block_forwards,
            causal=self.causal,
            stored=self.stored,
            cached_block=self.cached_block,
            starts_masked=self.starts_masked,
        )

    def step_window_start(self, slots: int) -> int:
        """First slot of the window of its steps, in buffers of ``slots`` slots."""
        block = self.block_state
        start = block.start if self.policy.has_block_steps else self.policy.step(block).start
        # A text that is shorter than its generation has a block that begins before it.
        return max(slots - len(self.tokens) + min(start, block.start), 0)

    @property
    def block_done(self) -> bool:
        """Whether nothing in its block is masked."""
        return self.masked == 0

    @property
    def finished(self) -> bool:
        """Whether it is over, for good or for bad."""
        return self.record is not None or self.error is not None

    @cached_property
    def refresh_commits(self) -> RefreshCommits:
        """What its refreshes commit."""
        return "first" if self.config.commits_first_alone else self.policy.refresh_commits

    @property
    def skips_commit(self) -> bool:
        """Whether the refresh of its block commits nothing: it would commit the block's first token, and that is fixed."""
        if self.refresh_commits == "rule":
            return False
        first = self.block_state.causal_start
        return self.refresh_commits == "nothing" or first < 0 or self.tokens[first] != self.ids.mask_id

    def begin_block(self) -> None:
        """Moves on to its next block."""
        self.ordinal += 1
        self.block_forwards, self.masked, self.starts_masked = 0, self.config.decoded_length, True

    @property
    def reusable(self) -> list[int]:
        """The tokens at its start whose keys and values may come from a request before it: those of whole blocks."""
        # The last position of a block that predicts the first token behind it is needed itself.
        last = self.prompt_length - (self.policy.refresh_commits == "first")
        return self.tokens[: max(last, 0) // self.causal * self.causal]

    def next_window(self) -> Window:
        """The window of its next forward, which is then behind it."""
        block = self.block_state
        window = self.policy.next_window(block)
        self.block_forwards += 1
        self.stored, self.cached_block = block.behind(window)
        return window

    @property
    def output(self) -> GenerationOutput:
        """What was generated.

        Raises:
            RuntimeError: it is not finished, or was aborted before it began.
        """
        if self.record is None:
            rest = "was aborted before it began" if self.error else "is not finished; step the engine until it is"
            raise RuntimeError(f"request {self.request_id!r} {rest}")
        refreshes = sum(index in self.refresh_indices for index in self.history)
        generated = slice(-self.config.gen_length, None)
        return GenerationOutput(
            sequences=self.record.tokens[None],
            gen_length=min(self.config.gen_length, len(self)),
            refreshes=refreshes,
            steps=len(self.history) - refreshes,
            row_forwards=torch.tensor([len(self.history)], dtype=torch.int32),
            step_map=self.record.step_map[None, generated],
            confidence=self.record.confidence[None, generated],
            seconds=self.seconds,
            eos_ids=self.ids.eos_ids,
            tokenizer=self.tokenizer,
        )


def batch_requests(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None,
    config: GenerationConfig,
    model: ModelConfig,
    reuse: PrefixStore | None = None,
) -> list[Request]:
    """The requests of prompts that are decoded together, in one cohort.

    Args:
        prompts: token ids of each row.
        answers: the last ``gen_length`` tokens of each row as they are at the start; all ``[MASK]`` if not given.
        config: the options.
        model: the model's shape.
        reuse: where finished blocks are taken over from and kept.

    Raises:
        ValueError: an option does not fit the model or the number of prompts.
    """
    ids = config.resolve(model, len(prompts))
    answers = answers or [[ids.mask_id] * config.gen_length] * len(prompts)
    return [
        new_request(row, prompt, answer, config, ids, model, cohort=ids, reuse=reuse)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def new_request(
    row: int,
    prompt: Sequence[int],
    answer: Sequence[int],
    config: GenerationConfig,
    ids: ResolvedIds,
    model: ModelConfig,
    **options: Any,
) -> Request:
    """The request of one prompt.

    Args:
        row: whose seed it has.
        prompt, answer: token ids.
        config, ids: the options.
        model: the model's shape.
        options: other attributes of the request; its id is the row if not given.
    """
    policy = config.cache_policy(shift=model.shift, block_causal=model.block_causal)
    causal = config.block_length if model.block_causal else 0
    tokens = [*prompt, *answer]
    if causal and len(tokens) % causal:
        # Where a store gives the only token of the last block, that block takes no step.
        alone = policy.refresh_commits == "first" and len(tokens) % causal == 1
        tokens += [ids.filler if alone else ids.mask_id] * (-len(tokens) % causal)
    of_request: dict[str, Any] = {"request_id": row, "prompt_length": len(prompt) + len(answer) - config.gen_length} | options
    return Request(tokens=tokens, config=config, ids=ids, seed=ids.seeds[row], policy=policy, causal=causal, **of_request)

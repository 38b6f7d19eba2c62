"""Block-wise decoding of a masked-diffusion model: Algorithm 1 of Fast-dLLM (arXiv 2505.22618) over windows, row by row.

A forward recomputes a window of slots in place. The first forward of a block, a refresh, rebuilds the cache and is also the
block's first decoding step; steps follow until nothing in the block is masked. The rows of a batch need not stand at the same
block: those that begin one are refreshed together, then all take a step.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ..decoding.config import GenerationConfig, Resolved
from ..kernels._limits import MAX_BLOCK, MAX_EOS, MAX_FORBIDDEN, MAX_ROWS
from ..models.token_ids import check_range
from ..models.transformer import Transformer
from ..utils.environment import BACKEND, GRAPHS
from .buckets import buckets, window_bucket
from .memory import check_memory
from .modes import decoding_modes
from .outputs import GenerationOutput
from .runner import Batch, Program


class Committed(NamedTuple):
    """A token that a forward committed.

    Attributes:
        row: of the batch.
        position: within the generation, from 0.
        token: its id.
        confidence: the model's probability of it at that forward.
    """

    row: int
    position: int
    token: int
    confidence: float


@dataclass(frozen=True)
class Forward:
    """What is known after a forward. Columns and rows are those of the output; ``[B, L]`` tensors are made when asked for.

    Attributes:
        index: of the forward, from 0.
        refresh: whether it rebuilt the cache.
        rows: the rows of the batch that it decoded.
        blocks: the block that each of them stands at, from 0.
        windows: the columns ``[first, last)`` that it recomputed of each of them.
        mask_id: the token of a masked slot.
    """

    index: int
    refresh: bool
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    mask_id: int
    _run: _Run

    @property
    def x(self) -> Tensor:
        """``[B, L]`` int64: the sequences, masks included, as they are now."""
        return self._run.records()[0]

    @property
    def step_map(self) -> Tensor:
        """``[B, L]`` int32: the forward that committed each slot; ``-1`` where none did."""
        return self._run.records()[1]

    @property
    def confidence(self) -> Tensor:
        """``[B, L]`` float32: the probability of each committed token at that forward; NaN where none was."""
        return self._run.records()[2]

    @property
    def committed(self) -> list[Committed]:
        """What this forward committed, row by row from left to right; to be asked for before the next forward."""
        x, step_map, confidence = self._run.records()
        first = x.shape[1] - self._run.config.gen_length
        found = step_map == self.index
        places = found.nonzero().tolist()
        values = zip(places, x[found].tolist(), confidence[found].tolist(), strict=True)
        return [Committed(row, column - first, token, sure) for (row, column), token, sure in values]


class Generation:
    """A generation that is under way: an iterator that runs it forward by forward.

    Prompts are left padded to one length. Padding is neither attended nor counted as positions, so each row gets the
    tokens it would get alone.

    Args:
        network: the model.
        prompts: token ids of each row, of any lengths. A ``[MASK]`` in a prompt stays one.
        config: the options.
        tokenizer: what the output's ``texts`` decode with, or None.
        answers: the last ``gen_length`` tokens of each row as they are at the start: ``[MASK]`` where they are to be decoded;
            all of them are if not given. What else is there is fixed: it is attended from the start, never overwritten, and
            counts neither as committed nor in the schedule of a strategy. A block without masks takes no forward.
        whole: whether each prompt and its answer are one text: the output's ids and texts are then those of whole rows,
            prompts may be empty, and answers of an empty prompt shorter than ``gen_length``.

    Raises:
        ValueError: a prompt is empty, too long, or holds an id outside the vocabulary; an option does not fit the model.
        MemoryError: the cache does not fit; says what is needed and what there is.
    """

    def __init__(
        self,
        network: Transformer,
        prompts: list[list[int]],
        config: GenerationConfig,
        tokenizer: object | None = None,
        *,
        answers: list[list[int]] | None = None,
        whole: bool = False,
    ) -> None:
        if whole and answers is not None:
            check_prompts([*map(add, prompts, answers)], config, network, whole=True)
        else:
            check_prompts(prompts, config, network)
        ids = config.resolve(network.config, len(prompts))
        if network.ops.name == "triton":
            check_kernel_limits(len(prompts), config.block_length, ids)
        masks = [[ids.mask_id] * config.gen_length] * len(prompts)
        with decoding_modes(network.device):
            self._run = _Run(network, prompts, answers or masks, config, ids)
        self._forwards = self._run.forwards()
        self._tokenizer, self._whole = tokenizer, whole
        _open.add(self)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Forward:
        with decoding_modes(self._run.network.device):
            return next(self._forwards)

    @property
    def batch(self) -> Batch:
        """The buffers on the device, for those who look inside; rows stand in the order of the batch, which changes."""
        with decoding_modes(self._run.network.device):
            return self._run.batch

    def close(self) -> None:
        """Ends it where it is; what it held on the device serves the next generation."""
        with decoding_modes(self._run.network.device):
            self._forwards.close()

    def output(self) -> GenerationOutput:
        """The result; before the end, what there is so far, masks included."""
        return replace(self._run.output(), tokenizer=self._tokenizer, starts=self._run.starts if self._whole else None)


#: Generations that somebody holds. Those that were left are closed while PyTorch is still whole: a generator with tensors that
#: is torn down with the interpreter aborts it.
_open: weakref.WeakSet[Generation] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for generation in list(_open):
        generation.close()


def run(generation: Generation, callback: Callable[[Forward], None] | None = None) -> GenerationOutput:
    """Runs a generation to its end.

    Args:
        generation: as it was made.
        callback: called after each forward.

    Returns:
        The sequences and the record of how they came about.

    Raises:
        TypeError: ``callback`` cannot be called; raised before any forward.
        FloatingPointError: a forward gave a row logits that are NaN or nowhere finite.
        BaseException: whatever stopped it, an interrupt or an exception of the callback. Its attribute ``output`` then holds
            the :class:`~fastdllm_triton.decoding.GenerationOutput` so far.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a Forward, got {callback!r}")
    try:
        for forward in generation:
            if callback is not None:
                callback(forward)
    except BaseException as error:
        error.output = generation.output()  # type: ignore[attr-defined]
        raise
    return generation.output()


@dataclass(eq=False)
class _Row:
    """Where a row of the batch stands.

    Attributes:
        origin: its place in the batch as given.
        blocks: those that it decodes: all that have something masked.
        begun: how many of them it has begun, less one.
        forwards: that it has had in this block.
        left: slots of the block that are still masked, at most.
        took_part: indices of the forwards that it took part in: the device numbers a row's forwards by themselves.
        pending: indices of the forwards since the host last read how many of them the row still needed.
    """

    origin: int
    blocks: list[int]
    begun: int = -1
    forwards: int = 0
    left: int = 1
    took_part: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the block is complete."""
        return self.left == 0

    @property
    def block(self) -> int:
        """The block it decodes."""
        return self.blocks[self.begun]


class _Run:
    """Algorithm 1: which rows are refreshed, stepped, moved on and let go.

    The first ``len(self.rows)`` rows of the batch are those that are not finished, in the order of ``self.rows``.
    """

    def __init__(
        self,
        network: Transformer,
        prompts: list[list[int]],
        answers: list[list[int]],
        config: GenerationConfig,
        ids: Resolved,
    ) -> None:
        self.network, self.config, self.ids, self.answers = network, config, ids, answers
        sequences = [*map(add, prompts, answers)]
        device, self.columns = network.device, max(config.gen_length, *map(len, sequences))
        self.rows_bucket, slots_bucket = buckets(device)
        self.window_bucket = window_bucket(device)
        self.size = (self.rows_bucket(len(prompts)), slots_bucket(self.columns))
        self.program = Program.of(network, config, ids)
        self.lengths = [len(sequence) for sequence in sequences]
        self.rows = [_Row(row, self.blocks_to_decode(answer)) for row, answer in enumerate(answers)]
        self.make_room()
        self.refreshes = self.steps = 0
        self.started, self.seconds, self.running = 0.0, 0.0, True
        padded = [[ids.filler] * (self.columns - len(sequence)) + sequence for sequence in sequences]
        self._x = torch.tensor(padded, dtype=torch.int64, device=device)
        self._step_map = torch.full(self._x.shape, -1, dtype=torch.int32, device=device)
        self._confidence = torch.full(self._x.shape, torch.nan, dtype=torch.float32, device=device)
        self._row_forwards = torch.zeros(len(prompts), dtype=torch.int32, device=device)
        self._recorded = 0
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        """The buffers, which a generation has from its first forward on."""
        if self._batch is None:
            self._batch = self.begin()
        return self._batch

    def make_room(self) -> None:
        """Sees to it that there are buffers or memory for them, at the expense of buffers that nobody uses."""
        buffers = self.network.buffers
        while not buffers.serves(self.program, *self.size):
            try:
                check_memory(self.network, len(self.rows), *self.size, self.config)
                return
            except MemoryError:
                if not buffers.free_one():
                    raise

    def begin(self) -> Batch:
        """Buffers that hold the prompts: those of a generation before, or new ones."""
        self.make_room()
        batch = self.network.buffers.take(self.program, *self.size) or Batch(self.network, *self.size, self.program)
        self.padding = batch.slots - self.columns  # slots in front of the output's first column
        self.kv_start = [batch.slots - length for length in self.lengths]
        batch.fill(self._x, self.kv_start, self.ids.seeds, self.config, self.ids.filler)
        return batch

    def forwards(self) -> Generator[Forward]:
        """Decodes, a forward at a time."""
        self.started = _now(self.network.device)
        batch = self.batch
        try:
            for i in reversed([i for i, row in enumerate(self.rows) if not row.blocks]):
                self.let_go(i)
            self.move_on(self.rows)
            while self.rows:
                due = [row for row in self.rows if self.is_due(row)]
                if due:
                    self.bring_forward(due)
                if self.config.cache == "none":  # Every forward recomputes everything: there is nothing to refresh apart.
                    yield self.step(refresh=bool(due))
                else:
                    whole = sum(map(self.renews_prompt, due))
                    if whole:
                        yield self.refresh(0, whole, min(self.kv_start[row.origin] for row in self.rows[:whole]))
                    if whole < len(due):
                        yield self.refresh(whole, len(due), self.batch.slots - self.config.gen_length)
                    if any(not row.done for row in self.rows[len(due) :]):
                        yield self.step()
                self.look()
        finally:
            self.record()
            self.running = False
            self.seconds = _now(self.network.device) - self.started
            self.network.buffers.give(batch)  # The next generation like this one finds its forwards captured.

    def tokens_of(self, answer: list[int], block: int) -> list[int]:
        """The tokens of a block as they are at the start; fewer in an answer that is shorter than the generation."""
        missing, length = self.config.gen_length - len(answer), self.config.block_length
        return answer[max(block * length - missing, 0) : max((block + 1) * length - missing, 0)]

    def blocks_to_decode(self, answer: list[int]) -> list[int]:
        """The blocks of a row that have something masked, up to one that has nothing masked and ends the row."""
        blocks = []
        for block in range(self.config.blocks):
            tokens = self.tokens_of(answer, block)
            if self.ids.mask_id in tokens:
                blocks.append(block)
            elif self.config.stop_at_eos and not set(tokens).isdisjoint(self.ids.eos_ids):
                break
        return blocks

    def move_on(self, rows: list[_Row]) -> None:
        """Lets rows begin their next block."""
        for row in rows:
            row.begun, row.forwards, row.left = row.begun + 1, 0, self.config.block_length
        moved = set(rows)
        for first, last in _runs([i for i, row in enumerate(self.rows) if row in moved]):
            self.batch.begin(first, last)

    def is_due(self, row: _Row) -> bool:
        """Whether the next forward of a row rebuilds its cache: the first of a block, and those asked for within it."""
        every = self.config.refresh_every
        return not row.done and (row.forwards % every == 0 if every else row.forwards == 0)

    def renews_prompt(self, row: _Row) -> bool:
        """Whether a refresh of a row recomputes its prompt as well."""
        return row.begun % (self.config.prompt_refresh or 1) == 0

    def bring_forward(self, due: list[_Row]) -> None:
        """Puts the rows that are due in front, those that renew their prompt first, and tells the device where all stand."""
        ahead = set(due)

        def key(row: _Row) -> int:
            return (0 if self.renews_prompt(row) else 1) if row in ahead else 2

        wanted = sorted(map(key, self.rows))
        for i, kind in enumerate(wanted):
            if key(self.rows[i]) != kind:
                j = next(j for j in range(i + 1, len(wanted)) if key(self.rows[j]) == kind != wanted[j])
                self.batch.swap(i, j)
                self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
        self.batch.place([self.start_of(row) for row in self.rows], [self.end_of(row) for row in self.rows])

    def start_of(self, row: _Row) -> int:
        """First slot of a row's block."""
        return self.batch.slots - self.config.gen_length + row.block * self.config.block_length

    def end_of(self, row: _Row) -> int:
        """End of the slots that a row computes and attends: all, or a suffix window behind its block."""
        suffix = self.config.suffix_window
        everything = self.batch.slots
        return everything if suffix is None else min(everything, self.start_of(row) + self.config.block_length + suffix)

    def refresh(self, first: int, last: int, start: int) -> Forward:
        """Recomputes everything from ``start`` on for the rows ``[first, last)``."""
        rows = self.rows[first:last]
        spans = {(self.kv_start[row.origin], self.end_of(row)) for row in rows}
        span = spans.pop() if len(spans) == 1 else None
        self.batch.refresh(self.network, first, last, start, max(map(self.end_of, rows)) - start, span)
        return self.forward(True, rows, [(start, self.end_of(row)) for row in rows])

    def step(self, refresh: bool = False) -> Forward:
        """Recomputes the step windows of all rows; those that are done are no-ops."""
        config, rows = self.config, [row for row in self.rows if not row.done]
        if config.cache == "none":
            windows = [(min(self.kv_start), self.end_of(row)) for row in rows]
        else:
            ahead = config.look_ahead if config.cache == "dual" else self.batch.slots
            starts = [self.start_of(row) for row in rows]
            ends = [min(start + config.block_length + ahead, self.end_of(row)) for start, row in zip(starts, rows, strict=True)]
            look_back = self.program.look_back
            windows = [(max(start - look_back, 0), end) for start, end in zip(starts, ends, strict=True)]
        window = self.window_bucket(max(end - start for start, end in windows))
        self.batch.step(self.network, self.rows_bucket(len(self.rows)), window)
        return self.forward(refresh, rows, windows)

    def forward(self, refresh: bool, rows: list[_Row], windows: list[tuple[int, int]]) -> Forward:
        """Counts a forward."""
        self.refreshes += refresh
        self.steps += not refresh
        for row in rows:
            row.forwards += 1
            if not (refresh and self.skips_commit(row)):
                row.pending.append(self.refreshes + self.steps - 1)
        columns = [
            (max(first, self.kv_start[row.origin]) - self.padding, last - self.padding)
            for row, (first, last) in zip(rows, windows, strict=True)
        ]
        origins, blocks = tuple(row.origin for row in rows), tuple(row.block for row in rows)
        return Forward(self.refreshes + self.steps - 1, refresh, origins, blocks, tuple(columns), self.ids.mask_id, self)

    def skips_commit(self, row: _Row) -> bool:
        """Whether a refresh of a row commits nothing: it would commit the first token of the block, and that is fixed."""
        tokens = self.tokens_of(self.answers[row.origin], row.block)
        return self.program.first_alone and (len(tokens) < self.config.block_length or tokens[0] != self.ids.mask_id)

    def look(self) -> None:
        """Reads how far the rows are: those whose block is done move on, those that are finished leave the batch."""
        remaining, ended, invalid, forwards = self.batch.look(len(self.rows))
        for row, count in zip(self.rows, forwards, strict=True):
            # A step behind the refresh that completed the block is none of the row's.
            row.took_part += row.pending[: count - len(row.took_part)]
            row.pending.clear()
        if any(invalid):
            rows = ", ".join(str(row.origin) for row, bad in zip(self.rows, invalid, strict=True) if bad)
            forward = self.refreshes + self.steps - 1
            raise FloatingPointError(f"forward {forward} gave logits that are NaN or nowhere finite in row {rows}")
        stuck = [row for row, left in zip(self.rows, remaining, strict=True) if row.left and left >= row.left]
        if stuck:
            rows = ", ".join(str(row.origin) for row in stuck)
            raise RuntimeError(
                f"forward {self.refreshes + self.steps - 1} committed nothing in row {rows}, which has masked slots: a captured "
                f"forward or a kernel is broken; try {GRAPHS.name}=0, then {BACKEND.name}=reference; `fastdllm-triton verify` "
                "says which"
            )
        for row, left in zip(self.rows, remaining, strict=True):
            row.left = left
        finished = [i for i, row in enumerate(self.rows) if row.done and (ended[i] or row.block == row.blocks[-1])]
        for i in reversed(finished):
            self.let_go(i)
        if not self.config.lockstep or all(row.done for row in self.rows):
            self.move_on([row for row in self.rows if row.done])

    def let_go(self, i: int) -> None:
        """Records a row and gives its place to the last one."""
        if self.config.stop_at_eos:  # What is still masked comes after an end token.
            answer = self.batch.x[i, -self.config.gen_length :]
            answer.masked_fill_(answer == self.ids.mask_id, self.ids.eos_ids[0])
        self._record(i)
        last = self.rows.pop()
        if i < len(self.rows):
            self.batch.move(len(self.rows), i)
            self.rows[i] = last

    @property
    def starts(self) -> tuple[int, ...]:
        """The first column of each row that is not padding."""
        return tuple(self.columns - length for length in self.lengths)

    def records(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences, step map and confidence of all rows, as they are now."""
        self.record()
        return self._x, self._step_map, self._confidence

    def record(self) -> None:
        """Brings the records of the rows that are not finished up to date."""
        now = self.refreshes + self.steps
        if self.running and self._recorded != now:
            for i in range(len(self.rows)):
                self._record(i)
            self._recorded = now

    def _record(self, i: int) -> None:
        batch, origin, own = self.batch, self.rows[i].origin, slice(self.padding, None)
        self._x[origin].copy_(batch.x[i, own])
        indices = torch.tensor([*self.rows[i].took_part, *self.rows[i].pending, -1], dtype=torch.int32, device=self._x.device)
        self._step_map[origin].copy_(indices[batch.state.step_map[i, own]])  # -1, no forward, is the last entry.
        self._confidence[origin].copy_(batch.state.confidence[i, own])
        self._row_forwards[origin].copy_(batch.state.forward[i])

    def output(self) -> GenerationOutput:
        """The result."""
        self.record()
        generated = slice(self.columns - self.config.gen_length, None)
        return GenerationOutput(
            sequences=self._x,
            gen_length=self.config.gen_length,
            refreshes=self.refreshes,
            steps=self.steps,
            row_forwards=self._row_forwards,
            step_map=self._step_map[:, generated],
            confidence=self._confidence[:, generated],
            seconds=_now(self.network.device) - self.started if self.running and self.started else self.seconds,
            eos_ids=self.ids.eos_ids,
        )


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending indices as ranges ``[first, last)``."""
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        yield members[0], members[-1] + 1


def check_prompts(prompts: Sequence[list[int]], config: GenerationConfig, network: Transformer, *, whole: bool = False) -> None:
    """Raises ``ValueError`` for prompts that a model cannot continue or, where they are ``whole`` texts, cannot take."""
    c = network.config
    most = c.max_length if whole else c.max_length - config.gen_length
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if not whole and config.gen_length >= c.max_length:
        raise ValueError(f"gen_length must be below the {c.max_length} tokens that the model takes, got {config.gen_length}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts: row {row} is empty; every prompt needs at least one token")
        if len(prompt) > most:
            beside = "" if whole else f"with gen_length = {config.gen_length} "
            raise ValueError(f"prompts: row {row} has {len(prompt)} tokens; {beside}the model takes at most {most}")
        check_range(f"prompts: row {row}", prompt, c)


def check_kernel_limits(rows: int, block_length: int, ids: Resolved) -> None:
    """Raises ``ValueError`` for what is valid but more than the selection kernels take."""
    for name, count, most in (
        ("prompts", rows, MAX_ROWS),
        ("block_length", block_length, MAX_BLOCK),
        ("forbidden", len(ids.forbidden), MAX_FORBIDDEN),
        ("commit_last and forbidden", len(ids.never_or_last), MAX_FORBIDDEN),
        ("eos_ids", len(ids.eos_ids), MAX_EOS),
    ):
        if count > most:
            raise ValueError(f"{name}: the Triton kernels take at most {most}, got {count} (forbidden counts [MASK])")


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""The static buffers of a batch, and the forward that advances rows of it: from token ids to committed tokens.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, key ranges, seeds, counters and
flags are device tensors, so that one captured step serves every block, and the host only says which rows and how wide a
window. Which rows do what and when is the engine's business (:mod:`fastdllm_triton.engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import GenerationConfig, Resolved
from .graphs import Graphs
from .models.transformer import Transformer
from .shapes import window_bucket
from .types import PolicyState, RuleName, ScoreName, TokenStatistics

#: Tokens up to which a refresh is captured. Larger ones are bound by arithmetic, and hide the host's time.
MAX_CAPTURED_TOKENS = 8192


@dataclass(frozen=True)
class Program:
    """What a captured forward has fixed. All other options are data on the device, or the host's business alone.

    Attributes:
        block_length: slots of a block.
        score, rule: of the strategy.
        temperature: of the noise.
        whole: whether a step recomputes everything.
        look_back: slots before the block that a step recomputes.
        first_alone: whether a refresh commits the first token of its block alone.
        logits_dtype: rounds logits.
        mask_id: the token of a masked slot.
        forbidden, eos_ids: token ids; no end tokens where they end nothing.
        commit_last, never_or_last: token ids that are committed once nothing else is left; those and the forbidden ones.
        cfg_scale: of guidance.
        captures: whether forwards are captured.
    """

    block_length: int
    score: ScoreName
    rule: RuleName
    temperature: float
    whole: bool
    look_back: int
    first_alone: bool
    logits_dtype: torch.dtype | None
    mask_id: int
    forbidden: tuple[int, ...]
    eos_ids: tuple[int, ...]
    commit_last: tuple[int, ...]
    never_or_last: tuple[int, ...]
    cfg_scale: float
    captures: bool

    @classmethod
    def of(cls, network: Transformer, config: GenerationConfig, ids: Resolved) -> Program:
        """The program of a generation."""
        return cls(
            block_length=config.block_length,
            score=config.strategy.score,
            rule=config.strategy.rule,
            temperature=config.temperature,
            whole=config.cache == "none",
            look_back=config.look_back_in(network.config),
            first_alone=config.refresh_commits == "first" and config.block_length > 1,
            logits_dtype=config.logits_dtype,
            mask_id=ids.mask_id,
            forbidden=ids.forbidden,
            eos_ids=ids.eos_ids if config.stop_at_eos else (),
            commit_last=ids.commit_last,
            never_or_last=ids.never_or_last,
            cfg_scale=config.cfg_scale,
            captures=network.captures and can_capture(network),
        )


def can_capture(network: Transformer) -> bool:
    """Whether forwards of a network can be captured: on a GPU, with ops that never wait for it."""
    return network.device.type == "cuda" and network.ops.name == "triton"


class Batch:
    """Buffers for ``R`` rows of ``L`` slots, decoded in blocks of ``N``.

    A row that has nothing masked in its block, and a row that was never filled, is a no-op of every forward. With guidance
    the network has ``C = 2`` rows for each: the sequence, and behind it the copy in which all that was given is masked. The
    network is an argument of what runs it: buffers that nobody uses keep no model alive.

    Attributes:
        program: what its forwards compute.
        x: ``[R, L]`` int64, the sequences.
        cache: keys and values of ``C R`` rows.
        state: what commits decide with and record.
        block_start: ``[R]`` int32, first slot of the row's block.
        forwards: ``[R]`` int32, forwards in which the row took part, those of its current block aside.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, program: Program) -> None:
        device = network.device
        self.program = program
        self._copies = 2 if program.cfg_scale else 1

        def zeros(dtype: torch.dtype = torch.int32, copies: int = 1) -> Tensor:
            return torch.zeros(rows * copies, dtype=dtype, device=device)

        self.x = zeros(torch.int64)[:, None].repeat(1, slots)
        self.block_start, self.forwards, self._window_start = zeros(), zeros(), zeros()
        self.cache = network.new_cache(zeros(copies=self._copies), slots)
        self._known = self.x.bool() if program.cfg_scale else None  # [R, L]: what the copies do not see
        self.state = PolicyState.create(
            program.score,
            program.rule,
            mask_id=program.mask_id,
            kv_start=zeros(),
            eos_ids=program.eos_ids,
            seed=zeros(torch.int64),
            slots=slots,
        )
        self._forbidden = torch.tensor(program.forbidden, device=device)
        self._commit_last = torch.tensor(program.commit_last, device=device) if program.commit_last else None
        self._never_or_last = torch.tensor(program.never_or_last, device=device)
        longest = max(window_bucket(device)(slots), rows * program.block_length)
        self._slots = torch.arange(longest, device=device)
        self._first = torch.zeros((), dtype=torch.int32, device=device)

        # The host writes and reads through pinned memory: a copy that it need not wait for.
        cuda = device.type == "cuda"
        self._starts = torch.zeros(rows, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._ends = torch.zeros(self._copies * rows, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._flags = torch.zeros((rows, 3), dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._looked = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._graphs = Graphs(device, fall_back=not network.ops.required) if program.captures else None

    @property
    def slots(self) -> int:
        """``L``."""
        return self.x.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the buffers that grow with rows and slots."""
        tensors = (self.x, self.cache.k, self.cache.v, self.state.step_map, self.state.confidence)
        return sum(tensor.nbytes for tensor in tensors)

    def serves(self, program: Program, rows: int, slots: int) -> bool:
        """Whether these buffers run a program and are large enough."""
        return program == self.program and rows <= self.x.shape[0] and slots <= self.slots

    def release(self) -> None:
        """Frees the captured forwards; the buffers go with their last user."""
        if self._graphs is not None:
            self._graphs.reset()

    def fill(
        self, sequences: Tensor, kv_start: Sequence[int], seeds: Sequence[int], config: GenerationConfig, filler: int
    ) -> None:
        """Begins anew; the rows after those given stay empty.

        Args:
            sequences: ``[B, C]`` int64, which end at the last slot.
            kv_start: first slot of each sequence.
            seeds: of each sequence.
            config: says what of a strategy is data.
            filler: a token for slots that hold nothing.
        """
        rows, state, device = len(sequences), self.state, self.x.device
        for counter in (state.step, state.masked, state.remaining, state.invalid, state.ended, state.forward, self.forwards):
            counter.zero_()
        state.value.fill_(config.strategy.value)
        # More forwards than slots: one token in each, whatever their number.
        state.steps.fill_(min(config.strategy.steps_per_block(config.blocks), config.block_length))
        state.step_map.fill_(-1)
        state.confidence.fill_(torch.nan)
        self.block_start.zero_()

        self.x.fill_(filler)
        self.x[:rows, self.slots - sequences.shape[1] :].copy_(sequences)
        state.kv_start.fill_(self.slots)
        state.kv_start[:rows].copy_(torch.tensor(kv_start, device=device))
        self._each(self.cache.kv_start).copy_(state.kv_start[:, None])
        if self._known is not None:
            self._known.copy_(self.x != self.program.mask_id)
        self.cache.kv_end.fill_(self.slots)
        state.seed[:rows].copy_(torch.tensor(seeds, device=device))
        self._first.fill_(min(kv_start))

    def place(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Tells the device where the blocks of the first rows begin, and where the keys that they attend end."""
        rows, copies = len(starts), self._copies * len(starts)
        self._starts[:rows] = torch.tensor(starts, device="cpu")
        self._ends[:copies] = torch.tensor(ends, device="cpu").repeat_interleave(self._copies)
        self.block_start[:rows].copy_(self._starts[:rows], non_blocking=True)
        self.cache.kv_end[:copies].copy_(self._ends[:copies], non_blocking=True)

    def begin(self, first: int, last: int) -> None:
        """Moves the counters of the rows ``[first, last)`` on to a new block."""
        self.forwards[first:last] += self.state.step[first:last]
        self.state.step[first:last].zero_()
        self.state.remaining[first:last].fill_(self.program.block_length)

    def swap(self, i: int, j: int) -> None:
        """Exchanges two rows."""
        for tensor in self._by_row():
            kept = tensor[i].clone()
            tensor[i].copy_(tensor[j])
            tensor[j].copy_(kept)

    def move(self, source: int, target: int) -> None:
        """Puts a row in the place of another, and leaves its own empty."""
        for tensor in self._by_row():
            tensor[target].copy_(tensor[source])
        self.state.remaining[source].zero_()

    def _by_row(self) -> list[Tensor]:
        cache = self.cache
        caches = map(self._each, (cache.k.transpose(0, 1), cache.v.transpose(0, 1), cache.kv_start, cache.kv_end))
        known = [] if self._known is None else [self._known]
        return [self.x, self.block_start, self.forwards, *caches, *known, *self.state.by_row.values()]

    def _each(self, tensor: Tensor) -> Tensor:
        """``[C R, ...]`` of the network's rows as ``[R, C, ...]``."""
        return tensor.view(-1, self._copies, *tensor.shape[1:])

    def refresh(self, network: Transformer, first: int, last: int, window_start: int, window: int) -> None:
        """Recomputes ``window`` slots from one start for the rows ``[first, last)``, and commits."""
        self._window_start[first:last].fill_(window_start)
        function = partial(self._refresh, network, first, last, window)
        if (last - first) * window <= MAX_CAPTURED_TOKENS:
            self._run(("refresh", first, last, window), function)
        else:
            function()

    def step(self, network: Transformer, rows: int, window: int) -> None:
        """Recomputes the step windows of the first ``rows`` rows, and commits."""
        self._run(("step", rows, window), partial(self._step, network, rows, window))

    def _run(self, key: tuple[str | int, ...], function: Callable[[], None]) -> None:
        """Runs a forward, captured where there is a GPU."""
        if self._graphs is None:
            function()
        else:
            self._graphs(key, function)

    def look(self, rows: int) -> tuple[list[int], list[int], list[int]]:
        """What the host must know of the first rows: masked slots left, whether ended, whether invalid.

        The one place that reads the device. On a GPU the host waits for an event behind the last forward, not for a stream.
        Reading one forward late would hide these microseconds, and pay for it with a whole forward at the end of each block.
        """
        state = self.state
        flags = torch.stack((state.remaining[:rows], state.ended[:rows].int(), state.invalid[:rows].int()), dim=1)
        if self._looked is not None:
            self._flags[:rows].copy_(flags, non_blocking=True)
            self._looked.record()
            self._looked.synchronize()
            flags = self._flags[:rows]
        remaining, ended, invalid = flags.T.tolist()
        return remaining, ended, invalid

    def _refresh(self, network: Transformer, first: int, last: int, window: int) -> None:
        start, length = self._window_start[first:last], self.program.block_length
        state = self.state.rows(first, last)
        if not self.program.first_alone:
            self._advance(network, first, last, state, start, window, length)
            return
        # A block of one token to the commit, whose end is not the row's, unless all others were fixed.
        self._advance(network, first, last, replace(state, eos_ids=state.eos_ids[:0]), start, window, 1)
        block = self.x[first:last].gather(1, self.block_start[first:last, None] + self._slots[:length])
        state.remaining.copy_((block == state.mask_id).sum(1))
        state.ended |= state.done & torch.isin(block, state.eos_ids).any(1)

    def _step(self, network: Transformer, rows: int, window: int) -> None:
        look_back = min(self.program.look_back, self.slots)
        start = self._first if self.program.whole else (self.block_start[:rows] - look_back).clamp(min=0)
        # A done row's window lies behind the cache: nothing of it is written.
        start = torch.where(self.state.done[:rows], self.slots, start)
        self._advance(network, 0, rows, self.state.rows(0, rows), start, window, self.program.block_length)

    def _advance(
        self,
        network: Transformer,
        first: int,
        last: int,
        state: PolicyState,
        window_start: Tensor,
        window: int,
        length: int,
    ) -> None:
        """Recomputes a window of some rows, takes the statistics of the first masked slots of their blocks, and commits."""
        rows, copies = last - first, self._copies
        x, block_start = self.x[first:last], self.block_start[first:last]
        slots = (window_start[:, None] + self._slots[:window]).clamp(0, self.slots - 1)  # [R, W]
        ids, starts = x.gather(1, slots), window_start
        if self._known is not None:
            copy = ids.masked_fill(self._known[first:last].gather(1, slots), state.mask_id)
            ids, starts = torch.stack((ids, copy), dim=1).flatten(0, 1), starts.repeat_interleave(copies)
        hidden = network.forward(ids, starts, self.cache.rows(copies * first, copies * last))  # [C R, W, E]

        # Only the rows that predict the block pass the final norm, only those of its masked slots the head.
        block = block_start[:, None] + self._slots[:length]  # [R, N]
        source = torch.maximum(block - 1, state.kv_start[:, None]) if network.config.shift else block
        at = (source - window_start[:, None]).clamp(0, window - 1)
        at = at[:, None].expand(-1, copies, -1).flatten(0, 1)
        hidden = network.final_norm(hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2])))
        masked = x.gather(1, block) == state.mask_id
        noise = {}
        if self.program.temperature > 0:
            keys = (state.seed[:, None], block - state.kv_start[:, None], state.step[:, None])
            noise = dict(zip(("seed", "position", "step"), (key.expand(rows, length).flatten() for key in keys), strict=True))
        statistics = self._statistics(network, hidden, masked.flatten(), noise)
        network.ops.commit_tokens(x, statistics.view(-1, length), block_start, state)

    def _statistics(self, network: Transformer, hidden: Tensor, masked: Tensor, noise: dict[str, Tensor]) -> TokenStatistics:
        """Statistics ``[R N]`` of the predictions for the masked slots of a block, from normed hidden states ``[C R, N, E]``."""
        program, ops = self.program, network.ops
        asked = torch.where(masked, self._slots[: len(masked)], -1)
        logits = self._guided_logits(network, hidden) if program.cfg_scale else None

        def without(forbidden: Tensor) -> TokenStatistics:
            options = {"temperature": program.temperature, "forbidden": forbidden, **noise}
            statistics: TokenStatistics = (
                ops.head_statistics(hidden.flatten(0, 1), network.head, rows=asked, logits_dtype=program.logits_dtype, **options)
                if logits is None
                else ops.token_statistics(logits, **options)
            )
            return statistics

        chosen = without(self._forbidden)
        if self._commit_last is None:
            return chosen
        others = without(self._never_or_last)
        last = (chosen.token[:, None] == self._commit_last).any(1)
        return replace(others, token=chosen.token, rest=torch.where(last, torch.inf, others.rest))

    def _guided_logits(self, network: Transformer, hidden: Tensor) -> Tensor:
        """``[R N, V]``: logits moved away from those of the copies that do not see what was given."""
        logits = F.linear(hidden, network.head)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Rounded where the official code rounds: every result is of the logits' dtype.
        logits, unguided = self._each(logits.to(self.program.logits_dtype or exact)).unbind(1)
        return (unguided + (self.program.cfg_scale + 1) * (logits - unguided)).flatten(0, 1)

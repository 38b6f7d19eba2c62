"""The static buffers of a batch, and the forward that advances rows of it: from token ids to committed tokens.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, key ranges, seeds, counters and
flags are device tensors, so that one captured step serves every block, and the host only says which rows and how wide a
window. Which rows do what and when is the engine's business (:mod:`fastdllm_triton.engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.config import GenerationConfig, Resolved
from ..models.transformer import Transformer
from ..types import PolicyState, RuleName, ScoreName, TokenStatistics, WindowInputs
from .buckets import window_bucket
from .cuda_graphs import Graphs

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
            look_back=getattr(config.cache_policy(shift=network.config.shift), "look_back", 0),
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


#: Predictions up to which a head takes as long as reading its weight: fewer are not worth a capture of their own.
LEAST_PREDICTIONS = 64


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
    """

    def __init__(self, network: Transformer, rows: int, slots: int, program: Program) -> None:
        device = network.device
        self.program = program
        self._copies = 2 if program.cfg_scale else 1

        def zeros(dtype: torch.dtype = torch.int32, copies: int = 1) -> Tensor:
            return torch.zeros(rows * copies, dtype=dtype, device=device)

        self.x = zeros(torch.int64)[:, None].repeat(1, slots)
        self.block_start, self._window_start = zeros(), zeros()
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
        self._left = rows * program.block_length  # masked slots left in the blocks of all rows, or more

        # The host writes and reads through pinned memory: a copy that it need not wait for.
        cuda = device.type == "cuda"
        self._starts = torch.zeros(rows, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._ends = torch.zeros(self._copies * rows, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._flags = torch.zeros((rows, 4), dtype=torch.int32, device="cpu", pin_memory=cuda)
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
        rows, state, device, self._left = len(sequences), self.state, self.x.device, 0
        for counter in (state.step, state.masked, state.remaining, state.invalid, state.ended, state.forward):
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
        self.state.step[first:last].zero_()
        self.state.remaining[first:last].fill_(self.program.block_length)
        self._left += (last - first) * self.program.block_length

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
        return [self.x, self.block_start, *caches, *known, *self.state.by_row.values()]

    def _each(self, tensor: Tensor) -> Tensor:
        """``[C R, ...]`` of the network's rows as ``[R, C, ...]``."""
        return tensor.view(-1, self._copies, *tensor.shape[1:])

    def refresh(
        self,
        network: Transformer,
        first: int,
        last: int,
        window_start: int,
        window: int,
        span: tuple[int, int] | None = None,
    ) -> None:
        """Recomputes ``window`` slots from one start for the rows ``[first, last)``, and commits.

        ``span`` is what all of these rows attend, if it is the same.
        """
        self._window_start[first:last].fill_(window_start)
        predicted = last - first if self.program.first_alone else self._predictions(last - first)
        function = partial(self._refresh, network, first, last, window, predicted, span)
        if (last - first) * window <= MAX_CAPTURED_TOKENS:
            self._run(("refresh", first, last, window, predicted, span), function)
        else:
            function()

    def step(self, network: Transformer, rows: int, window: int) -> None:
        """Recomputes the step windows of the first ``rows`` rows, and commits."""
        predicted = self._predictions(rows)
        self._run(("step", rows, window, predicted), partial(self._step, network, rows, window, predicted))

    def _predictions(self, rows: int) -> int:
        """How many slots a forward of so many rows predicts at most, as far as the host knows: what its head is as tall as.

        Exactly, where nothing is captured; else all of them, halved while they fit and the head is not fused with its statistics
        anyway, so that few captures serve.
        """
        most = rows * self.program.block_length
        if self._graphs is None:
            return max(min(self._left, most), 1)
        while most // 2 >= max(self._left, LEAST_PREDICTIONS):
            most //= 2
        return most

    def _run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs a forward, captured where there is a GPU."""
        if self._graphs is None:
            function()
        else:
            self._graphs(key, function)

    def look(self, rows: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """What the host must know of the first rows: masked slots left, whether ended, whether invalid, forwards had.

        The one place that reads the device. On a GPU the host waits for an event behind the last forward, not for a stream.
        Reading one forward late would hide these microseconds, and pay for it with a whole forward at the end of each block.
        """
        state = self.state
        columns = (state.remaining, state.ended.int(), state.invalid.int(), state.forward)
        flags = torch.stack(columns, dim=1)[:rows]
        if self._looked is not None:
            self._flags[:rows].copy_(flags, non_blocking=True)
            self._looked.record()
            self._looked.synchronize()
            flags = self._flags[:rows]
        remaining, ended, invalid, forwards = flags.T.tolist()
        self._left = sum(remaining)
        return remaining, ended, invalid, forwards

    def _refresh(
        self, network: Transformer, first: int, last: int, window: int, predicted: int, span: tuple[int, int] | None
    ) -> None:
        start, length, state = self._window_start[first:last], self.program.block_length, self.state.rows(first, last)
        if not self.program.first_alone:
            self._advance(network, first, last, state, start, 0, window, length, predicted, span)
            return
        # A block of one token to the commit, whose end is not the row's, unless all others were fixed.
        alone = replace(state, eos_ids=state.eos_ids[:, :0])
        self._advance(network, first, last, alone, start, 0, window, 1, predicted, span)
        block = self.x[first:last].gather(1, self.block_start[first:last, None] + self._slots[:length])
        state.remaining.copy_((block == state.mask_id).sum(1))
        ends = (block[:, :, None] == state.eos_ids[:, None]) & (block >= 0)[:, :, None]
        state.ended |= state.done & ends.flatten(1).any(1)

    def _step(self, network: Transformer, rows: int, window: int, predicted: int) -> None:
        # A done row's window lies behind the cache: nothing of it is written.
        base, back = (self._first, 0) if self.program.whole else (self.block_start[:rows], self.program.look_back)
        state, length = self.state.rows(0, rows), self.program.block_length
        self._advance(network, 0, rows, state, base, min(back, self.slots), window, length, predicted)

    def _advance(
        self,
        network: Transformer,
        first: int,
        last: int,
        state: PolicyState,
        base: Tensor,
        back: int,
        window: int,
        length: int,
        predicted: int,
        span: tuple[int, int] | None = None,
    ) -> None:
        """Recomputes a window of some rows, takes the statistics of the first masked slots of their blocks, and commits."""
        x, block_start, copies = self.x[first:last], self.block_start[first:last], self._copies
        keys = {"seed": state.seed, "step": state.step} if self.program.temperature > 0 else {}
        inputs = network.ops.window_inputs(
            x,
            base,
            block_start,
            state.remaining,
            state.kv_start,
            back=back,
            window=window,
            block=length,
            predicted=predicted,
            shift=network.config.shift,
            mask_id=state.mask_id,
            **keys,
        )
        noise = dict(zip(("seed", "position", "step"), inputs.keys, strict=True)) if keys else {}
        ids, start, rows = (inputs.ids, inputs.start, inputs.rows) if self._known is None else self._with_copies(first, inputs)
        # Only the rows that predict a masked slot pass the final norm and the head.
        hidden = network.forward(ids, start, self.cache.rows(copies * first, copies * last, span), rows)  # [C P, E]
        statistics = self._statistics(network, hidden, noise)
        network.ops.commit_tokens(x, statistics, block_start, state, place=inputs.place)

    def _with_copies(self, first: int, inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, starts and predicting rows of sequences, each with its copy that does not see what was given behind it."""
        (rows, window), at = inputs.ids.shape, inputs.rows
        slots = (inputs.start[:, None] + self._slots[:window]).clamp(0, self.slots - 1)
        known = self._known[first : first + rows].gather(1, slots)  # type: ignore[index]
        ids = torch.stack((inputs.ids, inputs.ids.masked_fill(known, self.program.mask_id)), dim=1).flatten(0, 1)
        of_copies = [torch.where(at < 0, at, (at // window * 2 + copy) * window + at % window) for copy in range(2)]
        return ids, inputs.start.repeat_interleave(2), torch.cat(of_copies)

    def _statistics(self, network: Transformer, hidden: Tensor, noise: dict[str, Tensor]) -> TokenStatistics:
        """Statistics ``[P]`` of the predictions, from normed hidden states ``[C P, E]``."""
        program, ops = self.program, network.ops
        logits = self._guided_logits(network, hidden) if program.cfg_scale else None

        def without(forbidden: Tensor) -> TokenStatistics:
            options = {"temperature": program.temperature, "forbidden": forbidden, **noise}
            statistics: TokenStatistics = (
                ops.head_statistics(hidden, network.head, logits_dtype=program.logits_dtype, **options)
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
        """``[P, V]``: logits moved away from those of the copies that do not see what was given."""
        logits = F.linear(hidden, network.head)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Rounded where the official code rounds: every result is of the logits' dtype.
        logits, unguided = logits.to(self.program.logits_dtype or exact).chunk(2)
        return unguided + (self.program.cfg_scale + 1) * (logits - unguided)

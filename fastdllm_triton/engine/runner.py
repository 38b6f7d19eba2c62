"""The static buffers of a batch, and the forward that advances rows of it: from token ids to committed tokens.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, windows, key ranges, thresholds,
seeds, counters and flags are device tensors, so that one captured step serves every block and every request, and the host only
says which rows and how wide a window. Which rows do what and when is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.cache_policy import Window
from ..models.transformer import Transformer
from ..types import PolicyState, TokenStatistics, WindowInputs
from .buckets import buckets, window_bucket
from .cuda_graphs import CUDAGraphRunner
from .outputs import Committed, RowRecord
from .program import ROW_TABLES, ForwardShape, Program, table_line
from .request import Request
from .scheduler import ForwardPlan, RowFlags

#: Tokens up to which a refresh is captured. Larger ones are bound by arithmetic, and hide the host's time.
MAX_CAPTURED_TOKENS = 8192

#: Predictions up to which a head takes as long as reading its weight: fewer are not worth a capture of their own.
LEAST_PREDICTIONS = 64


def can_capture(network: Transformer) -> bool:
    """Whether forwards of a network can be captured: on a GPU, with ops that never wait for it."""
    return network.device.type == "cuda" and network.ops.name == "triton"


class ModelRunner:
    """Buffers for ``R`` rows of ``L`` slots.

    Sequences end at the last slot. A row that has nothing masked in its block, and a row that nobody has, is a no-op of every
    forward. With guidance the network has ``C = 2`` rows for each: the sequence, and behind it the copy in which all that was
    given is masked. The network is an argument of what runs it: buffers that nobody uses keep no model alive.

    Attributes:
        copies: ``C``.
        wants_cuda_graphs: whether forwards are to be captured where they can be.
        x: ``[R, L]`` int64, the sequences.
        cache: keys and values of ``C R`` rows.
        state: what commits decide with and record.
        block_start: ``[R]`` int32, first slot of the row's block.
        window_start: ``[R]`` int32, first slot of the window of the row's steps; of those over a sub-block, where there are both.

    Args:
        network: what it runs.
        rows, slots: ``R`` and ``L``.
        copies: ``C``.
        use_cuda_graphs: whether forwards are captured.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, *, copies: int = 1, use_cuda_graphs: bool = False) -> None:
        device = network.device
        self.copies, self.wants_cuda_graphs = copies, use_cuda_graphs

        def zeros(dtype: torch.dtype = torch.int32, count: int = rows) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.x = zeros(torch.int64)[:, None].repeat(1, slots)
        self.block_start, self.window_start, self._block_step_start = zeros(), zeros(), zeros()
        self._refresh_start, self._stored_end = zeros(), zeros()
        self.cache = network.new_cache(zeros(count=rows * copies), slots)
        self._known = self.x.bool() if copies > 1 else None  # [R, L]: what the copies do not see
        self._temperature = zeros(torch.float32)
        self.state = PolicyState.create(
            "confidence", "threshold", mask_id=0, kv_start=zeros(), seed=zeros(torch.int64), slots=slots
        )
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._ids: dict[tuple[int, ...], Tensor] = {}
        self._slots = torch.arange(slots, device=device)

        # The host writes and reads through pinned memory: a copy that it need not wait for.
        cuda = device.type == "cuda"
        self._bounds = torch.zeros((6, rows), dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._flags = torch.zeros((rows, 5), dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._flags_are_read = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._graphs = (
            CUDAGraphRunner(device, fall_back=not network.ops.required) if use_cuda_graphs and can_capture(network) else None
        )
        self._rows_bucket, _ = buckets(device)
        self._window_bucket = window_bucket(device)

    @property
    def rows(self) -> int:
        """``R``."""
        return self.x.shape[0]

    @property
    def slots(self) -> int:
        """``L``."""
        return self.x.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the buffers that grow with rows and slots."""
        tensors = (self.x, self.cache.k, self.cache.v, self.state.step_map, self.state.confidence)
        return sum(tensor.nbytes for tensor in tensors)

    def release(self) -> None:
        """Frees the captured forwards; the buffers go with their last user."""
        if self._graphs is not None:
            self._graphs.reset()

    def reset(self) -> None:
        """Leaves every row empty."""
        self.state.remaining.zero_()
        self.state.kv_start.fill_(self.slots)
        self.cache.kv_start.fill_(self.slots)

    def fill(self, first: int, requests: Sequence[Request]) -> None:
        """Puts requests into the rows from ``first`` on."""
        rows, state, slots = slice(first, first + len(requests)), self.state, self.slots
        for counter in (state.step, state.masked, state.remaining, state.invalid, state.ended, state.forward):
            counter[rows].zero_()
        state.step_map[rows].fill_(-1)
        state.confidence[rows].fill_(torch.nan)

        def put(tensor: Tensor, values: Sequence[Any]) -> None:
            tensor[rows].copy_(torch.tensor(values, dtype=tensor.dtype, device="cpu"))

        put(self.x, [[request.ids.filler] * self._offset(request) + request.tokens for request in requests])
        put(state.kv_start, [self._offset(request) for request in requests])
        put(state.prompt_end, [self._offset(request) + request.prompt_length for request in requests])
        put(state.seed, [request.seed for request in requests])
        put(state.value, [request.config.strategy.value for request in requests])
        # More forwards than slots: one token in each, whatever their number.
        put(state.steps, [min(c.strategy.steps_per_block(c.blocks), c.decoded_length) for c in (r.config for r in requests)])
        put(self._temperature, [request.config.temperature for request in requests])
        self._each(self.cache.kv_start)[rows].copy_(state.kv_start[rows, None])
        self._each(self.cache.kv_end)[rows].fill_(slots)
        for (name, width), table in self._tables.items():
            put(table, [table_line(name, width, request) for request in requests])
        if self._known is not None:
            masks = torch.tensor([[request.ids.mask_id] for request in requests], device=self.x.device)
            self._known[rows].copy_(self.x[rows] != masks)

    def begin_blocks(self, indices: Sequence[int], requests: Sequence[Request]) -> None:
        """Moves rows on to new blocks: their counters, and where block, window and keys of theirs are.

        Args:
            indices: of the rows that begin one.
            requests: of all rows that somebody has.
        """
        state, rows = self.state, len(requests)
        for first, last in _ranges(indices):
            state.step[first:last].zero_()
            state.remaining[first:last].copy_(torch.tensor([r.config.decoded_length for r in requests[first:last]], device="cpu"))
        bounds = []
        for request in requests:
            block, offset = request.block_state, self._offset(request)
            # Behind a prefix that is stored, a sub-block is all that its steps need.
            bounds.append(
                (
                    offset + block.start,
                    request.step_window_start(self.slots),
                    offset + (block.causal_start if block.causal else block.start),
                    offset + request.policy.attend_end(block),
                )
            )
        self._bounds[:4, :rows] = torch.tensor(bounds, dtype=torch.int32, device="cpu").T
        for target, source in zip((self.block_start, self.window_start, self._block_step_start), self._bounds[:3], strict=True):
            target[:rows].copy_(source[:rows], non_blocking=True)
        self._each(self.cache.kv_end)[:rows].copy_(self._bounds[3, :rows, None], non_blocking=True)

    def read_prefix(self, row: int, request: Request, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[layers, Hkv, count, D]`` of a row's first positions, as views of the cache."""
        first = self._offset(request)
        part = slice(first, first + count)
        return self.cache.k[:, row, :, part], self.cache.v[:, row, :, part]

    def write_prefix(self, row: int, request: Request, k: Tensor, v: Tensor) -> None:
        """Puts keys and values ``[layers, Hkv, T, D]`` where those of a row's first positions are."""
        for target, values in zip(self.read_prefix(row, request, k.shape[2]), (k, v), strict=True):
            target.copy_(values)

    def swap_rows(self, i: int, j: int) -> None:
        """Exchanges two rows."""
        for tensor in self._by_row():
            former = tensor[i].clone()
            tensor[i].copy_(tensor[j])
            tensor[j].copy_(former)

    def move_row(self, source: int, target: int) -> None:
        """Puts a row in the place of another, and leaves its own empty."""
        for tensor in self._by_row():
            tensor[target].copy_(tensor[source])
        self.clear_row(source)

    def clear_row(self, row: int) -> None:
        """Leaves a row empty."""
        self.state.remaining[row].zero_()

    def read_row(self, row: int, request: Request) -> RowRecord:
        """A row as it is now."""
        return self._record(request, *(tensor[row].clone() for tensor in self._records))

    def read_rows(self, requests: Sequence[Request]) -> dict[Request, RowRecord]:
        """The first rows as they are now."""
        tensors = [tensor[: len(requests)].clone() for tensor in self._records]
        return {request: self._record(request, *(tensor[i] for tensor in tensors)) for i, request in enumerate(requests)}

    @property
    def _records(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.state.step_map, self.state.confidence

    def _record(self, request: Request, *lines: Tensor) -> RowRecord:
        first = self._offset(request)
        return RowRecord(*(line[first : first + len(request)] for line in lines))

    def _offset(self, request: Request) -> int:
        """The slot of its first position."""
        return self.slots - len(request.tokens)

    def read_committed(self, since: Sequence[tuple[Request, int]]) -> list[tuple[Committed, ...]]:
        """What forwards committed in the blocks that the first rows stand at.

        Args:
            since: of each row its request, and the forwards that it had had before.
        """
        rows, length = len(since), max(request.config.decoded_length for request, _ in since)
        slots = (self.block_start[:rows, None] + torch.arange(length, device=self.x.device)).clamp(max=self.slots - 1).long()
        sources = (self.x, self.state.step_map, self.state.confidence)
        lines = zip(*(source[:rows].gather(1, slots).tolist() for source in sources), strict=True)
        committed = []
        for (request, known), line in zip(since, lines, strict=True):
            start, end = request.bounds[request.block]
            first, last = start - request.prompt_length, min(end, len(request)) - start
            tokens = list(zip(*line, strict=True))[:last]
            committed.append(tuple(Committed(0, first + i, t, c) for i, (t, step, c) in enumerate(tokens) if step >= known))
        return committed

    def sync_flags(self, rows: int, mask_ids: Sequence[int] = ()) -> list[RowFlags]:
        """What the host must know of the first rows; of rows whose ``mask_ids`` are given also whether their blocks' first tokens
        are masked.

        The one place that reads the device. On a GPU the host waits for an event behind the last forward, not for a stream.
        Reading one forward late would hide these microseconds, and pay for it with a whole forward at the end of each block.
        """
        state = self.state
        masked = state.invalid[:rows]
        if mask_ids:
            first = self.x[:rows].gather(1, self.block_start[:rows, None].clamp(max=self.slots - 1).long())[:, 0]
            masked = first == self._ids_of(tuple(mask_ids))
        columns = (state.remaining, state.ended, state.invalid, state.forward, masked)
        flags = torch.stack([column[:rows].int() for column in columns], dim=1)
        if self._flags_are_read is not None:
            self._flags[:rows].copy_(flags, non_blocking=True)
            self._flags_are_read.record()
            self._flags_are_read.synchronize()
            flags = self._flags[:rows]
        return [RowFlags(left, bool(end), bool(bad), count, bool(start)) for left, end, bad, count, start in flags.tolist()]

    def _by_row(self) -> list[Tensor]:
        cache = self.cache
        caches = map(self._each, (cache.k.transpose(0, 1), cache.v.transpose(0, 1), cache.kv_start, cache.kv_end))
        known = [] if self._known is None else [self._known]
        single = [self.x, self.block_start, self.window_start, self._block_step_start, self._temperature]
        return [*single, *caches, *known, *self._tables.values(), *self.state.by_row.values()]

    def _each(self, tensor: Tensor) -> Tensor:
        """``[C R, ...]`` of the network's rows as ``[R, C, ...]``."""
        return tensor.view(-1, self.copies, *tensor.shape[1:])

    def program_of(self, requests: Sequence[Request], all_requests: Sequence[Request]) -> Program:
        """The program of requests that share a forward. Makes the tables that it reads, where it is the first one to do so.

        Args:
            requests: that take part.
            all_requests: of all rows that somebody has.
        """
        program = Program.of(requests)
        widths = {"eos_ids": program.eos_count, "shares": program.share_count}
        if isinstance(program.forbidden, int):
            widths["forbidden"] = program.forbidden
        for name, width in widths.items():
            if (name, width) not in self._tables:
                dtype, padding = ROW_TABLES[name]
                table = torch.full((self.rows, width), padding, dtype=dtype, device=self.x.device)
                if width:
                    lines = [table_line(name, width, request) for request in all_requests]
                    table[: len(lines)].copy_(torch.tensor(lines, dtype=dtype, device="cpu"))
                self._tables[name, width] = table
        return program

    def _ids_of(self, ids: tuple[int, ...]) -> Tensor:
        """Token ids on the device, kept: a capture could not copy them, and a copy would wait for the device."""
        if ids not in self._ids:
            self._ids[ids] = torch.tensor(ids, dtype=torch.int64, device=self.x.device)
        return self._ids[ids]

    def shape_of(self, plan: ForwardPlan, requests: Sequence[Request]) -> ForwardShape:
        """What a planned forward has fixed.

        Args:
            plan: which rows, and their windows.
            requests: of all rows that somebody has.
        """
        program = self.program_of(plan.requests, requests)
        # Where each row's first position is, and its window.
        windows = [(self._offset(request), window) for request, window in zip(plan.requests, plan.windows, strict=True)]
        ends = [offset + window.end for offset, window in windows]
        if plan.kind == "refresh" and program.causal:
            return self._store_shape(program, plan, windows)
        if plan.kind == "refresh" and plan.requests[0].policy.reuses:
            start = max(min(offset + window.start for offset, window in windows), 0)
            spans = {(offset, offset + window.attend_end) for offset, window in windows}
            span = spans.pop() if len(spans) == 1 else None
            return self.refresh_shape(program, plan.first, plan.last, start, max(ends) - start, plan.masked, span)
        if plan.kind == "block_step":
            widths = [program.causal]
        else:
            widths = [end - request.step_window_start(self.slots) for end, request in zip(ends, plan.requests, strict=True)]
        count = plan.last - plan.first
        last = plan.first + self._rows_bucket(count) if plan.is_last_group and plan.kind == "step" else plan.last
        shape = self.step_shape(program, plan.first, min(last, self.rows), self._window_bucket(max(widths)), plan.masked)
        is_whole = bool(program.causal) and not plan.requests[0].policy.reuses
        return replace(shape, kind=plan.kind if program.causal else "step", causal=program.causal if is_whole else 0)

    def refresh_shape(
        self, program: Program, first: int, last: int, start: int, window: int, masked: int, span: tuple[int, int] | None = None
    ) -> ForwardShape:
        """A refresh, and tells the device where it begins.

        Args:
            program: what the rows ``[first, last)`` have in common.
            first, last: the rows.
            start, window: the slots that are recomputed of each of them.
            masked: slots that are masked in their blocks, at most.
            span: what all of them attend, if it is the same.
        """
        self._refresh_start[first:last].fill_(start)
        is_single = program.refresh_commits == "first"
        predicted = last - first if is_single else self._predictions(last - first, program, masked)
        return ForwardShape("refresh", program, first, last, window, predicted, span=span)

    def _store_shape(self, program: Program, plan: ForwardPlan, windows: Sequence[tuple[int, Window]]) -> ForwardShape:
        """A forward over what is not stored yet of block-causal rows, and tells the device where that is in each of them.

        A window may reach beyond what is stored by it: keys and values of slots behind are written anew before anything attends
        them.
        """
        rows = slice(plan.first, plan.last)
        bounds = [(offset + window.start, offset + window.stored) for offset, window in windows]
        self._bounds[4:, rows] = torch.tensor(bounds, dtype=torch.int32, device="cpu").T
        for target, source in zip((self._refresh_start, self._stored_end), self._bounds[4:], strict=True):
            target[rows].copy_(source[rows], non_blocking=True)
        widest = self._window_bucket(max(len(window) for _, window in windows))
        if program.refresh_commits == "rule":
            predicted = self._predictions(plan.last - plan.first, program, plan.masked)
        else:
            predicted = plan.last - plan.first if plan.masked else 0
        return ForwardShape("refresh", program, plan.first, plan.last, widest, predicted, causal=program.causal)

    def step_shape(self, program: Program, first: int, last: int, window: int, masked: int) -> ForwardShape:
        """A step of the rows ``[first, last)``, whose windows are ``window`` slots wide."""
        return ForwardShape("step", program, first, last, window, self._predictions(last - first, program, masked))

    def run(self, network: Transformer, shape: ForwardShape) -> None:
        """Runs a forward: recomputes windows, takes the statistics of masked slots, commits. Captured where there is a GPU."""
        if self._graphs is None or (shape.kind == "refresh" and shape.tokens > MAX_CAPTURED_TOKENS):
            self._forward(network, shape)
        else:
            self._graphs(shape, partial(self._forward, network, shape))

    def _predictions(self, rows: int, program: Program, masked: int) -> int:
        """How many slots a forward of so many rows predicts at most, as far as the host knows: what its head is as tall as.

        Exactly, where nothing is captured; else all of them, halved while they fit and the head is not fused with its statistics
        anyway, so that few captures serve.
        """
        most = rows * program.block_length
        if self._graphs is None:
            return max(min(masked, most), 1)
        while most // 2 >= max(masked, LEAST_PREDICTIONS):
            most //= 2
        return most

    def _state(self, program: Program, first: int, last: int) -> PolicyState:
        """The state of some rows, as a program reads it."""
        eos_ids, shares = self._tables["eos_ids", program.eos_count], self._tables["shares", program.share_count]
        state = replace(
            self.state,
            score=program.score,
            rule=program.rule,
            mask_id=program.mask_id,
            ends=program.ends,
            eos_ids=eos_ids,
            shares=shares,
        )
        return state.rows(first, last)

    def _forward(self, network: Transformer, shape: ForwardShape) -> None:
        """What a capture records: launches alone, and nothing that waits for the device."""
        program, first, last, copies = shape.program, shape.first, shape.last, self.copies
        x, block_start, state = self.x[first:last], self.block_start[first:last], self._state(program, first, last)
        block, length, first_slot = state, program.block_length, block_start
        # A done row's step window lies behind the cache: nothing of it is written.
        starts = {"refresh": self._refresh_start, "block_step": self._block_step_start, "step": self.window_start}
        start = starts[shape.kind][first:last]
        first_alone = shape.kind == "refresh" and program.refresh_commits == "first"
        if first_alone:  # A block of one token to the commit.
            length = 1
            if program.causal:
                first_slot = self._stored_end[first:last]
            else:  # Its end is not the row's, unless all others were fixed.
                state = replace(state, eos_ids=state.eos_ids[:, :0])
        keys = {"seed": state.seed, "step": state.step} if program.temperature != 0 else {}
        inputs = network.ops.window_inputs(
            x,
            start,
            first_slot,
            state.remaining,
            state.kv_start,
            window=shape.window,
            block=length,
            predicted=max(shape.predicted, 1),
            shift=network.config.shift,
            mask_id=state.mask_id,
            **keys,
        )
        noise = dict(zip(("seed", "position", "step"), inputs.keys, strict=True)) if keys else {}
        ids, window_start, rows = (
            (inputs.ids, inputs.start, inputs.rows) if self._known is None else self._with_copies(first, inputs, program.mask_id)
        )
        # Only the rows that predict a masked slot pass the final norm and the head.
        cache = self.cache.rows(copies * first, copies * last, shape.span)
        if not shape.predicted:
            rows = rows[:0]
        hidden = network.forward(ids, window_start, cache, rows, block_length=shape.causal or None)  # [C P, E]
        if not shape.predicted:
            return
        # What differs between rows is gathered for each prediction.
        temperature: float | Tensor = 0.0 if program.temperature is None else program.temperature
        if program.temperature is None:
            temperature = self._temperature[first:last][inputs.batch_row]
        if isinstance(program.forbidden, int):
            forbidden = self._tables["forbidden", program.forbidden][first:last][inputs.batch_row]
        else:
            forbidden = self._ids_of(program.forbidden)
        statistics = self._statistics(network, program, hidden, {"temperature": temperature, **noise}, forbidden)
        network.ops.commit_tokens(x, statistics, first_slot, state, place=inputs.place)
        if first_alone:
            tokens = x.gather(1, block_start[:, None] + self._slots[: program.block_length])
            block.remaining.copy_((tokens == program.mask_id).sum(1))
            if program.causal:
                block.step.zero_()  # The block itself begins with its first step.
                return
            ends = (tokens[:, :, None] == block.eos_ids[:, None]) & (tokens >= 0)[:, :, None]
            block.ended |= block.done & ends.flatten(1).any(1)

    def _with_copies(self, first: int, inputs: WindowInputs, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, starts and predicting rows of sequences, each with its copy that does not see what was given behind it."""
        (rows, window), at = inputs.ids.shape, inputs.rows
        slots = (inputs.start[:, None] + torch.arange(window, device=at.device)).clamp(0, self.slots - 1)
        known = self._known[first : first + rows].gather(1, slots)  # type: ignore[index]
        ids = torch.stack((inputs.ids, inputs.ids.masked_fill(known, mask_id)), dim=1).flatten(0, 1)
        of_copies = [torch.where(at < 0, at, (at // window * 2 + copy) * window + at % window) for copy in range(2)]
        return ids, inputs.start.repeat_interleave(2), torch.cat(of_copies)

    def _statistics(
        self, network: Transformer, program: Program, hidden: Tensor, sampling: dict[str, Any], forbidden: Tensor
    ) -> TokenStatistics:
        """Statistics ``[P]`` of the predictions, from normed hidden states ``[C P, E]``."""
        ops = network.ops
        if program.tempered:
            # The states instead of the logits, which need not be in memory then: one more rounding like the norm's own.
            hidden, temperature = _divided(hidden, sampling["temperature"])
            sampling = sampling | {"temperature": temperature}
        logits = self._guided_logits(network, program, hidden) if program.cfg_scale else None

        def without(ids: Tensor, **options: Any) -> TokenStatistics:
            statistics: TokenStatistics = (
                ops.head_statistics(hidden, network.head, logits_dtype=program.logits_dtype, forbidden=ids, **options)
                if logits is None
                else ops.token_statistics(logits, forbidden=ids, **options)
            )
            return statistics

        chosen = without(forbidden, **sampling)
        if program.tempered and program.score == "margin":  # Dream's is that of the two likeliest tokens, whichever is sampled.
            return replace(without(forbidden), token=chosen.token)
        if not program.commit_last:
            return chosen
        others = without(self._ids_of(program.never_or_last), **sampling)
        last = (chosen.token[:, None] == self._ids_of(program.commit_last)).any(1)
        return replace(others, token=chosen.token, rest=torch.where(last, torch.inf, others.rest))

    def _guided_logits(self, network: Transformer, program: Program, hidden: Tensor) -> Tensor:
        """``[P, V]``: logits moved away from those of the copies that do not see what was given."""
        logits = F.linear(hidden, network.head)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Rounded where the official code rounds: every result is of the logits' dtype.
        logits, unguided = logits.to(program.logits_dtype or exact).chunk(2)
        return unguided + (program.cfg_scale + 1) * (logits - unguided)


def _divided(hidden: Tensor, temperature: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """Hidden states over their temperature, where that is above 0, and the temperature that is left."""
    if isinstance(temperature, Tensor):
        divisor = torch.where(temperature > 0, temperature, 1.0)
        return hidden / divisor[:, None].to(hidden.dtype), (temperature > 0).to(temperature.dtype)
    return hidden / temperature, 1.0


def _ranges(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as ranges ``[first, last)``."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges

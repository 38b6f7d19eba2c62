"""The static buffers of a batch: rows are put in, advanced block by block, read, moved and taken out.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, windows, key ranges, thresholds,
seeds, counters and flags are device tensors, so that one captured step serves every block and every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.transformer import Transformer
from ..types import PolicyState
from .outputs import Committed, RowRecord
from .program import ROW_TABLES, Program, table_line
from .request import Request
from .scheduler import RowFlags


class RowBuffers:
    """Buffers for ``R`` rows of ``L`` slots.

    Sequences end at the last slot. A row that has nothing masked in its block, and a row that nobody has, is a no-op of every
    forward. With guidance the network has ``C = 2`` rows for each: the sequence, and behind it the copy in which all that was
    given is masked.

    Attributes:
        copies: ``C``.
        x: ``[R, L]`` int64, the sequences.
        cache: keys and values of ``C R`` rows.
        state: what commits decide with and record.
        block_start: ``[R]`` int32, first slot of the row's block.
        window_start: ``[R]`` int32, first slot of the window of the row's steps; of those over a sub-block, where there are both.

    Args:
        network: whose buffers they are.
        rows, slots: ``R`` and ``L``.
        copies: ``C``.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, *, copies: int = 1) -> None:
        device = network.device
        self.copies = copies

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
            starts = offset + block.start, request.step_window_start(self.slots), offset + block.causal_start
            bounds.append((*starts, offset + request.policy.attend_end(block)))
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


def _ranges(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as ranges ``[first, last)``."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges

"""The static buffers of a batch, and the forward that advances rows of it: from token ids to committed tokens.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, key ranges, seeds, counters and
flags are device tensors, so that one captured step serves every block, and the host only says which rows and how wide a
window. Which rows do what and when is the engine's business (:mod:`fastdllm_triton.engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .decoding import GenerationConfig, Resolved
from .graphs import Graphs
from .models.transformer import Transformer
from .types import PolicyState

#: Predictions up to which a head takes as long as reading its weight: fewer are not worth a capture of their own.
LEAST_PREDICTIONS = 64


class Batch:
    """Buffers for ``R`` rows of ``L`` slots, decoded in blocks of ``N``.

    A row that has nothing masked in its block, and a row that was never filled, is a no-op of every forward.

    Attributes:
        x: ``[R, L]`` int64, the sequences.
        cache: keys and values.
        state: what commits decide with and record.
        block_start: ``[R]`` int32, first slot of the row's block.
        forwards: ``[R]`` int32, forwards in which the row took part, those of its current block aside.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, config: GenerationConfig, ids: Resolved) -> None:
        device = network.device
        self.network, self.config, self.ids = network, config, ids
        self.look_back = config.look_back_in(network.config)

        def zeros(dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.x = zeros(torch.int64)[:, None].repeat(1, slots)
        self.block_start, self.forwards, self._window_start = zeros(), zeros(), zeros()
        self.cache = network.new_cache(zeros(), slots)
        self.state = PolicyState.create(
            config.strategy.score,
            config.strategy.rule,
            value=config.strategy.value,
            steps=config.strategy.steps_per_block(config.blocks),
            mask_id=ids.mask_id,
            kv_start=self.cache.kv_start,
            eos_ids=ids.eos_ids if config.stop_at_eos else (),
            seed=zeros(torch.int64),
            slots=slots,
        )
        self._forbidden = torch.tensor(ids.forbidden, device=device)
        self._first = torch.zeros((), dtype=torch.int32, device=device)

        # The host writes and reads through pinned memory: a copy that it need not wait for.
        cuda = device.type == "cuda"
        self._bounds = torch.zeros((2, rows), dtype=torch.int32, pin_memory=cuda)
        self._flags = torch.zeros((3, rows), dtype=torch.int32, pin_memory=cuda)
        self._looked = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._captures = network.captures
        self._left = rows * config.block_length  # masked slots left in the blocks of all rows, or more
        self._captured = cuda and network.ops.name == "triton" and network.captures
        self._run_step = Graphs(self._step, fall_back=not network.ops.required) if self._captured else self._step

    @property
    def slots(self) -> int:
        """``L``."""
        return self.x.shape[1]

    def serves(self, rows: int, slots: int, config: GenerationConfig, ids: Resolved) -> bool:
        """Whether these buffers are just those that a generation needs."""
        own = (*self.x.shape, replace(self.config, seed=0), replace(self.ids, seeds=()), self._captures)
        return own == (rows, slots, replace(config, seed=0), replace(ids, seeds=()), self.network.captures)

    def fill(self, sequences: Sequence[Sequence[int]], kv_start: Sequence[int], seeds: Sequence[int]) -> None:
        """Begins anew with sequences of ``L`` ids each; the rows after them stay empty."""
        given, state, self._left = len(sequences), self.state, 0
        for counter in (state.step, state.masked, state.remaining, state.invalid, state.ended, state.forward, self.forwards):
            counter.zero_()
        state.step_map.fill_(-1)
        state.confidence.fill_(torch.nan)
        self.block_start.zero_()

        self.x.fill_(self.ids.filler)
        self.x[:given].copy_(torch.tensor(sequences))
        state.kv_start.fill_(self.slots)
        state.kv_start[:given].copy_(torch.tensor(kv_start))
        self.cache.kv_end.fill_(self.slots)
        state.seed[:given].copy_(torch.tensor(seeds))
        self._first.fill_(min(kv_start))

    def place(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Tells the device where the blocks of the first rows begin, and where the keys that they attend end."""
        rows = len(starts)
        self._bounds[0, :rows] = torch.tensor(starts)
        self._bounds[1, :rows] = torch.tensor(ends)
        self.block_start[:rows].copy_(self._bounds[0, :rows], non_blocking=True)
        self.cache.kv_end[:rows].copy_(self._bounds[1, :rows], non_blocking=True)

    def begin(self, first: int, last: int) -> None:
        """Moves the counters of the rows ``[first, last)`` on to a new block."""
        self.forwards[first:last] += self.state.step[first:last]
        self.state.step[first:last].zero_()
        self.state.remaining[first:last].fill_(self.config.block_length)
        self._left += (last - first) * self.config.block_length

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

    def _by_row(self) -> list[Tensor]:
        caches = (self.cache.k.transpose(0, 1), self.cache.v.transpose(0, 1), self.cache.kv_end)
        return [self.x, self.block_start, self.forwards, *caches, *self.state.by_row.values()]

    def refresh(self, first: int, last: int, window_start: int, window: int, span: tuple[int, int] | None = None) -> None:
        """Recomputes ``window`` slots from one start for the rows ``[first, last)``, and commits.

        ``span`` is what all of these rows attend, if it is the same.
        """
        start, length = self._window_start[first:last].fill_(window_start), self.config.block_length
        if self.config.refresh_commits == "rule" or length == 1:
            state = self.state.rows(first, last)
            self._advance(first, last, state, start, 0, window, length, self._predictions(last - first, length), span)
            return
        # A block of one token to the commit, whose end is not the row's.
        state = replace(self.state.rows(first, last), eos_ids=self.state.eos_ids[:0])
        self._advance(first, last, state, start, 0, window, 1, last - first, span)
        state.remaining.fill_(length - 1)

    def step(self, rows: int, window: int) -> None:
        """Recomputes the step windows of the first ``rows`` rows, and commits. Captured where there is a GPU."""
        self._run_step(rows, window, self._predictions(rows, self.config.block_length))

    def _predictions(self, rows: int, length: int) -> int:
        """How many slots a forward of so many rows predicts at most, as far as the host knows: what its head is as tall as.

        Exactly, where nothing is captured; else all of them, halved while they fit and the head is not fused with its statistics
        anyway, so that few captures serve.
        """
        most = rows * length
        if not self._captured:
            return max(min(self._left, most), 1)
        while most // 2 >= max(self._left, LEAST_PREDICTIONS):
            most //= 2
        return most

    def look(self, rows: int) -> tuple[list[int], list[int], list[int]]:
        """What the host must know of the first rows: masked slots left, whether ended, whether invalid.

        The one place that reads the device. On a GPU the host waits for an event behind the last forward, not for a stream.
        Reading one forward late would hide these microseconds, and pay for it with a whole forward at the end of each block.
        """
        state = self.state
        flags = torch.stack((state.remaining[:rows], state.ended[:rows].int(), state.invalid[:rows].int()))
        if self._looked is not None:
            self._flags[:, :rows].copy_(flags, non_blocking=True)
            self._looked.record()
            self._looked.synchronize()
            flags = self._flags[:, :rows]
        remaining, ended, invalid = flags.tolist()
        self._left = sum(remaining)
        return remaining, ended, invalid

    def _step(self, rows: int, window: int, predictions: int) -> None:
        # A done row's window lies behind the cache: nothing of it is written.
        base, back = (self._first, 0) if self.config.cache == "none" else (self.block_start[:rows], self.look_back)
        self._advance(0, rows, self.state.rows(0, rows), base, back, window, self.config.block_length, predictions)

    def _advance(
        self, first: int, last: int, state: PolicyState, base: Tensor, back: int, window: int, length: int, predictions: int,
        span: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Recomputes a window of some rows, takes the statistics of the first masked slots of their blocks, and commits."""
        network, ops, config = self.network, self.network.ops, self.config
        x, block_start = self.x[first:last], self.block_start[first:last]
        noise = {"kv_start": state.kv_start, "seed": state.seed, "step": state.step} if config.temperature > 0 else {}
        inputs = ops.window_inputs(
            x,
            base,
            block_start,
            state.remaining,
            back=back,
            window=window,
            block=length,
            predicted=predictions,
            shift=network.config.shift,
            mask_id=state.mask_id,
            **noise,
        )
        # Only the rows that predict a masked slot pass the final norm and the head.
        hidden = network.forward(inputs.ids, inputs.start, self.cache.rows(first, last, span), inputs.rows)  # [P, E]
        keys = dict(zip(("seed", "position", "step"), inputs.keys, strict=True)) if noise else {}
        statistics = ops.head_statistics(
            hidden,
            network.head,
            temperature=config.temperature,
            forbidden=self._forbidden,
            logits_dtype=config.logits_dtype,
            **keys,
        )
        ops.commit_tokens(x, statistics, block_start, state, place=inputs.place)

"""The static buffers of a batch, and the forward that advances rows of it: from token ids to committed tokens.

Everything a forward reads or writes is allocated once and addressed by row. Block starts, key ranges, seeds, counters and
flags are device tensors, so that one captured step serves every block, and the host only says which rows and how wide a
window. Which rows do what and when is the engine's business (:mod:`fastdllm_triton.engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import GenerationConfig, Resolved
from .graphs import Graphs
from .models.transformer import Transformer
from .types import PolicyState, TokenStatistics


class Batch:
    """Buffers for ``R`` rows of ``L`` slots, decoded in blocks of ``N``.

    A row that has nothing masked in its block, and a row that was never filled, is a no-op of every forward. With guidance
    the network has ``C = 2`` rows for each: the sequence, and behind it the copy in which all that was given is masked.

    Attributes:
        x: ``[R, L]`` int64, the sequences.
        cache: keys and values of ``C R`` rows.
        state: what commits decide with and record.
        block_start: ``[R]`` int32, first slot of the row's block.
        forwards: ``[R]`` int32, forwards in which the row took part, those of its current block aside.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, config: GenerationConfig, ids: Resolved) -> None:
        device = network.device
        self.network, self.config, self.ids = network, config, ids
        self.look_back = min(config.look_back_in(network.config), slots)
        self._copies = config.rows_per_sequence

        def zeros(dtype: torch.dtype = torch.int32, copies: int = 1) -> Tensor:
            return torch.zeros(rows * copies, dtype=dtype, device=device)

        self.x = zeros(torch.int64)[:, None].repeat(1, slots)
        self.block_start, self.forwards, self._window_start = zeros(), zeros(), zeros()
        self.cache = network.new_cache(zeros(copies=self._copies), slots)
        self._known = self.x.bool() if config.cfg_scale else None  # [R, L]: what the copies do not see
        self.state = PolicyState.create(
            config.strategy.score,
            config.strategy.rule,
            value=config.strategy.value,
            # More forwards than slots: one token in each, whatever their number.
            steps=min(config.strategy.steps_per_block(config.blocks), config.block_length),
            mask_id=ids.mask_id,
            kv_start=zeros(),
            eos_ids=ids.eos_ids if config.stop_at_eos else (),
            seed=zeros(torch.int64),
            slots=slots,
        )
        self._forbidden = torch.tensor(ids.forbidden, device=device)
        self._commit_last = torch.tensor(ids.commit_last, device=device) if ids.commit_last else None
        self._never_or_last = torch.tensor(ids.never_or_last, device=device)
        self._slots = torch.arange(max(slots, rows * config.block_length), device=device)
        self._first = torch.zeros((), dtype=torch.int32, device=device)

        # The host writes and reads through pinned memory: a copy that it need not wait for.
        cuda = device.type == "cuda"
        self._starts = torch.zeros(rows, dtype=torch.int32, pin_memory=cuda)
        self._ends = torch.zeros(self._copies * rows, dtype=torch.int32, pin_memory=cuda)
        self._flags = torch.zeros((3, rows), dtype=torch.int32, pin_memory=cuda)
        self._looked = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._captures = network.captures
        captured = cuda and network.ops.name == "triton" and network.captures
        self._run_step = Graphs(self._step, fall_back=not network.ops.required) if captured else self._step

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
        given, state = len(sequences), self.state
        for counter in (state.step, state.masked, state.remaining, state.invalid, state.ended, state.forward, self.forwards):
            counter.zero_()
        state.step_map.fill_(-1)
        state.confidence.fill_(torch.nan)
        self.block_start.zero_()

        self.x.fill_(self.ids.filler)
        self.x[:given].copy_(torch.tensor(sequences))
        state.kv_start.fill_(self.slots)
        state.kv_start[:given].copy_(torch.tensor(kv_start))
        self._each(self.cache.kv_start).copy_(state.kv_start[:, None])
        if self._known is not None:
            self._known.copy_(self.x != self.ids.mask_id)
        self.cache.kv_end.fill_(self.slots)
        state.seed[:given].copy_(torch.tensor(seeds))
        self._first.fill_(min(kv_start))

    def place(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Tells the device where the blocks of the first rows begin, and where the keys that they attend end."""
        rows, copies = len(starts), self._copies * len(starts)
        self._starts[:rows] = torch.tensor(starts)
        self._ends[:copies] = torch.tensor(ends).repeat_interleave(self._copies)
        self.block_start[:rows].copy_(self._starts[:rows], non_blocking=True)
        self.cache.kv_end[:copies].copy_(self._ends[:copies], non_blocking=True)

    def begin(self, first: int, last: int) -> None:
        """Moves the counters of the rows ``[first, last)`` on to a new block."""
        self.forwards[first:last] += self.state.step[first:last]
        self.state.step[first:last].zero_()
        self.state.remaining[first:last].fill_(self.config.block_length)

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
        cache = self.cache
        caches = map(self._each, (cache.k.transpose(0, 1), cache.v.transpose(0, 1), cache.kv_start, cache.kv_end))
        known = [] if self._known is None else [self._known]
        return [self.x, self.block_start, self.forwards, *caches, *known, *self.state.by_row.values()]

    def _each(self, tensor: Tensor) -> Tensor:
        """``[C R, ...]`` of the network's rows as ``[R, C, ...]``."""
        return tensor.view(-1, self._copies, *tensor.shape[1:])

    def refresh(self, first: int, last: int, window_start: int, window: int) -> None:
        """Recomputes ``window`` slots from one start for the rows ``[first, last)``, and commits."""
        start, length = self._window_start[first:last].fill_(window_start), self.config.block_length
        if self.config.refresh_commits == "rule" or length == 1:
            self._advance(first, last, self.state.rows(first, last), start, window, length)
            return
        # A block of one token to the commit, whose end is not the row's, unless all others were fixed.
        state = self.state.rows(first, last)
        self._advance(first, last, replace(state, eos_ids=state.eos_ids[:0]), start, window, 1)
        block = self.x[first:last].gather(1, self.block_start[first:last, None] + self._slots[:length])
        state.remaining.copy_((block == state.mask_id).sum(1))
        state.ended |= state.done & torch.isin(block, state.eos_ids).any(1)

    def step(self, rows: int, window: int) -> None:
        """Recomputes the step windows of the first ``rows`` rows, and commits. Captured where there is a GPU."""
        self._run_step(rows, window)

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
        return remaining, ended, invalid

    def _step(self, rows: int, window: int) -> None:
        start = self._first if self.config.cache == "none" else (self.block_start[:rows] - self.look_back).clamp(min=0)
        # A done row's window lies behind the cache: nothing of it is written.
        start = torch.where(self.state.done[:rows], self.slots, start)
        self._advance(0, rows, self.state.rows(0, rows), start, window, self.config.block_length)

    def _advance(self, first: int, last: int, state: PolicyState, window_start: Tensor, window: int, length: int) -> None:
        """Recomputes a window of some rows, takes the statistics of the first masked slots of their blocks, and commits."""
        network, rows, copies = self.network, last - first, self._copies
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
        if self.config.temperature > 0:
            keys = (state.seed[:, None], block - state.kv_start[:, None], state.step[:, None])
            noise = dict(zip(("seed", "position", "step"), (key.expand(rows, length).flatten() for key in keys), strict=True))
        statistics = self._statistics(hidden, masked.flatten(), noise)
        network.ops.commit_tokens(x, statistics.view(-1, length), block_start, state)

    def _statistics(self, hidden: Tensor, masked: Tensor, noise: dict[str, Tensor]) -> TokenStatistics:
        """Statistics ``[R N]`` of the predictions for the masked slots of a block, from normed hidden states ``[C R, N, E]``."""
        config, network, ops = self.config, self.network, self.network.ops
        asked = torch.where(masked, self._slots[: len(masked)], -1)
        logits = self._guided_logits(hidden) if config.cfg_scale else None

        def without(forbidden: Tensor) -> TokenStatistics:
            options = {"temperature": config.temperature, "forbidden": forbidden, **noise}
            statistics: TokenStatistics = (
                ops.head_statistics(hidden.flatten(0, 1), network.head, rows=asked, logits_dtype=config.logits_dtype, **options)
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

    def _guided_logits(self, hidden: Tensor) -> Tensor:
        """``[R N, V]``: logits moved away from those of the copies that do not see what was given."""
        logits = F.linear(hidden, self.network.head)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Rounded where the official code rounds: every result is of the logits' dtype.
        logits, unguided = self._each(logits.to(self.config.logits_dtype or exact)).unbind(1)
        return (unguided + (self.config.cfg_scale + 1) * (logits - unguided)).flatten(0, 1)

"""The forward that advances rows of a batch: from token ids to committed tokens.

The host only says which rows and how wide a window: all else is in the buffers. Which rows do what and when is the scheduler's
business.
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
from .program import ForwardShape, Program
from .request import Request
from .row_buffers import RowBuffers
from .scheduler import ForwardPlan

#: Tokens up to which a refresh is captured. Larger ones are bound by arithmetic, and hide the host's time.
MAX_CAPTURED_TOKENS = 8192

#: Predictions up to which a head takes as long as reading its weight: fewer are not worth a capture of their own.
LEAST_PREDICTIONS = 64


def can_capture(network: Transformer) -> bool:
    """Whether forwards of a network can be captured: on a GPU, with ops that never wait for it."""
    return network.device.type == "cuda" and network.ops.name == "triton"


class ModelRunner(RowBuffers):
    """Runs forwards over the rows of its buffers. The network is an argument of what runs it: buffers that nobody uses keep no
    model alive.

    Attributes:
        wants_cuda_graphs: whether forwards are to be captured where they can be.

    Args:
        network, rows, slots, copies: as of :class:`~fastdllm_triton.engine.row_buffers.RowBuffers`.
        use_cuda_graphs: whether forwards are captured.
    """

    def __init__(self, network: Transformer, rows: int, slots: int, *, copies: int = 1, use_cuda_graphs: bool = False) -> None:
        super().__init__(network, rows, slots, copies=copies)
        device = network.device
        self.wants_cuda_graphs = use_cuda_graphs
        self._graphs = (
            CUDAGraphRunner(device, fall_back=not network.ops.required) if use_cuda_graphs and can_capture(network) else None
        )
        self._rows_bucket, _ = buckets(device)
        self._window_bucket = window_bucket(device)

    def release(self) -> None:
        """Frees the captured forwards; the buffers go with their last user."""
        if self._graphs is not None:
            self._graphs.reset()

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

"""A batch of prompts that is decoded together, forward by forward."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from operator import add

import torch
from torch import Tensor

from ..decoding.config import GenerationConfig
from ..utils.environment import BACKEND, GRAPHS
from .buckets import buckets
from .engine import Engine, HasNetwork, check_reuse, now
from .limits import check_kernel_limits, check_prompts
from .modes import decoding_modes
from .outputs import Committed, GenerationOutput, RowRecord
from .prefix_store import PrefixStore
from .request import Request, batch_requests
from .runner import ModelRunner
from .scheduler import ForwardPlan


class Generation:
    """A generation that is under way: an iterator that runs it forward by forward.

    Prompts are left padded to one length. Padding is neither attended nor counted as positions, so each row gets the
    tokens it would get alone.

    Args:
        model: the model.
        prompts: token ids of each row, of any lengths. A ``[MASK]`` in a prompt stays one.
        config: the options.
        tokenizer: what the output's ``texts`` decode with, or None.
        answers: the last ``gen_length`` tokens of each row as they are at the start: ``[MASK]`` where they are to be decoded;
            all of them are if not given. What else is there is fixed: it is attended from the start, never overwritten, and
            counts neither as committed nor in the schedule of a strategy. A block without masks takes no forward.
        whole: whether each prompt and its answer are one text: the output's ids and texts are then those of whole rows,
            prompts may be empty, and answers of an empty prompt shorter than ``gen_length``.
        reuse: of a block-causal model, where finished blocks are taken over from and kept.

    Raises:
        ValueError: a prompt is empty, too long, or holds an id outside the vocabulary; an option does not fit the model.
        MemoryError: the cache does not fit; says what is needed and what there is.
    """

    def __init__(
        self,
        model: HasNetwork,
        prompts: list[list[int]],
        config: GenerationConfig,
        tokenizer: object | None = None,
        *,
        answers: list[list[int]] | None = None,
        whole: bool = False,
        reuse: PrefixStore | None = None,
    ) -> None:
        network = self._network = model.network
        if whole and answers is not None:
            check_prompts([*map(add, prompts, answers)], config, network, whole=True)
        else:
            check_prompts(prompts, config, network)
        check_reuse(reuse, network)
        requests = batch_requests(prompts, answers, config, network.config, reuse)
        check_kernel_limits(network, len(prompts), config.decoded_length, requests[0].ids)
        self._config, self._tokenizer, self._whole = config, tokenizer, whole
        with decoding_modes(network):
            self._run = _Run(model, requests, config)
        self._forwards = self._run.forwards()
        _open.add(self)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Forward:
        with decoding_modes(self._network):
            return self._forward(next(self._forwards))

    @property
    def batch(self) -> ModelRunner:
        """The buffers on the device, for those who look inside; rows stand in the order of the batch, which changes."""
        with decoding_modes(self._network):
            return self._run.engine.admit(self._run.engine.lane())

    def run(self, callback: Callable[[Forward], None] | None = None) -> GenerationOutput:
        """Runs it to its end.

        Args:
            callback: called after each forward.

        Returns:
            The sequences and the record of how they came about.

        Raises:
            TypeError: ``callback`` cannot be called; raised before any forward.
            FloatingPointError: a forward gave a row logits that are NaN or nowhere finite.
            BaseException: whatever stopped it, an interrupt or an exception of the callback. Its attribute ``output`` then holds
                the :class:`~fastdllm_triton.engine.outputs.GenerationOutput` so far.
        """
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of a Forward, got {callback!r}")
        run = self._run
        try:
            if callback is not None:
                for forward in self:
                    callback(forward)
            else:
                with decoding_modes(self._network), run.running():
                    while run.engine.has_unfinished:
                        for _ in run.engine.forwards():
                            pass
                        run.raise_errors()
        except BaseException as error:
            error.output = self.output()  # type: ignore[attr-defined]
            raise
        return self.output()

    def close(self) -> None:
        """Ends it where it is; what it held on the device serves the next generation."""
        with decoding_modes(self._network):
            self._forwards.close()

    def output(self) -> GenerationOutput:
        """The result; before the end, what there is so far, masks included."""
        run, gen_length = self._run, self._config.gen_length
        with decoding_modes(self._network):
            x, step_map, confidence = _assemble(run.requests, run.rows(), run.columns)
            seconds = run.seconds_so_far()
        forwards = [len(request.history) + len(request.pending) for request in run.requests]
        generated = slice(run.columns - gen_length, None)
        return GenerationOutput(
            sequences=x,
            gen_length=gen_length,
            refreshes=run.engine.refreshes,
            steps=run.engine.steps,
            row_forwards=torch.tensor(forwards, dtype=torch.int32, device=x.device),
            step_map=step_map[:, generated],
            confidence=confidence[:, generated],
            seconds=seconds,
            eos_ids=run.requests[0].ids.eos_ids,
            tokenizer=self._tokenizer,
            starts=tuple(run.columns - len(request) for request in run.requests) if self._whole else None,
        )

    def _forward(self, plan: ForwardPlan) -> Forward:
        """What is known after a forward."""
        run = self._run
        windows = tuple(
            (run.columns - len(request) + max(window.start, 0), run.columns - len(request) + window.end)
            for request, window in zip(plan.requests, plan.windows, strict=True)
        )
        return Forward(
            index=run.engine.forward_count - 1,
            refresh=plan.kind == "refresh",
            rows=tuple(int(request.request_id) for request in plan.requests),
            blocks=tuple(request.block for request in plan.requests),
            spans=tuple(request.span for request in plan.requests),
            windows=windows,
            mask_id=run.requests[0].ids.mask_id,
            _snapshot=_Snapshot(run.requests, run.rows(), run.columns, self._config.gen_length),
        )


class _Run:
    """The engine of a generation, and what it leaves behind. Whoever holds a generator of it need not hold the generation."""

    def __init__(self, model: HasNetwork, requests: list[Request], config: GenerationConfig) -> None:
        self.requests, self.device = requests, model.network.device
        self.columns = max(config.gen_length, *map(len, requests))
        slots = buckets(self.device)[1](max(self.columns, *(len(request.tokens) for request in requests)))
        described = f"prompts: {len(requests)} rows of {slots} slots (gen_length = {config.gen_length})"
        self.engine = Engine.of_batch(model, requests, described)
        self._left: dict[Request, RowRecord] = {}
        self._started, self._seconds, self._running = 0.0, 0.0, True

    def forwards(self) -> Generator[ForwardPlan]:
        """Decodes, a forward at a time."""
        with self.running():
            while self.engine.has_unfinished:
                yield from self.engine.forwards()
                self.raise_errors()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what is done within, and gives the buffers back."""
        self._started = now(self.device)
        try:
            yield
        finally:
            self._left = self.rows()
            self._running = False
            self._seconds = now(self.device) - self._started
            self.engine.close()  # The next generation finds its forwards captured.

    def rows(self) -> dict[Request, RowRecord]:
        """Every row as it is now; those that have not begun have none."""
        rows = self._left
        if self._running and self.engine.has_unfinished:
            lane = self.engine.lane()
            if lane.runner is not None:
                rows = lane.runner.read_rows(lane.scheduler.rows)
        return rows | {request: request.record for request in self.requests if request.record is not None}

    def seconds_so_far(self) -> float:
        """Wall time from the first forward to the last."""
        return now(self.device) - self._started if self._running and self._started else self._seconds

    def raise_errors(self) -> None:
        """Raises what stopped a row."""
        failed = [request for request in self.requests if request.error is not None]
        if not failed:
            return
        forward, rows = self.engine.forward_count - 1, ", ".join(str(request.request_id) for request in failed)
        if any(isinstance(request.error, FloatingPointError) for request in failed):
            raise FloatingPointError(f"forward {forward} gave logits that are NaN or nowhere finite in row {rows}")
        raise RuntimeError(
            f"forward {forward} committed nothing in row {rows}, which has masked slots: a captured forward or a kernel is "
            f"broken; try {GRAPHS.name}=0, then {BACKEND.name}=reference; `fastdllm-triton verify` says which"
        )


@dataclass
class _Snapshot:
    """The rows of a generation as they were after a forward, put together when somebody asks."""

    requests: Sequence[Request]
    rows: dict[Request, RowRecord]
    columns: int
    gen_length: int
    indices: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.indices = [[*request.history, *request.pending] for request in self.requests]

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences, step map and confidence."""
        return _assemble(self.requests, self.rows, self.columns, self.indices)


@dataclass(frozen=True)
class Forward:
    """What is known after a forward. A value: it stays as it is. Columns and rows are those of the output.

    Attributes:
        index: of the forward, from 0.
        refresh: whether it rebuilt the cache.
        rows: the rows of the batch that it decoded.
        blocks: the block, or sub-block, that each of them stands at, from 0, the one that holds its first generated slot.
        spans: the slots ``[first, last)`` of that block, counted from the first generated one. Of block-causal models it may
            begin in the prompt, which is negative, and end behind the generation.
        windows: the columns ``[first, last)`` that it recomputed of each of them.
        mask_id: the token of a masked slot.
    """

    index: int
    refresh: bool
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    windows: tuple[tuple[int, int], ...]
    mask_id: int
    _snapshot: _Snapshot = field(repr=False)

    @property
    def x(self) -> Tensor:
        """``[B, L]`` int64: the sequences, masks included, as they were after it."""
        return self._snapshot.tensors[0]

    @property
    def step_map(self) -> Tensor:
        """``[B, L]`` int32: the forward that committed each slot; ``-1`` where none did."""
        return self._snapshot.tensors[1]

    @property
    def confidence(self) -> Tensor:
        """``[B, L]`` float32: the probability of each committed token at that forward; NaN where none was."""
        return self._snapshot.tensors[2]

    @cached_property
    def committed(self) -> list[Committed]:
        """What this forward committed, row by row from left to right."""
        x, step_map, confidence = self._snapshot.tensors
        first = self._snapshot.columns - self._snapshot.gen_length
        at = step_map == self.index
        values = zip(at.nonzero().tolist(), x[at].tolist(), confidence[at].tolist(), strict=True)
        return [Committed(row, column - first, token, probability) for (row, column), token, probability in values]


def _assemble(
    requests: Sequence[Request],
    rows: dict[Request, RowRecord],
    columns: int,
    indices: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences ``[B, L]``, left padded, the batch's forward that committed each slot, and the confidence.

    Args:
        requests: of the rows.
        rows: as the device has them; what has not begun is as it was given.
        columns: ``L``.
        indices: the batch's forwards that each row took part in; those of now if not given.
    """
    device = next((record.tokens.device for record in rows.values()), torch.device("cpu"))
    x = torch.full((len(requests), columns), requests[0].ids.filler, dtype=torch.int64, device=device)
    step_map = torch.full(x.shape, -1, dtype=torch.int32, device=device)
    confidence = torch.full(x.shape, torch.nan, dtype=torch.float32, device=device)
    for i, request in enumerate(requests):
        place, record = slice(columns - len(request), None), rows.get(request)
        if record is None:
            x[i, place] = torch.tensor(request.tokens[: len(request)], device=device)
            continue
        taken = [*request.history, *request.pending] if indices is None else indices[i]
        x[i, place], confidence[i, place] = record.tokens, record.confidence
        # The device numbers a row's own forwards; -1, no forward, is the last entry.
        step_map[i, place] = torch.tensor([*taken, -1], dtype=torch.int32, device=device)[record.step_map.long()]
    return x, step_map, confidence


#: Generations that somebody holds. Those that were left are closed while PyTorch is still whole: a generator with tensors that
#: is torn down with the interpreter aborts it.
_open: weakref.WeakSet[Generation] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for generation in list(_open):
        generation.close()

"""The engine: requests come, are decoded together, and leave; none of them changes what another one gets.

Block-wise decoding with a cache is Algorithm 1 of Fast-dLLM (arXiv 2505.22618), run row by row: :meth:`Engine.step`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch

from ..decoding.config import GenerationConfig
from ..models.config import ModelConfig
from ..models.token_ids import id_row
from ..models.transformer import Transformer
from ..utils.checks import is_int, require
from .buckets import buckets
from .buffer_pool import BufferPool
from .limits import check_kernel_limits, check_prompt
from .memory import check_memory
from .modes import decoding_modes
from .outputs import Committed, StepOutput
from .prefix_store import PrefixStore
from .request import Aborted, Request, new_request
from .runner import ModelRunner
from .scheduler import ForwardPlan, Scheduler


class HasNetwork(Protocol):
    """What the engine needs of a model: the network, and the buffers of earlier generations."""

    network: Transformer
    buffers: BufferPool


class LanguageModel(HasNetwork, Protocol):
    """What takes texts and options besides, as :class:`~fastdllm_triton.MaskedDiffusionLM` does."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def tokenizer(self) -> Any:
        """What decodes ids, or None."""

    def options(self, config: GenerationConfig | None = None, **options: Any) -> GenerationConfig:
        """The options of a generation."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""


@dataclass
class _Lane:
    """Rows that share buffers: those of requests with the same number of sequences in the network."""

    copies: int
    scheduler: Scheduler
    runner: ModelRunner | None = None


class Engine:
    """Decodes requests that come and go: continuous batching for masked-diffusion models.

    Requests may differ in everything: lengths, strategies, caches, temperatures, seeds, end tokens. A row's tokens, and the
    forwards that committed them, are those that it gets alone.

    >>> import fastdllm_triton as fdt
    >>> engine = fdt.Engine(fdt.load("tiny"), max_rows=4, max_length=128)
    >>> request = engine.add_request("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?", gen_length=48, block_length=16)
    >>> while engine.has_unfinished:
    ...     outputs = engine.step()
    >>> request.output.texts[0][-7:]
    '#### 59'

    Args:
        model: what :func:`fastdllm_triton.load` returns.
        max_rows: requests that are decoded at a time; others wait, first come, first served.
        max_length: prompt and generation of the longest request, in tokens.

    Raises:
        ValueError: an argument is not valid.
        MemoryError: the buffers would not fit; says what is needed and what there is.
    """

    def __init__(self, model: LanguageModel, *, max_rows: int, max_length: int) -> None:
        for name, value in (("max_rows", max_rows), ("max_length", max_length)):
            require(name, value, "an integer of 1 or more", is_int(value) and value >= 1)
        most = model.config.max_length
        require("max_length", max_length, f"at most the {most} tokens that the model takes", max_length <= most)
        self._model: Any = model
        self._open(model, max_rows, max_length)
        self._check_memory(1, f"max_rows: {max_rows} rows of max_length = {max_length}")

    @classmethod
    def of_batch(cls, model: HasNetwork, requests: Sequence[Request], described: str) -> Engine:
        """An engine for requests that are known from the start.

        Args:
            model: the model.
            requests: already checked.
            described: what errors call them.
        """
        engine = cls.__new__(cls)
        engine._model = model
        engine._open(model, len(requests), max(max(len(r.tokens), r.config.gen_length) for r in requests))
        engine._check_memory(requests[0].config.rows_per_sequence, described)
        for request in requests:
            engine._add(request)
        return engine

    def _open(self, model: HasNetwork, max_rows: int, max_length: int) -> None:
        self.network, self._buffers = model.network, model.buffers
        self.max_rows, self.max_length = max_rows, max_length
        rows_bucket, slots_bucket = buckets(self.network.device)
        block_length = self.network.config.block_length or 1  # Rows of block-causal models are whole blocks.
        self._size = rows_bucket(max_rows), slots_bucket(-(-max_length // block_length) * block_length)
        self._lanes: dict[int, _Lane] = {}
        self._requests: dict[int | str, Request] = {}
        self._ids = count()
        self.refreshes = self.steps = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._requests)

    @property
    def forward_count(self) -> int:
        """Forwards so far, of all requests."""
        return self.refreshes + self.steps

    def add_request(
        self,
        prompt: Any,
        config: GenerationConfig | None = None,
        request_id: int | str | None = None,
        *,
        reuse: PrefixStore | None = None,
        **options: Any,
    ) -> Request:
        """Takes a request in. It begins with the next step for which there is a row.

        Args:
            prompt: a text, or token ids as a list, an array or a tensor ``[T]``.
            config: the options; the model's defaults if not given.
            request_id: what :class:`StepOutput` and :meth:`abort` call it; a number of its own if not given.
            reuse: of a block-causal model, where finished blocks of requests before it are taken over from, as far as it begins
                with the same tokens, and where its own are kept once it ends.
            options: fields of :class:`GenerationConfig` that replace those of ``config``.

        Returns:
            The request, whose ``output`` is there once it is ``finished``.

        Raises:
            ValueError: an option or the prompt is not valid, or the id is that of an unfinished request.
            TypeError: the prompt is of another type, or an option is unknown.
            MemoryError: guidance, which takes two rows a request, does not fit.
        """
        config = self._model.options(config, **options)
        require("seed", config.seed, "one integer: a request has one row", is_int(config.seed))
        tokens = self._model.encode(prompt) if isinstance(prompt, str) else id_row("prompt", prompt)
        check_prompt("prompt", tokens, config, self.network.config)
        if len(tokens) + config.gen_length > self.max_length:
            raise ValueError(
                f"prompt has {len(tokens)} tokens; with gen_length = {config.gen_length} the engine takes at most "
                f"{self.max_length - config.gen_length} (max_length = {self.max_length})"
            )
        ids = config.resolve(self.network.config, 1)
        check_kernel_limits(self.network, self.max_rows, config.decoded_length, ids, name="max_rows")
        if request_id is None:
            request_id = next(number for number in self._ids if number not in self._requests)
        require("request_id", request_id, "a string or an integer", is_int(request_id) or isinstance(request_id, str))
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id!r} is an unfinished request; give another id")
        if config.rows_per_sequence not in self._lanes:
            self._check_memory(config.rows_per_sequence, f"cfg_scale: {self.max_rows} pairs of rows of {self.max_length} tokens")
        check_reuse(reuse, self.network)
        answer = [ids.mask_id] * config.gen_length
        named = {"request_id": request_id, "tokenizer": self._model.tokenizer, "reuse": reuse}
        request = new_request(0, tokens, answer, config, ids, self.network.config, **named)
        if len(request.tokens) > self._size[1]:
            allowed = f"at most the model's {self.network.config.block_length}, or a larger max_length"
            raise ValueError(f"block_length must be {allowed} for whole blocks of this request, got {config.block_length}")
        self._add(request)
        return request

    def abort(self, request_id: int | str) -> None:
        """Ends a request where it is; its output is what there is so far. One that is not unfinished is left alone."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.error = Aborted(f"request {request_id!r} was aborted")
        lane = self._lanes[request.config.rows_per_sequence]
        if request in lane.scheduler.waiting:
            lane.scheduler.waiting.remove(request)
            del self._requests[request_id]
        else:
            with decoding_modes(self.network):
                self._retire(lane, lane.scheduler.rows.index(request))

    def step(self) -> list[StepOutput]:
        """One iteration: rows that begin a block are refreshed, then all that can take a step take one.

        Returns:
            What it did for each request that took part.
        """
        outputs: list[StepOutput] = []
        with decoding_modes(self.network):
            for _ in self.forwards(outputs):
                pass
        return outputs

    def forwards(self, outputs: list[StepOutput] | None = None) -> Iterator[ForwardPlan]:
        """:meth:`step`, to be gone through forward by forward, all of it.

        Args:
            outputs: receives what the iteration did, which takes a copy from the device; nothing is copied if not given.
        """
        for lane in tuple(self._lanes.values()):
            runner, scheduler = self.admit(lane), lane.scheduler
            plan = scheduler.schedule()
            if plan.begun:
                runner.begin_blocks(plan.begun, plan.requests)
            for pair in plan.swaps:
                runner.swap_rows(*pair)
            for forward in plan.forwards:
                runner.run(self.network, runner.shape_of(forward, scheduler.rows))
                self._count(forward)
                yield forward
            if not scheduler.rows:
                continue
            flags = runner.sync_flags(len(scheduler.rows), scheduler.mask_ids)
            since = [(request, len(request.history)) for request in scheduler.rows]
            committed = runner.read_committed(since) if outputs is not None else []
            finished = scheduler.update(flags)
            for row in finished:
                self._retire(lane, row)
            if outputs is not None:
                outputs += [
                    _step_output(request, known, tokens) for (request, known), tokens in zip(since, committed, strict=True)
                ]

    def admit(self, lane: _Lane) -> ModelRunner:
        """Gives free rows to requests that wait; the runner of the lane."""
        if lane.runner is None:
            lane.runner = self._take_runner(lane.copies)
        first = len(lane.scheduler.rows)
        if admitted := lane.scheduler.admit():
            lane.runner.fill(first, admitted)
            for row, request in enumerate(admitted, first):
                _take_over(lane.runner, row, request)
            # What has nothing masked is finished before it begins.
            for row in reversed([i for i, request in enumerate(lane.scheduler.rows) if not request.blocks]):
                self._retire(lane, row)
        return lane.runner

    def close(self) -> None:
        """Ends the engine; its buffers serve the next one, with their captured forwards. Unfinished requests stay so."""
        for lane in self._lanes.values():
            if lane.runner is not None:
                for row, request in enumerate(lane.scheduler.rows):
                    _keep_blocks(lane.runner, row, request)
                self._buffers.give(lane.runner)
        self._lanes.clear()
        self._requests.clear()

    def lane(self) -> _Lane:
        """The lane of a batch, which has one."""
        (lane,) = self._lanes.values()
        return lane

    def _add(self, request: Request) -> None:
        copies = request.config.rows_per_sequence
        if copies not in self._lanes:
            self._lanes[copies] = _Lane(copies, Scheduler(self.max_rows))
        self._lanes[copies].scheduler.add(request)
        self._requests[request.request_id] = request

    def _count(self, forward: ForwardPlan) -> None:
        """Notes for every request that took part which forward of the engine that was."""
        index, is_refresh = self.forward_count, forward.kind == "refresh"
        self.refreshes += is_refresh
        self.steps += not is_refresh
        for request, window in zip(forward.requests, forward.windows, strict=True):
            if request.started is None:
                request.started = time.perf_counter()
            if window.kind == "refresh":
                request.refresh_indices.add(index)
                if request.skips_commit:
                    continue
            request.pending.append(index)

    def _retire(self, lane: _Lane, row: int) -> None:
        """Records a row and gives its place to the last one."""
        request, runner = lane.scheduler.rows[row], lane.runner
        assert runner is not None
        request.record = runner.read_row(row, request)
        _keep_blocks(runner, row, request)
        if request.config.stop_at_eos and request.error is None:  # What is still masked comes after an end token.
            answer = request.record.tokens[-request.config.gen_length :]
            answer.masked_fill_(answer == request.ids.mask_id, request.ids.eos_ids[0])
        request.seconds = 0.0 if request.started is None else time.perf_counter() - request.started
        moved = lane.scheduler.retire(row)
        if moved is None:
            runner.clear_row(row)
        else:
            runner.move_row(moved, row)
        del self._requests[request.request_id]

    def _check_memory(self, copies: int, described: str) -> None:
        """Sees to it that there are buffers or memory for them, at the expense of buffers that nobody uses."""
        while not self._buffers.has_fitting(*self._size, copies):
            try:
                check_memory(self.network, *self._size, copies=copies, described=described)
                return
            except MemoryError:
                if not self._buffers.free_one():
                    raise

    def _take_runner(self, copies: int) -> ModelRunner:
        """Buffers of a generation before, or new ones."""
        self._check_memory(copies, f"{self.max_rows} rows")
        runner = self._buffers.take(*self._size, copies)
        if runner is None:
            graphs = self._buffers.use_cuda_graphs
            runner = ModelRunner(self.network, *self._size, copies=copies, use_cuda_graphs=graphs)
        runner.reset()
        return runner


def check_reuse(reuse: PrefixStore | None, network: Transformer) -> None:
    """Raises unless ``reuse`` is None or a store that can serve the model."""
    if reuse is None:
        return
    if not isinstance(reuse, PrefixStore):
        raise TypeError(f"reuse must be a PrefixStore or None, got {type(reuse).__name__}")
    reuse.check(network)


def _take_over(runner: ModelRunner, row: int, request: Request) -> None:
    """Gives a new row the finished blocks that it begins with."""
    if request.reuse is not None and request.policy.reuses and (found := request.reuse.find(request.reusable, request.causal)):
        runner.write_prefix(row, request, *found)
        request.stored = found[0].shape[2]


def _keep_blocks(runner: ModelRunner, row: int, request: Request) -> None:
    """Keeps the finished blocks of a row for others."""
    if request.reuse is None or not request.policy.reuses or request.error is not None or not request.stored:
        return
    tokens = runner.read_row(row, request).tokens[: request.stored].tolist()
    request.reuse.put(tokens, request.causal, *runner.read_prefix(row, request, request.stored))


def _step_output(request: Request, known: int, committed: tuple[Committed, ...]) -> StepOutput:
    block = request.block if request.blocks else None
    return StepOutput(request.request_id, block, len(request.history) - known, committed, request.finished, request.error)


def now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

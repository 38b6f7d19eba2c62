"""A whole denoising step and a refresh, ours and the official code's re-created, with random weights at the true sizes.

A step of ours is the captured graph, from token ids to committed tokens, over the dual cache; it is timed several times in
a row on a block that is masked again before each turn. The official step (``official_step.py``) does the same work with the
same weights: its forward over the block, selection, and the test on the host whether the block is done. A refresh recomputes the
whole context and is the first step of its block in both. The floor is that of ``fastdllm_triton.tools.roofline``, with the copy
bandwidth and the matrix rate that this GPU reached in the same run. Two more providers are ours with a choice made otherwise:
``triton serial`` launches no kernel before its predecessor has ended, ``triton fused`` takes the kernel of ``linear`` for every
product, measured or not.

Of block-causal models (``official_blocks.py``) a refresh stores the block before. With SDAR the first step of the block is part
of that forward of ours, and one of its own in the official code. With Fast-dLLM v2 that forward gives the block's first token,
and steps decode sub-blocks of 8 over the whole block, as its official code does by default.

Ours are timed first, and their buffers freed before the official ones are made. The logits of both are compared last; until
then rows of ours say so under ``wrong``.

``peak_bytes`` counts what a captured step holds in the memory pool of its graph. Where the time of a forward goes, op by op, is
what ``fastdllm-triton profile`` shows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._models import MODELS, network_of, prompt_of
from fastdllm_triton.bench._session import ModelBench, Row, Session, Shape, peak, timed
from fastdllm_triton.bench._timing import Timing, events_around, percentiles, pool_bytes, reason
from fastdllm_triton.bench.official_blocks import OfficialBlockModel, OfficialBlocks
from fastdllm_triton.bench.official_step import OfficialModel, dream_block, llada_block
from fastdllm_triton.decoding.config import GenerationConfig
from fastdllm_triton.decoding.strategies import Threshold
from fastdllm_triton.engine.request import batch_requests
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.engine.scheduler import ForwardPlan
from fastdllm_triton.models.config import ModelConfig
from fastdllm_triton.models.transformer import Transformer
from fastdllm_triton.tools.roofline import forward_cost
from fastdllm_triton.utils.environment import GRAPHS

#: Along each axis from a middle point; the most asked for first. Each has a row for its refresh too.
SHAPES: list[dict[str, Any]] = [
    {"forward": "step", "model": model, "batch": batch, "window": window, "context": context}
    for model in ("llada-8b", "dream-7b")
    for batch, window, context in dict.fromkeys(
        [(1, 32, 1024), (4, 32, 1024), (2, 32, 1024), (8, 32, 1024), (16, 32, 1024)]
        + [(1, window, 1024) for window in (16, 64, 128)]
        + [(1, 32, context) for context in (512, 2048, 4096, 8192, 16_384)]
        + [(batch, 32, 4096) for batch in (4, 16)]
    )
] + [
    {"forward": "step", "model": model, "batch": batch, "window": window, "context": context}
    for model, window in (("sdar-8b", 4), ("sdar-8b", 32), ("fast-dllm-v2-7b", 32), ("sdar-4b", 4), ("sdar-4b", 32))
    for batch, context in ((1, 1024), (8, 1024), (1, 4096))
]
#: Shapes that matter most.
KEY = 1
QUICK = [
    {"forward": "step", "model": model, "batch": batch, "window": 8, "context": 40}
    for model, batch in product(("tiny llada", "tiny dream"), (1, 2))
] + [
    {"forward": "step", "model": "tiny sdar", "batch": 2, "window": 4, "context": 40},
    {"forward": "step", "model": "tiny v2", "batch": 2, "window": 16, "context": 48},
]
#: Tokens that Fast-dLLM v2 decodes of a block at a time, unless asked otherwise.
SUB_BLOCK = 8
#: Steps in a row of a turn, no more than the slots of the smallest block: each commits a token at least.
STEPS, TURNS = 4, 10

#: Of the logits' size: bfloat16 through 32 layers in two orders of summation makes a hundredth, a wrong operand makes one.
TOLERANCE = 0.1


def cache_of(config: ModelConfig) -> dict[str, Any]:
    """The options for a model's cache: that of whole sequences, or of finished blocks."""
    if not config.block_causal:
        return {"cache": "dual"}
    return {"cache": "block_causal", "sub_block_length": SUB_BLOCK if config.shift else None}


class OurStep:
    """A batch that stands at a block, to be stepped again and again."""

    def __init__(self, network: Transformer, ids: Tensor, window: int) -> None:
        rows, context = ids.shape
        gen_length = min(context // window, 4) // 2 * window * 2  # half of it before the block, as in the middle of a generation
        self.config = GenerationConfig(
            gen_length=gen_length, block_length=window, strategy=Threshold(0.9), stop_at_eos=False, **cache_of(network.config)
        )
        self.start, self.rows, self.masked = context - gen_length // 2, rows, rows * self.config.decoded_length
        self.network = network
        self.sequences = ids.clone()
        self.sequences[:, self.start :] = network.config.mask_id
        begin = context - gen_length
        prompts, answers = self.sequences[:, :begin].tolist(), self.sequences[:, begin:].tolist()
        self.requests = batch_requests(prompts, answers, self.config, network.config)
        self.batch = ModelRunner(network, rows, context, use_cuda_graphs=GRAPHS.value == "1")
        self.batch.fill(0, self.requests)
        self.program = self.batch.program_of(self.requests, self.requests)
        for request in self.requests:
            request.begin_block()
        self.window = len(self.requests[0].policy.step(self.requests[0].block_state))
        if network.config.block_causal:
            self.prefill(self.start - window)

    @torch.no_grad()
    def prefill(self, end: int) -> None:
        """Stores the blocks up to ``end``: a refresh stores the one behind."""
        self.reset()
        first, nothing = torch.zeros_like(self.batch.window_start), self.sequences.new_empty(0)
        length = self.config.block_length
        self.network.forward(self.sequences[:, :end], first, self.batch.cache, nothing, block_length=length)
        for request in self.requests:
            request.stored = end

    def reset(self) -> None:
        self.batch.x.copy_(self.sequences)
        self.batch.begin_blocks(range(self.rows), self.requests)

    def refresh(self) -> None:
        """The first forward of the block."""
        if self.network.config.block_causal:
            windows = tuple(request.policy.refresh(request.block_state) for request in self.requests)
            masked = self.rows if self.program.refresh_commits == "first" else self.masked
            plan = ForwardPlan("refresh", 0, self.rows, tuple(self.requests), windows, masked, is_last_group=True)
            shape = self.batch.shape_of(plan, self.requests)
        else:
            shape = self.batch.refresh_shape(self.program, 0, self.rows, 0, self.batch.slots, self.masked)
        self.batch.run(self.network, shape)

    def step(self) -> None:
        """Another forward."""
        self.batch.run(self.network, self.batch.step_shape(self.program, 0, self.rows, self.window, self.masked))

    @torch.no_grad()
    def logits(self) -> Tensor:
        """``[B, N, V]``: of the masked block, over the cache of a refresh."""
        network, batch, back = self.network, self.batch, self.window - self.config.block_length
        self.reset()
        self.refresh()
        block = self.sequences[:, self.start - back : self.start - back + self.window]
        hidden = network.forward(block, batch.window_start, batch.cache)
        return (network.final_norm(hidden) @ network.head.T)[:, back:]


class OfficialStep:
    """The official code at the same block."""

    def __init__(self, network: Transformer, sequences: Tensor, start: int, window: int) -> None:
        self.model, self.mask_id = OfficialModel(network), network.config.mask_id
        if self.model.is_dream and len(sequences) > 1:
            raise NotImplementedError("the official loop is for one row")
        self.sequences, self.start, self.window = sequences, start, window
        self.x = sequences.clone()

    def reset(self) -> None:
        self.x.copy_(self.sequences)

    def refresh(self) -> None:
        """A forward of everything, its cache kept, and the first selection."""
        block = dream_block if self.model.is_dream else llada_block
        self.forwards = block(self.model, self.x, self.start, self.window, "dual", 0.9, None)  # the last cache may be freed
        self.step()

    def step(self) -> None:
        """A forward of the block, selection, and the look at what is left."""
        next(self.forwards)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """``[B, N, V]``: of the masked block, over the cache of a refresh."""
        end, replace = self.start + self.window, torch.zeros_like(self.x, dtype=torch.bool)
        replace[:, self.start : end] = True
        past = self.model(self.sequences, use_cache=True)[1]
        return self.model(self.sequences[:, self.start : end], past, replace)[0]


class OfficialBlockStep:
    """The official code of a block-causal model at the same block."""

    def __init__(self, network: Transformer, sequences: Tensor, start: int, window: int) -> None:
        self.sequences, self.start = sequences, start
        sub_block = SUB_BLOCK if network.config.shift else window
        self.loop = OfficialBlocks(OfficialBlockModel(network), sequences.clone(), window, sub_block)
        if start > window:
            self.loop.store(start - window, first=False)
        self.stored = self.loop.past

    def reset(self) -> None:
        self.loop.x.copy_(self.sequences)

    def refresh(self) -> None:
        """Stores the block before, and decodes of this one what ours does."""
        self.loop.past = self.stored
        self.loop.store(self.start)
        if self.loop.model.is_sdar:
            self.step()

    def step(self) -> None:
        """A forward of the block, selection, and the look at what is left."""
        self.loop.step(self.start, threshold=0.9)
        self.loop.masks(self.start, self.start + self.loop.sub_block)

    def logits(self) -> Tensor:
        """``[B, N, V]``: of the masked block, over the blocks before."""
        self.reset()
        self.loop.past = self.stored
        self.loop.store(self.start, first=False)
        return self.loop.logits(self.start)


def difference(got: Tensor, want: Tensor) -> float:
    """How far logits are from the official ones, in parts of their size."""
    got, want = got.double(), want.double()
    return ((got - want).pow(2).mean() / want.pow(2).mean()).sqrt().item()


def time_of(run: Callable[[], None], reset: Callable[[], None], repeat: int, turns: int = TURNS) -> Timing:
    """Milliseconds of one of ``repeat`` runs in a row, on the GPU's clock."""
    turned = []
    for turn in range(turns + 2):
        reset()
        torch.cuda.synchronize()
        begin, end = events_around(run, repeat)
        torch.cuda.synchronize()
        if turn >= 2:  # the first ones compile and capture
            turned.append(begin.elapsed_time(end) / repeat)
    return percentiles(turned)


#: Providers that are ours with a choice made otherwise.
OPTIONS = {"triton serial": {"pdl": False}, "triton fused": {"fuse_linear": True}}


def launched(network: Transformer, provider: str) -> Transformer:
    """The same model with the launch options of a provider."""
    return Transformer(network.config, network.weights, network.ops.with_options(**OPTIONS[provider]))


def sizes(forward: str, shape: Shape) -> tuple[int, int, int]:
    """Slots that a forward of ours recomputes of a row, slots that it attends, and rows that pass the head."""
    config, window, context = MODELS[shape["model"]], shape["window"], shape["context"]
    predicted = SUB_BLOCK if config.block_causal and config.shift else window
    if forward == "step":
        return window, context, predicted
    if not config.block_causal:
        return context, context, window
    return (window, context - window, 1) if config.shift else (2 * window, context, window)


class StepBench(ModelBench):
    """Steps and refreshes of whole models, ours and the official one."""

    op = suite = "step"
    shapes, quick, key = SHAPES, QUICK, KEY
    baselines = ("official", *OPTIONS)

    def rows_of(self, shape: Shape, session: Session) -> Iterator[list[Row]]:
        rows: dict[tuple[str, str], Row] = {}

        def listed(**more: Any) -> list[Row]:
            common = {"bench": self.op, "op": self.op, "axis": "batch"}
            ours = {forward: row.get("median_ms") for (forward, provider), row in rows.items() if provider == "triton"}
            return [
                common | {"shape": {**shape, "forward": forward}, "provider": provider} | row | more
                | ({"times_triton": row["median_ms"] / ours[forward]} if ours.get(forward) and "median_ms" in row else {})
                for (forward, provider), row in rows.items()
            ]  # fmt: skip

        dtype = torch.float32 if session.timer is None else torch.bfloat16
        try:
            network = network_of(shape["model"], session.device, dtype)
            ours = OurStep(network, prompt_of(shape["model"], shape["batch"], shape["context"], session.device), shape["window"])
        except Exception as error:
            rows["step", "triton"] = {"missing": reason(error)}
            yield listed()
            return
        for forward in ("refresh", "step"):
            rows[forward, "triton"] = self.row_of(forward, ours, shape, session)
        for provider in OPTIONS:
            if session.wants(provider):
                rows["step", provider] = self.other_row(provider, ours, shape, session)
        if not session.wants("official"):
            yield listed()
            return
        yield listed(wrong="not compared with the official logits yet")
        try:
            logits, block = ours.logits(), (ours.sequences, ours.start, shape["window"])
            del ours  # its cache takes no room from the official one
            gc.collect()
            theirs = (OfficialBlockStep if network.config.block_causal else OfficialStep)(network, *block)
            apart = difference(logits, theirs.logits())
        except Exception as error:  # not one for such a shape, or too little memory
            rows |= {(forward, "official"): {"missing": reason(error)} for forward in ("refresh", "step")}
            yield listed()
            return
        wrong = {}
        if not apart <= TOLERANCE:  # NaN is none either
            wrong = {"wrong": f"logits of the step differ from the official ones by {apart:.3f} of their size"}
            if not session.unverified:
                rows = {key: {"missing": f"refused: {wrong['wrong']}", "refused": True} for key in rows}
                yield listed()
                return
        for forward in ("refresh", "step"):
            rows[forward, "official"] = self.row_of(forward, theirs, shape, session)
        yield listed(**wrong)

    def other_row(self, provider: str, ours: OurStep, shape: Shape, session: Session) -> Row:
        """A step of ours with another choice."""
        if ours.network.ops.name != "triton":
            return {"missing": "needs a GPU"}
        try:
            step = OurStep(launched(ours.network, provider), ours.sequences, shape["window"])
        except Exception as error:
            return {"missing": reason(error)}
        return self.row_of("step", step, shape, session)

    def row_of(self, forward: str, side: OurStep | OfficialStep | OfficialBlockStep, shape: Shape, session: Session) -> Row:
        """A time with its ceilings, and the peak of memory."""
        run = side.step if forward == "step" else side.refresh
        try:
            side.reset()
            if session.timer is None or session.ceilings is None:
                run()
                return {"missing": "ran; not timed without a GPU"}
            if forward == "step":
                side.refresh()
            pools = pool_bytes()
            timing = time_of(run, side.reset, STEPS if forward == "step" else 1)
            pools = pool_bytes() - pools
            side.reset()
            reached = peak(lambda _: run(), {})
        except Exception as error:  # too little memory for a float64 softmax over a long context
            return {"missing": reason(error)}
        cost = forward_cost(MODELS[shape["model"]], shape["batch"], *sizes(forward, shape))
        row = timed(timing, int(cost.bytes), int(cost.flops), session.ceilings)
        return row | {"peak_bytes": None if reached is None else reached + pools}


BENCH = StepBench()

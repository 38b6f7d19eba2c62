"""The floor: how fast decoding could be on a GPU that is described by two numbers.

A forward must at least read every weight and every attended key and value once, and do its matrix products. What is divided
by the memory bandwidth and what is divided by the matrix rate are two times, and the larger one is the floor (the roofline
model: Williams, Waterman, Patterson, CACM 52(4), 2009). Everything here is arithmetic on shapes: nothing runs, and nothing
but the two numbers of the GPU is measured.

What counts:

* a product of ``[R, K]`` and ``[K, N]`` is ``2 R K N`` FLOPs; elementwise work counts nothing;
* weights, the cache's keys and values, token ids and statistics are memory traffic. Activations that one op hands to the
  next are not: 32 rows of them stay in the L2 cache, and a fusion would keep more. They are listed for each op
  (:attr:`OpCost.activations`), because an op that is timed by itself, with a cold cache, does pay for them;
* ops of one forward are taken together, since loads of one can overlap the products of another. Forwards follow one another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..decoding.cache_policy import CACHE_OPTIONS, CACHE_POLICIES, BlockState, CacheName, Window, cache_policy, decoded_blocks
from ..decoding.config import GenerationConfig
from ..models.config import ModelConfig
from ..models.published import PUBLISHED
from ..utils.checks import require


@dataclass(frozen=True)
class Gpu:
    """What a floor needs to know of a GPU.

    Attributes:
        name: for people.
        bandwidth: of its memory, bytes a second.
        matrix_rate: dense bfloat16 products with float32 accumulation, FLOPs a second.
    """

    name: str
    bandwidth: float
    matrix_rate: float


#: NVIDIA's data sheets and architecture white papers: memory bandwidth, and the dense bfloat16 rate with float32 accumulation
#: (half of a rate that is given "with sparsity"). A100 80GB SXM, H100 SXM5, H200 SXM, B200 (a GPU of an HGX B200), L40S; Ada
#: and RTX Blackwell white papers for the GeForce cards. What a machine really reaches is less: ``bench`` measures it.
GPUS = {
    "a100": Gpu("A100 80GB SXM", 2.039e12, 312e12),
    "h100": Gpu("H100 SXM", 3.35e12, 989.4e12),
    "h200": Gpu("H200 SXM", 4.8e12, 989.4e12),
    "b200": Gpu("B200", 8.0e12, 2250e12),
    "l40s": Gpu("L40S", 864e9, 362.05e12),
    "rtx4090": Gpu("GeForce RTX 4090", 1.008e12, 165.2e12),
    "rtx5090": Gpu("GeForce RTX 5090", 1.792e12, 209.5e12),
}


#: The published models by the names that commands take.
SHAPES = PUBLISHED


def shape_of(model: str | Path) -> ModelConfig:
    """The config of a published model by its name, or of a ``config.json`` or the folder that holds one.

    Raises:
        ValueError: no such name or file, or a config of an unknown architecture.
    """
    name = str(model).lower()
    if name in SHAPES:
        return SHAPES[name]
    if name != "tiny" and not os.path.exists(Path(model).expanduser()):
        raise ValueError(f"model: got {str(model)!r}, needs one of {', '.join(SHAPES)}, tiny, or a config.json")
    from ..loading import read_config

    return read_config(name if name == "tiny" else model)[0]


@dataclass(frozen=True)
class Cost:
    """Bytes that must pass the memory, and FLOPs of the matrix units."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.bytes * times, self.flops * times)

    def seconds(self, gpu: Gpu) -> float:
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.matrix_rate)

    def bound(self, gpu: Gpu) -> Literal["memory", "matrix"]:
        return "memory" if self.bytes / gpu.bandwidth >= self.flops / gpu.matrix_rate else "matrix"


@dataclass(frozen=True)
class OpCost:
    """One op in all layers of a forward.

    Attributes:
        calls: how often the forward runs it.
        bytes: weights, cache, ids and statistics it reads and writes.
        activations: bytes it takes from the op before and leaves to the next.
        flops: of its products.
    """

    calls: int
    bytes: float
    activations: float
    flops: float = 0.0

    @property
    def alone(self) -> Cost:
        """What the op costs where it is timed by itself: its activations pass the memory too."""
        return Cost(self.bytes + self.activations, self.flops)


#: What a token's statistics take: an int64 and five float32 (``TokenStatistics``).
STATISTICS_BYTES = 28


def op_costs(
    shape: ModelConfig,
    batch: float,
    window: float,
    keys: float,
    head_rows: float,
    *,
    weight_bits: float = 16,
    cache_bits: float = 16,
) -> dict[str, OpCost]:
    """What each op of a forward costs, all layers together. Sizes may be averages.

    Args:
        shape: the model.
        batch: sequences ``B``.
        window: rows ``W`` a sequence that the forward recomputes.
        keys: slots a sequence that its rows attend, the window's own included.
        head_rows: rows a sequence that go through the final norm and the head.
        weight_bits: of the matrices, the head included; products stay bfloat16 (weight-only quantisation).
        cache_bits: of keys and values.

    Raises:
        ValueError: a size is not positive, or a window exceeds the keys it writes.
    """
    sizes = {"batch": batch, "window": window, "keys": keys, "weight_bits": weight_bits, "cache_bits": cache_bits}
    for name, value in sizes.items():
        require(name, value, "a number above 0", math.isfinite(value) and value > 0)
    if not 0 <= head_rows <= window <= keys:
        raise ValueError(f"head_rows, window and keys must be in this order, got {head_rows}, {window} and {keys}")
    element = 2
    rows = batch * window
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def gemm(calls: int, rows: float, inner: int, columns: int, activations: float | None = None) -> OpCost:
        passed = element * rows * (inner + columns) if activations is None else activations
        return OpCost(calls, calls * inner * columns * weight_bits / 8, calls * passed, calls * 2 * rows * inner * columns)

    def elementwise(calls: int, rows: float, columns: float, extra_bytes: float = 0.0) -> OpCost:
        return OpCost(calls, calls * extra_bytes, calls * element * rows * columns)

    n, e, f = shape.layers, shape.width, shape.mlp
    return {
        "embedding": OpCost(1, rows * (8 + element * e), element * rows * e),
        # The sum of the residual and the output before it, and the norm of the sum: two in, two out.
        "rms_norm": elementwise(2 * n, rows, 4 * e, element * e),
        "qkv": gemm(n, rows, e, q + 2 * kv),
        "rope_kv_write": elementwise(n, rows, (q + 2 * kv) + q, 2 * rows * kv * cache_bits / 8),
        "window_attention": OpCost(
            n, n * 2 * batch * keys * kv * cache_bits / 8, n * element * 2 * rows * q, n * 4 * rows * keys * q
        ),
        "attn_out": gemm(n, rows, q, e),
        "gate_up": gemm(n, rows, e, 2 * f),
        "swiglu": elementwise(n, rows, 3 * f),
        "down": gemm(n, rows, f, e),
        "final_norm": elementwise(1, batch * head_rows, 3 * e, element * e),
        "head_statistics": gemm(1, batch * head_rows, e, shape.vocab_size, element * batch * head_rows * e),
        "commit_tokens": OpCost(1, 2 * STATISTICS_BYTES * batch * head_rows, 0.0),
    }  # fmt: skip


def forward_cost(shape: ModelConfig, batch: float, window: float, keys: float, head_rows: float, **bits: float) -> Cost:
    """What a forward costs; arguments as :func:`op_costs` takes them."""
    ops = op_costs(shape, batch, window, keys, head_rows, **bits).values()
    return Cost(sum(op.bytes for op in ops), sum(op.flops for op in ops))


@dataclass(frozen=True)
class Phase:
    """Forwards of one kind.

    Attributes:
        name: ``refresh``, ``block_step`` or ``step``.
        forwards: how many; an average may be a fraction.
        batch, window, keys, head_rows: as :func:`forward_cost` takes them.
    """

    name: str
    forwards: float
    batch: float
    window: float
    keys: float
    head_rows: float


@dataclass(frozen=True)
class Setting:
    """A generation, as far as its cost goes.

    Attributes:
        prompt_length: tokens of the prompt.
        gen_length, block_length: tokens to generate, and of a block.
        cache: which window a step recomputes.
        tokens_per_forward: tokens committed a forward, refreshes counted among the forwards; 1 is one token a forward.
        batch_size: sequences in lockstep, each as long as the others.
        prompt_refresh: blocks from one refresh of the prompt's part of the cache to the next; those in between recompute the
            generated part alone. 1 is the paper.
        refresh_every, suffix_window, look_back, look_ahead, sub_block_length, sub_block_cache, separate_store: as
            :class:`~fastdllm_triton.GenerationConfig` has them.
        stop_at: tokens up to and including the end token, after whose block decoding stops; all are decoded if not given.
        weight_bits, cache_bits: of the matrices, and of keys and values.
    """

    prompt_length: int
    gen_length: int
    block_length: int = 32
    cache: CacheName = "dual"
    tokens_per_forward: float = 1.0
    batch_size: int = 1
    prompt_refresh: int = 1
    stop_at: int | None = None
    weight_bits: float = 16
    cache_bits: float = 16
    refresh_every: int | None = None
    suffix_window: int | None = None
    look_back: int = 0
    look_ahead: int = 0
    sub_block_length: int | None = None
    sub_block_cache: bool = False
    separate_store: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_length", "gen_length", "block_length", "batch_size", "prompt_refresh"):
            require(name, getattr(self, name), "1 or more", getattr(self, name) >= 1)
        for name, least in (("refresh_every", 1), ("suffix_window", 0), ("look_back", 0), ("look_ahead", 0)):
            value = getattr(self, name)
            require(name, value, f"{least} or more", value is None or value >= least)
        if self.gen_length % self.block_length and self.cache not in ("none", "block_causal"):  # of which the model decides
            raise ValueError(f"block_length must divide gen_length, {self.gen_length}, got {self.block_length}")
        require("cache", self.cache, f"one of {', '.join(CACHE_POLICIES)}", self.cache in CACHE_POLICIES)
        for name in ("look_back", "look_ahead", "sub_block_cache", "separate_store"):
            if getattr(self, name) and name not in CACHE_OPTIONS[self.cache]:
                raise ValueError(f"{name} means nothing for cache = {self.cache!r}")
        rate = self.tokens_per_forward
        require("tokens_per_forward", rate, "in (0, block_length]", 0 < rate <= self.block_length)
        require("stop_at", self.stop_at, "in [1, gen_length]", self.stop_at is None or 1 <= self.stop_at <= self.gen_length)
        require("weight_bits", self.weight_bits, "in (0, 64]", 0 < self.weight_bits <= 64)
        require("cache_bits", self.cache_bits, "in (0, 64]", 0 < self.cache_bits <= 64)

    @property
    def slots(self) -> int:
        return self.prompt_length + self.gen_length

    @property
    def blocks(self) -> int:
        return math.ceil((self.stop_at or self.gen_length) / self.block_length)

    @property
    def tokens(self) -> int:
        return self.stop_at or self.gen_length

    def schedule(self, shape: ModelConfig | None = None) -> list[Phase]:
        """The forwards, equal ones together, in the order in which each kind first occurs.

        A block takes ``block_length / tokens_per_forward`` forwards. Before its first one all its rows are masked; before
        the others, half of them on average.

        Args:
            shape: the model; one whose attention is bidirectional if not given.

        Raises:
            ValueError: the cache is for models whose attention is of another kind.
        """
        counts: dict[Phase, float] = {}
        if shape is not None:
            self._config.check_fits(shape)
        reuses = CACHE_POLICIES[self.cache].reuses
        is_causal = shape is not None and shape.block_causal
        for window, count, head_rows in self._causal_windows(shape.shift) if is_causal and shape else self._windows():
            if count > 0:
                # Without a cache every forward is a whole one, and none of them is called a refresh.
                name = window.kind if reuses else "step"
                phase = Phase(name, 1, self.batch_size, window.end - window.start, window.attend_end, head_rows)
                counts[phase] = counts.get(phase, 0.0) + count
        return [replace(phase, forwards=count) for phase, count in counts.items()]

    @property
    def _config(self) -> GenerationConfig:
        options = {name: getattr(self, name) for name in (*CACHE_OPTIONS[self.cache], "sub_block_length")}
        return GenerationConfig(self.gen_length, self.block_length, self.cache, **options)

    def _windows(self) -> Iterator[tuple[Window, float, float]]:
        """Windows, how often each comes, and the rows of its head, of a model whose attention is bidirectional."""
        forwards, length = self.block_length / self.tokens_per_forward, self.block_length
        policy = cache_policy(self.cache, **{name: getattr(self, name) for name in CACHE_OPTIONS[self.cache]})
        refreshes = max(forwards / (self.refresh_every or forwards), 1)
        for index in range(self.blocks):
            start = self.prompt_length + index * length
            block = BlockState(self.prompt_length, self.slots, start, start + length, ordinal=index)
            yield policy.refresh(block), 1, length
            yield policy.refresh(block), refreshes - 1, length / 2
            yield policy.step(block), forwards - refreshes, length / 2

    def _causal_windows(self, shift: bool) -> Iterator[tuple[Window, float, float]]:
        """The same of a block-causal model: its first block takes what is left of it behind the prompt."""
        config, length, stored = self._config, self.block_length, 0
        policy, unit = config.cache_policy(shift=shift, block_causal=True), config.decoded_length
        for start, end in decoded_blocks(self.prompt_length, self.tokens, length, length):
            masked, stores = end - max(start, self.prompt_length), 0
            block = BlockState(self.prompt_length, self.slots, start, start + unit, causal=length, stored=stored)
            if policy.needs_refresh(block):
                first = float(start >= self.prompt_length)
                yield policy.refresh(block), 1, {"rule": min(unit, masked), "first": first, "nothing": 0}[policy.refresh_commits]
                stored, stores = start, 1
            steps = max(masked / self.tokens_per_forward, 1) - stores
            # Each sub-block begins with a step over the block.
            begun = min(math.ceil(masked / unit), steps) if policy.has_block_steps else 0
            yield policy.step(block), begun, unit / 2
            yield policy.step(replace(block, cached_block=start, starts_masked=False)), steps - begun, unit / 2


@dataclass(frozen=True)
class Floor:
    """The floor of a generation on a GPU.

    Attributes:
        forwards: of all phases.
        refresh_seconds, step_seconds: of all refreshes and of all other forwards.
        cost: bytes and FLOPs of the whole generation.
        tokens: useful ones, of the whole batch.
    """

    forwards: float
    refresh_seconds: float
    step_seconds: float
    cost: Cost
    tokens: float

    @property
    def seconds(self) -> float:
        return self.refresh_seconds + self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def generation_cost(shape: ModelConfig, schedule: Sequence[Phase], **bits: float) -> list[tuple[Phase, Cost]]:
    """Each phase with what all its forwards cost together."""
    return [(p, forward_cost(shape, p.batch, p.window, p.keys, p.head_rows, **bits) * p.forwards) for p in schedule]


def floor(shape: ModelConfig, setting: Setting, gpu: Gpu) -> Floor:
    costs = generation_cost(shape, setting.schedule(shape), weight_bits=setting.weight_bits, cache_bits=setting.cache_bits)
    seconds = {"refresh": 0.0, "step": 0.0}
    for phase, cost in costs:
        seconds["refresh" if phase.name == "refresh" else "step"] += cost.seconds(gpu)
    forwards, total = sum(phase.forwards for phase, _ in costs), sum((cost for _, cost in costs), Cost(0, 0))
    return Floor(forwards, seconds["refresh"], seconds["step"], total, setting.batch_size * setting.tokens)


def what_if(setting: Setting) -> list[tuple[str, Setting]]:
    changed = {
        "fp8 weights": replace(setting, weight_bits=8),
        "4-bit weights": replace(setting, weight_bits=4),
        "batch 8": replace(setting, batch_size=8),
        **(
            {}
            if setting.cache == "block_causal"
            else {f"prompt refresh {every}": replace(setting, prompt_refresh=every) for every in (2, 4)}
        ),
        "twice the tokens": replace(setting, tokens_per_forward=min(2 * setting.tokens_per_forward, setting.block_length)),
    }
    return [("as given", setting), *((name, other) for name, other in changed.items() if other != setting)]

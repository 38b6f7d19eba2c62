"""Whole generations at the paper's settings, ours and the official code's re-created, with random weights at the true sizes.

With random weights no confidence reaches a threshold, so the schedule is imposed: each block is spread over as many forwards
as the paper's tokens per forward make it, the same for ours and for the official loop. Providers:

* ``triton``: ours, every block decoded; ``triton eos`` stops after the block with the end token, as it does by default. The text
  is the same.
* ``official``: the official loop with the same cache and schedule.
* ``vanilla``: the official loop without a cache, one token a forward. All its forwards are alike, so that some are timed and
  the whole is their product (``extrapolated``).

Seconds are wall clock, the host included; ``over_vanilla`` is how many times faster than ``vanilla`` a row is.
``tokens_per_s`` counts the tokens of all rows, with an end token those up to it. The floor is that of
``fastdllm_triton.tools.roofline`` for the schedule on this GPU.

Tokens per forward: on GSM8K with 8-shot prompts and 1024 tokens from the wall clocks of figure 1c of the paper (140 forwards),
for 5-shot and 256 tokens as given there (3.01 with a cache). The others are not given: what they are is taken from the gain of
parallel decoding alone in tables 1, 3 and 4, whose forwards cost the same with and without it. Prompts: 5-shot GSM8K counted
(1030 tokens), 8-shot in proportion (1560), HumanEval assumed (150). The end token at 230 is what 19.3 tokens/s in 12 s amount to.

Block-causal models (``official_blocks.py``): the official loops over their own cache; ``vanilla`` is the same loop at one token
a forward, all of it. Forwards that only store a block are apart from the schedule: SDAR's official loop makes one a block and
ours none, Fast-dLLM v2's one a block as ours. Tokens per forward: of Fast-dLLM v2 from its README, 101.7 tokens/s at a threshold
of 0.9 against 39.1 at one token a forward; of SDAR from "more than twice" the static rate of its blocks of 4, and assumed to be
the same in blocks of 32. The prompt is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from fastdllm_triton.bench import official_blocks
from fastdllm_triton.bench import official_step as official
from fastdllm_triton.bench._models import MODELS, network_of, prompt_of, release
from fastdllm_triton.bench._session import ModelBench, Row, Session, Shape, timed
from fastdllm_triton.bench._timing import Timing, reason
from fastdllm_triton.bench.bench_step import SUB_BLOCK, cache_of
from fastdllm_triton.bench.official_blocks import OfficialBlockModel
from fastdllm_triton.bench.official_step import OfficialModel
from fastdllm_triton.decoding import CacheName, GenerationConfig
from fastdllm_triton.decoding.cache_policy import BlockCausal, play
from fastdllm_triton.decoding.strategies import FixedSteps
from fastdllm_triton.engine.generation import Generation
from fastdllm_triton.model import MaskedDiffusionLM
from fastdllm_triton.tools.roofline import Cost, Floor, Gpu, Setting, forward_cost
from fastdllm_triton.tools.roofline import floor as floor_of

BLOCK = 32
#: Task, tokens of the prompt, tokens to generate, tokens a forward, place of the end token.
TASKS = [
    ("gsm8k 8-shot", 1560, 1024, 1024 / 140, 230),
    ("gsm8k 5-shot", 1030, 256, 3.01, 230),
    ("gsm8k 8-shot", 1560, 256, 3.3, 230),
    ("gsm8k 8-shot", 1560, 512, 6.1, 230),
    ("gsm8k 5-shot", 1030, 512, 5.8, 230),
    ("gsm8k 5-shot", 1030, 1024, 10.6, 230),
    ("humaneval 0-shot", 150, 256, 3.3, 230),
    ("humaneval 0-shot", 150, 512, 3.1, 230),
]


NAMES = ("task", "prompt", "gen_length", "tokens_per_forward", "end")


def _shape(model: str, task: tuple[str, int, int, float, int], cache: str, batch: int) -> dict[str, Any]:
    return {"model": model, **dict(zip(NAMES, task, strict=True)), "cache": cache, "batch": batch}


#: The most asked for first; of these the first :data:`KEY` are the key ones.
SHAPES = [
    *(_shape(model, task, "dual", 1) for model in ("llada-8b", "dream-7b") for task in TASKS[:2]),
    *(_shape("llada-8b", task, "prefix", 1) for task in TASKS[:2]),
    *(_shape("llada-8b", task, "dual", batch) for task in TASKS[:2] for batch in (4, 2, 8, 16)),
    *(_shape(model, task, "dual", 1) for model in ("llada-8b", "dream-7b") for task in TASKS[2:]),
]
KEY = 4


def _block_shape(
    model: str, block: int, batch: int, prompt: int = 128, gen_length: int = 512, rate: float = 2.7, end: int = 230
) -> dict[str, Any]:
    return _shape(model, ("chat", prompt, gen_length, rate, end), "block_causal", batch) | {"block": block}


SHAPES += [
    _block_shape(model, block, batch)
    for model, block in (("sdar-8b", 4), ("sdar-8b", 32), ("fast-dllm-v2-7b", 32), ("sdar-4b", 4), ("sdar-4b", 32))
    for batch in (1, 8)
]
QUICK = [
    _shape("tiny llada", ("a small one", 9, 3 * BLOCK, 12.0, 40), "dual", 2),
    _shape("tiny dream", ("a small one", 9, 2 * BLOCK, 8.0, 40), "dual", 1),
    _block_shape("tiny sdar", 4, 2, 8, 24, 2.7, 10),
    _block_shape("tiny v2", 16, 2, 32, 32, 2.7, 10),
]
#: Forwards of the vanilla loop that are timed.
SAMPLED = 6


def decoded_length(shape: Shape) -> int:
    """Slots that are decoded together: a block, or a sub-block where a model has some."""
    config = MODELS[shape["model"]]
    return SUB_BLOCK if config.block_causal and config.shift else shape.get("block", BLOCK)


def spread(gen_length: int, tokens_per_forward: float, length: int = BLOCK, least: int = 2) -> list[int]:
    """Forwards of each block, two at least (Dream's official loop makes no fewer), spread as evenly as whole numbers allow."""
    blocks = gen_length // length
    each = length / tokens_per_forward
    ends = [round(each * (block + 1)) for block in range(blocks)]
    return [max(end - begin, least) for begin, end in zip([0, *ends], ends, strict=False)]


def forwards_of(shape: Shape, tokens_per_forward: float) -> list[int]:
    """Forwards of each block or sub-block of a shape. What stores a block of Fast-dLLM v2 gives the next one's first token."""
    config, length = MODELS[shape["model"]], decoded_length(shape)
    counts = spread(shape["gen_length"], tokens_per_forward, length, 1 if config.block_causal else 2)
    given = config.block_causal and config.shift
    return [min(count, length - (given and i * length % shape["block"] == 0)) for i, count in enumerate(counts)]


def blocks_until(end: int, length: int = BLOCK) -> int:
    """Blocks up to the one that holds the token ``end``, counted from 1."""
    return -(-end // length)


def run_ours(
    model: MaskedDiffusionLM, prompts: Tensor, cache: CacheName, counts: Sequence[int], gen_length: int, block: int = BLOCK
) -> Tensor:
    """Decodes ``len(counts)`` blocks, or sub-blocks, each in its number of forwards, and returns the sequences."""
    causal = model.config.block_causal
    options: dict[str, Any] = cache_of(model.config) if causal else {"cache": cache}
    strategy = FixedSteps(gen_length // (options.get("sub_block_length") or block))
    config = GenerationConfig(gen_length=gen_length, block_length=block, strategy=strategy, stop_at_eos=False, **options)
    generation = Generation(model, prompts.tolist(), config)
    # The strategy is one token count for all blocks; the schedule has one for each.
    steps = generation.batch.state.steps
    begins = dict(zip(accumulate(counts, initial=0), counts, strict=False))
    done = 0
    while done < sum(counts):
        if done in begins:
            steps.fill_(begins[done])
        forward = next(generation)
        done += not (forward.refresh and causal and model.config.shift)  # which only stores
    generation.close()  # gives the buffers and captured steps back, for the next run
    return generation.output().sequences


def run_official(
    model: OfficialModel | OfficialBlockModel,
    prompts: Tensor,
    cache: str,
    counts: Sequence[int],
    gen_length: int,
    most: int | None = None,
    block: int = BLOCK,
) -> Tensor:
    """The same with the official loop, or the first forwards of it."""
    if isinstance(model, OfficialBlockModel):
        if model.is_sdar:
            return official_blocks.official_sdar(model, prompts, gen_length, block, forwards=counts)[0]
        blocks = len(counts) * SUB_BLOCK // block
        return official_blocks.official_v2(model, prompts, blocks, block, SUB_BLOCK, forwards=counts)[0]
    return official.official_generate(model, prompts, gen_length, BLOCK, cache, forwards=counts, most=most)[0]


def block_causal_floor(shape: Shape, counts: Sequence[int], gpu: Gpu, tokens: int) -> Floor:
    """The floor of our forwards of a block-causal model, in which half of what is decoded is masked on average.

    Args:
        shape: of the generation.
        counts: forwards of each (sub-)block.
        gpu: that it is for.
        tokens: useful ones of a row.
    """
    config, length, block = MODELS[shape["model"]], decoded_length(shape), shape["block"]
    policy = BlockCausal(first_from_store=config.shift)
    forwards = [count + (config.shift and i * length % block == 0) for i, count in enumerate(counts)]
    seconds, total = {"refresh": 0.0, "step": 0.0}, Cost(0, 0)
    for window in play(policy, shape["prompt"], len(counts) * length, length, forwards, block):
        predicted = 1 if config.shift and window.kind == "refresh" else length / 2
        cost = forward_cost(config, shape["batch"], len(window), window.attend_end, predicted)
        seconds[window.kind] += cost.seconds(gpu)
        total += cost
    return Floor(sum(forwards), seconds["refresh"], seconds["step"], total, shape["batch"] * tokens)


def seconds_of(run: Callable[[], object], repeat: int = 1) -> float:
    """Wall clock of the best of some runs, after one that compiles and captures."""
    run()
    seconds = []
    for _ in range(repeat):
        began = timer()  # which waits for the GPU
        run()
        seconds.append(timer() - began)
    return min(seconds)


def ratios(row: Row, rows: Mapping[str, Row]) -> Row:
    """A row's time over ours, and the vanilla time over it: how many times faster than vanilla it is."""
    ours, vanilla = (rows.get(name, {}).get("median_ms") for name in ("triton", "vanilla"))
    milliseconds = row.get("median_ms")
    over_ours: Row = {"times_triton": milliseconds / ours} if milliseconds and ours else {}
    return over_ours | ({"over_vanilla": vanilla / milliseconds} if milliseconds and vanilla else {})


class GenerateBench(ModelBench):
    """Generations of whole models."""

    op = suite = "generate"
    shapes, quick, key = SHAPES, QUICK, KEY
    baselines = ("official", "vanilla")
    ours = ("triton", "triton eos")

    def rows_of(self, shape: Shape, session: Session) -> Iterator[list[Row]]:
        """One shape: the rows so far, after each provider."""
        device, dtype = session.device, torch.float32 if session.timer is None else torch.bfloat16
        base: Row = {"bench": self.op, "op": self.op, "shape": dict(shape), "axis": "batch"}
        network = network_of(shape["model"], device, dtype)
        ours, causal = MaskedDiffusionLM(network, None), network.config.block_causal
        model = OfficialBlockModel(network) if causal else OfficialModel(network)
        prompts = prompt_of(shape["model"], shape["batch"], shape["prompt"], device)
        gen_length, cache, block, length = shape["gen_length"], shape["cache"], shape.get("block", BLOCK), decoded_length(shape)
        counts, one_a_forward = (forwards_of(shape, rate) for rate in (shape["tokens_per_forward"], 1.0))
        until_end = counts[: blocks_until(shape["end"], length)]
        most = None if causal else SAMPLED
        rows: dict[str, Row] = {}
        for provider, run, schedule in (
            ("triton", lambda: run_ours(ours, prompts, cache, counts, gen_length, block), counts),
            ("triton eos", lambda: run_ours(ours, prompts, cache, until_end, gen_length, block), until_end),
            ("official", lambda: run_official(model, prompts, cache, counts, gen_length, None, block), counts),
            ("vanilla", lambda: run_official(model, prompts, "none", one_a_forward, gen_length, most, block), one_a_forward),
        ):
            if not session.wants(provider):
                continue
            is_ours = provider in self.ours
            if not is_ours:
                release(ours)  # our buffers take no room from the official loop
            try:
                if not is_ours and isinstance(model, OfficialModel) and model.is_dream and shape["batch"] > 1:
                    raise NotImplementedError("the official loop is for one row")
                if session.timer is None:
                    run()
                    rows[provider] = {"missing": "ran; not timed without a GPU"}
                else:
                    seconds = seconds_of(run, repeat=3 if is_ours else 1)
                    seconds *= gen_length / SAMPLED if provider == "vanilla" and not causal else 1
                    rows[provider] = self.row_of(shape, schedule, seconds, session, provider)
            except Exception as error:  # too little memory for a float64 softmax over a long context
                rows[provider] = {"missing": reason(error)}
            yield [base | {"provider": name} | row | ratios(row, rows) for name, row in rows.items()]
        release(ours)

    def row_of(self, shape: Shape, counts: Sequence[int], seconds: float, session: Session, provider: str) -> Row:
        """A time next to the floor of its schedule, where the forwards follow one another."""
        assert session.ceilings is not None
        gpu, causal = Gpu("this one", session.ceilings.copy, session.ceilings.matrix), MODELS[shape["model"]].block_causal
        length = decoded_length(shape)
        stops = len(counts) * length < shape["gen_length"]
        if causal:
            floor = block_causal_floor(shape, counts, gpu, shape["end"] if stops else shape["gen_length"])
        else:
            setting = Setting(
                shape["prompt"],
                shape["gen_length"],
                BLOCK,
                "none" if provider == "vanilla" else shape["cache"],
                tokens_per_forward=len(counts) * BLOCK / sum(counts),
                batch_size=shape["batch"],
                stop_at=shape["end"] if stops else None,
            )
            floor = floor_of(MODELS[shape["model"]], setting, gpu)
        timing = Timing(*[1e3 * seconds] * 3)
        return timed(timing, int(floor.cost.bytes), int(floor.cost.flops), session.ceilings) | {
            "of_floor": floor.seconds / seconds,
            "forwards": sum(counts),
            "tokens_per_s": floor.tokens / seconds,
            "extrapolated": provider == "vanilla" and not causal,
        }


BENCH = GenerateBench()

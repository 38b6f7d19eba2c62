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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from fastdllm_triton.bench import official_step as official
from fastdllm_triton.bench._models import MODELS, network_of, prompt_of, release
from fastdllm_triton.bench._session import ModelBench, Row, Session, Shape, timed
from fastdllm_triton.bench._timing import Timing, reason
from fastdllm_triton.bench.official_step import OfficialModel
from fastdllm_triton.decoding import CacheName, GenerationConfig
from fastdllm_triton.decoding.strategies import FixedSteps
from fastdllm_triton.engine.generation import Generation
from fastdllm_triton.model import MaskedDiffusionLM
from fastdllm_triton.tools.roofline import Gpu, Setting
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
QUICK = [
    _shape("tiny llada", ("a small one", 9, 3 * BLOCK, 12.0, 40), "dual", 2),
    _shape("tiny dream", ("a small one", 9, 2 * BLOCK, 8.0, 40), "dual", 1),
]
#: Forwards of the vanilla loop that are timed.
SAMPLED = 6


def spread(gen_length: int, tokens_per_forward: float) -> list[int]:
    """Forwards of each block, two at least (Dream's official loop makes no fewer), spread as evenly as whole numbers allow."""
    blocks = gen_length // BLOCK
    each = BLOCK / tokens_per_forward
    ends = [round(each * (block + 1)) for block in range(blocks)]
    return [max(end - begin, 2) for begin, end in zip([0, *ends], ends, strict=False)]


def blocks_until(end: int) -> int:
    """Blocks up to the one that holds the token ``end``, counted from 1."""
    return -(-end // BLOCK)


def run_ours(model: MaskedDiffusionLM, prompts: Tensor, cache: CacheName, counts: Sequence[int], gen_length: int) -> Tensor:
    """Decodes ``len(counts)`` blocks, each in its number of forwards, and returns the sequences."""
    config = GenerationConfig(
        gen_length=gen_length, block_length=BLOCK, cache=cache, strategy=FixedSteps(gen_length // BLOCK), stop_at_eos=False
    )
    generation = Generation(model, prompts.tolist(), config)
    # The strategy is one token count for all blocks; the schedule has one for each.
    steps = generation.batch.state.steps
    begins = dict(zip(accumulate(counts, initial=0), counts, strict=False))
    for done in range(sum(counts)):
        if done in begins:
            steps.fill_(begins[done])
        next(generation)
    generation.close()  # gives the buffers and captured steps back, for the next run
    return generation.output().sequences


def run_official(
    model: OfficialModel, prompts: Tensor, cache: str, counts: Sequence[int], gen_length: int, most: int | None = None
) -> Tensor:
    """The same with the official loop, or the first forwards of it."""
    return official.official_generate(model, prompts, gen_length, BLOCK, cache, forwards=counts, most=most)[0]


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
        ours, model = MaskedDiffusionLM(network, None), OfficialModel(network)
        prompts = prompt_of(shape["model"], shape["batch"], shape["prompt"], device)
        gen_length, cache = shape["gen_length"], shape["cache"]
        counts = spread(gen_length, shape["tokens_per_forward"])
        one_a_forward = [BLOCK] * len(counts)
        until_end = counts[: blocks_until(shape["end"])]
        rows: dict[str, Row] = {}
        for provider, run, schedule in (
            ("triton", lambda: run_ours(ours, prompts, cache, counts, gen_length), counts),
            ("triton eos", lambda: run_ours(ours, prompts, cache, until_end, gen_length), until_end),
            ("official", lambda: run_official(model, prompts, cache, counts, gen_length), counts),
            ("vanilla", lambda: run_official(model, prompts, "none", one_a_forward, gen_length, SAMPLED), one_a_forward),
        ):
            if not session.wants(provider):
                continue
            is_ours = provider in self.ours
            if not is_ours:
                release(ours)  # our buffers take no room from the official loop
            try:
                if not is_ours and model.is_dream and shape["batch"] > 1:
                    raise NotImplementedError("the official loop is for one row")
                if session.timer is None:
                    run()
                    rows[provider] = {"missing": "ran; not timed without a GPU"}
                else:
                    seconds = seconds_of(run, repeat=3 if is_ours else 1)
                    seconds *= gen_length / SAMPLED if provider == "vanilla" else 1
                    rows[provider] = self.row_of(shape, schedule, seconds, session, provider)
            except Exception as error:  # too little memory for a float64 softmax over a long context
                rows[provider] = {"missing": reason(error)}
            yield [base | {"provider": name} | row | ratios(row, rows) for name, row in rows.items()]
        release(ours)

    def row_of(self, shape: Shape, counts: Sequence[int], seconds: float, session: Session, provider: str) -> Row:
        """A time next to the floor of its schedule, where the forwards follow one another."""
        assert session.ceilings is not None
        stops = len(counts) * BLOCK < shape["gen_length"]
        setting = Setting(
            shape["prompt"],
            shape["gen_length"],
            BLOCK,
            "none" if provider == "vanilla" else shape["cache"],
            tokens_per_forward=len(counts) * BLOCK / sum(counts),
            batch_size=shape["batch"],
            stop_at=shape["end"] if stops else None,
        )
        floor = floor_of(MODELS[shape["model"]], setting, Gpu("this one", session.ceilings.copy, session.ceilings.matrix))
        timing = Timing(*[1e3 * seconds] * 3)
        return timed(timing, int(floor.cost.bytes), int(floor.cost.flops), session.ceilings) | {
            "of_floor": floor.seconds / seconds,
            "forwards": sum(counts),
            "tokens_per_s": floor.tokens / seconds,
            "extrapolated": provider == "vanilla",
        }


BENCH = GenerateBench()

"""Whole models with the kernels: recorded trajectories, batches against single rows, the reference, and a second run.

A check is a function that yields cases; :data:`MODEL_CHECKS` names them.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import ne
from pathlib import Path
from typing import Any

import torch

from ..compat import block_diffusion_generate, fast_dllm_v2_generate
from ..decoding.options import strategy_of
from ..decoding.strategies import STRATEGIES, EntropyBudget, Factor, FixedSteps, Threshold
from ..loading import load
from ..model import MaskedDiffusionLM
from .records import CaseRecord, Record
from .tolerance import bitwise

#: Small checkpoints, and what the official code makes of them in float32 (``cases.jsonl``).
GOLDEN = Path(__file__).parent / "golden"
#: In LLaDA's format, by Fast-dLLM; those of block-causal models.
LLADA, FAST_DLLM_V2, SDAR = "llada-gqa", "fast-dllm-v2", "sdar"
#: What SDAR's scripts call the strategies of its cases.
_REMASKING = {"static": "low_confidence_static", "dynamic": "low_confidence_dynamic", "sequential": "sequential"}
#: Models are checked in it alone: in fewer bits the order of a sum can change a token.
DTYPE = "float32"
_PROMPTS = [
    "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?",
    "Ann has 20 books. Ann buys 30.",
    "Sue has 9",
]


@dataclass(frozen=True)
class Setup:
    """Where and how thoroughly models are checked."""

    device: torch.device
    quick: bool

    @property
    def interpreted(self) -> bool:
        """Whether a forward takes a second rather than milliseconds."""
        return self.device.type == "cpu"

    def golden(self, name: str) -> MaskedDiffusionLM:
        """A checkpoint of recorded trajectories, with the kernels. Each shape comes once or twice, too seldom to capture;
        captured steps have a check of their own.
        """
        model = load(GOLDEN / name, device=self.device, dtype=DTYPE, backend="triton")
        model.buffers.use_cuda_graphs = False
        return model

    @cached_property
    def tiny(self) -> MaskedDiffusionLM:
        return load("tiny", device=self.device, dtype=DTYPE, backend="triton")

    @cached_property
    def tiny_reference(self) -> MaskedDiffusionLM:
        return load("tiny", device=self.device, dtype=DTYPE, backend="reference")

    @property
    def lengths(self) -> dict[str, Any]:
        """The lengths of generations with the built-in model."""
        return {"gen_length": 8, "block_length": 4} if self.interpreted else {"gen_length": 48, "block_length": 16}


def verify_model(name: str, device: torch.device, *, quick: bool = False) -> Record:
    began = time.perf_counter()
    try:
        cases = list(MODEL_CHECKS[name](Setup(device, quick)))
    except Exception as error:  # the other checks are still run
        cases = [CaseRecord("all", 1.0, 0.0, ok=False, note=f"{type(error).__name__}: {str(error)[:160]}")]
    return Record(name, DTYPE, cases, time.perf_counter() - began)


def golden_cases(name: str = LLADA) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name / "cases.jsonl").read_text(encoding="utf-8").splitlines()]


def _chosen(setup: Setup) -> list[dict[str, Any]]:
    """All cases on a GPU. Otherwise, of each cache and strategy, the shortest one with a step over the cache; where it is to be
    quick, one of each cache, on a GPU too.
    """
    cases = golden_cases()
    if not setup.interpreted and not setup.quick:
        return cases
    shortest: dict[Any, dict[str, Any]] = {}
    for case in sorted(cases, key=lambda case: case["nfe"] * len(case["prompt"]) * (len(case["prompt"][0]) + case["gen_length"])):
        if case["nfe"] > case["gen_length"] // case["block_length"]:
            shortest.setdefault(case["cache"] if setup.quick else (case["cache"], case["strategy"]), case)
    return list(shortest.values())


def _golden(setup: Setup) -> Iterator[CaseRecord]:
    """The same tokens in as many forwards as the official code."""
    model = setup.golden(LLADA)
    for case in _chosen(setup):
        out = model.generate(
            case["prompt"],
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            cache=case["cache"],
            strategy=strategy_of({STRATEGIES[case["strategy"]].option: case["value"]}),
            stop_at_eos=False,
            lockstep=True,  # as the recorded batches were
        )
        wrong = float((out.generated.cpu() != torch.tensor(case["tokens"])).sum())
        name = f"{case['cache']}, {case['strategy']} {case['value']}, batch {len(case['prompt'])}, block {case['block_length']}"
        note = f"{wrong:.0f} tokens differ" if wrong else ""
        if out.nfe != case["nfe"]:
            note = note or f"{out.nfe} forwards, not {case['nfe']}"
        yield CaseRecord(name, wrong, 0.0, ok=not note, note=note)


def _chosen_causal(setup: Setup, name: str) -> list[dict[str, Any]]:
    """All cases on a GPU. Otherwise, of each strategy, with and without the sub-block cache, the shortest of those that have a
    prefill, a store and steps; where it is to be quick, one.
    """
    cases = golden_cases(name)
    if not setup.interpreted and not setup.quick:
        return cases

    def work(case: dict[str, Any]) -> tuple[int, int]:
        return -len({kind for kind, *_ in case["windows"]}), sum(length for *_, length in case["windows"])

    shortest: dict[Any, dict[str, Any]] = {}
    for case in sorted(cases, key=work):
        shortest.setdefault(None if setup.quick else (case.get("strategy"), case.get("use_block_cache")), case)
    return list(shortest.values())


def _block_causal(setup: Setup) -> Iterator[CaseRecord]:
    """The same tokens in as many forwards as the official code of Fast-dLLM v2 and SDAR."""
    for name in (FAST_DLLM_V2, SDAR):
        model = setup.golden(name)
        for case in _chosen_causal(setup, name):
            prompt, block = torch.tensor([case["prompt"]]), case["block_length"]
            with warnings.catch_warnings():  # of other blocks than those of the training, which are meant
                warnings.simplefilter("ignore")
                if name == SDAR:
                    how = f"{case['strategy']} {case['threshold']}, {case['denoising_steps']} steps"
                    threshold = {} if case["threshold"] is None else {"confidence_threshold": case["threshold"]}
                    ids, nfe = block_diffusion_generate(
                        model,
                        prompt,
                        gen_length=case["gen_length"],
                        block_length=block,
                        denoising_steps=case["denoising_steps"],
                        remasking_strategy=_REMASKING[case["strategy"]],
                        stopping_criteria_idx=case["stop_tokens"],
                        **threshold,
                    )
                else:
                    how = f"threshold {case['threshold']}, sub-block {case['sub_block_length']}"
                    how += ", sub-block cache" if case["use_block_cache"] else ""
                    ids, nfe = fast_dllm_v2_generate(
                        model,
                        prompt,
                        case["max_new_tokens"],
                        block_size=block,
                        small_block_size=case["sub_block_length"],
                        threshold=case["threshold"],
                        use_block_cache=case["use_block_cache"],
                        mask_id=case["mask_id"],
                        stop_token=case["stop_token"],
                    )
            found, expected = ids[0].tolist(), case["prompt"] + case["tokens"]
            wrong = sum(map(ne, found, expected)) + abs(len(found) - len(expected))
            note = f"{wrong} tokens differ" if wrong else "" if nfe == case["nfe"] else f"{nfe} forwards, not {case['nfe']}"
            yield CaseRecord(f"{name}, {how}, block {block}", float(wrong), 0.0, ok=not note, note=note)


def _options(setup: Setup) -> list[tuple[str, dict[str, Any]]]:
    """What a step can differ in: the first one where it is to be quick. Fixed steps are two a block."""
    steps = 2 * setup.lengths["gen_length"] // setup.lengths["block_length"]
    options: list[tuple[str, dict[str, Any]]] = [
        ("dual, threshold", {"cache": "dual", "strategy": Threshold(0.9)}),
        ("prefix, entropy budget, samples", {"cache": "prefix", "strategy": EntropyBudget(0.5), "temperature": 1.0, "seed": 5}),
        ("dual, fixed steps at random", {"cache": "dual", "strategy": FixedSteps(steps, score="random"), "seed": 9}),
        ("none, factor, margin", {"cache": "none", "strategy": Factor(1.0, score="margin")}),
    ]
    return options[:1] if setup.quick and setup.interpreted else options


def _counted(name: str, wrong: int, what: str) -> CaseRecord:
    """A case that holds if nothing is wrong."""
    return CaseRecord(name, float(wrong), 0.0, ok=not wrong, note=what if wrong else "")


def _reference(setup: Setup) -> Iterator[CaseRecord]:
    """The built-in model with the kernels and with PyTorch."""
    for name, options in _options(setup):
        got, want = (model.generate(_PROMPTS[:2], **setup.lengths, **options) for model in (setup.tiny, setup.tiny_reference))
        wrong = int((got.sequences != want.sequences).sum()) + int((got.step_map != want.step_map).sum())
        yield _counted(name, wrong, f"{wrong} tokens or steps differ")


def _ragged(setup: Setup) -> Iterator[CaseRecord]:
    """Each row of a batch of prompts of different lengths, and the row alone."""
    for name, options in _options(setup):
        options = options | {"temperature": 0.0}
        if isinstance(options["strategy"], FixedSteps):  # a row's seed depends on its place
            options = options | {"strategy": FixedSteps(options["strategy"].steps)}
        prompts = _PROMPTS[1:] if setup.interpreted else _PROMPTS
        batch = setup.tiny.generate(prompts, **setup.lengths, **options)
        wrong = 0
        for row, prompt in enumerate(prompts):
            alone = setup.tiny.generate(prompt, **setup.lengths, **options)
            wrong += int((batch.generated[row] != alone.generated[0]).sum())
        yield _counted(name, wrong, f"{wrong} tokens differ")


def _captured(setup: Setup) -> Iterator[CaseRecord]:
    """Steps captured as CUDA graphs and steps that are not: tokens, steps and confidences, bit by bit."""
    for name, options in _options(setup):
        if setup.interpreted:
            yield CaseRecord(name, 0.0, 0.0, ok=True, skipped="captured steps need a GPU")
        else:
            captures = (False, True, True)  # the last one replays from its first step on
            yield _counted(name, _unequal_bits(setup, captures, _PROMPTS, options), "other bits in a captured step")


def _again(setup: Setup) -> Iterator[CaseRecord]:
    """The same generation twice: tokens, steps and confidences, bit by bit."""
    captures = (setup.tiny.buffers.use_cuda_graphs,) * 2
    for name, options in _options(setup)[: 1 if setup.interpreted else None]:
        yield _counted(name, _unequal_bits(setup, captures, _PROMPTS[1:2], options), "other bits in the second run")


def _unequal_bits(setup: Setup, captures: Sequence[bool], prompts: list[str], options: dict[str, Any]) -> int:
    """How many results of runs that capture their steps, or do not, differ from those of the first run."""
    runs = []
    for capture in captures:
        setup.tiny.buffers.use_cuda_graphs = capture
        out = setup.tiny.generate(prompts, **setup.lengths, **options)
        runs.append((out.sequences, out.step_map, out.confidence))
    return sum(not bitwise(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


MODEL_CHECKS: dict[str, Callable[[Setup], Iterator[CaseRecord]]] = {
    "recorded trajectories": _golden,
    "recorded block-causal trajectories": _block_causal,
    "kernels against PyTorch": _reference,
    "ragged batch against rows": _ragged,
    "captured step against uncaptured": _captured,
    "run twice": _again,
}

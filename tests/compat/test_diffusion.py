"""Dream's ``diffusion_generate``: the schedule, every alg against a plain loop, draws, batches, arguments, faults.

Recorded trajectories of the official code are in ``test_golden.py``.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton import compat
from fastdllm_triton.engine.dream.config import DiffusionConfig, DiffusionOutput
from fastdllm_triton.engine.dream.rules import Candidates, Schedule, block_rule, whole_sequence_rule
from fastdllm_triton.ops import resolve
from fastdllm_triton.ops.filtering import filter_logits
from fastdllm_triton.reference._random import gumbel
from fastdllm_triton.types import TokenStatistics

MASK = 318
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
ALGS = ["maskgit_plus", "topk_margin", "entropy", "confidence_threshold"]
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def lm() -> fdt.MaskedDiffusionLM:
    """The recorded Dream checkpoint; tests do not change it."""
    return fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")


def _run(lm: fdt.MaskedDiffusionLM, inputs: Tensor = PROMPT, **options: Any) -> DiffusionOutput:
    # The tokens of these tests are the likeliest of the whole vocabulary where a test does not say otherwise.
    out = compat.diffusion_generate(lm, inputs, return_dict_in_generate=True, **{"temperature": 0.0, "top_k": None, **options})
    assert isinstance(out, DiffusionOutput)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The schedule.


def _counts(rule: Schedule, masks: int) -> list[int]:
    """How many of so many masked slots each step of a schedule commits."""
    counts, step, slots = [], 0, torch.arange(1000)[None]
    while rule.open(step):
        masked = slots < masks
        statistics = TokenStatistics(*(torch.zeros(1, 1000) for _ in range(6)))
        counts.append(int(rule.choose(Candidates(slots, masked, slots, statistics), step).sum()))
        masks -= counts[-1]
        step += 1
    return counts


@pytest.mark.parametrize("steps", [128, 256, 512])
def test_a_step_a_mask_commits_nothing_first_and_two_last(steps: int) -> None:
    rule = whole_sequence_rule(DiffusionConfig(steps, steps=steps, alg="entropy"), [steps], torch.zeros(1))
    assert isinstance(rule, Schedule)
    assert _counts(rule, steps) == [0, *[1] * (steps - 2), 2]


def test_the_schedule_of_a_block_of_32_is_its_refresh_and_then_a_token_a_step() -> None:
    empty = torch.zeros(1, 0)
    rule = block_rule(DiffusionConfig(64, steps=64, cache="dual"), resolve("reference", empty.device), empty, empty, empty, MASK)
    assert isinstance(rule, Schedule)
    assert _counts(rule, 32) == [1, 0, *[1] * 29, 2]


@pytest.mark.parametrize(("masks", "steps"), [(32, 1), (32, 7), (5, 512), (0, 3), (1000, 13)])
def test_the_last_step_commits_what_is_left(masks: int, steps: int) -> None:
    rule = whole_sequence_rule(DiffusionConfig(8, steps=steps, alg="entropy"), [masks], torch.zeros(1))
    assert isinstance(rule, Schedule)
    counts = _counts(rule, masks)
    assert len(counts) == steps
    assert sum(counts) == masks


# ----------------------------------------------------------------------------------------------------------------------
# Every alg against a plain loop over full logits.


def _plain(
    lm: fdt.MaskedDiffusionLM,
    prompt: list[int],
    new: int,
    steps: int,
    alg: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 320,
    threshold: float = 0.9,
    seed: int = 0,
) -> tuple[list[int], int]:
    """Without a cache: logits of everything in every step, shifted by a copy, probabilities sorted in Python."""
    x = torch.tensor(prompt + [MASK] * new)
    times = torch.linspace(1, 1e-3, steps + 1)
    budget, step = 0, 0
    while (x == MASK).any():
        slots = (x == MASK).nonzero()[:, 0]
        logits = lm.logits(x[None])[0]
        logits = torch.cat((logits[:1], logits[:-1]))[slots]
        logits[:, MASK] = -torch.inf
        probs = (logits / (temperature or 1)).softmax(1)
        for row in probs:
            ranked = sorted(range(320), key=lambda token: -float(row[token]))
            total, nucleus = 0.0, []
            for token in ranked:
                if total <= top_p:
                    nucleus.append(token)
                total += float(row[token])
            kept = nucleus[:top_k]
            row[[token for token in range(320) if token not in kept]] = 0
        probs /= probs.sum(1, keepdim=True)

        tokens = probs.argmax(1)
        if temperature:
            keys = torch.full_like(slots, seed), slots, torch.full_like(slots, step)
            tokens = (probs.log() + gumbel(*keys, 320)).argmax(1)
        confidence = probs.gather(1, tokens[:, None])[:, 0]
        score = {
            "topk_margin": probs.topk(2).values.diff(dim=1)[:, 0].neg(),
            "entropy": torch.special.entr(probs).sum(1).neg(),
        }.get(alg, confidence)
        order = score.argsort(descending=True, stable=True)
        if alg == "confidence_threshold":
            budget += new // steps if step < steps else 0
            chosen = [s for rank, s in enumerate(order[:budget].tolist()) if rank == 0 or confidence[s] >= threshold]
            budget -= len(chosen)
        else:
            last = step == steps - 1
            chosen = order[: len(slots) if last else int(len(slots) * (1 - times[step + 1] / times[step]))].tolist()
        x[slots[chosen]] = tokens[chosen]
        step += 1
    return x.tolist(), step


@pytest.mark.parametrize("alg", ALGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.9, "top_k": 5, "temperature": 0.7, "seed": 3},
        {"temperature": 1.5, "seed": 4},
    ],
    ids=str,
)
def test_every_alg_is_the_plain_loop(lm: fdt.MaskedDiffusionLM, alg: str, options: dict[str, Any]) -> None:
    out = _run(lm, max_new_tokens=16, steps=8, alg=alg, threshold=0.5, **options)
    assert (out.sequences[0].tolist(), out.nfe) == _plain(lm, PROMPT[0].tolist(), 16, 8, alg, threshold=0.5, **options)


def test_filters_on_a_row_with_ties_and_a_forbidden_token() -> None:
    inf = torch.inf
    logits = torch.tensor([[0.5, 0.125, 0.125, 0.25, 0.0]]).log()
    assert filter_logits(logits, top_k=3).isfinite().tolist() == [[True, True, True, True, False]]  # two are third
    assert filter_logits(logits, top_p=0.4).isfinite().tolist() == [[True, False, False, False, False]]
    assert filter_logits(logits, top_p=0.5).isfinite().tolist() == [[True, False, False, True, False]]  # reached, not exceeded
    assert filter_logits(logits, top_p=0.76).isfinite().sum() == 3
    assert torch.equal(filter_logits(logits, top_p=1.0, top_k=9), logits)
    assert filter_logits(torch.tensor([[-inf, -inf, 1.0]]), top_k=2).tolist() == [[-inf, -inf, 1.0]]


# ----------------------------------------------------------------------------------------------------------------------
# Draws, by frequency. 4,096 rows that differ in nothing but their seeds; five standard deviations are allowed.

ROWS = 4096


def _assert_frequencies(counts: Tensor, probabilities: Tensor) -> None:
    deviation = (probabilities * (1 - probabilities) / ROWS).sqrt()
    assert ((counts / ROWS - probabilities).abs() <= 5 * deviation + 1e-6).all()


def _next_logits(lm: fdt.MaskedDiffusionLM, new: int) -> Tensor:
    """``[new, V]``: what predicts the first forward's tokens."""
    logits = lm.logits(torch.cat((PROMPT, torch.full((1, new), MASK)), dim=1))[0, len(PROMPT[0]) - 1 : -1]
    logits[:, MASK] = -torch.inf
    return logits


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}], ids=str)
def test_tokens_are_drawn_from_the_filtered_distribution(lm: fdt.MaskedDiffusionLM, cache: Any, filters: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 1, "steps": 1, "block_length": 1, "temperature": 1.3, "seed": 11}
    out = _run(lm, num_return_sequences=ROWS, cache=cache, **options, **filters)
    expected = filter_logits(_next_logits(lm, 1) / 1.3, **filters).softmax(1)[0]
    _assert_frequencies(out.sequences[:, -1].bincount(minlength=320), expected)


def test_the_order_is_drawn_at_alg_temp(lm: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "steps": 2, "alg": "maskgit_plus", "alg_temp": 0.3, "seed": 5}
    out = _run(lm, num_return_sequences=ROWS, output_history=True, **options)
    assert out.history is not None
    first = out.history[0][:, -4:] != MASK  # int(4 * 0.4995) = 1 of four
    assert (first.sum(1) == 1).all()
    confidence = _next_logits(lm, 4).softmax(1).max(1).values
    _assert_frequencies(first.sum(0), (confidence / 0.3).softmax(0))


def test_origin_unmasks_each_token_with_the_share_of_the_timestep(lm: fdt.MaskedDiffusionLM) -> None:
    out = _run(lm, num_return_sequences=ROWS, output_history=True, max_new_tokens=4, steps=3, alg="origin", eps=0.1, seed=6)
    assert out.history is not None
    assert out.nfe == 3
    first, second = ((x[:, -4:] != MASK).sum(0) for x in out.history[:2])
    _assert_frequencies(first, torch.full((4,), 0.3))  # timesteps 1, 0.7, 0.4, 0.1
    _assert_frequencies(second, torch.full((4,), 0.6))
    assert (out.sequences != MASK).all()
    assert out.history[0].unique(dim=0).shape[0] == 16  # tokens do not move together


@pytest.mark.parametrize(
    "options",
    [
        {"alg": "entropy", "temperature": 1.0},
        {"alg": "entropy", "alg_temp": 1.0},
        {"alg": "origin"},
        {"alg": "confidence_threshold", "temperature": 1.0, "cache": "dual"},
        {"alg": "entropy", "alg_temp": 1.0, "cache": "prefix"},
        {"alg": "maskgit_plus", "temperature": 1.0, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_seed_or_else_torchs_generator(lm: fdt.MaskedDiffusionLM, options: dict[str, Any]) -> None:
    def draw(seed: int | None, manual: int) -> list[list[int]]:
        torch.manual_seed(manual)
        lengths = {"max_new_tokens": 16, "steps": 8, "block_length": 8}
        return _run(lm, seed=seed, **lengths, **options).sequences.tolist()

    assert draw(1, 0) == draw(1, 1) != draw(2, 0)
    assert draw(None, 0) == draw(None, 0) != draw(None, 1)


def test_where_nothing_is_drawn_the_global_generator_is_left_alone(lm: fdt.MaskedDiffusionLM) -> None:
    before = torch.get_rng_state()
    for cache in ("none", "dual"):
        _run(lm, max_new_tokens=8, steps=4, alg="entropy", block_length=8, cache=cache)
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------------------
# Batches.

PROMPTS = [[3, 1, 4], [7, 9, 2, 6, 5, 3, 5], [11]]
EVERY_WAY = [
    *({"cache": "none", "alg": alg} for alg in ALGS),
    {"cache": "none", "alg": "origin", "temperature": 1.0},
    {"cache": "none", "alg": "entropy", "alg_temp": 0.5, "temperature": 0.8, "top_p": 0.9},
    *({"cache": cache, "alg": alg} for cache in ("prefix", "dual") for alg in ("entropy", "confidence_threshold")),
    {"cache": "dual", "alg": "confidence_threshold", "temperature": 1.0, "top_k": 9},
    {"cache": "prefix", "alg": "entropy", "alg_temp": 0.5},
]


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_a_row_of_a_ragged_batch_is_the_row_alone(lm: fdt.MaskedDiffusionLM, way: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "steps": 8, "block_length": 8, "threshold": 0.4, **way}
    # Padding is not looked at: it is one row's next token, another's end token or [MASK].
    padded = torch.tensor([[1, 3, 316, MASK, 3, 1, 4], PROMPTS[1], [MASK] * 6 + [11]])
    keep = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0] * 6 + [1]])
    batch = _run(lm, padded, attention_mask=keep, seed=40, **options)
    assert torch.equal(batch.sequences[:, :7], padded)
    assert (batch.sequences[:, 7:] != MASK).all()
    alone = [_run(lm, torch.tensor([prompt]), seed=40 + b, **options) for b, prompt in enumerate(PROMPTS)]
    assert [row[7:] for row in batch.sequences.tolist()] == [out.sequences[0, -16:].tolist() for out in alone]
    assert batch.nfe >= max(out.nfe for out in alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_without_padding_changes_nothing(lm: fdt.MaskedDiffusionLM, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "alg": "entropy"}
    plain = _run(lm, **options)
    for mask in (torch.ones(1, 5, dtype=dtype), "full"):
        assert torch.equal(_run(lm, attention_mask=mask, **options).sequences, plain.sequences)


def test_several_sequences_of_each_prompt(lm: fdt.MaskedDiffusionLM) -> None:
    inputs, keep = torch.tensor([[0, 3, 1], [7, 9, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 8, "alg": "entropy", "attention_mask": keep, "seed": 2}
    out = _run(lm, inputs, num_return_sequences=3, **options)
    assert torch.equal(out.sequences[:, :3], inputs.repeat_interleave(3, dim=0))
    assert all(len(rows.unique(dim=0)) == 1 for rows in out.sequences.split(3))
    sampled = _run(lm, inputs, num_return_sequences=3, temperature=2.0, **options)
    assert all(len(rows.unique(dim=0)) == 3 for rows in sampled.sequences.split(3))


# ----------------------------------------------------------------------------------------------------------------------
# What comes back.


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_history_has_the_sequences_after_each_forward(lm: fdt.MaskedDiffusionLM, cache: Any) -> None:
    out = _run(lm, max_new_tokens=16, steps=8, block_length=8, alg="entropy", cache=cache, output_history=True)
    assert out.history is not None
    assert len(out.history) == out.nfe == 8
    assert torch.equal(out.history[-1], out.sequences)
    for before, after in zip(out.history, out.history[1:], strict=False):
        assert torch.equal(after.where(before != MASK, before), before)  # what is committed stays


def test_a_tensor_unless_a_dict_is_asked_for(lm: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "alg": "entropy"}
    out = _run(lm, **options)
    assert out.history is None
    x = compat.diffusion_generate(lm, PROMPT, output_history=True, temperature=0.0, top_k=None, **options)
    assert isinstance(x, Tensor)
    assert torch.equal(x, out.sequences)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, :5], PROMPT)


@pytest.mark.parametrize("alg_temp", [0.0, 0.1])  # by the engine, and by Dream's own loop
@pytest.mark.parametrize(
    ("cache", "asked"),
    [
        ("none", [8, 7, 5, 3]),  # of eight masks, the schedule commits 1, 2, 2 and the last 3
        ("dual", [1, 3, 1, 3]),  # a refresh for one token, a step for the rest of the block
    ],
)
def test_only_rows_that_predict_a_masked_slot_pass_the_head(
    dream: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch, cache: Any, asked: list[int], alg_temp: float
) -> None:
    seen, head = [], dream.network.ops.head_statistics

    def spy(hidden: Tensor, weight: Tensor, *, rows: Tensor | None = None, **options: Any) -> Any:
        seen.append(len(hidden) if rows is None else int((rows >= 0).sum()))
        return head(hidden, weight, rows=rows, **options)

    monkeypatch.setattr(dream.network, "ops", replace(dream.network.ops, head_statistics=spy))
    _run(dream, max_new_tokens=8, steps=4, block_length=4, alg="entropy", cache=cache, alg_temp=alg_temp)
    assert seen == asked


@pytest.mark.parametrize(
    "options",
    [
        {"alg": alg, "cache": cache, "temperature": temperature, "seed": 3, "output_history": True}
        for alg in ("maskgit_plus", "topk_margin", "entropy", "confidence_threshold")
        for cache in ("none", "prefix", "dual")
        for temperature in (0.0, 0.8)
        if cache != "none" or alg != "confidence_threshold"
    ],
    ids=lambda options: "-".join(map(str, list(options.values())[:3])),
)
def test_the_engine_decodes_what_dreams_own_loop_does(lm: fdt.MaskedDiffusionLM, options: dict[str, Any]) -> None:
    options = {
        "max_new_tokens": 16,
        "steps": 12 if options["cache"] == "none" else 8,
        "block_length": 8,
        "threshold": 0.5,
    } | options
    inputs, keep = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    by_engine = _run(lm, inputs, attention_mask=keep, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionConfig, "strategy", None)
        by_loop = _run(lm, inputs, attention_mask=keep, **options)
    assert torch.equal(by_engine.sequences, by_loop.sequences) and by_engine.nfe == by_loop.nfe
    pairs = zip(by_engine.history or (), by_loop.history or (), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and len(by_engine.history or ()) == by_engine.nfe


# ----------------------------------------------------------------------------------------------------------------------
# Where the official code leaves masks, never ends or fails.


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_with_one_timestep_is_finished(lm: fdt.MaskedDiffusionLM, cache: Any) -> None:
    out = _run(lm, max_new_tokens=32, steps=4, block_length=8, alg="entropy", cache=cache)
    assert out.nfe == 8  # a refresh and a step each
    assert (out.sequences != MASK).all()


def test_a_block_of_one_token_is_finished_by_its_refresh(lm: fdt.MaskedDiffusionLM) -> None:
    for alg in ("entropy", "confidence_threshold"):
        assert _run(lm, max_new_tokens=4, steps=8, block_length=1, alg=alg, cache="dual").nfe == 4


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_the_mask_is_never_committed(dream: fdt.MaskedDiffusionLM, way: dict[str, Any]) -> None:
    likeliest = dream.logits(torch.cat((PROMPT, torch.full((1, 16), MASK)), dim=1))[0, 4:-1].max(1)
    head = dream.network.weights.head
    head[MASK] = 2 * head[likeliest.indices[likeliest.values.argmax()]]
    assert dream.logits(torch.cat((PROMPT, torch.full((1, 16), MASK)), dim=1))[0, 4:-1].argmax(1).eq(MASK).any()
    out = _run(dream, max_new_tokens=16, steps=8, block_length=8, seed=1, **way)
    assert (out.sequences != MASK).all()


def test_masks_in_a_prompt_are_filled_without_a_cache_and_stay_with_one(lm: fdt.MaskedDiffusionLM) -> None:
    prompts = torch.tensor([[MASK, 3, MASK, MASK, 4], [9, 9, 2, 6, 5]])
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "block_length": 8, "alg": "entropy"}
    filled = _run(lm, prompts, **options)
    assert (filled.sequences != MASK).all()
    assert torch.equal(filled.sequences[:1], _run(lm, prompts[:1], **options).sequences)
    kept = _run(lm, prompts, cache="dual", **options)
    assert torch.equal(kept.sequences[:, :5], prompts)
    assert (kept.sequences[:, 5:] != MASK).all()


def test_a_mask_at_position_0_reads_its_own_hidden_state(lm: fdt.MaskedDiffusionLM) -> None:
    prompt = torch.tensor([[MASK, 3, 1, 4]])
    out = _run(lm, prompt, max_new_tokens=1, steps=1, alg="maskgit_plus")
    logits = lm.logits(torch.cat((prompt, torch.tensor([[MASK]])), dim=1))[0]
    logits[:, MASK] = -torch.inf
    assert out.sequences[0, [0, -1]].tolist() == logits[[0, -2]].argmax(1).tolist()


def test_a_llada_is_refused_by_name(llada: fdt.MaskedDiffusionLM) -> None:
    for call in (llada.diffusion_generate, lambda inputs: compat.diffusion_generate(llada, inputs)):
        with pytest.raises(TypeError, match=r"model must be a Dream for diffusion_generate, got a llada; generate decodes it"):
            call(PROMPT)


def test_a_loaded_dream_has_the_method(lm: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "alg": "entropy", "temperature": 0.0}
    assert torch.equal(lm.diffusion_generate(PROMPT, **options), compat.diffusion_generate(lm, PROMPT, **options))


def test_nan_logits_name_the_forward_and_the_row(dream: fdt.MaskedDiffusionLM) -> None:
    dream.network.weights.embedding[9] = torch.nan
    for cache in ("none", "dual"):
        with pytest.raises(FloatingPointError, match=r"forward 0 .* row 1"):
            _run(dream, torch.tensor([[5, 6], [9, 6]]), max_new_tokens=8, steps=4, alg="entropy", block_length=8, cache=cache)


def test_logits_are_rounded_to_the_models_dtype() -> None:
    lm = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu", dtype="bfloat16")
    out = _run(lm, max_new_tokens=8, steps=1, alg="entropy")
    logits = lm.logits(torch.cat((PROMPT, torch.full((1, 8), MASK)), dim=1))[0, 4:-1]
    assert logits.dtype == torch.bfloat16
    logits[:, MASK] = -torch.inf
    lowest = torch.where(logits == logits.max(1, keepdim=True).values, torch.arange(320), 320).min(1).values
    assert out.sequences[0, -8:].tolist() == lowest.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Hooks. That they get what the official code gives them, and what comes of it, is recorded: see ``test_switching.py``.


@pytest.mark.parametrize("way", [way for way in EVERY_WAY if way["cache"] == "none"], ids=str)
def test_hooks_that_only_look_change_nothing(lm: fdt.MaskedDiffusionLM, way: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "steps": 8, "threshold": 0.4, "seed": 7, "output_history": True, **way}
    padded, keep = torch.tensor([[1, 3, 3, 1, 4], PROMPT[0].tolist()]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    steps: list[int | None] = []

    def look(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        assert (logits is None) == (step is None)
        assert logits is None or logits.shape == (2, 21, 320)
        steps.append(step)
        return x

    plain = _run(lm, padded, attention_mask=keep, **options)
    hooks: dict[str, Any] = {"generation_tokens_hook_func": look, "generation_logits_hook_func": lambda step, x, logits: logits}
    looked = _run(lm, padded, attention_mask=keep, **hooks, **options)
    assert torch.equal(looked.sequences, plain.sequences)
    assert steps == [None, *range(looked.nfe)]
    assert looked.nfe >= plain.nfe


def test_a_hook_with_a_cache_is_said_not_to_be_called(lm: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 8, "block_length": 8, "alg": "entropy", "cache": "dual"}
    with pytest.warns(UserWarning, match=r"hooks are not called with cache='dual', as in the official code"):
        out = _run(lm, generation_tokens_hook_func=lambda *_: pytest.fail("called"), **options)
    assert torch.equal(out.sequences, _run(lm, **options).sequences)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            lambda step, x, logits: None,
            r"generation_tokens_hook_func must return a tensor like its x, .*\[1, 13\].* got NoneType",
        ),
        (lambda step, x, logits: x[:, 1:], r"generation_tokens_hook_func must return .* got torch.int64 \[1, 12\]"),
        (lambda step, x, logits: x.float(), r"generation_tokens_hook_func must return .* got torch.float32"),
        (lambda step, x, logits: x + 300, r"generation_tokens_hook_func returned token id 618, outside the vocabulary"),
    ],
)
def test_what_a_tokens_hook_must_return(lm: fdt.MaskedDiffusionLM, hook: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(lm, max_new_tokens=8, steps=4, alg="entropy", generation_tokens_hook_func=hook)


@pytest.mark.parametrize("hook", [lambda step, x, logits: None, lambda step, x, logits: logits[0], lambda step, x, logits: x])
def test_what_a_logits_hook_must_return(lm: fdt.MaskedDiffusionLM, hook: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_logits_hook_func must return a tensor like its logits, .*\[1, 13, 320\]"):
        _run(lm, max_new_tokens=8, steps=4, alg="entropy", generation_logits_hook_func=hook)


@pytest.mark.parametrize("alg", ALGS)
def test_a_hook_that_masks_again_and_again_does_not_go_on_for_ever(lm: fdt.MaskedDiffusionLM, alg: str) -> None:
    def mask(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        return x.index_fill(1, torch.tensor([7, 8]), MASK)

    out = _run(lm, max_new_tokens=8, steps=4, alg=alg, generation_tokens_hook_func=mask)
    assert out.nfe <= 8
    assert (out.sequences[0, 7:9] == MASK).all()


# ----------------------------------------------------------------------------------------------------------------------
# Arguments.


def test_the_config_object_decides_what_the_caller_does_not(lm: fdt.MaskedDiffusionLM) -> None:
    config = SimpleNamespace(max_new_tokens=8, steps=4, alg="entropy", top_p=None, return_dict_in_generate=True, unknown=1)
    out = compat.diffusion_generate(lm, PROMPT, config)
    assert isinstance(out, DiffusionOutput)
    assert out.nfe == 4
    assert torch.equal(out.sequences, _run(lm, max_new_tokens=8, steps=4, alg="entropy").sequences)
    assert _run(lm, PROMPT, generation_config=config, steps=2).nfe == 2
    x = compat.diffusion_generate(lm, PROMPT, config, return_dict_in_generate=False)
    assert isinstance(x, Tensor)


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({}, 20),
        ({"max_length": 12}, 7),
        ({"max_length": 20}, 15),
        ({"max_length": 12, "max_new_tokens": 3}, 3),
        ({"generation_config": SimpleNamespace(max_length=20, steps=2)}, 20),  # the config's default means nothing was set
        ({"generation_config": SimpleNamespace(max_length=12)}, 7),
        ({"generation_config": SimpleNamespace(max_length=12, max_new_tokens=4)}, 4),
        ({"generation_config": SimpleNamespace(max_new_tokens=4), "max_length": 30}, 4),
    ],
    ids=str,
)
def test_how_long_a_generation_is(lm: fdt.MaskedDiffusionLM, options: dict[str, Any], new: int) -> None:
    assert _run(lm, steps=1, alg="entropy", **options).sequences.shape == (1, 5 + new)


def test_the_defaults_beside_the_configs_are_dreams(lm: fdt.MaskedDiffusionLM) -> None:
    torch.manual_seed(0)
    out = _run(lm, max_new_tokens=2)
    torch.manual_seed(0)
    same = _run(lm, max_new_tokens=2, steps=512, eps=1e-3, alg="origin", cache="none")
    assert torch.equal(out.sequences, same.sequences)
    assert out.nfe == same.nfe <= 512
    blocks: dict[str, Any] = {"max_new_tokens": 64, "steps": 64, "alg": "confidence_threshold", "cache": "dual"}
    assert _run(lm, **blocks).nfe == _run(lm, threshold=0.9, block_length=32, **blocks).nfe


def test_what_neither_the_caller_nor_a_config_says_samples_as_transformers_defaults_do(lm: fdt.MaskedDiffusionLM) -> None:
    out = compat.diffusion_generate(lm, PROMPT, max_new_tokens=1, steps=1, num_return_sequences=ROWS, seed=11)
    assert isinstance(out, Tensor)
    expected = filter_logits(_next_logits(lm, 1), top_k=50).softmax(1)[0]
    assert (expected > 0).sum() == 50
    _assert_frequencies(out[:, -1].bincount(minlength=320), expected)


def test_a_top_p_of_0_keeps_the_likeliest_token(lm: fdt.MaskedDiffusionLM) -> None:
    """The slider of ``app.py`` goes down to it."""
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 1, "alg": "entropy"}
    greedy = _run(lm, **options)
    assert torch.equal(_run(lm, top_p=0.0, temperature=1.5, seed=2, **options).sequences, greedy.sequences)


def test_numbers_of_numpy_and_torch_are_numbers(lm: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "alg": "entropy", "temperature": 0.5, "top_k": 50, "seed": 3}
    same = {
        "max_new_tokens": np.int64(8),
        "steps": torch.tensor(4),
        "temperature": np.float32(0.5),
        "top_k": 50.0,
        "top_p": np.float32(1),
        "threshold": np.float64(0.9),
        "block_length": np.int32(8),
        "seed": np.int64(3),
        "num_return_sequences": np.int8(1),
    }
    assert torch.equal(_run(lm, **options).sequences, _run(lm, **{**options, **same}).sequences)


@pytest.mark.parametrize(
    ("switches", "cache"),
    [
        ({"use_cache": True}, "prefix"),
        ({"use_cache": True, "dual_cache": False}, "prefix"),
        ({"use_cache": True, "dual_cache": True}, "dual"),
        ({"cache": "prefix", "dual_cache": False}, "prefix"),
        ({"dual_cache": False}, "none"),
        ({"dual_cache": True}, "dual"),
        ({"dual_cache": True, "cache": "dual"}, "dual"),
        ({"use_cache": False}, "none"),
        ({"use_cache": False, "dual_cache": False}, "none"),
    ],
    ids=str,
)
def test_the_official_switches_of_the_cache(lm: fdt.MaskedDiffusionLM, switches: dict[str, Any], cache: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 32, "steps": 16, "block_length": 16, "alg": "entropy", "output_history": True}
    switched, named = _run(lm, **options, **switches), _run(lm, cache=cache, **options)
    assert switched.history is not None
    assert named.history is not None
    assert all(torch.equal(a, b) for a, b in zip(switched.history, named.history, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "dream"}, TypeError, "model must come from fastdllm_triton.load, .* got str"),
        ({"inputs": [[1, 2]]}, ValueError, r"inputs must be a tensor of integers of shape \[B, P\], got list"),
        ({"inputs": torch.tensor([1, 2])}, ValueError, r"inputs must be a tensor of integers of shape \[B, P\], got .* \[2\]"),
        ({"inputs": torch.tensor([[1.0]])}, ValueError, r"inputs must be a tensor of integers .* got torch.float32"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "inputs must hold at least one prompt of at least one"),
        ({"inputs": torch.tensor([[1, 320]])}, ValueError, r"inputs holds token id 320, outside the vocabulary \[0, 320\)"),
        ({"inputs": torch.tensor([[1, -1]])}, ValueError, "inputs holds token id -1"),
        (
            {"attention_mask": torch.ones(1, 4)},
            ValueError,
            r"attention_mask must have the shape of inputs, \[1, 5\], got torch.float32 \[1, 4\]",
        ),
        ({"attention_mask": [[1] * 5]}, ValueError, "attention_mask must have the shape of inputs, .* got list"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1]])}, ValueError, "row 0 has padding after a token; .* on the left"),
        ({"attention_mask": torch.zeros(1, 5)}, ValueError, "attention_mask: row 0 is all padding"),
        ({"generation_config": {"steps": 4}}, TypeError, "generation_config must be an object .*, got dict; give single"),
        ({"generation_config": 128}, TypeError, "generation_config must be an object .*, got int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of 1 or more, got 0"),
        ({"max_new_tokens": 8.0}, ValueError, "max_new_tokens must be an integer of 1 or more, got 8.0"),
        ({"max_new_tokens": 2044}, ValueError, "takes 2048 tokens, which leaves 2043 after a prompt of 5, got 2044"),
        ({"max_new_tokens": None, "max_length": 5}, ValueError, "max_length must be an integer above the 5 tokens .* got 5"),
        ({"max_new_tokens": None, "max_length": "9"}, ValueError, "max_length must be an integer above"),
        ({"steps": 0}, ValueError, "steps must be an integer of 1 or more, got 0"),
        ({"steps": 3, "cache": "dual"}, ValueError, r"steps must be a multiple of the number of blocks, 2 .* got 3"),
        ({"steps": 3, "alg": "confidence_threshold"}, ValueError, "steps must divide the number of masked tokens, 16, .* got 3"),
        ({"eps": 0.0}, ValueError, "eps must be above 0 and below 1, got 0.0"),
        ({"eps": 1.0}, ValueError, "eps must be above 0 and below 1, got 1.0"),
        ({"alg": "random"}, ValueError, "alg must be one of origin, maskgit_plus, .*, got 'random'"),
        ({"alg_temp": -1.0}, ValueError, "alg_temp must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more, got nan"),
        ({"top_p": -0.1}, ValueError, r"top_p must be None or in \[0, 1\], got -0.1"),
        ({"top_p": 1.5}, ValueError, r"top_p must be None or in \[0, 1\], got 1.5"),
        ({"top_k": 2.5}, ValueError, "top_k must be None or an integer of 1 or more, got 2.5"),
        ({"steps": None}, ValueError, "steps must be an integer of 1 or more, got None"),
        ({"temperature": None}, ValueError, "temperature must be 0 or more, got None"),
        ({"max_new_tokens": None, "max_length": None}, ValueError, "max_length must be an integer .* got None; or give max_new"),
        ({"top_k": 0}, ValueError, "top_k must be None or an integer of 1 or more, got 0"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \(0, 1\], got 1.5"),
        ({"block_length": 5, "cache": "dual"}, ValueError, "block_length must divide the 16 new tokens .* got 5"),
        ({"cache": "full"}, ValueError, "cache must be one of none, prefix, dual, got 'full'"),
        ({"use_cache": False, "dual_cache": True}, ValueError, "dual_cache = True contradicts use_cache = False"),
        ({"cache": "none", "use_cache": True}, ValueError, "cache = 'none' contradicts use_cache = True"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be an integer of 1 or more, got 0"),
        ({"mask_token_id": 320}, ValueError, r"mask_token_id must be in the vocabulary \[0, 320\), got 320"),
        ({"seed": 1.5}, ValueError, r"seed must be None or an integer in \[-2\^62, 2\^62\], got 1.5"),
        (
            {"cache": "dual", "dual_cache": False},
            ValueError,
            "cache = 'dual' contradicts use_cache = None and dual_cache = False",
        ),
        ({"remasking": "random"}, TypeError, r"diffusion_generate\(\) got an unexpected keyword argument 'remasking'$"),
        ({"tresh": 0.8}, TypeError, r"unexpected keyword argument 'tresh'; did you mean 'threshold'\?"),
        ({"generation_tokens_hook_func": 3}, TypeError, "generation_tokens_hook_func must be a function or None, got int"),
        ({"generation_logits_hook_func": "f"}, TypeError, "generation_logits_hook_func must be a function or None, got str"),
    ],
)
def test_bad_arguments(
    lm: fdt.MaskedDiffusionLM,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(lm.network, "forward", None)  # nothing runs before the arguments are checked
    arguments = {"model": lm, "inputs": PROMPT, "max_new_tokens": 16, "steps": 8, "block_length": 8, **options}
    with pytest.raises(error, match=message):
        compat.diffusion_generate(**arguments)


def test_what_the_kernels_do_not_take_is_said_before_any_work(lm: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.network, "forward", None)
    monkeypatch.setattr(lm.network, "ops", resolve("triton", lm.device))
    options: dict[str, Any] = {"alg": "confidence_threshold", "cache": "dual", "steps": 8}
    with pytest.raises(ValueError, match=r"block_length: the Triton kernels take at most 1024, got 2000"):
        _run(lm, max_new_tokens=2000, block_length=2000, **options)
    with pytest.raises(ValueError, match=r"inputs: the Triton kernels take at most 1024, got 2000"):
        _run(lm, max_new_tokens=8, block_length=8, num_return_sequences=2000, **options)


# ----------------------------------------------------------------------------------------------------------------------
# The kernels, on a GPU or in Triton's interpreter.


@(pytest.mark.gpu if GPU else lambda test: test)
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "dual", "alg": "confidence_threshold", "threshold": 0.4, "temperature": 0.7},
        {"cache": "prefix", "alg": "entropy", "steps": 4, "alg_temp": 0.5},
        {"cache": "none", "alg": "topk_margin", "steps": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    ],
    ids=str,
)
def test_the_kernels_decode_as_the_reference(options: dict[str, Any]) -> None:
    inputs, keep = torch.tensor([[0, 3, 1], [7, 9, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments: dict[str, Any] = {"max_new_tokens": 8, "steps": 8, "block_length": 4, "seed": 3, "attention_mask": keep, **options}
    device = "cuda" if GPU else "cpu"
    kernels, reference = (
        _run(fdt.load(GOLDEN / GOLDEN_DREAM, device=device, backend=backend), inputs, **arguments)
        for backend in ("triton", "reference")
    )
    assert kernels.sequences.tolist() == reference.sequences.tolist()
    assert kernels.nfe == reference.nfe

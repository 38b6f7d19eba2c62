"""Models whose hidden state of a slot predicts the slot after it (Dream), decoded by the same engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GOLDEN

import fastdllm_triton as fdt

OPTIONS: dict[str, Any] = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}


@pytest.fixture
def dream() -> fdt.MaskedDiffusionLM:
    return fdt.load(GOLDEN / "dream-gqa", device="cpu")


def test_each_token_comes_from_the_slot_before_it(dream: fdt.MaskedDiffusionLM) -> None:
    mask, prompt = dream.config.mask_id, [5, 9, 2]
    out = dream.generate([prompt], cache="none", strategy=fdt.FixedSteps(16), **OPTIONS)
    x = torch.tensor([prompt + [mask] * 16])
    for forward in range(16):
        logits = dream.logits(x).double()
        logits[..., mask] = -torch.inf
        p = logits.softmax(-1)[0].roll(1, dims=0)
        p[x[0] != mask] = 0
        p[3 + 8 * (forward // 8 + 1) :] = 0
        slot = int(p.max(-1).values.argmax())
        assert int(out.step_map[0, slot - 3]) == forward
        assert int(out.sequences[0, slot]) == int(p[slot].argmax())
        assert float(out.confidence[0, slot - 3]) == pytest.approx(float(p[slot].max()), rel=1e-5)
        x[0, slot] = out.sequences[0, slot]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("strategy", [fdt.Threshold(0.6), fdt.FixedSteps(8)], ids=["threshold", "fixed"])
def test_a_cache_that_is_always_fresh_is_no_cache(dream: fdt.MaskedDiffusionLM, cache: str, strategy: fdt.Strategy) -> None:
    prompts = [[5, 9, 2], [7, 1, 8, 2, 8, 1]]
    plain = dream.generate(prompts, cache="none", strategy=strategy, lockstep=True, **OPTIONS)
    fresh = dream.generate(prompts, cache=cache, refresh_every=1, strategy=strategy, lockstep=True, **OPTIONS)
    assert fresh.sequences.tolist() == plain.sequences.tolist()
    assert fresh.step_map.tolist() == plain.step_map.tolist()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_row_gets_the_tokens_it_gets_alone(dream: fdt.MaskedDiffusionLM, cache: str) -> None:
    prompts = [[5, 9, 2], [7], [7, 1, 8, 2, 8, 1]]
    batch = dream.generate(prompts, cache=cache, strategy=fdt.Threshold(0.6), **OPTIONS)
    for row, prompt in enumerate(prompts):
        alone = dream.generate([prompt], cache=cache, strategy=fdt.Threshold(0.6), **OPTIONS)
        assert batch.generated[row].tolist() == alone.generated[0].tolist()


def test_a_refresh_may_commit_the_first_token_alone(dream: fdt.MaskedDiffusionLM) -> None:
    prompts = [[5, 9, 2], [7, 1, 8, 2, 8, 1]]
    options: dict[str, Any] = {"refresh_commits": "first", "strategy": fdt.Threshold(0.01), **OPTIONS}
    forwards = list(dream.stream([prompts[0]], **options))
    assert [forward.windows[0] for forward in forwards] == [(0, 19), (3, 11), (0, 19), (11, 19)]
    assert dream.generate([prompts[0]], **options).step_map[0].tolist() == [0, *[1] * 7, 2, *[3] * 7]
    batch = dream.generate(prompts, **options)
    for row, prompt in enumerate(prompts):
        assert batch.generated[row].tolist() == dream.generate([prompt], **options).generated[0].tolist()


def test_an_end_token_that_a_refresh_commits_does_not_end_the_row(dream: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"refresh_commits": "first", "strategy": fdt.Threshold(0.5), **OPTIONS}
    first = int(dream.generate([[5, 9, 2]], **options).generated[0, 0])
    out = dream.generate([[5, 9, 2]], **{**options, "stop_at_eos": True, "eos_ids": (first,)})
    assert (out.step_map[0, :8] >= 0).all()
    assert (out.step_map[0, 8:] == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_commits": "all"}, "refresh_commits must be rule or first, got 'all'"),
        ({"cache": "none"}, "'first' does not go with cache = 'none'"),
        ({"strategy": fdt.FixedSteps(16)}, "'first' does not go with strategy = FixedSteps"),
        ({"refresh_every": 2}, "'first' does not go with refresh_every = 2"),
    ],
)
def test_what_a_first_token_refresh_does_not_go_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdt.GenerationConfig(**{"refresh_commits": "first", **OPTIONS, **options})


def test_a_first_token_refresh_is_for_shifted_models(llada: fdt.MaskedDiffusionLM) -> None:
    with pytest.raises(ValueError, match="is for models with shifted predictions, and llada has none"):
        llada.generate([[1, 2]], refresh_commits="first", **OPTIONS)


def test_a_step_recomputes_the_slot_that_predicts_the_blocks_first(dream: fdt.MaskedDiffusionLM) -> None:
    forwards = list(dream.stream([[5, 9, 2]], cache="dual", strategy=fdt.FixedSteps(4), **OPTIONS))
    assert [forward.windows[0] for forward in forwards] == [(0, 19), (2, 11), (0, 19), (10, 19)]

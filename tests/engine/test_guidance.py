"""Classifier-free guidance and tokens that are committed last, against a plain loop over full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _plain_loop import decode
from conftest import GOLDEN, GOLDEN_DREAM

import fastdllm_triton as fdt
from fastdllm_triton.engine import memory

CACHES = ("none", "prefix", "dual")
STRATEGIES = [fdt.FixedSteps(6), fdt.Threshold(0.02), fdt.EntropyBudget(9.0)]
MODELS = {name: fdt.load(GOLDEN / name, device="cpu") for name in ("llada-gqa", GOLDEN_DREAM)}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("cache", CACHES)
def test_guidance_is_the_plain_loop(name: str, strategy: fdt.Strategy, cache: str) -> None:
    lm, mask = MODELS[name], MODELS[name].config.mask_id
    answer = [mask] * 6 + [7] + [mask] * 9
    want = decode(lm, PROMPTS[0], answer, 8, strategy, cache, cfg_scale=1.5)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "strategy": strategy, "cache": cache, "stop_at_eos": False}
    out = lm.generate(PROMPTS[:1], constraints={6: 7}, cfg_scale=1.5, **options)
    assert out.sequences[0].tolist() == want.x
    assert out.step_map[0].tolist() == want.step_map[5:]
    assert out.nfe == want.forwards
    assert out.generated.tolist() != lm.generate(PROMPTS[:1], constraints={6: 7}, **options).generated.tolist()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_a_guided_row_gets_in_a_batch_what_it_gets_alone(cache: str, temperature: float) -> None:
    lm = MODELS["llada-gqa"]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 4, "cache": cache, "strategy": fdt.Threshold(0.02)}
    options |= {"cfg_scale": 0.5, "temperature": temperature}
    batch = lm.generate(PROMPTS, seed=[4, 5, 6], eos_ids=[11], **options)
    for row, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], seed=4 + row, eos_ids=[11], **options)
        assert batch.generated[row].tolist() == alone.generated[0].tolist()
        assert int(batch.row_forwards[row]) == alone.nfe


def test_guidance_of_zero_is_none_and_costs_nothing(llada: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = llada.network.forward

    def counted(ids: Any, *args: Any, **options: Any) -> Any:
        rows.append(len(ids))
        return forward(ids, *args, **options)

    monkeypatch.setattr(llada.network, "forward", counted)
    for scale, each in ((0.0, 1), (0.7, 2)):
        rows.clear()
        llada.generate(PROMPTS, gen_length=16, block_length=8, cfg_scale=scale, lockstep=True, stop_at_eos=False)
        assert max(rows) == each * len(PROMPTS)


def test_guidance_with_little_to_say_changes_nothing() -> None:
    lm = MODELS["llada-gqa"]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}
    assert (
        lm.generate(PROMPTS, cfg_scale=1e-9, **options).generated.tolist() == lm.generate(PROMPTS, **options).generated.tolist()
    )


def test_guidance_rounds_where_logits_are_rounded() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu", dtype=torch.bfloat16)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cfg_scale": 1.0, "stop_at_eos": False}
    rounded = lm.generate(PROMPTS, logits_dtype=torch.bfloat16, **options)
    assert rounded.confidence.tolist() != lm.generate(PROMPTS, **options).confidence.tolist()


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", [fdt.FixedSteps(16), fdt.FixedSteps(6), fdt.Threshold(0.02), fdt.Factor(2.0)], ids=repr)
def test_tokens_are_committed_last_and_take_no_part_in_other_confidences(
    strategy: fdt.Strategy, cache: str, cfg_scale: float
) -> None:
    lm = MODELS["llada-gqa"]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "strategy": strategy, "cache": cache, "stop_at_eos": False}
    options["cfg_scale"] = cfg_scale
    allowed, last = (11, 31, 83, 113, 139, 150), (113, 150)
    never = tuple(token for token in range(lm.config.vocab_size) if token not in allowed)
    answer = [lm.config.mask_id] * 16
    want = decode(lm, PROMPTS[0], answer, 8, strategy, cache, cfg_scale=cfg_scale, never=never, last=last)
    out = lm.generate(PROMPTS[:1], commit_last=last, forbidden=never, **options)
    assert out.sequences[0].tolist() == want.x
    assert out.step_map[0].tolist() == want.step_map[5:]
    assert 0.0 in want.confidence.values()
    for slot, sure in want.confidence.items():
        assert float(out.confidence[0, slot - 5]) == pytest.approx(sure, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": -0.5}, r"cfg_scale must be 0 or more, got -0.5"),
        ({"cfg_scale": float("nan")}, r"cfg_scale must be 0 or more, got nan"),
        ({"cfg_scale": 1e300}, r"cfg_scale must be at most 1,000,000, got 1e\+300"),
        ({"temperature": 1e300}, r"temperature must be at most 1,000,000, got 1e\+300"),
        ({"commit_last": (320,)}, r"commit_last must be in the vocabulary \[0, 320\), got 320"),
        ({"commit_last": (3,), "strategy": fdt.EntropyBudget(1)}, r"commit_last goes with score = 'confidence' only"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS["llada-gqa"].generate([[1, 2, 3]], gen_length=16, block_length=8, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("huge", "enough"),
    [
        ({"look_back": 10**12}, {"look_back": 100}),
        ({"look_back": 2**40}, {"look_back": 100}),
        ({"look_back": 99999999999999999999, "cache": "prefix"}, {"look_back": 100, "cache": "prefix"}),
        ({"look_ahead": 10**20}, {"look_ahead": 100}),
        ({"suffix_window": 10**20}, {}),
        ({"refresh_every": 10**20}, {}),
        ({"prompt_refresh": 10**20}, {"prompt_refresh": 100}),
        ({"strategy": fdt.FixedSteps(99999999999999999998)}, {"strategy": fdt.FixedSteps(16)}),
    ],
)
def test_more_than_there_are_slots_is_all_of_them(name: str, huge: dict[str, Any], enough: dict[str, Any]) -> None:
    lm = MODELS[name]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual", "strategy": fdt.Threshold(0.02)}
    assert (
        lm.generate(PROMPTS, **options | huge).sequences.tolist() == lm.generate(PROMPTS, **options | enough).sequences.tolist()
    )


def test_guidance_counts_twice_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = MODELS["llada-gqa"]
    need = memory.Memory.of(lm.config, 1, 3 + 8, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * (need.cache + need.workspace))
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8}
    lm.generate([[1, 2, 3]] * 3, **options)
    lm.generate([[1, 2, 3]], cfg_scale=1.0, **options)
    with pytest.raises(MemoryError, match="the largest batch that fits is 1"):
        lm.generate([[1, 2, 3]] * 2, cfg_scale=1.0, **options)

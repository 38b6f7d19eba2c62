"""The official calls: their signatures, their arguments by position, their errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fastdllm_triton as fdt
from fastdllm_triton import compat

CALLS = [compat.generate, compat.generate_with_prefix_cache, compat.generate_with_dual_cache]
OFFICIAL = {
    "model": inspect.Parameter.empty,
    "prompt": inspect.Parameter.empty,
    "steps": 128,
    "gen_length": 128,
    "block_length": 128,
    "temperature": 0.0,
    "remasking": "low_confidence",
    "mask_id": None,
    "threshold": None,
    "factor": None,
}
PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


@pytest.mark.parametrize("call", CALLS)
def test_the_signature_is_the_official_one(call: Any) -> None:
    parameters = inspect.signature(call).parameters
    assert list(parameters) == list(OFFICIAL)
    assert {name: p.default for name, p in parameters.items()} == OFFICIAL


@pytest.mark.parametrize("call", CALLS)
def test_arguments_by_position(golden: fdt.MaskedDiffusionLM, call: Any) -> None:
    x, nfe = call(golden, PROMPT, 8, 16, 8, 0.0, "low_confidence", 318)
    assert x.shape == (2, 19)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, :3], PROMPT)
    assert isinstance(nfe, int)
    assert nfe == 8
    y, _ = call(golden, PROMPT, steps=8, gen_length=16, block_length=8)
    assert torch.equal(x, y)


def test_the_factor_wins_over_the_threshold(golden: fdt.MaskedDiffusionLM) -> None:
    lengths: dict[str, Any] = {"steps": 16, "gen_length": 16, "block_length": 8}
    both = compat.generate(golden, PROMPT, threshold=0.01, factor=0.5, **lengths)
    alone = compat.generate(golden, PROMPT, factor=0.5, **lengths)
    threshold = compat.generate(golden, PROMPT, threshold=0.01, **lengths)
    assert torch.equal(both[0], alone[0])
    assert both[1] == alone[1] != threshold[1] == 2


def test_another_mask_id(golden: fdt.MaskedDiffusionLM) -> None:
    x, _ = compat.generate(golden, PROMPT, steps=8, gen_length=16, block_length=8, mask_id=7)
    assert 7 not in x[:, 3:]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"remasking": "random"}])
def test_draws_follow_the_global_seed(golden: fdt.MaskedDiffusionLM, call: Any, options: dict[str, Any]) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        x, _ = call(golden, PROMPT, steps=16, gen_length=16, block_length=8, **options)
        return x.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_at_temperature_zero_the_global_generator_is_left_alone(golden: fdt.MaskedDiffusionLM) -> None:
    before = torch.get_rng_state()
    compat.generate(golden, PROMPT, steps=8, gen_length=16, block_length=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_block_is_decoded(tiny: fdt.MaskedDiffusionLM) -> None:
    prompt = torch.tensor([tiny.encode("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?")])
    _, nfe = compat.generate_with_dual_cache(tiny, prompt, steps=48, gen_length=48, block_length=8)
    assert nfe == 48


def test_logits_are_rounded_to_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fdt.load("tiny", dtype=torch.bfloat16)
    asked: dict[str, Any] = {}
    run = lm.generate
    monkeypatch.setattr(lm, "generate", lambda *a, **kw: asked.update(kw) or run(*a, **kw))
    compat.generate(lm, torch.tensor([[4, 5, 6]]), steps=8, gen_length=8, block_length=8)
    assert asked["logits_dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 3}, ValueError, "steps must be a multiple"),
        ({"steps": 3, "threshold": 0.9}, ValueError, "steps must be a multiple"),
        ({"gen_length": 20}, ValueError, "gen_length must be a multiple"),
        ({"threshold": 2.0}, ValueError, "threshold must be in"),
        ({"factor": 0}, ValueError, "factor must be above 0"),
        ({"remasking": "high"}, ValueError, "remasking must be one of low_confidence, random, got 'high'"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more"),
        ({"mask_id": 320}, ValueError, "mask_id must be in the vocabulary"),
        ({"prompt": torch.tensor([3])}, ValueError, r"prompts must be integers of shape \[B, T\]"),
        ({"model": "tiny"}, TypeError, "model must come from fastdllm_triton.load, .* got str"),
    ],
)
def test_bad_arguments(golden: fdt.MaskedDiffusionLM, options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": golden, "prompt": PROMPT, "steps": 16, "gen_length": 16, "block_length": 8, **options}
    with pytest.raises(error, match=message):
        compat.generate(**arguments)

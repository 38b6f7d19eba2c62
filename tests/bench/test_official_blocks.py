"""The re-created official code of block-causal families against what the official code was recorded to do, and ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

import fastdllm_triton as fdt
from fastdllm_triton.bench import official_blocks as official


def recorded(model: str, **wanted: Any) -> list[dict[str, Any]]:
    """The recorded cases with these fields."""
    cases = map(json.loads, (GOLDEN / model / "cases.jsonl").read_text().splitlines())
    return [case for case in cases if all(case[name] == value for name, value in wanted.items())]


def model_of(name: str) -> official.OfficialBlockModel:
    return official.OfficialBlockModel(fdt.load(GOLDEN / name, device="cpu").network)


@pytest.mark.parametrize("block_cache", [False, True])
def test_fast_dllm_v2_gives_the_recorded_tokens_in_as_many_forwards(block_cache):
    model = model_of("fast-dllm-v2")
    cases = recorded("fast-dllm-v2", use_block_cache=block_cache)
    assert {len(case["tokens"]) < case["max_new_tokens"] for case in cases[::4]} == {True, False}  # some end early
    for case in cases[::4]:
        x, nfe = official.official_v2(
            model,
            torch.tensor([case["prompt"]]),
            case["max_new_tokens"] // case["block_length"],
            case["block_length"],
            case["sub_block_length"],
            threshold=case["threshold"],
            block_cache=block_cache,
            stop=case["stop_token"],
        )
        assert x[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case


@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential"])
def test_sdar_gives_the_recorded_tokens_in_as_many_forwards(strategy):
    model, cases = model_of("sdar"), recorded("sdar", strategy=strategy)
    for case in cases[:: max(len(cases) // 8, 1)]:
        blocks = (len(case["prompt"]) + case["gen_length"]) // case["block_length"] + 1
        x, nfe = official.official_sdar(
            model,
            torch.tensor([case["prompt"]]),
            case["gen_length"],
            case["block_length"],
            forwards=[case["denoising_steps"]] * blocks,
            threshold=case["threshold"],
            leftmost=strategy == "sequential",
            stops=case["stop_tokens"],
        )
        assert x[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case


@pytest.mark.parametrize("name", ["fast-dllm-v2", "sdar"])
def test_logits_are_the_recorded_ones(name):
    model, data = model_of(name), load_file(GOLDEN / name / "logits.safetensors")
    block, start = (32, 64) if name == "fast-dllm-v2" else (4, 32)
    ids = data["input_ids"] if name == "fast-dllm-v2" else data["input_ids"][:, :start]
    with torch.no_grad():
        logits, _ = model(ids, [], block, store=True)
        torch.testing.assert_close(logits, data["prefill_logits"], rtol=0, atol=1e-4)
        _, past = model(ids[:, :start], [], block, store=True)
        if name == "sdar":
            torch.testing.assert_close(model(data["step_ids"], past, block)[0], data["step_logits"], rtol=0, atol=1e-4)
            return
        logits, whole = model(data["block_ids"], past, block)
        torch.testing.assert_close(logits, data["block_logits"], rtol=0, atol=1e-4)
        logits, _ = model(data["sub_ids"], past, block, whole=whole, at=8)
        torch.testing.assert_close(logits, data["sub_logits"], rtol=0, atol=1e-4)

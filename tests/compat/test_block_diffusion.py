"""The functions of block-causal models, by name and by position as their authors' scripts call them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton import compat

V2, SDAR = "fast-dllm-v2", "sdar"


def _cases(model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines()]


def _v2_arguments(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "max_new_tokens": case["max_new_tokens"],
        "block_size": case["block_length"],
        "small_block_size": case["sub_block_length"],
        "threshold": case["threshold"],
        "use_block_cache": case["use_block_cache"],
        "mask_id": case["mask_id"],
        "stop_token": case["stop_token"],
    }


@pytest.fixture(scope="module")
def v2() -> fdt.MaskedDiffusionLM:
    return fdt.load(GOLDEN / V2, device="cpu")


@pytest.fixture(scope="module")
def sdar() -> fdt.MaskedDiffusionLM:
    return fdt.load(GOLDEN / SDAR, device="cpu")


def test_fast_dllm_v2_gives_the_official_sequences_and_forwards(v2: fdt.MaskedDiffusionLM) -> None:
    for case in _cases(V2)[::4]:
        sequences, nfe = compat.fast_dllm_v2_generate(v2, torch.tensor([case["prompt"]]), **_v2_arguments(case))
        assert (sequences.tolist(), nfe) == ([case["prompt"] + case["tokens"]], case["nfe"])


def test_a_batch_of_fast_dllm_v2_gets_what_each_row_gets_alone(v2: fdt.MaskedDiffusionLM) -> None:
    """Rows whose prompts end with a block, and beyond one by one token, which the official batches get wrong."""
    lengths = (5, 16, 17, 33, 48)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 300, (1, n), generator=generator) for n in lengths]
    padded = torch.full((len(lengths), max(lengths)), 318)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: prompt.shape[1]] = prompt[0]
    options: dict[str, Any] = {"block_size": 16, "small_block_size": 8, "max_new_tokens": 32, "threshold": 0.6}
    batch = compat.batch_sample(v2, padded, seq_len=torch.tensor(lengths), **options)
    for i, prompt in enumerate(prompts):
        alone, _ = compat.fast_dllm_v2_generate(v2, prompt, **options)
        assert batch[i].tolist() == alone[0].tolist()


def test_sdar_gives_the_official_sequences_and_forwards(sdar: fdt.MaskedDiffusionLM) -> None:
    names = {"static": "low_confidence_static", "dynamic": "low_confidence_dynamic", "sequential": "sequential"}
    for case in _cases(SDAR)[::4]:
        threshold = {} if case["threshold"] is None else {"confidence_threshold": case["threshold"]}
        sequences, nfe = compat.block_diffusion_generate(
            sdar,
            {"input_ids": torch.tensor([case["prompt"]])},
            mask_id=318,
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            denoising_steps=case["denoising_steps"],
            temperature=1.0,
            top_k=1,
            remasking_strategy=names[case["strategy"]],
            stopping_criteria_idx=case["stop_tokens"],
            **threshold,
        )
        assert (sequences.tolist(), nfe) == ([case["prompt"] + case["tokens"]], case["nfe"])


def test_draws_are_seeded_from_torch(sdar: fdt.MaskedDiffusionLM, v2: fdt.MaskedDiffusionLM) -> None:
    prompt = torch.tensor([[3, 5, 7]])

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        one, _ = compat.block_diffusion_generate(sdar, prompt, gen_length=32, temperature=1.0)
        two, _ = compat.fast_dllm_v2_generate(v2, prompt, 32, temperature=1.0, top_p=1.0)
        return [*one.tolist(), *two.tolist()]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_prompt_of_one_block_and_a_budget_below_one(v2: fdt.MaskedDiffusionLM) -> None:
    """Blocks that are not whole are not decoded; a prefill gives its token all the same, of one block as well."""
    prompt = torch.arange(32)[None]
    sequences, nfe = compat.fast_dllm_v2_generate(v2, prompt, 31)
    assert (sequences.shape, nfe) == ((1, 33), 1)
    sequences, nfe = compat.fast_dllm_v2_generate(v2, prompt[:, :9], 31)
    assert (sequences.tolist(), nfe) == (prompt[:, :9].tolist(), 0)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("v2", {"small_block_size": 5}, "small_block_size must be a divisor of block_size = 32, got 5"),
    ("v2", {"block_size": 0}, "block_size must be an integer of 1 or more, got 0"),
    ("v2", {"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
    ("v2", {"max_new_tokens": -1}, "max_new_tokens must be an integer of 0 or more, got -1"),
    ("v2", {"temperature": 1.0}, "top_p must be 1 with a temperature above 0, got 0.95"),
    ("v2", {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"input_ids must be of shape \[1, P\]"),
    ("sdar", {"remasking_strategy": "entropy_bounded"}, "remasking_strategy must be one of low_confidence_static"),
    ("sdar", {"top_k": 50}, "top_k must be 0 or 1, got 50"),
    ("sdar", {"confidence_threshold": 0}, r"confidence_threshold must be in \(0, 1\], got 0"),
    ("sdar", {"denoising_steps": 0}, "denoising_steps must be an integer of 1 or more, got 0"),
    ("sdar", {"gen_length": 0}, "gen_length must be an integer of 1 or more, got 0"),
]


@pytest.mark.parametrize(("family", "wrong", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_named_as_typed(
    v2: fdt.MaskedDiffusionLM, sdar: fdt.MaskedDiffusionLM, family: str, wrong: dict[str, Any], message: str
) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    call = partial(compat.fast_dllm_v2_generate, v2) if family == "v2" else partial(compat.block_diffusion_generate, sdar)
    arguments = {"input_ids": prompt, "max_new_tokens": 32} if family == "v2" else {"prompt": prompt}
    with pytest.raises(ValueError, match=message):
        call(**(arguments | wrong))


def test_functions_of_one_family_refuse_models_of_another(tiny: fdt.MaskedDiffusionLM) -> None:
    with pytest.raises(ValueError, match="cache must be none or prefix or dual for llada, whose attention is bidirectional"):
        compat.fast_dllm_v2_generate(tiny, torch.tensor([[1, 2]]), 32)

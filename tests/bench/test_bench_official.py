"""The re-created official code, which the benches compare with, against what the official code was recorded to do, and ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

import fastdllm_triton as fdt
from fastdllm_triton.bench import official_step as official


def recorded(model: str, **wanted: Any) -> list[dict[str, Any]]:
    """The recorded cases with these fields."""
    cases = map(json.loads, (GOLDEN / model / "cases.jsonl").read_text().splitlines())
    return [case for case in cases if all(case[name] == value for name, value in wanted.items())]


def model_of(name: str) -> Any:
    return official.OfficialModel(fdt.load(GOLDEN / name, device="cpu").network)


@pytest.mark.parametrize("strategy", ["fixed", "threshold"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", ["llada-mha", "llada-gqa"])
def test_llada_gives_the_recorded_tokens_in_as_many_forwards(name, cache, strategy):
    model = model_of(name)
    cases = recorded(name, cache=cache, strategy=strategy)
    for case in cases[:: len(cases) // 8]:
        blocks = case["gen_length"] // case["block_length"]
        how = {"threshold": case["value"]} if strategy == "threshold" else {"forwards": [case["value"] // blocks] * blocks}
        prompt = torch.tensor(case["prompt"])
        x, nfe = official.official_generate(model, prompt, case["gen_length"], case["block_length"], cache, **how)
        assert x[:, prompt.shape[1] :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case


@pytest.mark.parametrize(("cache", "algorithm"), [
    ("none", "maskgit_plus"), ("prefix", "entropy"), ("dual", "entropy"),
    ("prefix", "confidence_threshold"), ("dual", "confidence_threshold"),
])  # fmt: skip
def test_dream_gives_the_recorded_tokens_in_as_many_forwards(cache, algorithm):
    model = model_of("dream-gqa")
    for case in recorded("dream-gqa", cache=cache, alg=algorithm):
        length, block = case["max_new_tokens"], case["block_length"] or case["max_new_tokens"]
        how = (
            {"threshold": case["threshold"]}
            if case["threshold"]
            else {"forwards": [case["steps"] // (length // block)] * (length // block)}
        )
        x, nfe = official.official_generate(model, torch.tensor([case["prompt"]]), length, block, cache, **how)
        assert x[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case


@pytest.mark.parametrize("name", ["llada-mha", "llada-gqa", "dream-gqa"])
def test_logits_are_the_recorded_ones_with_each_cache(name):
    model, data = model_of(name), load_file(GOLDEN / name / "logits.safetensors")
    rows = 1 if name == "dream-gqa" else 2  # the official dual cache of Dream is for one row
    ids, following = data["input_ids"][:rows], data["next_ids"][:rows]
    with torch.no_grad():
        logits, past = model(ids, use_cache=True)
        torch.testing.assert_close(logits, data["logits"][:rows], rtol=0, atol=1e-5)
        front = [(k[:, :24], v[:, :24]) if name == "dream-gqa" else (k[:, :, :24], v[:, :, :24]) for k, v in past]
        torch.testing.assert_close(model(following[:, 24:], front)[0], data["prefix_logits"][:rows], rtol=0, atol=1e-5)
        replace = torch.zeros(rows, 40, dtype=torch.bool)
        replace[:, 24:32] = True
        dual = model(following[:, 24:32], past, replace)[0]
        torch.testing.assert_close(dual, data["dual_logits"][:rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_its_tokens_are_ours(cache, llada):
    prompt = torch.tensor([[5, 17, 300, 2], [9, 8, 7, 6]])
    x, nfe = official.official_generate(official.OfficialModel(llada.network), prompt, 32, 16, cache, threshold=0.5)
    ours = llada.generate(
        prompt, gen_length=32, block_length=16, cache=cache, strategy=fdt.Threshold(0.5), stop_at_eos=False, lockstep=True
    )
    assert torch.equal(x, ours.sequences)
    assert nfe == ours.nfe


def test_an_imposed_schedule_is_kept_and_stops_after_the_blocks_asked_for(llada):
    model, prompt = official.OfficialModel(llada.network), torch.tensor([[5, 17, 300, 2]])
    x, nfe = official.official_generate(model, prompt, 32, 8, "dual", forwards=[2, 3])
    assert nfe == 5
    assert (x[:, 4:20] != llada.config.mask_id).all()
    assert (x[:, 20:] == llada.config.mask_id).all()

"""Swap-in of block-causal models: the functions of their authors over loaded modules, and everything undone on request."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from _modules import load_module
from conftest import GOLDEN, GOLDEN_BLOCK_CAUSAL
from torch import nn

import fastdllm_triton as fdt
from fastdllm_triton import compat

V2, SDAR = GOLDEN_BLOCK_CAUSAL


def _module(name: str, **config: Any) -> nn.Module:
    """As the checkpoint's own class would be loaded: the folder says the mask of a Fast-dLLM v2."""
    return load_module(GOLDEN / name, **({"_name_or_path": str(GOLDEN / name)} | config))


def _cases(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name / "cases.jsonl").read_text().splitlines()]


def _decoded(name: str, model: Any, case: dict[str, Any]) -> tuple[list[list[int]], int]:
    prompt = torch.tensor([case["prompt"]])
    if name == V2:
        ids, nfe = compat.fast_dllm_v2_generate(
            model,
            prompt,
            tokenizer=None,
            max_new_tokens=case["max_new_tokens"],
            block_size=case["block_length"],
            small_block_size=case["sub_block_length"],
            threshold=case["threshold"],
            use_block_cache=case["use_block_cache"],
            stop_token=case["stop_token"],
        )
    else:
        strategy = {"sequential": "sequential"}.get(case["strategy"], f"low_confidence_{case['strategy']}")
        ids, nfe = compat.block_diffusion_generate(
            model,
            {"input_ids": prompt},
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            denoising_steps=case["denoising_steps"],
            remasking_strategy=strategy,
            confidence_threshold=case["threshold"] or 0.85,
            stopping_criteria_idx=case["stop_tokens"],
        )
    return ids.tolist(), nfe


@pytest.mark.parametrize("name", GOLDEN_BLOCK_CAUSAL)
def test_the_functions_take_a_module_that_nobody_has_accelerated(name: str, caplog: pytest.LogCaptureFixture) -> None:
    module = _module(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="fastdllm_triton"):
        for case in _cases(name)[::12]:
            assert _decoded(name, module, case) == ([case["prompt"] + case["tokens"]], case["nfe"])
    assert len([record for record in caplog.records if "is accelerated on first use" in record.message]) == 1
    fdt.restore(module)
    assert not {"generate", "fast_forward", "infill", "release"} & set(vars(module))
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    memory = [p.untyped_storage().data_ptr() for p in module.parameters()]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("name", GOLDEN_BLOCK_CAUSAL)
def test_a_module_generates_what_the_checkpoint_does(name: str) -> None:
    module, lm = _module(name), fdt.load(GOLDEN / name, device="cpu")
    ids = torch.randint(0, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = module(ids).logits
    report = fdt.accelerate(module)
    assert report.architecture == lm.config.architecture
    torch.testing.assert_close(module.fast_forward(ids), own, rtol=1e-4, atol=1e-4)
    prompts, options = [[5, 6, 7], list(range(40))], {"gen_length": 30}
    assert module.generate(prompts, **options).generated.tolist() == lm.generate(prompts, **options).generated.tolist()
    assert not hasattr(module, "diffusion_generate")
    with torch.no_grad():  # An optimizer's step is seen.
        module.lm_head.weight.neg_()
    torch.testing.assert_close(module.fast_forward(ids), -own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        (V2, "compat.fast_dllm_v2_generate, compat.batch_sample"),
        (SDAR, "compat.block_diffusion_generate"),
        ("llada-gqa", "compat.generate, compat.generate_with_prefix_cache, compat.generate_with_dual_cache"),
        ("dream-gqa", "compat.diffusion_generate"),
    ],
)
def test_the_report_names_the_functions_of_the_family(name: str, functions: str) -> None:
    report = fdt.accelerate(_module(name))
    (entry,) = (entry for entry in report.entries if entry.part == "generate")
    assert entry.what == f"generate; {functions}"
    for word in functions.split(", "):
        assert callable(getattr(compat, word.removeprefix("compat.")))
        assert word.removeprefix("compat.") in "".join(str(report).split("\u2502")).replace("\n", "")


def test_arguments_of_the_modules_own_generate_are_pointed_to_their_function() -> None:
    module = _module(V2)
    prompt = torch.tensor([[1, 2, 3]])
    assert module.generate(prompt, max_new_tokens=32) == "its own"
    fdt.accelerate(module)
    message = r"not max_new_tokens, small_block_size; fastdllm_triton.compat has fast_dllm_v2_generate\(model, ...\)"
    with pytest.raises(TypeError, match=message):
        module.generate(prompt, max_new_tokens=32, small_block_size=8)
    fdt.restore(module)
    assert module.generate(prompt, max_new_tokens=32) == "its own"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (V2, {"_name_or_path": ""}, r"mask"),
        (V2, {"bd_size": 0}, r"module.config: bd_size must be"),
        (SDAR, {"attention_bias": True}, r"module.config: attention_bias = True is not supported"),
        (SDAR, {"head_dim": 16}, r"q_proj.weight has shape \(128, 64\), module.config asks for \(64, 64\)"),
    ],
)
def test_what_is_not_supported_is_named(name: str, config: dict[str, Any], message: str) -> None:
    module = _module(name)
    vars(module.config).update(config)
    with pytest.raises(ValueError, match=message):
        fdt.accelerate(module)
    assert "generate" not in vars(module)


def test_functions_of_another_family_are_refused() -> None:
    with pytest.raises(ValueError, match="cache must be none or block_causal for sdar, whose attention is block-causal"):
        compat.generate_with_dual_cache(_module(SDAR), torch.tensor([[1, 2]]), 8, 16, 8)
    with pytest.raises(
        TypeError, match=r"model must come from fastdllm_triton.load, or be a loaded LLaDA, Dream, Fast-dLLM v2 or"
    ):
        compat.fast_dllm_v2_generate("a path", torch.tensor([[1, 2]]), 32)

"""A generation with the kernels is the generation with the reference, in every way a step can differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdllm_triton as fdt

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
SHORT = {"gen_length": 16, "block_length": 8}


@pytest.fixture(scope="module")
def models() -> tuple[fdt.MaskedDiffusionLM, fdt.MaskedDiffusionLM]:
    """The built-in model with the kernels (on a GPU, or in Triton's interpreter), and with the reference."""
    device = "cuda" if GPU else "cpu"
    return fdt.load("tiny", device=device, backend="triton"), fdt.load("tiny", device=device, backend="reference")


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "dual", "strategy": fdt.Threshold(0.9)},
        {"cache": "prefix", "strategy": fdt.EntropyBudget(0.5), "temperature": 1.0, "seed": 5},
        {"cache": "dual", "strategy": fdt.FixedSteps(4, score="random"), "seed": 9, "forbidden": (20, 21)},
        {"cache": "dual", "strategy": fdt.Threshold(0.3, score="margin"), "eos_ids": (16, 4)},  # a dot and a space end a row
    ],
    ids=lambda options: f"{options['cache']}-{type(options['strategy']).__name__}-{options['strategy'].score}",
)
def test_tokens_steps_and_ends_are_the_same(models: Any, options: dict[str, Any]) -> None:
    prompts = ["Tom has 51 coins. Tom finds 27. Tom sells 19. How many?", "Ann has 20 books. Ann buys 30."]
    kernels, reference = (model.generate(prompts, **SHORT, **options) for model in models)
    assert kernels.sequences.tolist() == reference.sequences.tolist()
    assert kernels.step_map.tolist() == reference.step_map.tolist()
    assert kernels.row_forwards.tolist() == reference.row_forwards.tolist()
    assert (kernels.refreshes, kernels.steps) == (reference.refreshes, reference.steps)
    torch.testing.assert_close(kernels.confidence, reference.confidence, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_nan_logits_name_the_forward_and_the_row() -> None:
    lm = fdt.load("tiny", device="cuda" if GPU else "cpu", backend="triton")
    lm.network.weights.embedding[9] = torch.nan
    with pytest.raises(FloatingPointError, match=r"forward 0 .* row 1"):
        lm.generate([[5, 6, 7], [9, 6, 7]], **SHORT)

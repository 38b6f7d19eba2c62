"""The training script: it trains the architecture that the runtime runs, and its loss falls."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastdllm_triton as fdt

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import train_tiny

SMALL = replace(train_tiny.Recipe(), width=64, layers=2, mlp=128, heads=2, steps=80, batch=32, warmup=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, train_tiny.TrainableLLaDA, list[float]]:
    out = tmp_path_factory.mktemp("trained")
    model, losses = train_tiny.train(SMALL, compiled=False, out=out)
    return out, model, losses


def test_the_loss_falls(trained: tuple[Path, train_tiny.TrainableLLaDA, list[float]]) -> None:
    losses = trained[2]
    assert len(losses) == 80
    assert sum(losses[:10]) / 10 > 3.5
    assert sum(losses[-10:]) / 10 < 1.5


def test_the_runtime_computes_what_was_trained(trained: tuple[Path, train_tiny.TrainableLLaDA, list[float]]) -> None:
    out, model, _ = trained
    lm = fdt.load(out)
    ids = torch.randint(0, lm.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_batches_hold_training_problems_only() -> None:
    tokenizer = train_tiny.build_tokenizer()
    stream = train_tiny.batches(SMALL)
    for _ in range(4):
        ids, prompt = next(stream)
        assert ids.shape == (32, prompt + 48)
        for row in ids.tolist():
            assert not train_tiny_is_test(tokenizer.decode(row[:prompt]))
            assert row[-1] == tokenizer.eos_token_id


def train_tiny_is_test(prompt: str) -> bool:
    from fastdllm_triton.tiny.problems import is_test_prompt

    assert prompt.endswith("How many?")
    return is_test_prompt(prompt)


def test_the_prompt_is_never_masked_and_the_loss_counts_masked_tokens_only() -> None:
    ids, prompt = next(train_tiny.batches(SMALL))
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.zeros(*x.shape, 137)  # Uniform: every masked token costs log(137).

    generator = torch.Generator().manual_seed(0)
    losses = [train_tiny.loss_of(Probe(), ids, prompt, 1, generator).item() for _ in range(300)]
    assert all(torch.equal(x[:, :prompt], ids[:, :prompt]) for x in seen)
    mean = sum(losses) / len(losses)
    assert mean == pytest.approx(torch.tensor(137.0).log().item(), rel=0.1)  # The weights 1/t make the bound unbiased.

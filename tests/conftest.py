"""Fixtures: the models that the tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastdllm_triton as fdt

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MODELS = ("llada-mha", "llada-gqa")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are so small that threads only get in each other's way, and workers share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=GOLDEN_MODELS)
def golden(request: pytest.FixtureRequest) -> fdt.MaskedDiffusionLM:
    """Each of the recorded checkpoints, freshly loaded."""
    return fdt.load(GOLDEN / request.param)


@pytest.fixture
def llada() -> fdt.MaskedDiffusionLM:
    """A tiny LLaDA with random weights, freshly loaded, so a test may change it."""
    return fdt.load(GOLDEN / "llada-gqa")


@pytest.fixture(scope="session")
def tiny() -> fdt.MaskedDiffusionLM:
    """The built-in model."""
    return fdt.load("tiny")

"""Fixtures. Kernels run wherever the tests run: on a GPU if there is one, otherwise in Triton's interpreter, or with
``--ptx sm_90`` as compiled, executed on the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _order
import pytest
import torch
from hypothesis import settings

import fastdllm_triton as fdt

# The same examples in every run: a failure is about the change at hand.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MODELS = ("llada-mha", "llada-gqa")
GOLDEN_DREAM = "dream-gqa"
GOLDEN_BLOCK_CAUSAL = ("fast-dllm-v2", "sdar")


def _ordered(order: str) -> Callable[[], None]:
    """All tests run the programs of launches in this order, until what is returned is called."""
    stack = ExitStack()
    stack.enter_context(_order.programs_in_order(order))
    return stack.close


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdllm-triton")
    group.addoption(
        "--ptx", choices=["sm_80", "sm_90"], help="compile kernels for this architecture and execute their PTX on the CPU"
    )
    group.addoption("--ptx-seed", type=int, help="interleave warps and programs at random")


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when a kernel is decorated, so it is set before any test module imports one.
    if config.getoption("--ptx"):
        os.environ["TRITON_INTERPRET"] = "0"
    elif not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if order := os.environ.get(_order.VARIABLE):
        config.add_cleanup(_ordered(order))
    # The recorded checkpoints are decoded in blocks of all lengths.
    config.addinivalue_line("filterwarnings", "ignore:block_length = .* were trained with blocks of:UserWarning")
    # Triton's interpreter converts loop bounds the old way.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    # It computes with numpy, which warns of what a kernel computes and then selects away.
    config.addinivalue_line("filterwarnings", "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--ptx"):
        for item in items:
            if item.get_closest_marker("ptx"):
                item.add_marker(pytest.mark.skip(reason="needs --ptx ARCH, as Triton's interpreter is on"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def _executed_ptx(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--ptx``, whatever a test launches is executed PTX, and what is found fails it."""
    arch = request.config.getoption("--ptx")
    if arch is None:
        yield
        return
    from fastdllm_triton.verify.emulation import emulated

    with emulated(arch, seed=request.config.getoption("--ptx-seed")):
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are so small that threads only get in each other's way, and workers share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh floating-point memory of the package holds NaN, so that an element that nobody wrote shows."""

    def poison(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller.startswith("fastdllm_triton") and tensor.is_floating_point() and not tensor.is_meta
            return tensor.fill_(torch.nan) if ours else tensor

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        yield


@pytest.fixture(params=GOLDEN_MODELS)
def golden(request: pytest.FixtureRequest) -> fdt.MaskedDiffusionLM:
    """Each of the recorded checkpoints of LLaDA, freshly loaded, on the CPU as in the recording."""
    return fdt.load(GOLDEN / request.param, device="cpu")


@pytest.fixture
def dream() -> fdt.MaskedDiffusionLM:
    """The recorded checkpoint of Dream, freshly loaded."""
    return fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")


@pytest.fixture
def llada() -> fdt.MaskedDiffusionLM:
    """A tiny LLaDA with random weights, freshly loaded, so a test may change it."""
    return fdt.load(GOLDEN / "llada-gqa", device="cpu")


@pytest.fixture(scope="session")
def tiny() -> fdt.MaskedDiffusionLM:
    """The built-in model."""
    return fdt.load("tiny", device="cpu")

"""A generation in any mode of PyTorch, in a thread, and at the end of a process."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton.engine.buffer_pool import BufferPool
from fastdllm_triton.types import DEFAULT_LAUNCH
from fastdllm_triton.utils import environment

OPTIONS: dict[str, Any] = {"gen_length": 16, "block_length": 8, "temperature": 0.7, "seed": 3}
PROMPTS = [[5, 6, 7], [9]]

MODES: dict[str, AbstractContextManager[Any]] = {
    "plain": nullcontext(),
    "inference mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    # Tensors that are made without a device land there: none of them may be.
    "default device": torch.device("meta"),
}


class DefaultDtype:
    """A context in which new floating-point tensors are float64."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(torch.float32)


MODES["default dtype"] = DefaultDtype()  # type: ignore[assignment]


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_every_mode_gives_the_same_tokens_also_in_buffers_that_another_mode_left(
    cache: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BufferPool, "of", classmethod(lambda cls, device: cls(2**40 if kept else 0)))
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    plain = model.generate(PROMPTS, cache=cache, **OPTIONS)
    for name in ["inference mode", *MODES, *reversed(MODES)]:
        with MODES[name]:
            out = model.generate(PROMPTS, cache=cache, **OPTIONS)
        assert torch.equal(out.sequences, plain.sequences), name
        assert torch.equal(out.confidence.nan_to_num(-1), plain.confidence.nan_to_num(-1)), name
        assert out.confidence.dtype == torch.float32
        out.sequences[0, 0] = 1  # the caller's own


@pytest.mark.parametrize("options", [{"alg": "entropy"}, {"alg": "confidence_threshold", "cache": "dual", "block_length": 8}])
def test_dreams_decoding_gives_the_same_in_every_mode(dream: fdt.MaskedDiffusionLM, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 16, "steps": 16, "temperature": 0.0, "top_k": None} | options
    inputs = torch.tensor([[5, 6, 7]])
    plain = dream.diffusion_generate(inputs, **options)
    for name, mode in MODES.items():
        with mode:
            assert torch.equal(dream.diffusion_generate(inputs, **options), plain), name


def test_a_thread_generates_what_the_main_thread_does(llada: fdt.MaskedDiffusionLM) -> None:
    plain, outputs = llada.generate(PROMPTS, **OPTIONS), []

    def work() -> None:
        with torch.inference_mode():
            outputs.append(llada.generate(PROMPTS, **OPTIONS))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [out.sequences.tolist() for out in outputs] == [plain.sequences.tolist()] * 4


LEFT = """
import fastdllm_triton as fdt
model = fdt.load("tiny", device="cpu")
stream = model.stream([[5, 6, 7]], gen_length=16, block_length=8)
for forward in stream:
    if forward.index == 1:
        break
print("left")
"""


def test_a_stream_that_was_left_ends_with_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FASTDLLM_BACKEND", "cuda", "auto, triton, cpu, reference"),
        ("FASTDLLM_GRAPHS", "off", "1, 0"),
        ("FASTDLLM_PDL", "false", "1, 0"),
    ],
)
def test_an_unknown_value_of_a_variable_is_an_error_that_lists_the_allowed_ones(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be one of {allowed}, got '{value}'"):
        environment.check()
    from fastdllm_triton.ops.backends import _resolved

    _resolved.cache_clear()
    with pytest.raises(ValueError, match=name):
        fdt.load("tiny", device="cpu")


def test_the_variables_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm_triton.kernels import _pdl
    from fastdllm_triton.kernels._arch import ARCHS

    monkeypatch.setenv("FASTDLLM_BACKEND", "reference")
    assert fdt.load("tiny", device="cpu").network.ops.reason == "asked for"
    assert fdt.load("tiny", device="cpu").buffers.use_cuda_graphs
    monkeypatch.setenv("FASTDLLM_GRAPHS", "0")
    assert not fdt.load("tiny", device="cpu").buffers.use_cuda_graphs
    monkeypatch.setattr(_pdl, "INTERPRETED", False)
    for value, overlaps in (("1", True), ("0", False)):
        monkeypatch.setenv("FASTDLLM_PDL", value)
        monkeypatch.setattr(_pdl._Switch, "on", None)
        assert _pdl.dependent_launch(ARCHS["sm_90"], DEFAULT_LAUNCH)["PDL"] is overlaps
        assert _pdl.dependent_launch(ARCHS["sm_80"], DEFAULT_LAUNCH) == {"PDL": False}
    monkeypatch.setattr(_pdl._Switch, "on", None)

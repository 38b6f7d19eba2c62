"""Requests for weights ahead: the branch they make in a capture, and that they change nothing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastdllm_triton as fdt
from fastdllm_triton.kernels import _tuned
from fastdllm_triton.kernels import prefetch as module
from fastdllm_triton.ops import resolve

CUDA = torch.device("cuda")
WEIGHT = torch.empty(64, 128, dtype=torch.float16, device="meta")


class Stream:
    """A stream that writes down what it waits for."""

    device = CUDA

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the streams of a capture on a GPU that there is not."""
    events: list[str] = []
    main, side, current = Stream("main", events), Stream("side", events), ["main"]

    @contextmanager
    def on(stream: Stream) -> Any:
        current.append(stream.name)
        yield
        current.pop()

    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_side_stream", lambda device: side)
    monkeypatch.setattr(module, "launch", lambda weight, size: events.append(f"{size} bytes on {current[-1]}"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return events


def test_a_request_is_a_branch_that_begins_where_the_stream_stands_and_is_waited_for(log: list[str]) -> None:
    ahead = module.Prefetch(CUDA, size=4096)
    ahead(WEIGHT)
    ahead(WEIGHT)
    ahead.join()
    assert log == ["side waits for main", "4096 bytes on side"] * 2 + ["main waits for side"]


def test_no_more_is_asked_for_than_there_is_and_less_than_a_line_not_at_all(log: list[str]) -> None:
    module.Prefetch(CUDA, size=2**30)(WEIGHT)
    assert log.pop() == f"{64 * 128 * 2} bytes on side"
    log.clear()
    module.Prefetch(CUDA, size=100)(WEIGHT)
    module.Prefetch(CUDA, size=4096)(WEIGHT.T)
    assert log == []


def test_without_a_measurement_or_outside_of_a_capture_there_is_no_branch(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unmeasured = module.Prefetch(CUDA)
    unmeasured(WEIGHT)
    unmeasured.join()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    eager = module.Prefetch(CUDA, size=4096)
    eager(WEIGHT)
    eager.join()
    assert log == []


def test_what_was_measured_is_asked_for(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {_tuned._key("prefetch", {"n": 64, "k": 128, "itemsize": 2}): {"bytes": 8192}}
    monkeypatch.setattr(_tuned, "_entries", lambda folder, gpu: entry)
    monkeypatch.setattr(module, "gpu_name", lambda device: "NVIDIA Test 7")
    module.Prefetch(CUDA)(WEIGHT)
    assert log[-1] == "8192 bytes on side"


def test_a_forward_asks_for_each_weight_before_it_reads_it_and_gives_what_it_gives_without(
    llada: fdt.MaskedDiffusionLM,
) -> None:
    network, seen = llada.network, []

    class Recorder:
        def __call__(self, weight: torch.Tensor) -> None:
            seen.append(("ask", weight.data_ptr()))

        def join(self) -> None:
            seen.append(("join", 0))

    def linear(x: torch.Tensor, weight: torch.Tensor, **around: Any) -> Any:
        seen.append(("read", weight.data_ptr()))
        return ops.linear(x, weight, **around)

    ids = torch.arange(12).view(1, 12)
    ops = resolve("reference", torch.device("cpu"))
    network.ops = ops
    want = network.logits(ids)
    network.ops = replace(ops, prefetch=lambda device: Recorder(), linear=linear)
    assert torch.equal(network.logits(ids), want)
    for layer in network.weights.layers:
        for weight in (layer.attn_out.weight, layer.gate_up.weight):
            assert seen.index(("ask", weight.data_ptr())) < seen.index(("read", weight.data_ptr()))
    assert seen.index(("join", 0)) > max(i for i, (what, _) in enumerate(seen) if what == "ask")

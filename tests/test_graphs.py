"""Captured steps: when a shape is captured, when it is replayed, what a failed capture does; on a GPU, the decode loop itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastdllm_triton as fdt
from fastdllm_triton.graphs import Graphs


class FakeGraph:
    """Stands for a CUDA graph: replaying it runs what was called while it was captured."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def pool(self) -> str:
        return "the pool of the first graph"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeGraph, Any]]:
    made: list[tuple[FakeGraph, Any]] = []

    @contextmanager
    def capture(graph: FakeGraph, pool: Any = None) -> Iterator[None]:
        made.append((graph, pool))
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


def test_a_shape_runs_once_is_then_captured_and_from_there_on_replayed(captured: list[tuple[FakeGraph, Any]]) -> None:
    calls: list[tuple[int, int, bool]] = []
    graphs = Graphs(lambda rows, window: calls.append((rows, window, FakeGraph.capturing is not None)), fall_back=False)
    for shape in [(4, 32), (4, 32), (4, 32), (2, 32), (2, 32)]:
        graphs(*shape)
    assert calls == [(4, 32, False), (4, 32, True), (2, 32, False), (2, 32, True)]
    assert [graph.replays for graph, _ in captured] == [2, 1]
    assert [pool for _, pool in captured] == [None, "the pool of the first graph"]


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), RuntimeError("operation not permitted")])
def test_a_failed_capture_falls_back_with_one_warning_that_says_why(
    captured: list[tuple[FakeGraph, Any]], error: RuntimeError
) -> None:
    calls: list[int] = []

    def function(rows: int) -> None:
        if FakeGraph.capturing is not None:
            FakeGraph.capturing = None
            raise error
        calls.append(rows)

    graphs = Graphs(function, fall_back=True)
    graphs(1)
    with pytest.warns(UserWarning, match=f"without CUDA graphs: the capture failed: {error}"):
        graphs(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (1, 2, 2):
            graphs(rows)
    assert calls == [1, 1, 1, 2, 2]
    assert len(captured) == 1

    strict = Graphs(function, fall_back=False)
    strict(3)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) could not be captured as a CUDA graph"):
        strict(3)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU.

PROMPTS = [[5, 9, 2, 7], [1, 2, 3], [4] * 12]
OPTIONS: dict[str, Any] = {"gen_length": 32, "block_length": 8, "strategy": fdt.Threshold(0.6), "stop_at_eos": False}
WINDOWS: list[dict[str, Any]] = [
    {"cache": "none"},
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "dual", "look_back": 3, "look_ahead": 5, "suffix_window": 8, "prompt_refresh": 2},
    {"cache": "dual", "temperature": 1.0},
]


@pytest.mark.gpu
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_captured_steps_decode_what_uncaptured_ones_do(windows: dict[str, Any]) -> None:
    lm = fdt.load("tiny", device="cuda", backend="triton")
    lm.network.captures = False
    expected = lm.generate(PROMPTS, **windows, **OPTIONS)
    lm.network.captures = True
    for _ in range(3):  # run, capture and replay, replay from the first forward on
        found = lm.generate(PROMPTS, **windows, **OPTIONS)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.step_map.tolist() == expected.step_map.tolist()
    assert lm.network.kept[0]._run_step._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_the_decode_loop_never_waits_for_the_device(windows: dict[str, Any]) -> None:
    lm = fdt.load("tiny", device="cuda", backend="triton")
    forwards = max(lm.generate(PROMPTS, **windows, **OPTIONS).nfe for _ in range(2))  # captured from the second on
    generation = lm.stream(PROMPTS, **windows, **OPTIONS)
    next(generation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(forwards - 1):
            next(generation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert list(generation) == []


@pytest.mark.gpu
def test_graphs_serve_prompts_of_other_lengths() -> None:
    lm = fdt.load("tiny", device="cuda", backend="triton")
    cpu = fdt.load("tiny", device="cpu")
    for length in (3, 9, 20, 5):
        prompt = [list(range(1, length))]
        assert lm.generate(prompt, **OPTIONS).sequences.tolist() == cpu.generate(prompt, **OPTIONS).sequences.tolist()

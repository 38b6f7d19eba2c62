"""Captured steps: when a shape is captured, when it is replayed, what a failed capture does; on a GPU, the decode loop itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastdllm_triton as fdt
from fastdllm_triton.engine.cuda_graphs import CUDAGraphRunner
from fastdllm_triton.kernels import _pdl

DEVICE = torch.device("cuda", 1)


class FakeGraph:
    """Stands for a CUDA graph: it remembers whether it is being captured, and how often it was replayed."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.replays = 0
        self.was_reset = False

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.was_reset = True

    def pool(self) -> str:
        return "the pool of the first graph"


class Cuda:
    """What the graphs ask of ``torch.cuda``.

    Attributes:
        captures: every capture that began: graph, pool, stream.
        stream: the current stream.
    """

    def __init__(self) -> None:
        self.captures: list[tuple[FakeGraph, Any, Any]] = []
        self.stream = "the stream of the caller"

    @contextmanager
    def graph(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.captures.append((graph, pool, stream))
        FakeGraph.capturing, self.stream = graph, stream
        try:
            yield
        except Exception:
            FakeGraph.capturing = None
            raise  # As torch does it, with the stream of the capture left behind.
        FakeGraph.capturing, self.stream = None, "the stream of the caller"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stub = Cuda()
    names: dict[str, Any] = {"CUDAGraph": FakeGraph, "graph": stub.graph, "Stream": lambda device: f"a stream of {device}"}
    names |= {"current_stream": lambda device: stub.stream, "set_stream": lambda stream: setattr(stub, "stream", stream)}
    for name, replacement in names.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(_pdl, "in_use", lambda arch: False)
    monkeypatch.setattr("fastdllm_triton.kernels._arch.arch_of", lambda device: None)
    return stub


def _call(graphs: CUDAGraphRunner, function: Callable[..., None], *shape: int) -> None:
    graphs(shape, lambda: function(*shape))


def test_a_shape_runs_once_is_then_captured_and_from_there_on_replayed(cuda: Cuda) -> None:
    calls: list[tuple[int, int, bool]] = []
    graphs = CUDAGraphRunner(DEVICE, fall_back=False)
    for shape in [(4, 32), (4, 32), (4, 32), (2, 32), (2, 32)]:
        _call(graphs, lambda rows, window: calls.append((rows, window, FakeGraph.capturing is not None)), *shape)
    assert calls == [(4, 32, False), (4, 32, True), (2, 32, False), (2, 32, True)]
    assert [graph.replays for graph, _, _ in cuda.captures] == [2, 1]
    assert [pool for _, pool, _ in cuda.captures] == [None, "the pool of the first graph"]
    assert {stream for _, _, stream in cuda.captures} == {"a stream of cuda:1"}


def test_few_graphs_are_kept_and_the_ones_used_least_recently_go(cuda: Cuda) -> None:
    graphs = CUDAGraphRunner(DEVICE, fall_back=False, limit=2)
    for shape in (1, 1, 2, 2, 1, 3, 3):
        _call(graphs, lambda rows: None, shape)
    first, second, third = (graph for graph, _, _ in cuda.captures)
    assert (first.was_reset, second.was_reset, third.was_reset) == (False, True, False)
    assert len(graphs) == 2
    graphs.reset()
    assert first.was_reset and third.was_reset and len(graphs) == 0


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), RuntimeError("operation not permitted")])
def test_a_failed_capture_falls_back_with_one_warning_that_says_why(cuda: Cuda, error: RuntimeError) -> None:
    calls: list[int] = []

    def function(rows: int) -> None:
        if FakeGraph.capturing is not None:
            raise error
        calls.append(rows)

    graphs = CUDAGraphRunner(DEVICE, fall_back=True)
    _call(graphs, function, 1)
    with pytest.warns(UserWarning, match=f"without CUDA graphs: the capture failed: {error} .FASTDLLM_GRAPHS=0"):
        _call(graphs, function, 1)
    assert cuda.stream == "the stream of the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (1, 2, 2):
            _call(graphs, function, rows)
    assert calls == [1, 1, 1, 2, 2]
    assert len(cuda.captures) == 1

    strict = CUDAGraphRunner(DEVICE, fall_back=False)
    _call(strict, function, 3)
    with pytest.raises(RuntimeError, match=r"\(3,\) could not be captured as a CUDA graph: .*; FASTDLLM_GRAPHS=0 runs without"):
        _call(strict, function, 3)
    assert cuda.stream == "the stream of the caller"


def test_a_capture_that_fails_with_dependent_launches_is_tried_again_without(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"on": True}
    monkeypatch.setattr(_pdl, "in_use", lambda arch: state["on"])
    monkeypatch.setattr(_pdl, "turn_off", lambda: state.update(on=False))
    calls: list[tuple[bool, bool]] = []

    def function(rows: int) -> None:
        if FakeGraph.capturing is not None and state["on"]:
            raise RuntimeError("invalid resource handle")
        calls.append((FakeGraph.capturing is not None, state["on"]))

    graphs = CUDAGraphRunner(DEVICE, fall_back=False)
    _call(graphs, function, 1)
    with pytest.warns(UserWarning, match=r"without programmatic dependent launch .* invalid resource handle .FASTDLLM_PDL=0"):
        _call(graphs, function, 1)
    for _ in range(2):
        _call(graphs, function, 1)
    # Plain with them, plain without, which compiles; then captured without, and replayed.
    assert calls == [(False, True), (False, False), (True, False)]
    assert [graph.replays for graph, _, _ in cuda.captures] == [0, 2]
    assert [pool for _, pool, _ in cuda.captures] == [None, None]


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
    lm.buffers.use_cuda_graphs = False
    expected = lm.generate(PROMPTS, **windows, **OPTIONS)
    lm.buffers.use_cuda_graphs = True
    for _ in range(3):  # run, capture and replay, replay from the first forward on
        found = lm.generate(PROMPTS, **windows, **OPTIONS)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.step_map.tolist() == expected.step_map.tolist()
    (batch,) = lm.buffers._runners
    assert batch._graphs is not None and len(batch._graphs)


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

"""What a CUDA graph does, on a CPU: a capture computes nothing, and a replay runs what was captured without any of its Python.

The ops of a captured function are recorded with the tensors that they were called with. A replay calls them again with those
very tensors, and copies each result to where the recorded one lies, since later ops of the recording read it there. So whatever
Python computed while it was captured is frozen, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastdllm_triton as fdt
from fastdllm_triton.engine import buckets as shapes
from fastdllm_triton.engine import engine as engines
from fastdllm_triton.engine import generation as generations
from fastdllm_triton.engine import runner as runners
from fastdllm_triton.engine.cuda_graphs import CUDAGraphRunner
from fastdllm_triton.ops import NAMES


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_of(entry)


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def pool(self) -> str:
        return "pool"

    def reset(self) -> None:
        self.calls.clear()

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, recorded in self.calls:
            for old, new in zip(tensors_of(recorded), tensors_of(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


class _Capture(AbstractContextManager[None]):
    """Stands for ``torch.cuda.graph``. What the captured function wrote is taken back: a capture computes nothing."""

    runner: runners.ModelRunner

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "") -> None:
        assert capture_error_mode == "thread_local"
        self.graph, self.recorder = graph, _Recorder(graph)

    def __enter__(self) -> None:
        self.written = list(tensors_of(list(vars(self.runner).values())))
        self.before = [tensor.clone() for tensor in self.written]
        Graph.capturing = self.graph
        self.recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.recorder.__exit__(None, None, None)
        Graph.capturing = None
        for tensor, value in zip(self.written, self.before, strict=True):
            tensor.copy_(value)


def recorded(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that a capture records as one call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if (graph := Graph.capturing) is None:
            return op(*args, **kwargs)
        with _disable_current_modes():
            out = op(*args, **kwargs)
        graph.calls.append((op, args, kwargs, out))
        return out

    return call


def emulate(patch: pytest.MonkeyPatch, *models: fdt.MaskedDiffusionLM) -> None:
    """Lets models on a CPU capture their forwards, keep their buffers, and round sizes up, all as on a GPU."""
    for model in models:
        ops = {name: recorded(getattr(model.network.ops, name)) for name in NAMES}
        model.network.ops = replace(model.network.ops, **ops)
        model.buffers.limit = 2**40
    run = runners.ModelRunner.run

    def run_of(self: runners.ModelRunner, *args: Any) -> None:
        _Capture.runner = self
        run(self, *args)

    predictions = runners.ModelRunner._predictions

    def as_captured(self: runners.ModelRunner, *args: Any) -> int:
        graphs, self._graphs = self._graphs, CUDAGraphRunner(torch.device("cpu"), fall_back=False)
        try:
            return predictions(self, *args)
        finally:
            self._graphs = graphs

    # As many as in a capture also where there is none, for products of the same shape have the same bits.
    patch.setattr(runners.ModelRunner, "_predictions", as_captured)
    patch.setattr(runners.ModelRunner, "run", run_of)
    patch.setattr(runners, "can_capture", lambda network: True)
    patch.setattr(runners, "window_bucket", lambda device: shapes._window_bucket)
    for module in (engines, generations, runners):
        patch.setattr(module, "buckets", lambda device: (shapes.rows_bucket, shapes.slots_bucket))
    stubs = {"CUDAGraph": Graph, "graph": _Capture, "Stream": lambda device: "stream"}
    stubs |= {"current_stream": lambda device: "before", "set_stream": lambda stream: None}
    for name, stub in stubs.items():
        patch.setattr(torch.cuda, name, stub)

"""What the code for GPUs calls of ``torch.cuda``, on a machine without one: enough to run it and see what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Stream:
    """A stream that other streams wait for."""

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    """An event that is a millisecond and a half behind the one before."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self, *stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1.5


class Graph:
    """A graph that replays nothing."""

    def replay(self) -> None:
        pass


class PretendCuda:
    """Streams and captures.

    Attributes:
        current: the current stream.
        recording: pools into which a capture is under way; one that failed stays among them, as in torch up to 2.12.
        modes: of the captures.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = self.current = Stream()
        self.recording: list[Any] = []
        self.modes: list[str] = []
        self.broken = False
        options = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self.graph,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "set_stream": self.set_stream,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "memory_snapshot": lambda: [],
        }
        for name, value in options.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        """A capture as in torch: one that was invalidated raises at its end and leaves its stream as the current one."""
        pool = pool or object()
        if pool in self.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.modes.append(capture_error_mode)
        before, self.current = self.current, stream or Stream()
        self.recording.append(pool)
        try:
            yield
        finally:
            if self.broken:
                self.broken = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.recording.remove(pool)
            self.current = before

    def invalidate(self) -> None:
        """What an operation does that no capture allows, such as reading the device."""
        self.broken = bool(self.recording)

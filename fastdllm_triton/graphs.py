"""A function over static buffers, captured as CUDA graphs: one for each shape it is called with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Calls a function, and from the second call of a shape on replays its capture.

    The first call runs as it is, which compiles whatever the capture must find compiled. A batch begins with most rows and the
    widest window, so the largest graphs are captured first; all share one memory pool.

    Args:
        function: of integers that fix the shapes; it reads and writes static buffers and never waits for the device.
        fall_back: whether a shape that cannot be captured runs uncaptured, with one warning that says why, or raises.
    """

    def __init__(self, function: Callable[..., None], *, fall_back: bool) -> None:
        self._function, self._fall_back = function, fall_back
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._pool: Any = None
        self._usable = True

    def __call__(self, *shape: int) -> None:
        """Runs the function.

        Raises:
            RuntimeError: the capture failed, and falling back is not wanted.
        """
        if self._usable and shape in self._seen and shape not in self._graphs:
            self._capture(shape)
        self._seen.add(shape)
        if (graph := self._graphs.get(shape)) is not None:
            graph.replay()
        else:
            self._function(*shape)

    def _capture(self, shape: tuple[int, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._function(*shape)
        except RuntimeError as error:  # Out of memory is one of them.
            if not self._fall_back:
                raise RuntimeError(f"the step of shape {shape} could not be captured as a CUDA graph: {error}") from error
            self._usable = False
            warnings.warn(f"steps run without CUDA graphs: the capture failed: {error}", stacklevel=2)
        else:
            self._graphs[shape] = graph
            self._pool = self._pool or graph.pool()

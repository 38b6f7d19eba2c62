"""Functions over static buffers, captured as CUDA graphs: one for each function and shape."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..utils.environment import GRAPHS, PDL

#: Graphs that are kept at once. A graph of a step has some hundred nodes, and takes a few megabytes.
MAX_GRAPHS = 64


class CUDAGraphRunner:
    """Calls functions, and from the second call of a key on replays what they launch.

    The first call of a key runs as it is, which compiles whatever the capture must find compiled. A batch begins with most
    rows and the widest window, so the largest graphs are captured first; all share one memory pool. Nothing here refers to
    what owns the buffers, so buffers and graphs are freed with their last user.

    Args:
        device: where the functions run.
        fall_back: whether what cannot be captured runs uncaptured, with one warning that says why, or raises.
        limit: graphs that are kept; the ones used least recently go first.
    """

    def __init__(self, device: torch.device, *, fall_back: bool, limit: int = MAX_GRAPHS) -> None:
        self._device, self._fall_back, self._limit = device, fall_back, limit
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._stream: Any = None
        self._pool: Any = None
        self._usable = True

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs a function.

        Args:
            key: fixes what the function launches: its shapes, and every number that it does not read from the device.
            function: reads and writes static buffers, and never waits for the device.

        Raises:
            RuntimeError: the capture failed, and falling back is not wanted.
        """
        if self._usable and key in self._seen and key not in self._graphs:
            self._capture(key, function)
        self._seen.add(key)
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            graph.replay()
        else:
            function()

    def reset(self) -> None:
        """Frees all graphs and their memory."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _capture(self, key: Hashable, function: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        # One of the device, not of whichever is current: a capture on another device's stream records nothing.
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        before = torch.cuda.current_stream(self._device)
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except Exception as error:
            self._failed(key, error)
        else:
            self._graphs[key] = graph
            self._pool = self._pool or graph.pool()
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)[1].reset()
        finally:
            # A capture that fails leaves its own stream behind as the current one.
            torch.cuda.set_stream(before)

    def _failed(self, key: Hashable, error: Exception) -> None:
        """Decides how to go on: without dependent launches, without graphs, or not at all."""
        from ..kernels import _pdl
        from ..kernels._arch import arch_of

        # Memory that a failed capture began to use cannot be captured into again.
        self._pool = None
        if _pdl.in_use(arch_of(self._device)):
            _pdl.turn_off()
            # The next call compiles without them, the one after that captures again.
            self._seen.discard(key)
            message = f"a capture failed, kernels are launched without programmatic dependent launch from here on: {error}"
            warnings.warn(f"{message} ({PDL.name}=0 does so from the start)", stacklevel=2)
            return
        if not self._fall_back:
            raise RuntimeError(
                f"{key} could not be captured as a CUDA graph: {error}; {GRAPHS.name}=0 runs without graphs"
            ) from error
        self._usable = False
        warnings.warn(
            f"forwards run without CUDA graphs: the capture failed: {error} ({GRAPHS.name}=0 does so from the start)",
            stacklevel=2,
        )

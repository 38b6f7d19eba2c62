"""Keeps the buffers of generations that have ended, with their captured forwards, for the next ones."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from ..utils.environment import GRAPHS

if TYPE_CHECKING:
    from .runner import ModelRunner

#: Share of a GPU's memory that buffers which nobody uses may hold.
KEPT_SHARE = 0.25


class BufferPool:
    """Runners by when they were used last. Safe to use from several threads.

    Attributes:
        limit: bytes that are kept; the runner used last is kept whatever it holds, unless the limit is 0.
        use_cuda_graphs: whether runners capture forwards, on a GPU and with the Triton kernels.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.use_cuda_graphs = GRAPHS.value == "1"
        self._runners: list[ModelRunner] = []  # the one used last at the end
        self._lock = Lock()

    @classmethod
    def of(cls, device: torch.device) -> BufferPool:
        """The pool of a model: on a GPU a share of its memory; elsewhere nothing is captured, and allocation is cheap."""
        if device.type != "cuda":
            return cls(0)
        return cls(int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is empty: buffers and captured forwards belong to one process and one model."""
        return BufferPool, (self.limit,)

    def __len__(self) -> int:
        return len(self._runners)

    @property
    def nbytes(self) -> int:
        """Of all buffers that are kept."""
        return sum(runner.nbytes for runner in self._runners)

    def has_fitting(self, rows: int, slots: int, copies: int) -> bool:
        """Whether :meth:`take` would find a runner."""
        return any(self._fits(runner, rows, slots, copies) for runner in self._runners)

    def take(self, rows: int, slots: int, copies: int) -> ModelRunner | None:
        """The smallest runner that is large enough, no longer kept; None if there is none."""
        with self._lock:
            fitting = [runner for runner in self._runners if self._fits(runner, rows, slots, copies)]
            if not fitting:
                return None
            runner = min(fitting, key=lambda runner: runner.nbytes)
            self._runners.remove(runner)
            return runner

    def give(self, runner: ModelRunner) -> None:
        """Keeps a runner that nobody uses any more, and frees those used least recently where it is too much."""
        if not self.limit:
            return
        with self._lock:
            self._runners.append(runner)
            while len(self._runners) > 1 and self.nbytes > self.limit:
                self._runners.pop(0).release()

    def free_one(self) -> bool:
        """Frees the runner used least recently.

        Returns:
            Whether there was one.
        """
        with self._lock:
            if not self._runners:
                return False
            self._runners.pop(0).release()
            return True

    def clear(self) -> None:
        """Frees all runners."""
        while self.free_one():
            pass

    def _fits(self, runner: ModelRunner, rows: int, slots: int, copies: int) -> bool:
        large_enough = rows <= runner.rows and slots <= runner.slots
        return large_enough and copies == runner.copies and self.use_cuda_graphs == runner.wants_cuda_graphs

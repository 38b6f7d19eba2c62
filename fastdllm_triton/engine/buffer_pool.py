"""Keeps the buffers of generations that have ended, with their captured forwards, for the next ones."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .runner import Batch, Program

#: Share of a GPU's memory that buffers which nobody uses may hold.
KEPT_SHARE = 0.25


class BufferPool:
    """Batches by when they were used last. Safe to use from several threads.

    Attributes:
        limit: bytes that are kept; the batch used last is kept whatever it holds, unless the limit is 0.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._batches: list[Batch] = []  # the one used last at the end
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
        return len(self._batches)

    @property
    def nbytes(self) -> int:
        """Of all buffers that are kept."""
        return sum(batch.nbytes for batch in self._batches)

    def serves(self, program: Program, rows: int, slots: int) -> bool:
        """Whether :meth:`take` would find a batch."""
        return any(batch.serves(program, rows, slots) for batch in self._batches)

    def take(self, program: Program, rows: int, slots: int) -> Batch | None:
        """The smallest batch that runs a program and is large enough, no longer kept; None if there is none."""
        with self._lock:
            fitting = [batch for batch in self._batches if batch.serves(program, rows, slots)]
            if not fitting:
                return None
            batch = min(fitting, key=lambda batch: batch.nbytes)
            self._batches.remove(batch)
            return batch

    def give(self, batch: Batch) -> None:
        """Keeps a batch that nobody uses any more, and frees those used least recently where it is too much."""
        if not self.limit:
            return
        with self._lock:
            self._batches.append(batch)
            while len(self._batches) > 1 and self.nbytes > self.limit:
                self._batches.pop(0).release()

    def free_one(self) -> bool:
        """Frees the batch used least recently.

        Returns:
            Whether there was one.
        """
        with self._lock:
            if not self._batches:
                return False
            self._batches.pop(0).release()
            return True

    def clear(self) -> None:
        """Frees all batches."""
        while self.free_one():
            pass

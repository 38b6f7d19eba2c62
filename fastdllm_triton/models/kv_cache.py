"""The KV cache: static buffers that every forward writes in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer for ``B`` sequences of up to ``L`` slots.

    Nothing is appended, sliced or copied: a forward overwrites the slots of its window, and attention reads one contiguous
    range. The three caches of Fast-dLLM differ only in which window a forward recomputes.

    Attributes:
        k, v: ``[layers, B, Hkv, L, D]``.
        kv_start: ``[B]`` int32, first slot of each sequence: the slots before it are left padding.
        kv_end: ``[B]`` int32, end of the slots that are attended.
        span: where the host knows that all sequences attend the same slots, the first of them and their end.
    """

    k: Tensor
    v: Tensor
    kv_start: Tensor
    kv_end: Tensor
    span: tuple[int, int] | None = None

    @classmethod
    def allocate(cls, layers: int, kv_heads: int, head_dim: int, slots: int, kv_start: Tensor, dtype: torch.dtype) -> KVCache:
        """Empty buffers on the device of ``kv_start``, one sequence an entry of it, attended up to the last slot."""
        shape = (layers, len(kv_start), kv_heads, slots, head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=kv_start.device) for _ in range(2))
        return cls(k, v, kv_start, torch.full_like(kv_start, slots))

    def rows(self, first: int, last: int, span: tuple[int, int] | None = None) -> KVCache:
        """The sequences ``[first, last)``, sharing memory; ``span`` if all of them attend the same slots."""
        return KVCache(self.k[:, first:last], self.v[:, first:last], self.kv_start[first:last], self.kv_end[first:last], span)

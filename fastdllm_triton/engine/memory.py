"""What a generation needs in memory, before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.config import ModelConfig
from ..models.transformer import Transformer, layer_shapes
from .buckets import Bucket, buckets


@dataclass(frozen=True)
class Memory:
    """Bytes of a model and of one generation.

    Attributes:
        weights: parameters.
        cache: keys and values.
        workspace: activations of the widest forward, an estimate from above: the residual stream and what a layer holds
            at once beside it.
    """

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.workspace

    @classmethod
    def of(cls, model: ModelConfig, rows: int, slots: int, itemsize: int) -> Memory:
        """Of ``rows`` sequences of ``slots`` slots, all refreshed at once.

        Args:
            model: the shape.
            rows: sequences.
            slots: prompt and generation.
            itemsize: bytes of an element of the model's dtype.
        """
        heads = (model.heads + 2 * model.kv_heads) * model.head_dim
        layer = sum(math.prod(shape) for shape in layer_shapes(model).values())
        tables = (1 if model.tied else 2) * model.embedding_size * model.width
        weights = model.layers * layer + tables + model.width
        cache = 2 * model.layers * model.kv_heads * model.head_dim * slots * rows
        workspace = rows * slots * (4 * model.width + max(3 * model.mlp, heads + 2 * model.heads * model.head_dim))
        return cls(weights * itemsize, cache * itemsize, workspace * itemsize)


def check_memory(network: Transformer, rows: int, slots: int, *, copies: int = 1, described: str) -> None:
    """Raises before the first forward where buffers would not fit.

    Args:
        network: the model, loaded.
        rows, slots: rows that are allocated, and slots of each.
        copies: sequences of the network that decode one row.
        described: what is asked for, as the error calls it.

    Raises:
        MemoryError: says what is needed, what there is, and the largest batch that fits.
    """
    available = available_bytes(network.device)
    if available is None:
        return
    available = max(available - network.weights.mapped, 0)
    itemsize = network.dtype.itemsize
    need = Memory.of(network.config, rows * copies, slots, itemsize)
    if (needed := need.cache + need.workspace) <= available:
        return
    most = largest_batch(network.config, slots, itemsize, available // copies, buckets(network.device)[0])
    advice = f"the largest batch that fits is {most}" if most else "not even one row fits; shorten prompts or gen_length"
    raise MemoryError(
        f"{described} need {needed:,} bytes on {network.device} ({need.cache:,} cache, {need.workspace:,} workspace), "
        f"{available:,} are available; {advice}"
    )


def largest_batch(model: ModelConfig, slots: int, itemsize: int, available: int, bucket: Bucket) -> int:
    """The most rows that a generation fits with, beside the weights; 0 if not even one does.

    Args:
        model: the shape.
        slots: of each row, as they are allocated.
        itemsize: bytes of an element of the model's dtype.
        available: bytes beside the weights.
        bucket: how many rows are allocated for so many.
    """
    one = Memory.of(model, 1, slots, itemsize)
    most = available // (one.cache + one.workspace)
    return next((rows for rows in range(most, 0, -1) if bucket(rows) <= most), 0)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else kilobytes * 1024

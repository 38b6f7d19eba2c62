"""Which sizes static buffers and captured steps come in, so that few of them serve every request."""

from __future__ import annotations

from collections.abc import Callable

import torch

Bucket = Callable[[int], int]


def buckets(device: torch.device) -> tuple[Bucket, Bucket]:
    """How rows and slots are rounded up on a device: where nothing is captured, not at all."""
    return (rows_bucket, slots_bucket) if device.type == "cuda" else (int, int)


def rows_bucket(rows: int) -> int:
    """The smallest power of two, or one and a half times one, that holds ``rows``."""
    power = 1 << max(rows - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def slots_bucket(slots: int) -> int:
    """``slots`` rounded up to a multiple of an eighth to a quarter of its power of two, of 64 at least.

    The surplus is left padding: it takes memory, at most a quarter, and no time.
    """
    grain = max(64, 1 << max(slots.bit_length() - 3, 0))
    return -(-slots // grain) * grain

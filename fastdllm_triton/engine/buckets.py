"""Which sizes static buffers and captured steps come in, so that few of them serve every request."""

from __future__ import annotations

from collections.abc import Callable

import torch

Bucket = Callable[[int], int]


def buckets(device: torch.device) -> tuple[Bucket, Bucket]:
    """How rows and slots are rounded up on a device: where nothing is captured, not at all."""
    return (rows_bucket, slots_bucket) if device.type == "cuda" else (int, int)


def window_bucket(device: torch.device) -> Bucket:
    """How the window of a step is rounded up on a device: where nothing is captured, not at all.

    Over the prefix cache the window of a step shrinks block by block, and without a cache it follows the prompt. Slots behind
    the last one are no-ops.
    """
    return _window_bucket if device.type == "cuda" else int


def _window_bucket(window: int) -> int:
    """``window`` up to 128, where a step is bound by reading weights; above, a multiple of an eighth to a sixteenth of it."""
    grain = 1 if window <= 128 else 1 << (window.bit_length() - 4)
    return -(-window // grain) * grain


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

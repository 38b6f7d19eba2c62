"""The cases of window_inputs."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels._limits import MAX_BLOCK, MAX_ROWS
from ._base import CASE_MODELS, Case, Inputs, OpCases, Outputs, Random

_MASK = CASE_MODELS["llada"].mask_id


def _make(
    random: Random,
    batch: int,
    block: int,
    window: int,
    share: float = 0.5,
    back: int = 0,
    shift: bool = False,
    sample: bool = False,
) -> Inputs:
    """Blocks of which a share is masked."""
    slots, device = 3 * block + window, random.device
    x = (torch.rand((batch, slots), generator=random.generator, device=device) < share).long() * _MASK
    start = torch.arange(batch, dtype=torch.int32, device=device) % (2 * block) + back
    # Some rows have fewer masks left than places, one has none.
    left = torch.full_like(start, block)
    left[batch // 2] = 0
    keys = {"seed": start.long() * 7, "step": start} if sample else {}
    sizes = {"back": back, "window": window, "block": block, "predicted": batch * block, "shift": shift, "mask_id": _MASK}
    return {"x": x, "base": start, "block_start": start, "remaining": left, "kv_start": start // 2, **sizes, **keys}


def _named(result: Any, inputs: Inputs) -> Outputs:
    return dict(vars(result))


#: Steps of blocks of 32; a launch takes so little that its latency is what is timed.
_SHAPES = [
    {"batch": batch, "block": block, "window": block, "sample": sample}
    for block, batches in ((32, (1, 4, 16, 64)), (128, (1, 16)))
    for batch in batches
    for sample in (False, True)
]

WINDOW_INPUTS = OpCases(
    "window_inputs",
    [
        Case("some masks left", {"batch": 3, "block": 4, "window": 4}, "quick"),
        Case(
            "a shifted model that samples",
            {"batch": 5, "block": 7, "window": 8, "share": 0.7, "back": 1, "shift": True, "sample": True},
            "quick",
        ),
        Case("one row, nothing masked", {"batch": 1, "block": 1, "window": 3, "share": 0.0}),
        Case("a window of several programs", {"batch": 2, "block": 32, "window": 600, "share": 0.9}),
        Case("a step", {"batch": 1, "block": 32, "window": 32, "share": 0.8}, "key"),
        Case("more rows than a warp has threads", {"batch": 130, "block": 8, "window": 8, "sample": True}, "gpu"),
        Case("a large batch", {"batch": 1024, "block": 32, "window": 32}, "gpu"),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["batch"] == 1],
    small={"batch": 2, "block": 4, "window": 4, "sample": True},
    axis="batch",
    # The window's ids in and out; of each slot of the block a row and a place, with noise three keys too.
    bytes=lambda shape: shape["batch"] * (16 * shape["window"] + (12 + 24 * shape["sample"]) * shape["block"]),
    named=_named,
    dtypes=(torch.float32,),
    float64=False,
    # Blocks of 32 and of the most slots, with and without noise.
    compiled=lambda arch: [
        (torch.float32, {"batch": batch, "block": block, "window": block, "sample": sample}, None)
        for batch, block, sample in ((1, 32, False), (1, 32, True), (MAX_ROWS, MAX_BLOCK, True))
    ],
    label=lambda kernel, dtype, c: f"N={c['BLOCK_N']}{' sample' if c['SAMPLE'] else ''}",
)

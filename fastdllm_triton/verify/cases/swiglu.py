"""The cases of swiglu."""

from __future__ import annotations

import torch

from ._base import CASE_MODELS, Case, Inputs, OpCases, Random

_LLADA, _DREAM = (model.mlp for model in CASE_MODELS.values())


def _make(random: Random, rows: int, width: int, leading: tuple[int, ...] = ()) -> Inputs:
    return {"gate_up": random(*leading, rows, 2 * width, scale=4)}


SWIGLU = OpCases(
    "swiglu",
    [
        Case("one product", {"rows": 1, "width": 1}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7}, "quick"),
        Case("leading dimensions and a tail", {"leading": (2,), "rows": 3, "width": 130}, "quick"),
        Case("LLaDA's width", {"rows": 2, "width": _LLADA}),
        Case("Dream's width", {"rows": 2, "width": _DREAM}),
        Case("a step of LLaDA", {"rows": 32, "width": _LLADA}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": _DREAM}, "key"),
    ],
    _make,
    shapes=[{"rows": rows, "width": width} for width in (_LLADA, _DREAM) for rows in (32, 128, 512, 2048, 8192)],
    key=[{"rows": rows, "width": width} for width in (_LLADA, _DREAM) for rows in (32, 2048)],
    small={"rows": 3, "width": 64},
    axis="rows",
    bytes=lambda shape: 2 * 3 * shape["rows"] * shape["width"],  # gate and up in, their product out
    outs=["out"],
    compiled=lambda arch: [(torch.bfloat16, {"rows": 32, "width": _LLADA}, None)],  # the MLPs of both have one configuration
    label=lambda kernel, dtype, c: f"{dtype} block={c['BLOCK_F']}",
    forward=lambda c: [{"rows": c.rows, "width": CASE_MODELS[c.model].mlp}],
)

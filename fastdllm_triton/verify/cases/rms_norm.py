"""The cases of rms_norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from ._base import CASE_MODELS, Case, Inputs, OpCases, Random

_LLADA, _DREAM = (model.width for model in CASE_MODELS.values())


def _make(
    random: Random, rows: int, width: int, residual: bool, leading: tuple[int, ...] = (), gather: Sequence[int] | None = None
) -> Inputs:
    inputs: Inputs = {"x": random(*leading, rows, width), "weight": random(width), "eps": 1e-5}
    inputs |= {} if gather is None else {"rows": torch.tensor(gather, device=random.device)}
    return inputs | ({"residual": random(*leading, rows, width)} if residual else {})


RMS_NORM = OpCases(
    "rms_norm",
    [
        Case("one element", {"rows": 1, "width": 1, "residual": False}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7, "residual": True}, "quick"),
        Case("the built-in model", {"rows": 5, "width": 128, "residual": True}, "quick"),
        Case("gathered rows, some of them none", {"rows": 4, "width": 24, "residual": True, "gather": (3, -1, 0)}, "quick"),
        Case("leading dimensions", {"leading": (2,), "rows": 5, "width": 64, "residual": False}),
        Case("Dream's width, no power of two", {"rows": 2, "width": _DREAM, "residual": True}),
        Case("LLaDA's width", {"rows": 4, "width": _LLADA, "residual": False}),
        Case("a step of LLaDA", {"rows": 32, "width": _LLADA, "residual": True}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": _DREAM, "residual": True}, "key"),
    ],
    _make,
    shapes=[
        {"rows": rows, "width": width, "residual": residual}
        for width in (_DREAM, _LLADA)
        for residual in (False, True)
        for rows in (32, 128, 512, 2048, 8192)
    ],
    key=[{"rows": rows, "width": width, "residual": True} for width in (_DREAM, _LLADA) for rows in (32, 2048)],
    small={"rows": 3, "width": 64, "residual": True},
    axis="rows",
    # x in and y out, with a residual also that in and the sum out; the weight once.
    bytes=lambda shape: 2 * shape["width"] * (shape["rows"] * (4 if shape["residual"] else 2) + 1),
    outs=["out", "residual_out"],
    # With and without a residual; gathers of embeddings, and of sums.
    compiled=lambda arch: [
        (torch.bfloat16, {"rows": 32, "width": width, "residual": residual, "gather": gather}, None)
        for width, residual, gather in product((_DREAM, _LLADA), (False, True), (None, range(32)))
    ],
    label=lambda kernel, dtype, c: (
        f"{dtype} E={c['E']}{' residual' if c['HAS_RESIDUAL'] else ''}{'' if 'rows_ptr' in c else ' rows'}"
    ),
    forward=lambda c: [{"rows": c.rows, "width": CASE_MODELS[c.model].width, "residual": True}],
)

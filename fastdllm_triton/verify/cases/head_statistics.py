"""The cases of head_statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...kernels import head_statistics as kernels
from ...kernels._arch import Arch
from ...kernels.head_statistics import compile_cases
from ...types import TokenStatistics
from ._base import MODELS, Case, Inputs, Launches, OpCases, Outputs, Random, ShapeClass, labelled
from .token_statistics import named_statistics

__all__ = ["HEAD_STATISTICS", "compile_cases", "launches"]

#: Vocabulary and width.
HEADS = {name: {"vocabulary": config.vocab_size, "width": config.width} for name, config in MODELS.items()}


def _make(
    random: Random, rows: int, vocabulary: int, width: int, temperature: float = 0.0, asked: Sequence[int] | None = None
) -> Inputs:
    """Logits three wide, as a trained head's are."""
    return {
        "hidden": random(rows, width),
        "weight": random(vocabulary, width, scale=3 / math.sqrt(width)),
        "rows": None if asked is None else torch.tensor(asked, device=random.device),
        "temperature": temperature,
        "seed": 1 if temperature else None,
    }


def _named(statistics: TokenStatistics, inputs: Inputs) -> Outputs:
    """A rounding may make two logits swap places, so a token is judged by its float64 logit; with noise on the logits it may
    be any, and what is true of all tokens is judged alone.
    """
    missing, named = statistics.token < 0, named_statistics(statistics, inputs)
    del named["token"]
    if inputs["temperature"]:
        return {"missing": missing, "logsumexp": named["logsumexp"], "entropy": named["entropy"]}
    hidden = inputs["hidden"] if inputs["rows"] is None else inputs["hidden"][inputs["rows"]]
    chosen = (hidden.double() * inputs["weight"][statistics.token].double()).sum(1)
    return {"chosen": chosen.masked_fill(missing, torch.nan).to(statistics.logit.dtype), "missing": missing, **named}


#: Rows on both sides of where the fused kernel hands over to cuBLAS, and noise where the engine samples.
_SHAPES: list[dict[str, Any]] = [
    {"rows": rows, **sizes, "temperature": temperature}
    for sizes in HEADS.values()
    for temperature, listed in ((0.0, (1, 8, 16, 32, 48, 64, 96, 128, 256, 512)), (1.0, (32, 64, 128)))
    for rows in listed
]

HEAD_STATISTICS = OpCases(
    "head_statistics",
    [
        Case("one token", {"rows": 1, "vocabulary": 1, "width": 16}, "quick"),
        Case("the built-in model", {"rows": 3, "vocabulary": 137, "width": 128}, "quick"),
        Case("nothing divides a tile", {"rows": 5, "vocabulary": 999, "width": 80}, "quick"),
        Case("listed rows, some of them none", {"rows": 6, "vocabulary": 500, "width": 32, "asked": (5, -1, 2, 2, -1)}, "quick"),
        Case("many rows", {"rows": 66, "vocabulary": 640, "width": 64}),
        Case("a wide one", {"rows": 17, "vocabulary": 4096, "width": 96}),
        Case("samples", {"rows": 4, "vocabulary": 500, "width": 64, "temperature": 0.7}),
        *(
            Case(f"{rows} rows of {name}", {"rows": rows, **sizes}, "key" if rows == 32 else "gpu")
            for name, sizes in HEADS.items()
            for rows in (1, 32, 64, 200)
        ),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["rows"] == 32],
    small={"rows": 3, "vocabulary": 500, "width": 32},
    axis="rows",
    # The weight and the hidden states, two bytes a number; no logits.
    bytes=lambda shape: 2 * (shape["vocabulary"] + shape["rows"]) * shape["width"],
    flops=lambda shape: 2 * shape["rows"] * shape["vocabulary"] * shape["width"],
    named=_named,
)


def launches(shape_class: ShapeClass, arch: Arch) -> Launches:
    """The launch on the rows of the blocks; none where cuBLAS multiplies."""
    vocabulary, width = HEADS[shape_class.model].values()
    config = kernels.head_statistics_config(arch, shape_class.head_rows, vocabulary, width, 2, False)
    if config is None:
        return []
    return labelled(compile_cases(arch), f"bf16 E={width} rows={config.block_rows}", config.parts)

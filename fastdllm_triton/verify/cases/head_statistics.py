"""The cases of head_statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...kernels._arch import Arch
from ...types import TokenStatistics
from ._base import CASE_MODELS, Case, Compiled, Inputs, OpCases, Outputs, Random
from .token_statistics import SAMPLING, merge_label, named_statistics, options_by_row, sampling_label

#: Vocabulary and width.
HEADS = {name: {"vocabulary": config.vocab_size, "width": config.width} for name, config in CASE_MODELS.items()}


def _make(
    random: Random,
    rows: int,
    vocabulary: int,
    width: int,
    temperature: float = 0.0,
    asked: Sequence[int] | None = None,
    forbidden: Sequence[int] | None = None,
    by_row: int = 0,
) -> Inputs:
    """Logits three wide, as a trained head's are."""
    return {
        "hidden": random(rows, width),
        "weight": random(vocabulary, width, scale=3 / math.sqrt(width)),
        "rows": None if asked is None else torch.tensor(asked, device=random.device),
        "temperature": temperature,
        "seed": 1 if temperature else None,
        "forbidden": forbidden,
        **(options_by_row(rows, vocabulary, random.device, by_row) if by_row else {}),
    }


def _named(statistics: TokenStatistics, inputs: Inputs) -> Outputs:
    """A rounding may make two logits swap places, so a token is judged by its float64 logit; where all rows have noise it may be
    any, and what is true of all tokens is judged alone.
    """
    missing, named = statistics.token < 0, named_statistics(statistics, inputs)
    del named["token"]
    if isinstance(inputs["temperature"], float) and inputs["temperature"] > 0:
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


def _compiled(arch: Arch) -> Iterator[Compiled]:
    """The buckets of rows, listed as those of a window are; logits rounded where the dtype is bfloat16."""
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    grid = [(dtype, "llada", rows) for dtype in (bf16, fp32) for rows in (16, 32, 64)]
    for dtype, model, rows in (*grid, (bf16, "dream", 32), (fp16, "llada", 32), (fp16, "dream", 64)):
        for options in SAMPLING:
            sizes = {"rows": rows, **HEADS[model], "asked": range(rows), **options}
            yield dtype, sizes, {"logits_dtype": bf16 if dtype == bf16 else None}


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    if kernel == "merge_statistics_kernel":
        return merge_label(c)
    return f"{dtype} E={c['E']} rows={c['BLOCK_R']}{sampling_label(c)}"


HEAD_STATISTICS = OpCases(
    "head_statistics",
    [
        Case("one token", {"rows": 1, "vocabulary": 1, "width": 16}, "quick"),
        Case("the built-in model", {"rows": 3, "vocabulary": 137, "width": 128}, "quick"),
        Case("nothing divides a tile", {"rows": 5, "vocabulary": 999, "width": 80}, "quick"),
        Case("listed rows, some of them none", {"rows": 6, "vocabulary": 500, "width": 32, "asked": (5, -1, 2, 2, -1)}, "quick"),
        Case("rows that differ", {"rows": 6, "vocabulary": 500, "width": 32, "by_row": 2}, "quick"),
        Case("many rows", {"rows": 66, "vocabulary": 640, "width": 64}),
        Case("many rows that differ", {"rows": 66, "vocabulary": 640, "width": 64, "by_row": 2}),
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
    compiled=_compiled,
    label=_label,
    forward=lambda c: [{"rows": c.head_rows, **HEADS[c.model], "asked": range(c.head_rows), "forbidden": [0]}],
)

"""The cases of token_statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...types import TokenStatistics
from ._base import CASE_MODELS, Case, Inputs, OpCases, Outputs, Random

_LLADA, _DREAM = (model.vocab_size for model in CASE_MODELS.values())


def _make(
    random: Random,
    rows: int,
    vocabulary: int,
    temperature: float = 0.0,
    bits: int | None = None,
    ties: Sequence[int] = (),
    broken: bool = False,
    forbidden: Sequence[int] | None = None,
    by_row: int = 0,
) -> Inputs:
    """Logits ten wide, in float32 where ``bits`` are 32."""
    logits = random(rows, vocabulary, scale=3, dtype=torch.float32 if bits == 32 else None)
    if ties:
        logits[:, list(ties)] = 40.0
    if broken:  # rows of -inf, with a NaN, and with +inf have no token to choose
        logits[0], logits[1, 2], logits[2, 1] = -torch.inf, torch.nan, torch.inf
        logits[3:, ::2] = -torch.inf
    if by_row:
        return {"logits": logits, **options_by_row(rows, vocabulary, random.device, by_row)}
    return {"logits": logits, "temperature": temperature, "seed": 7 if temperature else None, "forbidden": forbidden}


def options_by_row(rows: int, vocabulary: int, device: torch.device, count: int) -> Inputs:
    """Temperatures of which every other is 0, and none to ``count`` forbidden ids a row, two at most."""
    row = torch.arange(rows, device=device)
    ids = torch.stack((row * 37 % vocabulary, row * 101 % vocabulary), dim=1)
    none = torch.stack((row % 3 == 0, row % 2 == 0), dim=1)
    return {"temperature": (row % 2) * 0.5 * row, "forbidden": ids.masked_fill(none, -1)[:, :count], "seed": 7}


def named_statistics(statistics: TokenStatistics, inputs: Inputs) -> Outputs:
    """What is compared. The odds against a token span many orders of magnitude, so their logarithm is."""
    return {
        "token": statistics.token,
        "logit": statistics.logit,
        "second_logit": statistics.second_logit,
        "logsumexp": statistics.logsumexp,
        "log_rest": statistics.rest.log(),
        "entropy": statistics.entropy,
    }


#: How tokens are chosen: the best, samples, and each row in its way.
SAMPLING: list[dict[str, Any]] = [{"forbidden": [0]}, {"forbidden": [0], "temperature": 1.0}, {"by_row": 2}]


def sampling_label(c: Mapping[str, Any]) -> str:
    return f"{' sample' if c['SAMPLE'] else ''}{' by row' if c['FORBIDDEN_BY_ROW'] else ''}"


def merge_label(c: Mapping[str, Any]) -> str:
    """The label of the kernel that merges what programs found in parts of a row."""
    return f"BLOCK={c['BLOCK']}{' sample' if c['SAMPLE'] else ''}"


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    if kernel == "merge_statistics_kernel":
        return merge_label(c)
    return f"{dtype}{' split' if c['SPLIT'] else ''}{sampling_label(c)}"


#: A block of one sequence, of a batch, and the rows of a refresh; noise where the engine samples. Logits are float32 by default.
_SHAPES: list[dict[str, Any]] = [
    {"rows": rows, "vocabulary": vocabulary, "temperature": temperature, "bits": bits}
    for vocabulary in (_LLADA, _DREAM)
    for rows, temperature in ((1, 0.0), (32, 0.0), (32, 1.0), (128, 0.0), (128, 1.0), (512, 0.0), (2048, 0.0))
    for bits in (32, 16)
    if rows < 2048 or bits == 16
]

TOKEN_STATISTICS = OpCases(
    "token_statistics",
    [
        Case("one token", {"rows": 1, "vocabulary": 1}, "quick"),
        Case("less than a tile", {"rows": 2, "vocabulary": 7}, "quick"),
        Case("ties across tiles", {"rows": 3, "vocabulary": 9000, "ties": (12, 4096, 8999)}, "quick"),
        Case("rows without a choice", {"rows": 5, "vocabulary": 3000, "broken": True}, "quick"),
        Case("forbidden ids", {"rows": 2, "vocabulary": 500, "ties": (3, 4), "forbidden": (3, 77)}, "quick"),
        Case("samples", {"rows": 4, "vocabulary": 1000, "temperature": 1.0}, "quick"),
        Case("rows that differ", {"rows": 6, "vocabulary": 1000, "by_row": 2}, "quick"),
        Case("the built-in model", {"rows": 130, "vocabulary": 137}),
        Case("an odd vocabulary", {"rows": 2, "vocabulary": 50_257}),
        Case("LLaDA's vocabulary", {"rows": 1, "vocabulary": _LLADA}),
        Case("a block of LLaDA", {"rows": 32, "vocabulary": _LLADA}, "key"),
        Case("samples of a block of LLaDA", {"rows": 32, "vocabulary": _LLADA, "temperature": 0.7}, "gpu"),
        Case("many rows of Dream", {"rows": 512, "vocabulary": _DREAM}, "gpu"),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["rows"] in (32, 128) and shape["bits"] == 32],
    small={"rows": 3, "vocabulary": 500, "temperature": 0.0},
    axis="rows",
    # The logits in; what comes out, 28 bytes a row, is nothing beside them.
    bytes=lambda shape: shape.get("bits", 16) // 8 * shape["rows"] * shape["vocabulary"] + 28 * shape["rows"],
    named=named_statistics,
    # From one row to those of a refresh; one case for all that launch the same code.
    compiled=lambda arch: [
        (dtype, {"rows": rows, "vocabulary": vocabulary, **options}, None)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for vocabulary in (_LLADA, _DREAM)
        for rows in (1, 16, 32, 64, 128, 512, 1024)
        for options in SAMPLING
    ],
    label=_label,
    forward=lambda c: [{"rows": c.head_rows, "vocabulary": CASE_MODELS[c.model].vocab_size, "forbidden": [0]}],
)

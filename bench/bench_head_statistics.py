"""head_statistics against cuBLAS and a separate pass over the logits, with the heads of LLaDA and Dream.

python bench/bench_head_statistics.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._baselines import compiled_float32, official_float64, torch_float32
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.head_statistics import head_statistics as kernel
from fastdllm_triton.kernels.token_statistics import token_statistics
from fastdllm_triton.reference.head_statistics import head_statistics as reference
from fastdllm_triton.types import TokenStatistics

#: Rows on both sides of where the fused kernel hands over to cuBLAS, and noise where the engine samples.
SHAPES = [
    {"rows": rows, "vocabulary": vocabulary, "width": width, "temperature": temperature}
    for vocabulary, width in ((126_464, 4096), (152_064, 3584))
    for rows, temperature in (
        *((rows, 0.0) for rows in (1, 8, 16, 32, 48, 64, 96, 128, 256, 512)), *((rows, 1.0) for rows in (32, 64, 128)),
    )
]  # fmt: skip


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal hidden states and weights of logits three wide, as a trained head has."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, vocabulary, width = shape["rows"], shape["vocabulary"], shape["width"]
    weight = torch.randn((vocabulary, width), generator=generator, device=device, dtype=dtype)
    return {
        "hidden": torch.randn((rows, width), generator=generator, device=device, dtype=dtype),
        "weight": weight.mul_(3 / math.sqrt(width)),
        "temperature": shape.get("temperature", 0.0),
        "seed": 1 if shape.get("temperature") else None,
    }


def compared(found: TokenStatistics) -> list[Tensor]:
    """What the kernel is checked by; a token may differ where rounding makes two logits meet."""
    return [found.logsumexp, found.entropy, found.confidence]


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """The weight and the hidden states, two bytes a number; no logits."""
    return 2 * (shape["vocabulary"] + shape["rows"]) * shape["width"]


def flops(shape: Mapping[str, Any]) -> int:
    """Of the product."""
    return 2 * shape["rows"] * shape["vocabulary"] * shape["width"]


def logits_of(i: Inputs) -> Tensor:
    """What an engine materialises."""
    return i["hidden"] @ i["weight"].T


BENCH = Bench(
    op="head_statistics",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["rows"] == 32],
    quick=[{"rows": 3, "vocabulary": 500, "width": 32}],
    axis="rows",
    inputs=inputs,
    ours=lambda i: compared(kernel(**i)),
    oracle=lambda i: compared(reference(**i)),
    baselines={
        "matmul": logits_of,
        "matmul + token_statistics": lambda i: token_statistics(logits_of(i)),
        "matmul + official float64": lambda i: official_float64(logits_of(i)),
        "matmul + torch float32": lambda i: torch_float32(logits_of(i)),
        "matmul + torch.compile float32": lambda i: compiled_float32(logits_of(i)),
    },
    bytes=bytes_moved,
    flops=flops,
    gpu_only=["matmul + torch.compile float32"],
)

if __name__ == "__main__":
    main(BENCH.op)

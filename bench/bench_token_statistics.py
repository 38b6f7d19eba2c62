"""token_statistics against what decoders do to logits today, at the vocabularies of LLaDA and Dream.

python bench/bench_token_statistics.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._baselines import compiled_float32, official_float64, torch_float32
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.token_statistics import token_statistics as kernel
from fastdllm_triton.reference.token_statistics import token_statistics as reference
from fastdllm_triton.types import TokenStatistics

#: A block of one sequence, of a batch, and the rows of a refresh; noise where the engine samples. Logits are float32 by default.
SHAPES = [
    {"rows": rows, "vocabulary": vocabulary, "temperature": temperature, "bits": bits}
    for vocabulary in (126_464, 152_064)
    for rows, temperature in ((1, 0.0), (32, 0.0), (32, 1.0), (128, 0.0), (128, 1.0), (512, 0.0), (2048, 0.0))
    for bits in (32, 16)
    if rows < 2048 or bits == 16
]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal logits, ten wide; of 32 bits where the shape says so."""
    dtype = torch.float32 if shape.get("bits") == 32 else dtype
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn((shape["rows"], shape["vocabulary"]), generator=generator, device=device, dtype=dtype)
    return {"logits": logits.mul_(3), "temperature": shape["temperature"], "seed": 1 if shape["temperature"] else None}


def compared(found: TokenStatistics) -> list[Tensor]:
    """What the kernel is checked by before it is timed."""
    return [found.token, found.logit, found.second_logit, found.logsumexp, found.confidence, found.entropy]


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """The logits in; what comes out, 28 bytes a row, is nothing beside them."""
    return shape.get("bits", 16) // 8 * shape["rows"] * shape["vocabulary"] + 28 * shape["rows"]


BENCH = Bench(
    op="token_statistics",
    shapes=SHAPES,
    # float32 logits are what the engine has by default.
    key=[shape for shape in SHAPES if shape["rows"] in (32, 128) and shape["bits"] == 32],
    quick=[{"rows": 3, "vocabulary": 500, "temperature": 0.0}],
    axis="rows",
    inputs=inputs,
    ours=lambda i: compared(kernel(**i)),
    oracle=lambda i: compared(reference(**i)),
    baselines={
        "official float64": lambda i: official_float64(i["logits"]),
        "torch float32": lambda i: torch_float32(i["logits"]),
        "torch.compile float32": lambda i: compiled_float32(i["logits"]),
    },
    bytes=bytes_moved,
    gpu_only=["torch.compile float32"],
)

if __name__ == "__main__":
    main(BENCH.op)

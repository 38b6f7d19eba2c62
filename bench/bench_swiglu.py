"""swiglu against PyTorch, at the MLP widths of LLaDA and Dream.

python bench/bench_swiglu.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.swiglu import swiglu as kernel
from fastdllm_triton.reference.swiglu import swiglu as reference

SHAPES = [{"rows": rows, "width": width} for width in (12_288, 18_944) for rows in (32, 128, 512, 2048, 8192)]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width = shape["rows"], shape["width"]
    return {
        "gate_up": torch.randn((rows, 2 * width), generator=generator, device=device, dtype=dtype),
        "out": torch.empty((rows, width), device=device, dtype=dtype),
    }


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """Gate and up in, their product out."""
    return 2 * 3 * shape["rows"] * shape["width"]


compiled = torch.compile(reference)

BENCH = Bench(
    op="swiglu",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["rows"] in (32, 2048)],
    quick=[{"rows": 3, "width": 64}],
    axis="rows",
    inputs=inputs,
    ours=lambda i: kernel(**i),
    oracle=lambda i: reference(i["gate_up"]),
    baselines={"torch": lambda i: reference(i["gate_up"]), "torch.compile": lambda i: compiled(i["gate_up"])},
    bytes=bytes_moved,
    gpu_only=["torch.compile"],
)

if __name__ == "__main__":
    main(BENCH.op)

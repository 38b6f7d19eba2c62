"""rms_norm against PyTorch, at the widths of Dream and LLaDA, with and without a residual.

python bench/bench_rms_norm.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.rms_norm import rms_norm as kernel
from fastdllm_triton.reference.rms_norm import rms_norm as reference

EPS = 1e-5
SHAPES = [
    {"rows": rows, "width": width, "residual": residual}
    for width in (3584, 4096)
    for residual in (False, True)
    for rows in (32, 128, 512, 2048, 8192)
]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape["rows"], shape["width"])
    found = {
        "x": torch.randn(size, generator=generator, device=device, dtype=dtype),
        "weight": torch.randn(size[1], generator=generator, device=device, dtype=dtype),
        "out": torch.empty(size, device=device, dtype=dtype),
    }
    if shape["residual"]:
        found["residual"] = torch.randn(size, generator=generator, device=device, dtype=dtype)
        found["residual_out"] = torch.empty(size, device=device, dtype=dtype)
    return found


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """X in and y out, with a residual also that in and the sum out; the weight once."""
    return 2 * shape["width"] * (shape["rows"] * (4 if shape["residual"] else 2) + 1)


def torch_rms_norm(i: Inputs) -> Tensor:
    """PyTorch's own op, after the addition."""
    x = i["x"] if "residual" not in i else i["x"] + i["residual"]
    return torch.nn.functional.rms_norm(x, x.shape[-1:], i["weight"], EPS)


compiled = torch.compile(reference)

BENCH = Bench(
    op="rms_norm",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["residual"] and shape["rows"] in (32, 2048)],
    quick=[{"rows": 3, "width": 64, "residual": True}],
    axis="rows",
    inputs=inputs,
    ours=lambda i: kernel(eps=EPS, **i),
    oracle=lambda i: reference(i["x"], i["weight"], EPS, residual=i.get("residual")),
    baselines={
        "torch": torch_rms_norm,
        "torch.compile": lambda i: compiled(i["x"], i["weight"], EPS, residual=i.get("residual")),
    },
    bytes=bytes_moved,
    gpu_only=["torch.compile"],
)

if __name__ == "__main__":
    main(BENCH.op)

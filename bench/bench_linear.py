"""linear against cuBLAS between separate kernels: the projections of LLaDA and Dream with what is fused into them.

python bench/bench_linear.py [--quick] [--out DIR] [--html FILE] [--only NAME]

The library's time is what a layer without fusions spends: the norm in front and the gated unit behind are launches of their
own, but the residual is not, since it is added by the next norm's launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels._arch import arch_of
from fastdllm_triton.kernels.linear import PROJECTIONS, Config, select_config
from fastdllm_triton.kernels.linear import linear as kernel
from fastdllm_triton.kernels.rms_norm import rms_norm
from fastdllm_triton.kernels.swiglu import swiglu
from fastdllm_triton.reference.linear import linear as reference

EPS = 1e-5
SHAPES = [
    {"name": name, "rows": rows, "n": n, "k": k, "norm": norm, "activation": activation, "residual": residual}
    for (name, (n, k, norm, activation, residual)), rows in product(PROJECTIONS.items(), (16, 32, 64, 128, 256, 512))
]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal numbers, the weight's of the size that keeps the product's."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, n, k, gated = shape["rows"], shape["n"], shape["k"], shape["activation"] == "swiglu"
    outputs = n // 2 if gated else n

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    found = {"x": randn(rows, k), "weight": randn(n, k).mul_(k**-0.5), "activation": shape["activation"]}
    found["out"] = torch.empty(rows, outputs, device=device, dtype=dtype)
    if shape["norm"]:
        found |= {"norm_weight": randn(k), "eps": EPS}
    if shape["residual"]:
        found["residual"] = randn(rows, outputs)
    return found


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """The weight, x, the residual and the norm's weight in, the result out."""
    outputs = shape["n"] // 2 if shape["activation"] == "swiglu" else shape["n"]
    rows = shape["rows"] * (shape["k"] + outputs * (2 if shape["residual"] else 1))
    return 2 * (shape["n"] * shape["k"] + rows + (shape["k"] if shape["norm"] else 0))


def ours(i: Inputs, config: Config | None = None) -> Tensor:
    """The kernel in the configuration that its pure function chooses, or a given one."""
    x, (n, k) = i["x"], i["weight"].shape
    chosen = config or select_config(arch_of(x.device), x.shape[0], n, k, x.element_size(), i["activation"])
    return kernel(**i, config=chosen)


def library(i: Inputs) -> Tensor:
    """cuBLAS, with a norm and a gated unit as kernels of their own."""
    x = rms_norm(i["x"], i["norm_weight"], EPS) if "norm_weight" in i else i["x"]
    y = F.linear(x, i["weight"])  # type: ignore[arg-type]
    return y if i["activation"] is None else swiglu(y)


compiled = torch.compile(reference)

BENCH = Bench(
    op="linear",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["rows"] == 32],
    quick=[{"name": "small", "rows": 3, "n": 64, "k": 128, "norm": True, "activation": "swiglu", "residual": False}],
    axis="rows",
    inputs=inputs,
    ours=ours,
    oracle=lambda i: reference(**{**i, "out": None}),
    baselines={"library": library, "torch.compile": lambda i: compiled(**{**i, "out": None})},
    bytes=bytes_moved,
    flops=lambda shape: 2 * shape["rows"] * shape["n"] * shape["k"],
    gpu_only=["torch.compile"],
)


if __name__ == "__main__":
    main(BENCH.op)

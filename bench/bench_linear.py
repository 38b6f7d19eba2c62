"""linear against cuBLAS between separate kernels: the projections of LLaDA and Dream with what is fused into them.

python bench/bench_linear.py [--quick] [--out DIR] [--html FILE] [--only NAME]

Ours is the kernel in the configuration that its pure function chooses, whatever was measured. The library's time is what a layer
without fusions spends: the norm in front and the gated unit behind are launches of their own, but the residual is not, since it
is added by the next norm's launch.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdllm_triton.bench._baselines import compiled
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.rms_norm import rms_norm
from fastdllm_triton.kernels.swiglu import swiglu
from fastdllm_triton.verify.cases.linear import LINEAR, chosen_config


def ours(**inputs: Any) -> Tensor:
    """The kernel in the configuration that its pure function chooses."""
    result: Tensor = LINEAR.kernel(**inputs, config=chosen_config(inputs))
    return result


def library(i: Inputs) -> Tensor:
    """cuBLAS, with a norm and a gated unit as kernels of their own."""
    x = rms_norm(i["x"], i["norm_weight"], i["eps"]) if "norm_weight" in i else i["x"]
    y = F.linear(x, i["weight"])  # type: ignore[arg-type]
    return y if i["activation"] is None else swiglu(y)


BENCH = Bench(LINEAR, {"library": library, "torch.compile": compiled(LINEAR)}, ours)


if __name__ == "__main__":
    main(BENCH.op)

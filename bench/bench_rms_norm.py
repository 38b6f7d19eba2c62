"""rms_norm against PyTorch, at the widths of Dream and LLaDA, with and without a residual.

python bench/bench_rms_norm.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import rms_norm

from fastdllm_triton.bench._baselines import compiled
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.verify.cases.rms_norm import RMS_NORM


def torch_rms_norm(i: Inputs) -> Tensor:
    """PyTorch's own op, after the addition."""
    x = i["x"] if "residual" not in i else i["x"] + i["residual"]
    return rms_norm(x, x.shape[-1:], i["weight"], i["eps"])


BENCH = Bench(RMS_NORM, {"torch": torch_rms_norm, "torch.compile": compiled(RMS_NORM)})


if __name__ == "__main__":
    main(BENCH.op)

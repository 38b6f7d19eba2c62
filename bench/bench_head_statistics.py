"""head_statistics against cuBLAS and a separate pass over the logits, with the heads of LLaDA and Dream.

python bench/bench_head_statistics.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from torch import Tensor

from fastdllm_triton.bench._baselines import compiled_float32, official_float64, torch_float32
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.token_statistics import token_statistics
from fastdllm_triton.verify.cases.head_statistics import HEAD_STATISTICS


def logits_of(i: Inputs) -> Tensor:
    logits: Tensor = i["hidden"] @ i["weight"].T
    return logits


BENCH = Bench(
    HEAD_STATISTICS,
    {
        "matmul": logits_of,
        "matmul + token_statistics": lambda i: token_statistics(logits_of(i)),
        "matmul + official float64": lambda i: official_float64(logits_of(i)),
        "matmul + torch float32": lambda i: torch_float32(logits_of(i)),
        "matmul + torch.compile float32": lambda i: compiled_float32(logits_of(i)),
    },
)


if __name__ == "__main__":
    main(BENCH.op)

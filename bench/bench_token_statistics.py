"""token_statistics against what decoders do to logits today, at the vocabularies of LLaDA and Dream.

python bench/bench_token_statistics.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from fastdllm_triton.bench._baselines import compiled_float32, official_float64, torch_float32
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.verify.cases.token_statistics import TOKEN_STATISTICS

BENCH = Bench(
    TOKEN_STATISTICS,
    {
        "official float64": lambda i: official_float64(i["logits"]),
        "torch float32": lambda i: torch_float32(i["logits"]),
        "torch.compile float32": lambda i: compiled_float32(i["logits"]),
    },
)


if __name__ == "__main__":
    main(BENCH.op)

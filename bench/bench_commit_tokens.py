"""commit_tokens against the same decision in PyTorch. A launch reads a few kilobytes: what is timed is latency.

python bench/bench_commit_tokens.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from torch import Tensor

from fastdllm_triton.bench._baselines import official_threshold, reference
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.verify.cases.commit_tokens import COMMIT_TOKENS, MASK, START


def run_official(i: Inputs) -> Tensor:
    """Only the threshold rule is free of host reads in the official code."""
    if i["state"].rule != "threshold":
        raise ValueError("the official factor rule reads the GPU from Python; the entropy budget is not in it")
    return official_threshold(i["x"], i["statistics"].token, i["statistics"].confidence.double(), START, MASK, 0.7)


BENCH = Bench(COMMIT_TOKENS, {"reference": reference(COMMIT_TOKENS), "official": run_official}, most_sets=12)


if __name__ == "__main__":
    main(BENCH.op)

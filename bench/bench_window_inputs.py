"""window_inputs against the same gathers in PyTorch. A launch reads a few kilobytes: what is timed is latency.

python bench/bench_window_inputs.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from fastdllm_triton.bench._baselines import compiled, reference
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.verify.cases.window_inputs import WINDOW_INPUTS

BENCH = Bench(WINDOW_INPUTS, {"torch": reference(WINDOW_INPUTS), "torch.compile": compiled(WINDOW_INPUTS)}, most_sets=12)


if __name__ == "__main__":
    main(BENCH.op)

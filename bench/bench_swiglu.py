"""swiglu against PyTorch, at the MLP widths of LLaDA and Dream.

python bench/bench_swiglu.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from fastdllm_triton.bench._baselines import compiled, reference
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.verify.cases.swiglu import SWIGLU

BENCH = Bench(SWIGLU, {"torch": reference(SWIGLU), "torch.compile": compiled(SWIGLU)})


if __name__ == "__main__":
    main(BENCH.op)

"""commit_tokens against the same decision in PyTorch. A launch reads a few kilobytes: what is timed is latency.

python bench/bench_commit_tokens.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._baselines import official_threshold
from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.commit_tokens import commit_tokens as kernel
from fastdllm_triton.reference.commit_tokens import commit_tokens as reference
from fastdllm_triton.types import PolicyState, TokenStatistics

MASK, START, SLOTS = 126_336, 512, 2048

SHAPES = [
    {"batch": batch, "block": block, "rule": rule}
    for batch, block in ((1, 32), (16, 32), (64, 32), (16, 128), (16, 1024))
    for rule in ("threshold", "factor", "entropy_budget")
]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """A masked block in which every token is [MASK] itself: committing it changes nothing, so every launch has all to decide.

    Statistics are float32 whatever the ``dtype`` of logits.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, block = shape["batch"], shape["block"]
    rest = torch.rand((batch, block), generator=generator, device=device)
    states = [
        PolicyState.create(
            "neg_entropy" if shape["rule"] == "entropy_budget" else "confidence",
            shape["rule"],
            value=0.7,
            mask_id=MASK,
            kv_start=torch.zeros(batch, dtype=torch.int32, device=device),
            seed=torch.zeros(batch, dtype=torch.int64, device=device),
            slots=SLOTS,
        )
        for _ in range(2)
    ]
    token = torch.full((batch, block), MASK, device=device)
    return {
        "x": torch.full((batch, SLOTS), MASK, device=device),
        "statistics": TokenStatistics(token, -rest, -2 - rest, torch.log1p(rest) - rest, rest, rest),
        "window_start": torch.full((batch,), START, dtype=torch.int32, device=device),
        "state": states[0],
        "other_state": states[1],
    }


def run_kernel(i: Inputs) -> list[Tensor]:
    """One launch; what it is checked by."""
    kernel(i["x"], i["statistics"], i["window_start"], i["state"])
    return [i["state"].remaining, i["state"].step_map]


def run_reference(i: Inputs) -> list[Tensor]:
    """Some dozens of launches, on a state of their own."""
    reference(i["x"], i["statistics"], i["window_start"], i["other_state"])
    return [i["other_state"].remaining, i["other_state"].step_map]


def run_official(i: Inputs) -> Tensor:
    """Only the threshold rule is free of host reads in the official code."""
    if i["state"].rule != "threshold":
        raise ValueError("the official factor rule reads the GPU from Python; the entropy budget is not in it")
    statistics = i["statistics"]
    return official_threshold(i["x"], statistics.token, statistics.confidence.double(), START, MASK, 0.7)


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """Each slot's id, token and two statistics in; id, step and confidence out: 40 bytes."""
    return 40 * shape["batch"] * shape["block"]


BENCH = Bench(
    op="commit_tokens",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["batch"] == 1],
    quick=[{"batch": 2, "block": 8, "rule": "factor"}],
    axis="block",
    inputs=inputs,
    ours=run_kernel,
    oracle=run_reference,
    baselines={"reference": run_reference, "official": run_official},
    bytes=bytes_moved,
    most_sets=12,
)


if __name__ == "__main__":
    main(BENCH.op)

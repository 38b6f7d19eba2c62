"""rope_kv_write against the same work in PyTorch: rotation of q and k, and the copy of k and v into the caches.

python bench/bench_rope_kv_write.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.kernels.rope_kv_write import rope_kv_write as kernel
from fastdllm_triton.reference.rope_kv_write import rope_kv_write as reference
from fastdllm_triton.reference.rope_kv_write import rotate

#: Query heads, KV heads, theta, bias and rounding.
MODELS: dict[str, tuple[int, int, float, bool, str]] = {
    "llada": (32, 32, 500_000.0, False, "llada"),
    "dream": (28, 4, 1_000_000.0, True, "dream"),
}
DIM = 128
SHAPES = [
    {"model": model, "batch": batch, "window": window, "slots": 4096}
    for model in MODELS
    for batch, window in ((1, 32), (4, 32), (16, 32), (16, 64), (1, 4096), (4, 4096))
]


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """A projection of normal numbers, caches of zeros, and a window at the end of the caches."""
    q_heads, kv_heads, theta, with_bias, rounding = MODELS[shape["model"]]
    batch, window, slots = shape["batch"], shape["window"], shape["slots"]
    generator = torch.Generator(device).manual_seed(seed)
    columns = (q_heads + 2 * kv_heads) * DIM
    return {
        "qkv": torch.randn((batch, window, columns), generator=generator, device=device, dtype=dtype),
        "k_cache": torch.zeros((batch, kv_heads, slots, DIM), device=device, dtype=dtype),
        "v_cache": torch.zeros((batch, kv_heads, slots, DIM), device=device, dtype=dtype),
        "window_start": torch.full((batch,), slots - window, dtype=torch.int32, device=device),
        "kv_start": torch.zeros(batch, dtype=torch.int32, device=device),
        "theta": theta,
        "bias": torch.randn(columns, generator=generator, device=device, dtype=dtype) if with_bias else None,
        "rounding": rounding,
        "out": torch.empty((batch, window, q_heads, DIM), device=device, dtype=dtype),
    }


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """The projection in; q, k and v out."""
    q_heads, kv_heads = MODELS[shape["model"]][:2]
    return 2 * 2 * shape["batch"] * shape["window"] * (q_heads + 2 * kv_heads) * DIM


def in_torch(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Without the reference's selection of slots, whose number the host would wait for: here every row is valid."""
    batch, kv_heads, slots, dim = i["k_cache"].shape
    window, heads = i["qkv"].shape[1], i["qkv"].shape[2] // dim
    qkv = i["qkv"] if i["bias"] is None else i["qkv"] + i["bias"]
    q, k, v = qkv.view(batch, window, heads, dim).split((heads - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    position = i["window_start"][:, None] + torch.arange(window, device=q.device) - i["kv_start"][:, None]
    i["k_cache"][:, :, slots - window :] = rotate(k, position, i["theta"], i["rounding"]).transpose(1, 2)
    i["v_cache"][:, :, slots - window :] = v.transpose(1, 2)
    return rotate(q, position, i["theta"], i["rounding"]), i["k_cache"], i["v_cache"]


def ours(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, and the caches that were written."""
    return kernel(**i), i["k_cache"], i["v_cache"]


def oracle(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, on caches of its own."""
    k_cache, v_cache = i["k_cache"].clone(), i["v_cache"].clone()
    return reference(**{**i, "k_cache": k_cache, "v_cache": v_cache, "out": None}), k_cache, v_cache


compiled = torch.compile(in_torch)

BENCH = Bench(
    op="rope_kv_write",
    shapes=SHAPES,
    key=[shape for shape in SHAPES if shape["batch"] == 1],
    quick=[{"model": "dream", "batch": 1, "window": 2, "slots": 4}],
    axis="window",
    inputs=inputs,
    ours=ours,
    oracle=oracle,
    baselines={"torch": in_torch, "torch.compile": compiled},
    bytes=bytes_moved,
    gpu_only=["torch.compile"],
)

if __name__ == "__main__":
    main(BENCH.op)

"""rope_kv_write against the same work in PyTorch: rotation of q and k, and the copy of k and v into the caches.

python bench/bench_rope_kv_write.py [--quick] [--out DIR] [--html FILE] [--only NAME]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs
from fastdllm_triton.reference.rope_kv_write import rotate
from fastdllm_triton.verify.cases.rope_kv_write import ROPE_KV_WRITE


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


BENCH = Bench(ROPE_KV_WRITE, {"torch": in_torch, "torch.compile": torch.compile(in_torch)})


if __name__ == "__main__":
    main(BENCH.op)

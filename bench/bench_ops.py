"""Every op against PyTorch and against what decoders do today.

window_attention meets every backend of PyTorch's attention that takes the shape, FlexAttention and flash-attn; ``triton plain``
and ``triton swapped`` force an operand order where the chosen config has the other one.

Of linear ours is the kernel in the configuration that its pure function chooses, whatever was measured. The library's time is
what a layer without fusions spends: the norm in front and the gated unit behind are launches of their own, but the residual is
not, since it is added by the next norm's launch. A launch of commit_tokens or window_inputs reads a few kilobytes: what is timed
is latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastdllm_triton.bench._session import Bench
from fastdllm_triton.bench._timing import Inputs, Run
from fastdllm_triton.bench.official_step import llada_confidence, llada_select
from fastdllm_triton.kernels._arch import arch_of
from fastdllm_triton.kernels.rms_norm import rms_norm
from fastdllm_triton.kernels.swiglu import swiglu
from fastdllm_triton.kernels.token_statistics import token_statistics
from fastdllm_triton.kernels.window_attention import select_config, window_attention
from fastdllm_triton.reference.rope_kv_write import head_norm, rotate
from fastdllm_triton.verify.cases import OPS, OpCases
from fastdllm_triton.verify.cases.commit_tokens import MASK, START
from fastdllm_triton.verify.cases.linear import chosen_config


def reference(cases: OpCases) -> Run:
    """The op's reference, which makes its own results."""
    return lambda i: cases.reference(**_without_results(cases, i))


def compiled(cases: OpCases) -> Run:
    """The op's reference, fused by Inductor."""
    function = torch.compile(cases.reference)
    return lambda i: function(**_without_results(cases, i))


def _without_results(cases: OpCases, i: Inputs) -> Inputs:
    return {name: value for name, value in i.items() if name not in cases.outs}


def torch_float32(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The official choice in float32: softmax, its maximum and where it is."""
    confidence, token = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return token, confidence


def torch_rms_norm(i: Inputs) -> Tensor:
    """PyTorch's own op, after the addition."""
    x = i["x"] if "residual" not in i else i["x"] + i["residual"]
    return F.rms_norm(x, x.shape[-1:], i["weight"], i["eps"])


def own_linear(**inputs: Any) -> Tensor:
    """The kernel in the configuration that its pure function chooses."""
    result: Tensor = OPS["linear"].kernel(**inputs, config=chosen_config(inputs))
    return result


def library_linear(i: Inputs) -> Tensor:
    """cuBLAS, with a norm and a gated unit as kernels of their own."""
    x = rms_norm(i["x"], i["norm_weight"], i["eps"]) if "norm_weight" in i else i["x"]
    y = F.linear(x, i["weight"])  # type: ignore[arg-type]
    return y if i["activation"] is None else swiglu(y)


def torch_rope(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Without the reference's selection of slots, whose number the host would wait for: here every row is valid."""
    batch, kv_heads, slots, dim = i["k_cache"].shape
    window, heads = i["qkv"].shape[1], i["qkv"].shape[2] // dim
    qkv = i["qkv"] if i["bias"] is None else i["qkv"] + i["bias"]
    q, k, v = qkv.view(batch, window, heads, dim).split((heads - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    if "q_norm" in i:
        q, k = (head_norm(x, i[name], i["eps"], i["norm_rounding"]) for name, x in (("q_norm", q), ("k_norm", k)))
    position = i["window_start"][:, None] + torch.arange(window, device=q.device) - i["kv_start"][:, None]
    i["k_cache"][:, :, slots - window :] = rotate(k, position, i["theta"], i["rounding"]).transpose(1, 2)
    i["v_cache"][:, :, slots - window :] = v.transpose(1, 2)
    return rotate(q, position, i["theta"], i["rounding"]), i["k_cache"], i["v_cache"]


def logits_of(i: Inputs) -> Tensor:
    """What an engine without head_statistics materialises."""
    logits: Tensor = i["hidden"] @ i["weight"].T
    return logits


def selecting(select: Callable[[Tensor], object], logits: Callable[[Inputs], Tensor]) -> Run:
    """A choice of tokens from the logits of the inputs."""
    return lambda i: select(logits(i))


def official_commit(i: Inputs) -> Tensor:
    """The threshold rule, the only one that is free of host reads in the official code; one block at one place for all rows.

    Returns:
        ``[B]``: whether a row's block has no mask left, which the official loop then reads on the host.
    """
    if i["state"].rule != "threshold":
        raise ValueError("the official factor rule reads the GPU from Python; the entropy budget is not in it")
    token, confidence = i["statistics"].token, i["statistics"].confidence.double()
    block = i["x"][:, START : START + token.shape[1]]
    token, chosen = llada_select(token, confidence, block == MASK, block, None, 0.7)
    block.copy_(torch.where(chosen, token, block))
    return (block == MASK).sum(1) == 0


def sdpa(backend: SDPBackend) -> Run:
    """One backend of PyTorch's attention, on the same layouts; block-causal by a mask that is made once."""

    def run(i: Inputs) -> Tensor:
        grouped = i["q"].shape[2] != i["k_cache"].shape[1]
        q, k, v = i["q"].transpose(1, 2), i["k_cache"], i["v_cache"]
        mask = block_mask(q.shape[2], k.shape[2], i["block_causal"][1], q.device) if "block_causal" in i else None
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)

    return run


@lru_cache(maxsize=1)
def block_mask(window: int, slots: int, block: int, device: torch.device) -> Tensor:
    """``[W, L]``: what the last ``W`` slots attend block-causally."""
    slot = torch.arange(slots, device=device)
    return slot // block <= slot[slots - window :, None] // block


def flex(i: Inputs) -> Any:
    """FlexAttention, for one row and the paper's window or a refresh: compiling takes seconds a shape."""
    (batch, window, q_heads, _), (kv_heads, slots) = i["q"].shape, i["k_cache"].shape[1:3]
    if batch > 1 or window not in (32, slots):
        raise ValueError("compiled for one row and windows of 32 or all alone")
    run = compiled_flex(i["q"].shape, i["k_cache"].shape)
    block = flex_mask(window, slots, i["block_causal"][1], i["q"].device) if "block_causal" in i else None
    return run(i["q"].transpose(1, 2), i["k_cache"], i["v_cache"], block_mask=block, enable_gqa=q_heads != kv_heads)


@lru_cache(maxsize=1)
def flex_mask(window: int, slots: int, block: int, device: torch.device) -> BlockMask:
    """The same mask for FlexAttention, which passes over tiles that it denies."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv // block <= (q + slots - window) // block

    return create_block_mask(allowed, None, None, window, slots, device=device)


@lru_cache(maxsize=1)
def compiled_flex(*shapes: torch.Size) -> Callable[..., Any]:
    """FlexAttention compiled for these shapes. Earlier versions are dropped: beyond a few, torch runs uncompiled."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def flash_attn(i: Inputs) -> Any:
    """The flash-attn package, if it is installed; it takes [B, L, H, D]."""
    if "block_causal" in i:
        raise ValueError("it has no block-causal mask")
    from flash_attn import flash_attn_func

    return flash_attn_func(i["q"], i["k_cache"].transpose(1, 2), i["v_cache"].transpose(1, 2))


def in_order(swap_ab: bool) -> Run:
    """The kernel in this operand order, where the chosen config has the other one."""

    def run(i: Inputs) -> Any:
        (batch, window, q_heads, dim), (kv_heads, slots) = i["q"].shape, i["k_cache"].shape[1:3]
        device = i["q"].device
        sizes = (batch, window, q_heads, kv_heads, dim, slots, i["q"].element_size())
        config = select_config(arch_of(device), *sizes)
        if config.swap_ab == swap_ab:
            raise ValueError("the chosen config has this order")
        return window_attention(**i, config=replace(config, swap_ab=swap_ab))

    return run


#: What decoders do to logits.
SELECTIONS = {
    "official float64": llada_confidence,
    "torch float32": torch_float32,
    "torch.compile float32": torch.compile(torch_float32),
}
#: In the order of importance, so that a time limit cuts the least.
BENCHES = [
    Bench(
        OPS["window_attention"],
        {
            "triton plain": in_order(False),
            "triton swapped": in_order(True),
            "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
            "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "sdpa math": sdpa(SDPBackend.MATH),
            "flex": flex,
            "flash-attn": flash_attn,
        },
    ),
    Bench(
        OPS["head_statistics"],
        {
            "matmul": logits_of,
            "matmul + token_statistics": lambda i: token_statistics(logits_of(i)),
            **{f"matmul + {name}": selecting(select, logits_of) for name, select in SELECTIONS.items()},
        },
    ),
    Bench(OPS["linear"], {"library": library_linear, "torch.compile": compiled(OPS["linear"])}, own_linear),
    Bench(OPS["rope_kv_write"], {"torch": torch_rope, "torch.compile": torch.compile(torch_rope)}),
    Bench(OPS["rms_norm"], {"torch": torch_rms_norm, "torch.compile": compiled(OPS["rms_norm"])}),
    Bench(OPS["swiglu"], {"torch": reference(OPS["swiglu"]), "torch.compile": compiled(OPS["swiglu"])}),
    Bench(OPS["token_statistics"], {name: selecting(select, itemgetter("logits")) for name, select in SELECTIONS.items()}),
    Bench(OPS["commit_tokens"], {"reference": reference(OPS["commit_tokens"]), "official": official_commit}, most_sets=12),
    Bench(
        OPS["window_inputs"],
        {"torch": reference(OPS["window_inputs"]), "torch.compile": compiled(OPS["window_inputs"])},
        most_sets=12,
    ),
]

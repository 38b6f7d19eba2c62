"""The same work in PyTorch, and what decoders do today to choose tokens from logits, op for op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm_triton.bench._timing import Inputs, Run
from fastdllm_triton.verify.cases import OpCases


def reference(cases: OpCases) -> Run:
    """The op's reference, which makes its own results."""
    return lambda i: cases.reference(**_without_results(cases, i))


def compiled(cases: OpCases) -> Run:
    """The op's reference, fused by Inductor."""
    function = torch.compile(cases.reference)
    return lambda i: function(**_without_results(cases, i))


def _without_results(cases: OpCases, i: Inputs) -> Inputs:
    return {name: value for name, value in i.items() if name not in cases.outs}


def official_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and confidence as LLaDA's and Fast-dLLM's generate do: argmax, then a float64 softmax over the whole vocabulary."""
    token = torch.argmax(logits, dim=-1)
    p = torch.softmax(logits.to(torch.float64), dim=-1)
    return token, torch.gather(p, -1, token[:, None])[:, 0]


def torch_float32(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float32: softmax, its maximum and where it is."""
    confidence, token = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return token, confidence


#: The same, fused by Inductor.
compiled_float32 = torch.compile(torch_float32)


def official_threshold(x: Tensor, token: Tensor, confidence: Tensor, start: int, mask_id: int, threshold: float) -> Tensor:
    """Fast-dLLM's choice by threshold, vectorised, and the write of the chosen tokens; one block at one place for all rows.

    Returns:
        ``[B]``: whether a row's block has no mask left, which the official loop then reads on the host.
    """
    block = x[:, start : start + token.shape[1]]
    masked = block == mask_id
    score = torch.where(masked, confidence, torch.finfo(torch.float64).min)
    chosen = masked & (score >= threshold)
    best = torch.zeros_like(chosen).scatter_(1, score.argmax(dim=1, keepdim=True), True)
    chosen = (chosen | best) & masked
    block.copy_(torch.where(chosen, token, block))
    return (block == mask_id).sum(1) == 0

"""Decoding as one would write it down: one row, softmax over all logits in float64, nothing shared with the engine.

``cache`` says which slots a step recomputes; what it does not recompute keeps the keys and values of the refresh.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastdllm_triton as fdt


@dataclass
class Plain:
    """What came out: the row, the forward that committed each slot (-1 where none did), and the number of forwards."""

    x: list[int]
    step_map: list[int]
    forwards: int = 0
    confidence: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def decode(
    lm: fdt.MaskedDiffusionLM,
    prompt: list[int],
    answer: list[int],
    block_length: int,
    strategy: fdt.Strategy,
    cache: str = "none",
    cfg_scale: float = 0.0,
    never: tuple[int, ...] = (),
    last: tuple[int, ...] = (),
) -> Plain:
    """Decodes the masks of ``answer``, whose length is a multiple of the blocks'."""
    network, mask, shift = lm.network, lm.config.mask_id, int(lm.config.shift)
    x = torch.tensor(prompt + answer)
    given = x != mask
    length, start = len(x), torch.zeros(2, dtype=torch.int32)
    kv = network.new_cache(start, length)
    out = Plain([], [-1] * length)
    blocks = len(answer) // block_length
    for block in range(blocks):
        first = len(prompt) + block * block_length
        masks, step = int((x[first : first + block_length] == mask).sum()), 0
        while slots := [i for i in range(first, first + block_length) if x[i] == mask]:
            window = (0, length)
            if step and cache != "none":
                window = (max(first - shift, 0), length if cache == "prefix" else first + block_length)
            rows = torch.stack((x, torch.where(given, mask, x)))[:, window[0] : window[1]]
            hidden = network.forward(rows, start + window[0], kv)
            logits = (network.final_norm(hidden) @ network.head.T)[:, [max(i - shift, 0) - window[0] for i in slots]]
            logits = logits[1] + (cfg_scale + 1) * (logits[0] - logits[1]) if cfg_scale else logits[0]
            logits[:, [mask, *never]] = -torch.inf
            token = logits.argmax(1)
            logits[:, list(last)] = -torch.inf
            p = logits.double().softmax(1)
            sure = p.gather(1, token[:, None])[:, 0]
            margin = p.topk(2, dim=1).values
            entropy = torch.special.entr(p).sum(1)
            score = {"confidence": sure, "margin": margin[:, 0] - margin[:, 1], "neg_entropy": -entropy}[strategy.score]
            order = sorted(range(len(slots)), key=lambda i: (-float(score[i]), i))
            count = _count(strategy, score[order], entropy[order], masks, step, blocks)
            for i in order[: max(count, 1)]:
                x[slots[i]] = token[i]
                out.step_map[slots[i]] = out.forwards
                out.confidence[slots[i]] = float(sure[i])
            out.forwards += 1
            step += 1
    out.x = x.tolist()
    return out


def _count(strategy: fdt.Strategy, score: Tensor, entropy: Tensor, masks: int, step: int, blocks: int) -> int:
    """How many of the ranked slots a strategy commits."""
    ranks = range(len(score))
    if isinstance(strategy, fdt.FixedSteps):
        steps = strategy.steps // blocks
        return masks // steps + (step < masks % steps)
    if type(strategy) is fdt.Threshold:  # a capped one commits fewer
        return int((score >= strategy.t).sum())
    if isinstance(strategy, fdt.Factor):
        fails = [n for n in ranks if n > 0 and (n + 2) * (1 - float(score[n])) > strategy.f]
        count = fails[0] if fails else len(score)
        return len(score) if count == len(score) - 1 else count
    assert isinstance(strategy, fdt.EntropyBudget)
    fails = [n for n in ranks if float(entropy[: n + 1].sum() - entropy[: n + 1].max()) > strategy.gamma]
    return fails[0] if fails else len(score)

"""The official code of block-causal families, Fast-dLLM v2 and SDAR, re-created op for op: the baseline of their benches.

Of Fast-dLLM v2 the ``generate`` of the hub's ``modeling.py``, of SDAR ``block_diffusion_generate`` of its evaluation (greedy:
temperature 1, ``top_k`` 1) and the network of ``modeling_sdar.py``. Every forward joins the whole prefix with the window in every
layer, repeats keys and values for the query heads where a mask is used, makes its mask on the host, and passes all rows of its
window through the head; finished blocks take a forward of their own; selection and loops read the device. Written from a
description of it, not copied; where the description leaves a choice, the cheaper op is taken.
``tests/bench/test_official_blocks.py`` shows that it gives the recorded tokens of the official code.

The matrices are views of our fused ones. Schedules can be imposed, as in ``official_step.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count as counted

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm_triton.bench.official_step import (
    OfficialModel,
    Past,
    Tables,
    _rms_norm,
    _rotate_half,
    shift,
)
from fastdllm_triton.models.transformer import Transformer


class OfficialBlockModel:
    """The official forward of a block-causal model whose weights are those of ``network``. Keys are kept rotated."""

    def __init__(self, network: Transformer) -> None:
        self.config, self.weights = network.config, network.weights
        self.is_sdar = network.config.architecture == "sdar"
        self._bidirectional = OfficialModel(network)  # whose split matrices and angles are the same

    def __call__(
        self, ids: Tensor, past: Past, block: int, *, whole: Past | None = None, at: int = 0, store: bool = False
    ) -> tuple[Tensor, Past]:
        """Logits ``[B, T, V]`` of a window, and keys and values ``[B, Hkv, S, D]`` of its layers.

        Args:
            ids: ``[B, T]``, the slots behind ``past``; with ``whole`` those from its slot ``at`` on.
            past: of the blocks before; empty before the first.
            block: tokens of the blocks that the window is attended in.
            whole: of the block, written in place where the window is, and attended behind ``past`` without a mask.
            at: where the window begins in it.
            store: return those of ``past`` and the window together; of the window alone if not.
        """
        official = self._bidirectional
        x = F.embedding(ids, self.weights.embedding)
        start = past[0][0].shape[2] if past else 0
        tables = self._tables(start + at, ids.shape[1], ids.device)
        mask = None
        if whole is None:  # made on the host
            blocks = torch.arange(start + ids.shape[1]) // block
            mask = (blocks[start:, None] >= blocks).to(ids.device)
        kept: Past = []
        for i, (layer, p) in enumerate(zip(self.weights.layers, official.layers, strict=True)):
            h = self._norm(x, layer.attn_norm)
            q, k, v = (official._heads(F.linear(h, w, b)) for w, b in zip((p.q, p.k, p.v), p.biases, strict=True))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            q, k = (t * tables[1] + _rotate_half(t) * tables[0] for t in (q, k))
            own = k, v
            if whole is not None:
                for old, new in zip(whole[i], own, strict=True):
                    old[:, :, at : at + ids.shape[1]] = new
                k, v = whole[i]
            if past:
                k, v = (torch.cat((old, new), dim=2) for old, new in zip(past[i], (k, v), strict=True))
            kept.append((k, v) if store else own)
            y = self._attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + F.linear(y, p.out)
            h = self._norm(x, layer.mlp_norm)
            x = x + F.linear(F.silu(F.linear(h, p.gate)) * F.linear(h, p.up), p.down)
        return F.linear(self._norm(x, self.weights.final_norm), official.head), kept

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """SDAR leaves out a mask that hides nothing, and looks at it in every layer."""
        c = self.config
        if self.is_sdar and mask is not None and bool(mask.all()):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=c.heads != c.kv_heads)
        if c.heads != c.kv_heads:
            k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """SDAR's is one kernel, which rounds once; that of Fast-dLLM v2 rounds before the weight."""
        if self.is_sdar:
            return F.rms_norm(x, (x.shape[-1],), weight, self.config.eps)
        return _rms_norm(x, weight, self.config.eps)

    def _tables(self, start: int, length: int, device: torch.device) -> Tables:
        """Made in each forward, and rounded to the model's dtype."""
        angles, dtype = self._bidirectional._angles(start + length, device)[start:], self.weights.embedding.dtype
        return angles.sin().to(dtype), angles.cos().to(dtype)


class OfficialBlocks:
    """Where the official loops stand: sequences and the cache of their finished blocks, which forwards advance.

    Attributes:
        x: ``[B, L]``, the sequences.
        forwards: that were made.

    Args:
        model: with the weights.
        x: as they are at the start.
        block, sub_block: tokens of a block, and of what is decoded of it at a time.
        block_cache: whether a forward recomputes its sub-block alone where that begins with a token (Fast-dLLM v2).
    """

    def __init__(
        self, model: OfficialBlockModel, x: Tensor, block: int, sub_block: int | None = None, *, block_cache: bool = False
    ) -> None:
        self.model, self.x, self.block, self.sub_block = model, x, block, sub_block or block
        self.block_cache = block_cache
        self.past: Past = []
        self._whole: Past | None = None
        self.forwards = 0

    @torch.no_grad()
    def store(self, end: int, *, first: bool = True) -> None:
        """A forward over all up to ``end`` that is not stored.

        Args:
            end: of the last block that is finished.
            first: whether its last row gives the token behind it (Fast-dLLM v2).
        """
        start = self.past[0][0].shape[2] if self.past else 0
        logits, self.past = self.model(self.x[:, start:end], self.past, self.block, store=True)
        self._whole, self.forwards = None, self.forwards + 1
        if first and not self.model.is_sdar:
            self.x[:, end] = logits[:, -1].argmax(-1)

    @torch.no_grad()
    def logits(self, start: int) -> Tensor:
        """``[B, T, V]``: of the block that begins at ``start``, over the blocks before."""
        return self.model(self.x[:, start : start + self.block], self.past, self.block)[0]

    @torch.no_grad()
    def step(self, start: int, *, threshold: float | None = None, count: int = 1, leftmost: bool = False) -> None:
        """A forward and its selection in the (sub-)block that begins at ``start``.

        Args:
            start: of what is decoded.
            threshold: commit what is above it, and Fast-dLLM v2 the surest, SDAR ``count`` at least.
            count: how many are committed.
            leftmost: SDAR commits the first ones instead of the surest.
        """
        end, begin = start + self.sub_block, start // self.block * self.block
        mask_id = self.model.config.mask_id
        current, window = self.x[:, start:end], slice(begin, begin + self.block)
        whole = None
        if self.block_cache and self._whole is not None and not bool((self.x[:, start] == mask_id).any()):
            whole, window = self._whole, slice(start, end)
        logits, own = self.model(self.x[:, window], self.past, self.block, whole=whole, at=start - begin if whole else 0)
        self._whole = own if self.block_cache and whole is None else self._whole
        self.forwards += 1
        masked = current == mask_id
        if self.model.is_sdar:
            sdar_commit(current, logits, masked, count, threshold, leftmost=leftmost)
            return
        p = F.softmax(shift(logits)[:, start - window.start : end - window.start], dim=-1)
        x0 = p.argmax(dim=-1)
        confidence = torch.gather(p, dim=-1, index=x0[..., None])[..., 0]
        confidence = torch.where(masked, confidence, -torch.inf)
        best = torch.topk(confidence, count if threshold is None else 1, dim=1).indices
        chosen = torch.zeros_like(masked).scatter_(1, best, True)
        if threshold is not None:
            chosen |= confidence > threshold
        chosen &= masked
        current[chosen] = x0[chosen]

    def masks(self, start: int, end: int) -> bool:
        """Whether a slot of ``[start, end)`` is masked."""
        return bool((self.x[:, start:end] == self.model.config.mask_id).any())


def sdar_commit(
    x: Tensor, logits: Tensor, masked: Tensor, count: int, threshold: float | None, *, leftmost: bool = False
) -> None:
    """Draws a token of each row of a block, of the likeliest one alone, and writes those that are chosen."""
    p = F.softmax(logits, dim=-1)
    least = torch.topk(logits, 1, dim=-1).values
    kept = F.softmax(torch.where(logits < least, -torch.inf, logits), dim=-1)
    x0 = torch.multinomial(kept.flatten(0, 1), 1).view_as(x)
    confidence = torch.gather(p, dim=-1, index=x0[..., None])[..., 0]
    confidence = torch.where(masked, confidence, -torch.inf)
    for row in range(len(x)):
        if leftmost:
            chosen = masked[row].nonzero()[:count, 0]
        else:
            chosen = torch.topk(confidence[row], count).indices
            if threshold is not None and int((confidence[row] > threshold).sum()) >= count:
                chosen = (confidence[row] > threshold).nonzero()[:, 0]
        chosen = chosen[masked[row, chosen]]
        x[row, chosen] = x0[row, chosen]


@torch.no_grad()
def official_v2(
    model: OfficialBlockModel,
    prompt: Tensor,
    blocks: int,
    block: int,
    sub_block: int,
    *,
    threshold: float | None = None,
    forwards: Sequence[int] = (),
    block_cache: bool = False,
    stop: int | None = None,
) -> tuple[Tensor, int]:
    """Fast-dLLM v2's ``generate``.

    Args:
        model: with the weights.
        prompt: ``[B, P]``; with ``stop`` of one row.
        blocks: to decode, the one that begins in the prompt among them.
        block, sub_block: tokens of each.
        threshold: commit what is above it.
        forwards: without a threshold, those of each sub-block that has a mask, beside those that store.
        block_cache: see :class:`OfficialBlocks`.
        stop: the token that ends a text; none if not given.

    Returns:
        The sequences, up to the end, and the number of forwards.
    """
    length = prompt.shape[1]
    first = length // block * block
    x = F.pad(prompt, (0, first + blocks * block + 1 - length), value=model.config.mask_id)
    loop, counts = OfficialBlocks(model, x, block, sub_block, block_cache=block_cache), list(forwards)
    if first:
        loop.store(first, first=first == length)

    def first_stop(start: int, end: int) -> int | None:
        if stop is None:
            return None
        stops = (x[0, start:end] == stop).nonzero()[:, 0]
        return start + int(stops[0]) if len(stops) else None

    def has_ended(known: int, end: int) -> bool:
        """Whether nothing is masked in front of the first end token behind ``known``."""
        at = first_stop(known, end)
        return at is not None and not loop.masks(known, at)

    for start in range(first, first + blocks * block, block):
        end = start + block
        known = start + int((x[0, start:end] != model.config.mask_id).sum())
        if has_ended(length, start + 1):
            break
        for begin in range(start, end, sub_block):
            if begin + sub_block <= known:
                continue
            left, steps = sub_block - max(known - begin, 0), counts.pop(0) if threshold is None else 0
            for i in counted():
                if not loop.masks(begin, begin + sub_block) or has_ended(known, end):
                    break
                loop.step(begin, threshold=threshold, count=left // steps + (i < left % steps) if steps else 1)
        if has_ended(known, end):
            break
        loop.store(end)
    at = first_stop(length, x.shape[1])
    return x if at is None else x[:, : at + 1], loop.forwards


@torch.no_grad()
def official_sdar(
    model: OfficialBlockModel,
    prompt: Tensor,
    gen_length: int,
    block: int,
    *,
    forwards: Sequence[int],
    threshold: float | None = None,
    leftmost: bool = False,
    stops: Collection[int] = (),
) -> tuple[Tensor, int]:
    """SDAR's ``block_diffusion_generate``.

    Args:
        model: with the weights.
        prompt: ``[B, P]``; with ``stops`` of one row.
        gen_length, block: as there.
        forwards: steps that each block is spread over, beside the one that stores it; as many are decoded as have a number.
        threshold: commit all above it instead, where they are more.
        leftmost: ``sequential``: commit the first ones instead of the surest.
        stops: the tokens that end a text; it is not cut.

    Returns:
        The sequences, up to the end of the last block, and the number of forwards.
    """
    length = prompt.shape[1]
    first, total = length // block * block, -(-(length + gen_length) // block) * block
    x = F.pad(prompt, (0, total - length), value=model.config.mask_id)
    loop = OfficialBlocks(model, x, block)
    if first:
        loop.store(first)
    for start, steps in zip(range(first, total, block), forwards, strict=False):
        for i in range(steps):
            if not loop.masks(start, start + block):
                break
            count = block // steps + (i < block % steps)
            loop.step(start, threshold=threshold, count=count, leftmost=leftmost)
        loop.store(start + block)
        if stops and any(bool((x[:, length:] == stop).any()) for stop in stops):
            return x[:, : start + block], loop.forwards
    return x, loop.forwards

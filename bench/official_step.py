"""The official Fast-dLLM code, re-created op for op: the baseline of the benches of whole steps and generations.

What it computes and in which order is that of the code for LLaDA and Dream in its version of 2025-11-28 (for LLaDA with the loop
of the paper's version, which always finishes a block): separate projections, the cache grown by ``torch.cat`` or written by
index, all keys rotated in every layer of every forward, PyTorch's attention, logits of the whole window, a float64 softmax
over them (Dream: one in the model's dtype), selection by sorting, and a loop on the host that reads the device. Written from a
description of it, not copied; where the description leaves a choice, the cheaper op is taken.
``tests/bench/test_bench_official.py``
shows that it gives the recorded tokens of the official code.

The matrices are views of our fused ones, so that both models fit a GPU together. Schedules can be imposed: with random weights
no confidence reaches a threshold, so a bench says how many forwards each block takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm_triton.models.transformer import Transformer

#: Keys and values of a layer. LLaDA keeps ``[B, Hkv, L, D]``, Dream ``[B, L, Hkv D]``, both before the rotation.
Past = list[tuple[Tensor, Tensor]]
#: Sine and cosine of positions, ``[L, D]``.
Tables = tuple[Tensor, Tensor]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@dataclass
class _Projections:
    """The matrices of a layer as the official modules hold them."""

    q: Tensor
    k: Tensor
    v: Tensor
    biases: tuple[Tensor | None, ...]
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class OfficialModel:
    """The official forward of a model whose weights are those of ``network``."""

    def __init__(self, network: Transformer) -> None:
        c = network.config
        self.config, self.weights = c, network.weights
        rows = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
        self.layers = []
        for layer in network.weights.layers:
            biases = (None, None, None) if layer.qkv_bias is None else tuple(layer.qkv_bias.split(rows))
            gate, up = layer.gate_up.weight.chunk(2)
            q, k, v = layer.qkv.weight.split(rows)
            projections = _Projections(q, k, v, biases, layer.attn_out.weight, gate, up, layer.down.weight)
            self.layers.append(projections)
        self.head = network.head
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, ids: Tensor, past: Past | None = None, replace: Tensor | None = None, *, use_cache: bool = False
    ) -> tuple[Tensor, Past]:
        """Logits ``[B, T, V]`` of a window, and the cache if it is used.

        Args:
            ids: ``[B, T]``.
            past: keys and values of earlier forwards, for the dual cache of the whole sequence, which is written in place.
            replace: ``[B, L]`` bool, the slots that the window replaces (dual cache); appended if not given.
            use_cache: return the keys and values.
        """
        c = self.config
        attend = self._attend_dream if c.architecture == "dream" else self._attend_llada
        x = F.embedding(ids, self.weights.embedding)
        cache: Past = []
        tables = self._dream_table(ids, past, replace) if c.architecture == "dream" else None
        for i, (layer, p) in enumerate(zip(self.weights.layers, self.layers, strict=True)):
            h = _rms_norm(x, layer.attn_norm, c.eps)
            q, k, v = (F.linear(h, w, b) for w, b in zip((p.q, p.k, p.v), p.biases, strict=True))
            attended, present = attend(q, k, v, None if past is None else past[i], replace, tables)
            if use_cache:
                cache.append(present)
            x = x + F.linear(attended, p.out)
            h = _rms_norm(x, layer.mlp_norm, c.eps)
            x = x + F.linear(F.silu(F.linear(h, p.gate)) * F.linear(h, p.up), p.down)
        return F.linear(_rms_norm(x, self.weights.final_norm, c.eps), self.head), cache

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.config.head_dim).transpose(1, 2)

    def _attend_llada(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None, _: Tables | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c, dtype = self.config, q.dtype
        q, k, v = self._heads(q, c.heads), self._heads(k, c.kv_heads), self._heads(v, c.kv_heads)
        if past is not None:
            past_k, past_v = past
            if replace is None:
                k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
            else:
                for row in range(len(q)):
                    at = replace[row].nonzero(as_tuple=True)[0]
                    past_k[row, :, at] = k[row]
                    past_v[row, :, at] = v[row]
                k, v = past_k, past_v
        present = (k, v)
        # In float32: all keys, and the queries at the end of the keys or of what was replaced.
        length, window = k.shape[-2], q.shape[-2]
        sin, cos = self._llada_table(length, q.device)
        end = length if replace is None else int(replace.nonzero(as_tuple=True)[1].max()) + 1
        q_, k_ = q.float(), k.float()
        q_ = q_ * cos[end - window : end] + _rotate_half(q_) * sin[end - window : end]
        k_ = k_ * cos[:length] + _rotate_half(k_) * sin[:length]
        q, k = q_.to(dtype), k_.to(dtype)
        if c.heads != c.kv_heads:
            k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).contiguous().view(*y.shape[:1], window, -1), present

    def _llada_table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sine and cosine, kept, and made again when a longer sequence comes."""
        if self._table is None or len(self._table[0]) < length:
            angles = self._angles(length, device)
            self._table = angles.sin(), angles.cos()
        return self._table

    def _angles(self, length: int, device: torch.device) -> Tensor:
        c = self.config
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float) / c.head_dim)
        angles = torch.einsum("i,j->ij", torch.arange(length, device=device, dtype=torch.float), frequency)
        return torch.cat((angles, angles), dim=-1)

    def _dream_table(self, ids: Tensor, past: Past | None, replace: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sine and cosine of all positions, made once a forward and rounded to the model's dtype."""
        length = ids.shape[1] if past is None else past[0][0].shape[1] + (ids.shape[1] if replace is None else 0)
        angles = self._angles(length, ids.device)
        dtype = self.weights.embedding.dtype
        return angles.sin().to(dtype), angles.cos().to(dtype)

    def _attend_dream(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None, tables: Tables | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c = self.config
        end = None
        if past is not None:
            past_k, past_v = past
            if replace is None:
                k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
            else:
                at = replace.nonzero(as_tuple=True)[1]
                past_k[:, at] = k
                past_v[:, at] = v
                k, v, end = past_k, past_v, int(at.max()) + 1
        present = (k, v)
        window, length = q.shape[1], k.shape[1]
        end = end or length
        q, k, v = self._heads(q, c.heads), self._heads(k, c.kv_heads), self._heads(v, c.kv_heads)
        assert tables is not None
        sin, cos = tables
        q = q * cos[end - window : end] + _rotate_half(q) * sin[end - window : end]
        k = k * cos[:length] + _rotate_half(k) * sin[:length]
        k, v = (
            t[:, :, None].expand(-1, -1, c.heads // c.kv_heads, -1, -1).reshape(len(t), c.heads, length, c.head_dim)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k.contiguous(), v.contiguous())
        return y.transpose(1, 2).contiguous().view(*y.shape[:1], window, -1), present


# LLaDA: selection and the three loops.


def _transfer_counts(masked: Tensor, steps: int) -> Tensor:
    """``[B, steps]``: how many tokens each step commits when a block is spread evenly."""
    count = masked.sum(dim=1, keepdim=True)
    base, remainder = count // steps, count % steps
    return base + (torch.arange(steps, device=masked.device) < remainder).to(torch.int64)


def llada_select(
    logits: Tensor, eligible: Tensor, x: Tensor, count: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """The likeliest token of each slot, and which slots take theirs: the ``count`` surest, or all that reach ``threshold``."""
    x0 = torch.argmax(logits, dim=-1)
    p = F.softmax(logits.to(torch.float64), dim=-1)
    confidence = torch.gather(p, dim=-1, index=x0[..., None])[..., 0]
    x0 = torch.where(eligible, x0, x)
    confidence = torch.where(eligible, confidence, torch.finfo(torch.float64).min)
    if threshold is not None:
        best = torch.zeros_like(eligible).scatter_(1, confidence.argmax(dim=1, keepdim=True), True)
        return x0, ((confidence >= threshold) | best) & eligible
    assert count is not None
    order = torch.sort(confidence, dim=1, descending=True)[1]
    first = torch.arange(x.shape[1], device=x.device)[None] < count[:, None]
    return x0, torch.zeros_like(eligible).scatter_(1, order, first.expand_as(eligible)) & eligible


@torch.no_grad()
def llada_generate(
    model: OfficialModel,
    prompt: Tensor,
    gen_length: int,
    block_length: int,
    cache: str,
    *,
    threshold: float | None = None,
    forwards: int | Sequence[int] = 1,
    blocks: int | None = None,
    most: int | None = None,
) -> tuple[Tensor, int]:
    """``generate``, ``generate_with_prefix_cache`` and ``generate_with_dual_cache``.

    Args:
        model: of a LLaDA.
        prompt: ``[B, P]``.
        gen_length, block_length: as there.
        cache: ``none``, ``prefix`` or ``dual``.
        threshold: commit what reaches it; otherwise each block is spread over ``forwards``.
        forwards: of each block, or of all.
        blocks: stop after so many (the official code has no such stop).
        most: stop after so many forwards.

    Returns:
        The sequences ``[B, P + gen_length]``, and the number of forwards.
    """
    mask_id, length = model.config.mask_id, prompt.shape[1]
    x = torch.full((len(prompt), length + gen_length), mask_id, dtype=torch.long, device=prompt.device)
    x[:, :length] = prompt
    nfe = 0
    for block in range(blocks or gen_length // block_length):
        start, end = length + block * block_length, length + (block + 1) * block_length
        counts = None
        if threshold is None:
            counts = _transfer_counts(x[:, start:end] == mask_id, forwards if isinstance(forwards, int) else forwards[block])
        i, past, replace = 0, None, None
        while True:
            first = 0 if cache == "none" or i == 0 else start
            last = end if cache == "dual" and i else x.shape[1]
            logits, present = model(x[:, first:last], past, replace, use_cache=cache != "none" and i == 0)
            nfe += 1
            eligible = x[:, first:last] == mask_id
            eligible[:, end - first :] = False
            x0, chosen = llada_select(logits, eligible, x[:, first:last], None if counts is None else counts[:, i], threshold)
            x[:, first:last] = torch.where(chosen, x0, x[:, first:last])
            i += 1
            if (x[:, start:end] == mask_id).sum() == 0:
                break
            if nfe == most:
                return x, nfe
            if cache == "prefix" and i == 1:
                past = [(k[:, :, :start], v[:, :, :start]) for k, v in present]
            elif cache == "dual" and i == 1:
                past, replace = present, torch.zeros_like(x, dtype=torch.bool)
                replace[:, start:end] = True
    return x, nfe


# Dream: sampling in the model's dtype, shifted logits, the loops without a cache and over blocks.


def dream_sample(logits: Tensor, *, neg_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Confidence and token of rows of logits, at temperature 0."""
    p = torch.softmax(logits, dim=-1)
    confidence, x0 = p.max(dim=-1)
    if neg_entropy:
        confidence = torch.sum(p * torch.log(p + 1e-10), dim=-1)
    return confidence, x0


def shift(logits: Tensor) -> Tensor:
    """The logits of a window, each moved to the slot that it predicts."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def dream_commit(x: Tensor, logits: Tensor, block_length: int, mask_id: int, count: int, threshold: float | None, *,
                  by_entropy: bool = True) -> None:  # fmt: skip
    """Samples the masked rows of a window and writes the ``count`` surest of its first block; with a threshold the surest
    and those of the others that reach it.
    """
    masked = x == mask_id
    confidence, x0 = dream_sample(logits[masked], neg_entropy=by_entropy and threshold is None)
    all_confidence = torch.full(x.shape, -torch.inf, device=x.device, dtype=logits.dtype)
    all_confidence[masked] = confidence
    all_confidence[:, block_length:] = -torch.inf
    x_ = torch.full_like(x, mask_id)
    x_[masked] = x0
    surest, order = torch.topk(all_confidence, count)
    if threshold is not None:
        keep = surest[0] >= threshold
        keep[0] = True
        order = order[:, keep]
    chosen = torch.zeros_like(masked).scatter_(1, order, True)
    x[chosen] = x_[chosen]


@torch.no_grad()
def dream_generate(
    model: OfficialModel,
    prompt: Tensor,
    gen_length: int,
    block_length: int,
    cache: str,
    *,
    threshold: float | None = None,
    forwards: int | Sequence[int] = 1,
    blocks: int | None = None,
    most: int | None = None,
) -> tuple[Tensor, int]:
    """Dream's ``diffusion_generate``: without a cache with ``alg="maskgit_plus"``, with one block by block.

    Args:
        model: of a Dream.
        prompt: ``[1, P]``; the official loops are for one row.
        gen_length, block_length: as there; without a cache there are no blocks.
        cache: ``none``, ``prefix`` or ``dual``.
        threshold: over a cache, commit what reaches it (``alg="confidence_threshold"``).
        forwards: without a threshold, of the generation (``none``), of each block, or of all blocks.
        blocks: stop after so many (the official code has no such stop).
        most: stop after so many forwards.

    Returns:
        The sequences ``[1, P + gen_length]``, and the number of forwards.
    """
    mask_id, length = model.config.mask_id, prompt.shape[1]
    x = F.pad(prompt, (0, gen_length), value=mask_id)
    if cache == "none":
        assert isinstance(forwards, int)
        timesteps = torch.linspace(1, 1e-3, forwards + 1, device=x.device)
        for i in range(min(forwards, most or forwards)):
            logits = shift(model(x)[0])
            masks = (x == mask_id).sum() / len(x)
            count = int(masks * (1 - timesteps[i + 1] / timesteps[i]) if i < forwards - 1 else masks)
            if count > 0:
                dream_commit(x, logits, x.shape[1], mask_id, count, None, by_entropy=False)
        return x, min(forwards, most or forwards)

    nfe = 0
    for block in range(blocks or gen_length // block_length):
        start, end = length + block * block_length, length + (block + 1) * block_length
        logits, past = model(x, use_cache=True)
        nfe += 1
        _, x0 = dream_sample(shift(logits))
        x[:, start] = x0[:, start]
        replace, stop = None, x.shape[1]
        if cache == "prefix":
            past = [(k[:, :start], v[:, :start]) for k, v in past]
        else:
            replace, stop = torch.zeros_like(x, dtype=torch.bool), end
            replace[:, start:end] = True
        steps = 0 if threshold is not None else forwards if isinstance(forwards, int) else forwards[block]
        timesteps = torch.linspace(1, 1e-3, steps + 1, device=x.device)
        i = 1
        while True:
            window = x[:, start:stop]
            logits = shift(model(window, past, replace)[0])
            nfe += 1
            left = int((window[:, :block_length] == mask_id).sum())
            count = left
            if threshold is None and i < steps - 1:
                count = int(left * (1 - timesteps[i + 1] / timesteps[i]))
            dream_commit(window, logits, block_length, mask_id, count, threshold)
            i += 1
            if (window[:, :block_length] == mask_id).sum() == 0 or (threshold is None and i >= steps):
                break
            if nfe == most:
                return x, nfe
    return x, nfe

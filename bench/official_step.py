"""The official Fast-dLLM code, re-created op for op: the baseline of the benches of whole steps and generations.

What it computes and in which order is that of the code for LLaDA and Dream in its version of 2025-11-28 (for LLaDA with the loop
of the paper's version, which always finishes a block): separate projections, the cache grown by ``torch.cat`` or written by
index, all keys rotated in every layer of every forward, PyTorch's attention, logits of the whole window, a float64 softmax
over them (Dream: one in the model's dtype), selection by sorting, and a loop on the host that reads the device. Written from a
description of it, not copied; where the description leaves a choice, the cheaper op is taken.
``tests/bench/test_bench_official.py`` shows that it gives the recorded tokens of the official code.

The matrices are views of our fused ones, so that both models fit a GPU together. Schedules can be imposed: with random weights
no confidence reaches a threshold, so a bench says how many forwards each block takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        self.config, self.weights, self.is_dream = c, network.weights, c.architecture == "dream"
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
        x = F.embedding(ids, self.weights.embedding)
        cache: Past = []
        length = 0 if past is None else past[0][0].shape[1 if self.is_dream else 2]
        tables = self._tables(length if replace is not None else length + ids.shape[1], ids.device)
        for i, (layer, p) in enumerate(zip(self.weights.layers, self.layers, strict=True)):
            h = _rms_norm(x, layer.attn_norm, c.eps)
            q, k, v = (F.linear(h, w, b) for w, b in zip((p.q, p.k, p.v), p.biases, strict=True))
            attended, present = self._attend(q, k, v, None if past is None else past[i], replace, tables)
            if use_cache:
                cache.append(present)
            x = x + F.linear(attended, p.out)
            h = _rms_norm(x, layer.mlp_norm, c.eps)
            x = x + F.linear(F.silu(F.linear(h, p.gate)) * F.linear(h, p.up), p.down)
        return F.linear(_rms_norm(x, self.weights.final_norm, c.eps), self.head), cache

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None, tables: Tables
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All keys are rotated in every forward: LLaDA's in float32, Dream's in the model's dtype."""
        c, dtype = self.config, q.dtype
        if not self.is_dream:
            k, v = self._heads(k), self._heads(v)
        if past is not None and replace is None:
            k, v = (torch.cat((old, new), dim=1 if self.is_dream else 2) for old, new in zip(past, (k, v), strict=True))
        elif past is not None and replace is not None:
            for old, new in zip(past, (k, v), strict=True):
                if self.is_dream:
                    old[:, replace.nonzero(as_tuple=True)[1]] = new
                else:
                    for row in range(len(q)):
                        old[row, :, replace[row].nonzero(as_tuple=True)[0]] = new[row]
            k, v = past
        present = (k, v)
        if self.is_dream:
            k, v = self._heads(k), self._heads(v)
        q = self._heads(q)
        window, length, (sin, cos) = q.shape[2], k.shape[2], tables
        # The queries are at the end of the keys, or of what was replaced.
        end = length if replace is None else int(replace.nonzero(as_tuple=True)[1].max()) + 1
        q, k = q.to(sin.dtype), k.to(sin.dtype)
        q = q * cos[end - window : end] + _rotate_half(q) * sin[end - window : end]
        k = k * cos[:length] + _rotate_half(k) * sin[:length]
        q, k = q.to(dtype), k.to(dtype)
        if c.heads != c.kv_heads:
            k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).contiguous().view(*y.shape[:1], window, -1), present

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def _tables(self, length: int, device: torch.device) -> Tables:
        """LLaDA's are kept until a longer sequence comes; Dream's are made in each forward and rounded to the model's dtype."""
        if self.is_dream:
            angles, dtype = self._angles(length, device), self.weights.embedding.dtype
            return angles.sin().to(dtype), angles.cos().to(dtype)
        if self._table is None or len(self._table[0]) < length:
            angles = self._angles(length, device)
            self._table = angles.sin(), angles.cos()
        return self._table

    def _angles(self, length: int, device: torch.device) -> Tensor:
        c = self.config
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float) / c.head_dim)
        angles = torch.einsum("i,j->ij", torch.arange(length, device=device, dtype=torch.float), frequency)
        return torch.cat((angles, angles), dim=-1)


@torch.no_grad()
def official_generate(
    model: OfficialModel,
    prompt: Tensor,
    gen_length: int,
    block_length: int,
    cache: str,
    *,
    threshold: float | None = None,
    forwards: Sequence[int] = (),
    most: int | None = None,
) -> tuple[Tensor, int]:
    """LLaDA's ``generate`` with each cache, and Dream's ``diffusion_generate``: without a cache ``alg="maskgit_plus"``.

    Args:
        model: with the weights.
        prompt: ``[B, P]``. With a threshold Dream's loop is for one row, and with a dual cache it raises for more, as there.
        gen_length, block_length: as there; Dream without a cache has no blocks.
        cache: ``none``, ``prefix`` or ``dual``.
        threshold: commit what reaches it, in all blocks (Dream: ``alg="confidence_threshold"``, over a cache).
        forwards: without a threshold, those of each block; as many blocks are decoded as have a number.
        most: stop after so many forwards.

    Returns:
        The sequences ``[B, P + gen_length]``, and the number of forwards.
    """
    x = F.pad(prompt, (0, gen_length), value=model.config.mask_id)
    if model.is_dream and cache == "none":
        blocks = [dream_whole(model, x, sum(forwards))]
    else:
        counts = [None] * (gen_length // block_length) if threshold is not None else forwards
        block, start = dream_block if model.is_dream else llada_block, prompt.shape[1]
        blocks = [
            block(model, x, start + i * block_length, block_length, cache, threshold, count) for i, count in enumerate(counts)
        ]
    nfe = 0
    while blocks:
        for _ in blocks.pop(0):  # whose cache goes with it
            nfe += 1
            if nfe == most:
                return x, nfe
    return x, nfe


# LLaDA: selection and the loop of a block.


def _transfer_counts(masked: Tensor, steps: int) -> Tensor:
    """``[B, steps]``: how many tokens each step commits when a block is spread evenly."""
    count = masked.sum(dim=1, keepdim=True)
    base, remainder = count // steps, count % steps
    return base + (torch.arange(steps, device=masked.device) < remainder).to(torch.int64)


def llada_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each slot and its probability, by a float64 softmax over the whole vocabulary."""
    x0 = torch.argmax(logits, dim=-1)
    p = F.softmax(logits.to(torch.float64), dim=-1)
    return x0, torch.gather(p, dim=-1, index=x0[..., None])[..., 0]


def llada_select(
    x0: Tensor, confidence: Tensor, eligible: Tensor, x: Tensor, count: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """The token of each slot, and which slots take theirs: the ``count`` surest, or all that reach ``threshold``."""
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
def llada_block(
    model: OfficialModel, x: Tensor, start: int, length: int, cache: str, threshold: float | None, forwards: int | None
) -> Iterator[None]:
    """Decodes a block of ``x`` in place, a forward at a time; arguments as :func:`official_generate` takes them."""
    mask_id, end = model.config.mask_id, start + length
    counts = None if forwards is None else _transfer_counts(x[:, start:end] == mask_id, forwards)
    i, past, replace, done = 0, None, None, False
    while not done:
        first = 0 if cache == "none" or i == 0 else start
        last = end if cache == "dual" and i else x.shape[1]
        window = x[:, first:last]
        logits, present = model(window, past, replace, use_cache=cache != "none" and i == 0)
        eligible = window == mask_id
        eligible[:, end - first :] = False
        count = None if counts is None else counts[:, i]
        x0, chosen = llada_select(*llada_confidence(logits), eligible, window, count, threshold)
        x[:, first:last] = torch.where(chosen, x0, window)
        if cache == "prefix" and i == 0:
            past = [(k[:, :, :start], v[:, :, :start]) for k, v in present]
        elif cache == "dual" and i == 0:
            past, replace = present, torch.zeros_like(x, dtype=torch.bool)
            replace[:, start:end] = True
        i += 1
        done = bool((x[:, start:end] == mask_id).sum() == 0)
        yield


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
    """Samples the masked slots of a window (without a threshold those of its first block) and writes the ``count`` surest of
    its first block in each row; with a threshold the surest and those of the others that reach it.
    """
    masked = x == mask_id
    if threshold is None:
        masked[:, block_length:] = False
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
def dream_whole(model: OfficialModel, x: Tensor, forwards: int) -> Iterator[None]:
    """Decodes ``x`` in place without a cache and without blocks, a forward at a time."""
    mask_id = model.config.mask_id
    timesteps = torch.linspace(1, 1e-3, forwards + 1, device=x.device)
    for i in range(forwards):
        logits = shift(model(x)[0])
        masks = (x == mask_id).sum() / len(x)
        count = int(masks * (1 - timesteps[i + 1] / timesteps[i]) if i < forwards - 1 else masks)
        if count > 0:
            dream_commit(x, logits, x.shape[1], mask_id, count, None, by_entropy=False)
        yield


@torch.no_grad()
def dream_block(
    model: OfficialModel, x: Tensor, start: int, length: int, cache: str, threshold: float | None, forwards: int | None
) -> Iterator[None]:
    """Decodes a block of ``x`` in place, a forward at a time; arguments as :func:`official_generate` takes them."""
    mask_id, steps = model.config.mask_id, forwards or 0
    logits, past = model(x, use_cache=True)
    _, x0 = dream_sample(shift(logits))
    x[:, start] = x0[:, start]
    replace, stop = None, x.shape[1]
    if cache == "prefix":
        past = [(k[:, :start], v[:, :start]) for k, v in past]
    else:
        replace, stop = torch.zeros_like(x, dtype=torch.bool), start + length
        replace[:, start:stop] = True
    timesteps = torch.linspace(1, 1e-3, steps + 1, device=x.device)
    yield
    i, done = 1, False
    while not done:
        window = x[:, start:stop]
        logits = shift(model(window, past, replace)[0])
        left = (window[:, :length] == mask_id).sum()
        if threshold is None:
            left = left / len(window)  # as many in every row
        share = 1 - timesteps[i + 1] / timesteps[i] if threshold is None and i < steps - 1 else 1
        count = int(left * share)
        dream_commit(window, logits, length, mask_id, count, threshold)
        i += 1
        done = bool((window[:, :length] == mask_id).sum() == 0) or (threshold is None and i >= steps)
        yield

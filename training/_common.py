"""What the training scripts share: the transformer, batches of word problems, and the loop over steps."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdllm_triton.models import llada
from fastdllm_triton.models.config import NameMap
from fastdllm_triton.reference.rms_norm import rms_norm
from fastdllm_triton.reference.swiglu import swiglu
from fastdllm_triton.tiny.problems import MAX_ANSWER_TOKENS, problems
from fastdllm_triton.tiny.vocabulary import EOS, MASK, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, but the loss."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 384
    head_norms: bool = False
    rope_theta: float = 10000.0
    eps: float = 1e-5
    max_length: int = 512
    steps: int = 3000
    batch: int = 64
    lr: float = 1.5e-3
    muon_lr: float = 3e-3
    warmup: int = 100
    flat: float = 0.4
    weight_decay: float = 0.01
    ema: float = 0.998
    seed: int = 0


class Block(nn.Module):
    """One layer. ``head_norms`` normalises each head of q and k before the rotation, as Qwen3 does."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.attn_norm, self.mlp_norm = nn.Parameter(torch.ones(r.width)), nn.Parameter(torch.ones(r.width))
        self.rows = (r.heads * r.head_dim, r.kv_heads * r.head_dim, r.kv_heads * r.head_dim)
        self.qkv, self.attn_out = nn.Linear(r.width, sum(self.rows), bias=False), nn.Linear(self.rows[0], r.width, bias=False)
        self.gate_up, self.down = nn.Linear(r.width, 2 * r.mlp, bias=False), nn.Linear(r.mlp, r.width, bias=False)
        if r.head_norms:
            self.q_norm, self.k_norm = (nn.Parameter(torch.ones(r.head_dim)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        h = rms_norm(x, self.attn_norm, self.r.eps)
        q, k, v = (part.unflatten(-1, (-1, self.r.head_dim)).transpose(1, 2) for part in self.qkv(h).split(self.rows, dim=-1))
        if self.r.head_norms:
            q, k = rms_norm(q, self.q_norm, self.r.eps), rms_norm(k, self.k_norm, self.r.eps)
        # Spelled out: at this size faster on a CPU than the backward of scaled_dot_product_attention.
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if self.r.kv_heads < self.r.heads:
            k, v = (t.repeat_interleave(self.r.heads // self.r.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.mT / math.sqrt(self.r.head_dim)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
        x = x + self.attn_out((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(swiglu(self.gate_up(rms_norm(x, self.mlp_norm, self.r.eps))))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``reference.rope_kv_write.rotate`` with its angles given: ``x [B, H, T, D]``, ``cos`` and ``sin`` ``[B, 1, T, D/2]``."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Transformer(nn.Module):
    """A pre-norm transformer as a plain differentiable module."""

    def __init__(self, r: Recipe, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, r.width)
        self.layers = nn.ModuleList(Block(r) for _ in range(r.layers))
        self.final_norm = nn.Parameter(torch.ones(r.width))
        self.head = nn.Linear(r.width, vocabulary, bias=False)
        self.r = r
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            ids: ``[B, T]``.
            cos: ``[B, 1, T, D/2]``, with ``sin`` what ``angles`` returns.
            sin: as ``cos``.
            seen: ``[B, T, T]``, which slots (last axis) the attention of a slot sees; all of them if not given.

        Returns:
            ``[B, T, V]``.
        """
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, seen)
        return self.head(rms_norm(x, self.final_norm, self.r.eps))


def angles(position: Tensor, r: Recipe) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at ``position [B, T]``. Apart from the model, which is compiled: it would compute them in
    every layer, forward and backward.
    """
    angle = position[:, None, :, None] / r.rope_theta ** (torch.arange(0, r.head_dim, 2) / r.head_dim)
    return angle.cos(), angle.sin()


#: From ids ``[B, T]``, positions ``[B, T]`` and what each slot sees (``[B, T, T]``; None: everything) to logits ``[B, T, V]``.
Logits = Callable[[Tensor, Tensor, Tensor | None], Tensor]

#: From ``(logits of, ids [B, T], prompt length, mask id, generator)`` to a loss.
Loss = Callable[[Logits, Tensor, int, int, torch.Generator], Tensor]


def batches(r: Recipe) -> Iterator[tuple[Tensor, int]]:
    """``(ids [batch, T], prompt length)`` without end. A batch holds one number of steps, so nothing is padded but the
    answers, with end tokens, as LLaDA's fine-tuning does: the model learns to end.
    """
    tokenizer = build_tokenizer()
    stream = problems(r.seed, test=False)
    pools: dict[int, list[list[int]]] = {}
    while True:
        chunk = list(islice(stream, 64 * r.batch))
        prompts = tokenizer([p.prompt for p in chunk]).input_ids
        answers = tokenizer([p.answer for p in chunk]).input_ids
        for prompt, answer in zip(prompts, answers, strict=True):
            pool = pools.setdefault(len(prompt), [])
            pool.append(prompt + answer + [tokenizer.eos_token_id] * (MAX_ANSWER_TOKENS - len(answer)))
            if len(pool) == r.batch:
                yield torch.tensor(pool), len(prompt)
                pool.clear()


def stratified(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise levels t ~ U(0, 1), one in each of equal strata: that lowers the variance of a batch's loss. Not below 1/1000."""
    n = math.prod(shape)
    t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return t.clamp(min=1e-3).view(shape)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """``[B, T]`` of ``logits [B, T, V]`` against ``ids [B, T]``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def train(
    r: Recipe,
    loss_of: Loss,
    *,
    compiled: bool,
    start: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
    log: int = 100,
) -> tuple[Transformer, list[float]]:
    """Runs the recipe.

    Args:
        r: the recipe.
        loss_of: the objective.
        compiled: whether to run the model through ``torch.compile``.
        start: weights to begin with, from :func:`read`; random ones if not given. Norms that they lack begin with ones.
        save: called with the averaged weights every 1,000 steps and at the end.
        log: steps between two lines of progress.

    Returns:
        the model holding the averaged weights, and the loss of every step.
    """
    torch.manual_seed(r.seed)
    generator = torch.Generator().manual_seed(r.seed)
    tokenizer = build_tokenizer()
    mask = tokenizer.convert_tokens_to_ids(MASK)
    model = Transformer(r, len(tokenizer))
    if start is not None:
        lacking = model.load_state_dict(start, strict=False)
        assert not lacking.unexpected_keys and all(name.endswith("_norm") for name in lacking.missing_keys), lacking
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.startswith("layers.")]
    # Muon is for the matrices of the layers; its authors leave embedding, head and vectors to AdamW.
    optimizers = (
        torch.optim.Muon(matrices, lr=r.muon_lr, weight_decay=r.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=r.lr, betas=(0.9, 0.98), weight_decay=r.weight_decay, fused=True),
    )

    def rate(step: int) -> float:
        """Warm-up, flat, then linear to zero."""
        return min(1.0, (step + 1) / r.warmup, (r.steps - step) / (r.steps * (1 - r.flat)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Without its patterns: they would turn the attention into scaled_dot_product_attention.
    run = torch.compile(model, dynamic=False, options={"pattern_matcher": False}) if compiled else model
    losses: list[float] = []
    begun, cpu = time.perf_counter(), time.process_time()
    for step, (ids, prompt) in enumerate(islice(batches(r), r.steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(lambda x, position, seen: run(x, *angles(position, r), seen), ids, prompt, mask, generator)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - min(r.ema, step / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % log == 0:
            seconds = f"{time.perf_counter() - begun:.0f} CPU {time.process_time() - cpu:.0f}"
            print(f"step {step + 1} loss {sum(losses[-log:]) / log:.4f} seconds {seconds}", flush=True)
        if save is not None and ((step + 1) % 1000 == 0 or step + 1 == r.steps):
            save(average)
    model.load_state_dict(average)
    return model, losses


def _parts(name: str, rows: int, names: NameMap, r: Recipe) -> list[tuple[str, int]]:
    """The tensors of a checkpoint that are stacked in a parameter of :class:`Transformer`, and how many rows each has."""
    field, *rest = name.removesuffix(".weight").split(".")
    if not rest:
        return [(getattr(names, field), rows)]
    layer, field = rest
    parts = names.layer[field]
    shares = (r.heads, r.kv_heads, r.kv_heads) if field == "qkv" else (1,) * len(parts)
    return [(part.format(i=layer), rows * share // sum(shares)) for part, share in zip(parts, shares, strict=True)]


def write(out: Path, config: dict[str, object], names: NameMap, state: dict[str, Tensor], r: Recipe) -> None:
    """Writes a checkpoint and its tokenizer.

    Args:
        out: the folder.
        config: ``config.json``.
        names: the family's names.
        state: parameters by the names of :class:`Transformer`.
        r: the recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts, rows = zip(*_parts(name, len(tensor), names, r), strict=True)
        tensors |= {part: piece.clone() for part, piece in zip(parts, tensor.split(rows), strict=True)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    build_tokenizer().save_pretrained(out)


def read(folder: Path, names: NameMap, r: Recipe) -> dict[str, Tensor]:
    """The parameters that :func:`write` wrote, by the names of :class:`Transformer`, but norms of heads that ``names`` lacks."""
    tensors = load_file(folder / "model.safetensors")
    named = Transformer(r, len(build_tokenizer())).named_parameters()
    shared = {name: len(p) for name, p in named if not name.endswith(("q_norm", "k_norm")) or "q_norm" in names.layer}
    return {name: torch.cat([tensors[part] for part, _ in _parts(name, rows, names, r)]) for name, rows in shared.items()}


def special_ids() -> dict[str, int]:
    """What a config says of the vocabulary: its size, the end token, the mask."""
    tokenizer = build_tokenizer()
    mask, eos = (tokenizer.convert_tokens_to_ids(token) for token in (MASK, EOS))
    return {"vocab_size": len(tokenizer), "eos_token_id": eos, "pad_token_id": eos, "mask_token_id": mask}


def main(
    description: str | None, r: Recipe, loss_of: Loss, config: Callable[[Recipe], dict[str, object]], names: NameMap
) -> None:
    """The command line of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint and its tokenizer")
    parser.add_argument("--start", type=Path, help="folder of a checkpoint in LLaDA's format, of the same shapes, to begin with")
    parser.add_argument("--steps", type=int, default=r.steps)
    parser.add_argument("--seed", type=int, default=r.seed)
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    r = replace(r, steps=given.steps, seed=given.seed)
    print(json.dumps(asdict(r)), flush=True)
    start = None if given.start is None else read(given.start, llada.NAMES, r)
    train(r, loss_of, compiled=not given.no_compile, start=start, save=lambda state: write(given.out, config(r), names, state, r))

"""Trains the built-in model: LLaDA's objective on the word problems of ``fastdllm_triton/tiny/problems.py``.

    python training/train_tiny.py --out fastdllm_triton/tiny

Needs a C++ compiler for ``torch.compile`` (``--no-compile`` does without, at half the speed). One run from the fixed seed
takes minutes on a few CPU cores; ``MODEL_CARD.md`` in the output folder's package says what it took and what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdllm_triton.reference.rms_norm import rms_norm
from fastdllm_triton.reference.rope_kv_write import rotate
from fastdllm_triton.reference.swiglu import swiglu
from fastdllm_triton.tiny.problems import MAX_ANSWER_TOKENS, problems
from fastdllm_triton.tiny.vocabulary import EOS, MASK, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    rope_theta: float = 10000.0
    eps: float = 1e-5
    max_length: int = 512
    steps: int = 10_000
    batch: int = 64
    lr: float = 2.5e-3
    warmup: int = 200
    flat: float = 0.6
    weight_decay: float = 0.01
    ema: float = 0.998
    seed: int = 0


class Block(nn.Module):
    """One layer, parameters named as in LLaDA's checkpoints."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.attn_norm, self.ff_norm = nn.Parameter(torch.ones(r.width)), nn.Parameter(torch.ones(r.width))
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(r.width, r.width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(r.width, r.mlp, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(r.mlp, r.width, bias=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        h = rms_norm(x, self.attn_norm, self.r.eps)
        q, k, v = (p(h).unflatten(-1, (self.r.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(t, position, self.r.rope_theta).transpose(1, 2) for t in (q, k))
        # Spelled out: at this size faster on a CPU than the backward of scaled_dot_product_attention.
        weights = torch.softmax((q @ k.mT) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + self.attn_out((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
        h = rms_norm(x, self.ff_norm, self.r.eps)
        return x + self.ff_out(swiglu(torch.cat((self.ff_proj(h), self.up_proj(h)), dim=-1)))


class TrainableLLaDA(nn.Module):
    """The architecture of LLaDA (arXiv 2502.09992) as a plain differentiable module: ``[B, T]`` ids to ``[B, T, V]`` logits."""

    def __init__(self, r: Recipe, vocabulary: int) -> None:
        super().__init__()
        self.r = r
        self.wte = nn.Embedding(vocabulary, r.width)
        self.blocks = nn.ModuleList(Block(r) for _ in range(r.layers))
        self.ln_f = nn.Parameter(torch.ones(r.width))
        self.ff_out = nn.Linear(r.width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        for block in self.blocks:
            x = block(x, position)
        return self.ff_out(rms_norm(x, self.ln_f, self.r.eps))

    def checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module under the names of LLaDA's checkpoints."""
        names = {name: name if name.endswith(".weight") else f"{name}.weight" for name in state}
        return {f"model.transformer.{names[name]}": tensor.contiguous() for name, tensor in state.items()}


def config(r: Recipe, vocabulary: int, eos: int, mask: int) -> dict[str, object]:
    """``config.json`` in LLaDA's format."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "d_model": r.width,
        "n_layers": r.layers,
        "n_heads": r.heads,
        "n_kv_heads": r.heads,
        "mlp_hidden_size": r.mlp,
        "vocab_size": vocabulary,
        "embedding_size": vocabulary,
        "max_sequence_length": r.max_length,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": r.rope_theta,
        "rms_norm_eps": r.eps,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "mask_token_id": mask,
        "torch_dtype": "float32",
    }


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


def loss_of(model: nn.Module, ids: Tensor, prompt: int, mask: int, generator: torch.Generator) -> Tensor:
    """LLaDA's bound (arXiv 2502.09992, equation 3): each answer token masked with probability t ~ U(0, 1), cross-entropy of
    the masked ones weighted by 1/t. The t of a batch are stratified, which lowers the variance of the estimate.
    """
    rows = len(ids)
    t = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    t = t.clamp(min=1e-3)[:, None]
    masked = torch.rand(ids.shape, generator=generator) < t
    masked[:, :prompt] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids.masked_fill(masked, mask))[:, prompt:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, prompt:].flatten(), reduction="none").view(rows, -1)
    return (loss * masked[:, prompt:] / t).mean()


def train(r: Recipe, *, compiled: bool, out: Path | None = None, log: int = 100) -> tuple[TrainableLLaDA, list[float]]:
    """Runs the recipe.

    Returns:
        the model holding the averaged weights, and the loss of every step.
    """
    torch.manual_seed(r.seed)
    generator = torch.Generator().manual_seed(r.seed)
    tokenizer = build_tokenizer()
    mask, eos = (tokenizer.convert_tokens_to_ids(token) for token in (MASK, EOS))
    model = TrainableLLaDA(r, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=r.lr, betas=(0.9, 0.98), weight_decay=r.weight_decay, fused=True)

    def rate(step: int) -> float:
        """Warm-up, flat, then linear to zero."""
        return min(1.0, (step + 1) / r.warmup, (r.steps - step) / (r.steps * (1 - r.flat)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = torch.compile(model, dynamic=False) if compiled else model
    losses: list[float] = []
    start = time.perf_counter()

    def save() -> None:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_file(model.checkpoint(average), out / "model.safetensors", metadata={"format": "pt"})
            (out / "config.json").write_text(json.dumps(config(r, len(tokenizer), eos, mask), indent=1) + "\n")
            tokenizer.save_pretrained(out)

    for step, (ids, prompt) in enumerate(islice(batches(r), r.steps)):
        loss = loss_of(run, ids, prompt, mask, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - min(r.ema, step / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % log == 0:
            recent = sum(losses[-log:]) / log
            print(f"step {step + 1} loss {recent:.4f} seconds {time.perf_counter() - start:.0f}", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == r.steps:
            save()
    model.load_state_dict(average)
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint and its tokenizer")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    print(json.dumps(asdict(recipe)), flush=True)
    train(recipe, compiled=not arguments.no_compile, out=arguments.out)


if __name__ == "__main__":
    main()

"""Trains the built-in model: LLaDA's objective on the word problems of ``fastdllm_triton/tiny/problems.py``, half of it as seen
through the dual cache.

    git show 618ec41:fastdllm_triton/tiny/model.safetensors > plain/model.safetensors
    python training/train_tiny.py --start plain --out fastdllm_triton/tiny

It goes on from weights that were trained with LLaDA's loss alone, in 10,000 steps of the script as it was in that commit. From
random weights (without ``--start``) 3,000 steps of this mixture had not learned to add.

Needs a C++ compiler for ``torch.compile`` (``--no-compile`` does without, at half the speed). ``MODEL_CARD.md`` in the package of
the output folder says what a run took and what came out.
"""

from __future__ import annotations

import torch
from _common import Logits, Recipe, cross_entropy, main, special_ids, stratified
from torch import Tensor

from fastdllm_triton.models.llada import NAMES

#: Sizes of the blocks that are seen through a cache; each divides the response.
BLOCKS = (8, 16, 16, 24, 48)

#: Share of the batches that are.
CACHED = 0.5


def plain_loss(logits: Logits, ids: Tensor, prompt: int, mask: int, generator: torch.Generator) -> Tensor:
    """LLaDA's bound (arXiv 2502.09992, equation 3): each answer token masked with probability t ~ U(0, 1), cross-entropy of
    the masked ones weighted by 1/t.
    """
    t = stratified((len(ids), 1), generator)
    masked = torch.rand(ids.shape, generator=generator) < t
    masked[:, :prompt] = False
    position = torch.arange(ids.shape[1]).expand(ids.shape)
    loss = cross_entropy(logits(ids.masked_fill(masked, mask), position, None)[:, prompt:], ids[:, prompt:])
    return (loss * masked[:, prompt:] / t).mean()


def cached_loss(logits: Logits, ids: Tensor, prompt: int, mask: int, generator: torch.Generator) -> Tensor:
    """The same bound for one block of the answer, over what the dual cache holds while that block is decoded.

    The cache was filled by a forward over the whole sequence, with the blocks before it done and all from it on masked. That
    sequence comes first and sees itself only. The block's slots come after it, as often as they fit into the length of an answer,
    each copy with its own t; they see their own copy, and of the sequence what is outside the block.
    """
    rows, total = ids.shape
    length = total - prompt
    size = torch.tensor(BLOCKS)[torch.randint(len(BLOCKS), (rows, 1), generator=generator)]
    start = prompt + (torch.rand((rows, 1), generator=generator) * (length // size)).long() * size
    slot = torch.arange(total).expand(rows, total)
    copy, offset = torch.arange(length) // size, torch.arange(length) % size

    t = stratified((rows, length), generator).gather(1, copy)
    masked = torch.rand((rows, length), generator=generator) < t
    block = ids.gather(1, start + offset)
    x = torch.cat((ids.masked_fill(slot >= start, mask), block.masked_fill(masked, mask)), dim=1)

    seen = torch.zeros(rows, total + length, total + length, dtype=torch.bool)
    seen[:, :total, :total] = True
    seen[:, total:, :total] = ((slot < start) | (slot >= start + size))[:, None]
    seen[:, total:, total:] = copy[:, :, None] == copy[:, None]
    loss = cross_entropy(logits(x, torch.cat((slot, start + offset), dim=1), seen)[:, total:], block)
    return (loss * masked / t).mean()


def loss_of(logits: Logits, ids: Tensor, prompt: int, mask: int, generator: torch.Generator) -> Tensor:
    """One of the two."""
    chosen = cached_loss if torch.rand((), generator=generator) < CACHED else plain_loss
    return chosen(logits, ids, prompt, mask, generator)


def config(r: Recipe) -> dict[str, object]:
    """``config.json`` in LLaDA's format."""
    ids = special_ids()
    vocabulary = ids.pop("vocab_size")
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
        **ids,
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    main(__doc__, Recipe(), loss_of, config, NAMES)

"""Trains the built-in block-diffusion model: SDAR's architecture and objective on the same word problems.

    python training/train_tiny_block.py --start fastdllm_triton/tiny --out fastdllm_triton/tiny_block

As SDAR adapts a model that was trained otherwise, it goes on from the built-in one. As ``train_tiny.py`` in all else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _common import Logits, Recipe, cross_entropy, main, special_ids, stratified
from torch import Tensor

from fastdllm_triton.models import dream

#: Slots of a block, counted from position 0.
BLOCK = 16

#: Qwen3's names, as SDAR has them: Qwen2's without biases, and the norms of the heads.
_ATTENTION = "model.layers.{i}.self_attn"
NAMES = replace(
    dream.NAMES,
    layer={
        **{field: parts for field, parts in dream.NAMES.layer.items() if field != "qkv_bias"},
        "q_norm": (f"{_ATTENTION}.q_norm.weight",),
        "k_norm": (f"{_ATTENTION}.k_norm.weight",),
    },
)


def loss_of(logits: Logits, ids: Tensor, prompt: int, mask: int, generator: torch.Generator) -> Tensor:
    """The bound of block diffusion (BD3-LM, arXiv 2503.09573, section 3), with which SDAR (arXiv 2510.06303) is trained.

    The clean sequence comes first; its blocks see themselves and those before. The noised blocks follow, each with a t of
    its own; a noised block sees itself and the clean blocks before it. The first one may begin with the prompt's last tokens,
    which are never masked. Blocks of the prompt alone have no noised copy.
    """
    ids = F.pad(ids, (0, -ids.shape[1] % BLOCK), value=int(ids[0, -1]))  # an end token
    rows, total = ids.shape
    first = prompt // BLOCK * BLOCK
    clean, noised = torch.arange(total), torch.arange(first, total)
    t = stratified((rows, (total - first) // BLOCK), generator).repeat_interleave(BLOCK, dim=1)
    masked = (torch.rand((rows, total - first), generator=generator) < t) & (noised >= prompt)
    x = torch.cat((ids, ids[:, first:].masked_fill(masked, mask)), dim=1)

    position = torch.cat((clean, noised))
    block, is_noised = position // BLOCK, torch.arange(len(position)) >= total
    earlier, same = block[None] < block[:, None], block[None] == block[:, None]
    seen = torch.where(is_noised[None], same & is_noised[:, None], earlier | (same & ~is_noised[:, None]))
    size = (rows, len(position))
    loss = cross_entropy(logits(x, position.expand(size), seen.expand(rows, *seen.shape))[:, total:], ids[:, first:])
    return (loss * masked / t).sum() / (rows * (total - prompt))


def config(r: Recipe) -> dict[str, object]:
    """``config.json`` in SDAR's format."""
    ids = special_ids()
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "block_size": BLOCK,
        "head_dim": r.head_dim,
        "hidden_act": "silu",
        "hidden_size": r.width,
        "intermediate_size": r.mlp,
        "max_position_embeddings": r.max_length,
        "num_attention_heads": r.heads,
        "num_hidden_layers": r.layers,
        "num_key_value_heads": r.kv_heads,
        "rms_norm_eps": r.eps,
        "rope_scaling": None,
        "rope_theta": r.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": ids["eos_token_id"],
        **ids,
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    main(__doc__, Recipe(head_norms=True, eps=1e-6), loss_of, config, NAMES)

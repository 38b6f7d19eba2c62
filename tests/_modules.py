"""Models of all families as their users hold them: torch modules with the checkpoints' parameter names, a config and a
``forward``.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def load_module(folder: Path, **config: Any) -> nn.Module:
    """A module with the weights and the config of a checkpoint, some fields replaced."""
    raw = json.loads((folder / "config.json").read_text()) | config
    module = _CLASSES[raw["model_type"]](SimpleNamespace(**raw))
    module.load_state_dict(load_file(folder / "model.safetensors"), strict=not (raw.get("tie_word_embeddings")))
    return module.eval()


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    theta: float,
    norms: tuple[Any, Any] = (nn.Identity(), nn.Identity()),
    block: int | None = None,
) -> Tensor:
    """Projections ``[B, T, heads * D]`` to the mixed values ``[B, T, Hq * D]``: normalised, rotated, grouped, without a mask or,
    with a block length, up to the end of a token's own block.
    """
    q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = norms[0](q), norms[1](k)
    half = q.shape[-1] // 2
    angle = torch.arange(q.shape[2]).float()[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = torch.cat((angle.cos(),) * 2, -1).to(q), torch.cat((angle.sin(),) * 2, -1).to(q)
    q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
    number = None if block is None else torch.arange(q.shape[2]) // block
    mask = None if number is None else number[:, None] >= number
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2)


class LLaDABlock(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = c.n_heads, c.n_kv_heads, c.rope_theta
        head_dim = c.d_model // c.n_heads
        self.attn_norm, self.ff_norm = (Norm(c.d_model, c.rms_norm_eps) for _ in range(2))
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(c.d_model, c.n_kv_heads * head_dim, bias=False) for _ in range(2))
        self.attn_out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(c.d_model, c.mlp_hidden_size, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn_norm(x)
        x = x + self.attn_out(attend(self.q_proj(h), self.k_proj(h), self.v_proj(h), self.heads, self.kv_heads, self.theta))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDA(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        c = self.config = config
        self.model = nn.Module()
        parts = {
            "wte": nn.Embedding(c.embedding_size, c.d_model),
            "blocks": nn.ModuleList(LLaDABlock(c) for _ in range(c.n_layers)),
            "ln_f": Norm(c.d_model, c.rms_norm_eps),
            "ff_out": nn.Linear(c.d_model, c.embedding_size, bias=False),
        }
        self.model.transformer = nn.ModuleDict(parts)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x = block(x)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


class DreamLayer(nn.Module):
    """A layer of Qwen's network.

    Attributes:
        has_bias: whether the q, k and v projections have biases.
        has_norms: whether every query and key head is normalised.
        block_field: the field of the config with the length of the blocks that attention is causal between, if it is.
    """

    has_bias, has_norms, block_field = True, False, ""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = c.num_attention_heads, c.num_key_value_heads, c.rope_theta
        self.block = getattr(c, self.block_field) if self.block_field else None
        width, head_dim = c.hidden_size, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.input_layernorm, self.post_attention_layernorm = (Norm(width, c.rms_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        rows, bias = (self.heads * head_dim, self.kv_heads * head_dim), self.has_bias
        self.self_attn.q_proj = nn.Linear(width, rows[0], bias=bias)
        self.self_attn.k_proj, self.self_attn.v_proj = (nn.Linear(width, rows[1], bias=bias) for _ in range(2))
        self.self_attn.o_proj = nn.Linear(rows[0], width, bias=False)
        if self.has_norms:
            self.self_attn.q_norm, self.self_attn.k_norm = (Norm(head_dim, c.rms_norm_eps) for _ in range(2))
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(width, c.intermediate_size, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(c.intermediate_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)
        norms = (a.q_norm, a.k_norm) if self.has_norms else (nn.Identity(), nn.Identity())
        shape = self.heads, self.kv_heads, self.theta, norms, self.block
        x = x + a.o_proj(attend(a.q_proj(h), a.k_proj(h), a.v_proj(h), *shape))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class Dream(nn.Module):
    layer_class: type[DreamLayer] = DreamLayer

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(self.layer_class(c) for _ in range(c.num_hidden_layers))
        self.model.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


class FastDLLMQwenLayer(DreamLayer):
    block_field = "bd_size"


class FastDLLMQwenForCausalLM(Dream):
    """Fast-dLLM v2, with the ``generate`` of its own that it comes with."""

    layer_class = FastDLLMQwenLayer

    def generate(self, input_ids: Tensor, tokenizer: object = None, **options: Any) -> str:
        return "its own"


class SDARLayer(DreamLayer):
    has_bias, has_norms, block_field = False, True, "block_size"


class SDARForCausalLM(Dream):
    layer_class = SDARLayer


_CLASSES: dict[str, Any] = {"llada": LLaDA, "Dream": Dream, "Fast_dLLM_Qwen": FastDLLMQwenForCausalLM, "sdar": SDARForCausalLM}


class LoRA(nn.Module):
    """A layer with a low-rank adapter, with the attributes by which PEFT's are known."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.active_adapters, self.merged_adapters, self.disable_adapters = ["default"], [], False

    @torch.no_grad()
    def merge(self) -> None:
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.merged_adapters.append("default")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.merged_adapters or self.disable_adapters else y + self.lora_B["default"](self.lora_A["default"](x))


class Wrapper(nn.Module):
    """Two modules around a model, as PEFT puts them: ``base_model.model``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = module

    def forward(self, input_ids: Tensor) -> Any:
        return self.base_model.model(input_ids)


#: What transformers writes into a config beside a checkpoint's own fields, and what of it decides something.
GENERATION_FIELDS = ("temperature", "top_p", "top_k", "max_length", "num_return_sequences", "return_dict_in_generate")


def mixin(name: str) -> type:
    """A stand-in for the ``DreamGenerationMixin`` of a module of that name: it begins as the official ones do."""

    class DreamGenerationMixin:
        def _prepare_generation_config(self, generation_config: object, **options: object) -> str:
            return f"prepared by {name}"

        def diffusion_generate(self, inputs: Tensor, generation_config: object = None, **options: object) -> str:
            return f"{self._prepare_generation_config(generation_config)}, decoded by {name}"

        def _sample(self) -> None: ...

    for method in (DreamGenerationMixin.diffusion_generate, DreamGenerationMixin._sample):
        method.__module__ = f"transformers_modules.Dream.{name}"
    return DreamGenerationMixin


def put_mixin(module: Any, source: Any) -> None:
    """What ``dream/eval.py`` and ``dream/demo_multiturn_chat.py`` do to take another mixin."""
    module.diffusion_generate = types.MethodType(source.diffusion_generate, module)
    module._sample = types.MethodType(source._sample, module)

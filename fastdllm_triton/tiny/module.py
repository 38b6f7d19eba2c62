"""The built-in model as its users would hold it: a torch module, to try ``accelerate`` and ``compat`` without a download."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import dream, llada
from ..models.checkpoint import read_json
from ..reference.rope_kv_write import rotate
from . import PATH


def hf_module(architecture: Literal["llada", "dream"] = "llada") -> nn.Module:
    """A stand-in for what ``AutoModel.from_pretrained(..., trust_remote_code=True)`` gives.

    Args:
        architecture: ``"llada"``; or ``"dream"``, the same weights under Dream's names. They were not trained to predict one
            position ahead, as a Dream does, so its text is noise.

    Returns:
        A module with the parameter names and the config fields of the official class, and a ``forward`` in plain PyTorch.

    Raises:
        ValueError: ``architecture`` is neither.
    """
    if architecture not in ("llada", "dream"):
        raise ValueError(f"architecture must be llada or dream, got {architecture!r}")
    return _Module(architecture).eval()


class _Module(nn.Module):
    """Parameters by the names of a checkpoint, and a config."""

    def __init__(self, architecture: str) -> None:
        from ..loading import load

        super().__init__()
        weights, raw = load("tiny", device="cpu", backend="reference").network.weights, read_json(PATH / "config.json")
        if architecture == "dream":
            raw = _dream_config(raw)
            for layer in weights.layers:
                layer.qkv_bias = torch.zeros(len(layer.qkv.weight))
        self.config = SimpleNamespace(**raw, _name_or_path=str(PATH))
        kind = dream if architecture == "dream" else llada
        self._names, self._shape = kind.NAMES, kind.config(raw)
        for name, tensor in weights.named(self._shape, self._names):
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(last, nn.Parameter(tensor.clone()))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor) -> Any:
        """``[B, T]`` ids to an object with ``logits [B, T, V]``."""
        c, names, weights = self._shape, self._names, dict(self.named_parameters())
        heads, position = (*input_ids.shape, -1, c.head_dim), torch.arange(input_ids.shape[1], device=input_ids.device)[None]

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (c.width,), weight, c.eps)

        x = F.embedding(input_ids, weights[names.embedding])
        for i in range(c.layers):
            layer = {field: [weights[name.format(i=i)] for name in parts] for field, parts in names.layer.items()}
            h, biases = norm(x, *layer["attn_norm"]), layer.get("qkv_bias", [None, None, None])
            q, k, v = (F.linear(h, w, b).view(heads) for w, b in zip(layer["qkv"], biases, strict=True))
            q, k = (rotate(part, position, c.rope_theta, c.rope_rounding).transpose(1, 2) for part in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), enable_gqa=True)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), *layer["attn_out"])
            h = norm(x, *layer["mlp_norm"])
            gate, up = (F.linear(h, w) for w in layer["gate_up"])
            x = x + F.linear(F.silu(gate) * up, *layer["down"])
        return SimpleNamespace(logits=F.linear(norm(x, weights[names.final_norm]), weights[names.head]))


def _dream_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of LLaDA's config under Dream's names."""
    return {
        "model_type": "Dream",
        "hidden_act": "silu",
        "hidden_size": raw["d_model"],
        "intermediate_size": raw["mlp_hidden_size"],
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": raw["n_heads"],
        "num_key_value_heads": raw["n_kv_heads"],
        "max_position_embeddings": raw["max_sequence_length"],
        "tie_word_embeddings": raw["weight_tying"],
        **{name: raw[name] for name in ("vocab_size", "rope_theta", "rms_norm_eps", "torch_dtype")},
        **{name: raw[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id")},
    }

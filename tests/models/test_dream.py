"""Dream's format: names, biases, rounding, tied heads, and what of a config is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM
from safetensors.torch import load_file, save_file

import fastdllm_triton as fdt
from fastdllm_triton.models import dream as architecture

SOURCE = GOLDEN / GOLDEN_DREAM
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318]])


def _raw(**fields: Any) -> dict[str, Any]:
    """The checkpoint's config with some fields replaced; ``absent`` removes one."""
    raw = json.loads((SOURCE / "config.json").read_text()) | fields
    return {name: value for name, value in raw.items() if value != "absent"}


def test_the_config_is_read() -> None:
    c = architecture.config(_raw())
    assert (c.architecture, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp) == ("dream", 3, 64, 4, 2, 16, 160)
    assert (c.rope_theta, c.eps, c.max_length, c.mask_id, c.eos_ids) == (1e6, 1e-6, 2048, 318, (316,))
    assert (c.qkv_bias, c.shift, c.rope_rounding, c.tied) == (True, True, "dream", False)


def test_the_config_of_the_released_7b_model() -> None:
    c = architecture.config(
        _raw(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            mask_token_id=151666,
            eos_token_id=151643,
            max_window_layers=28,
        )
    )
    assert (c.heads // c.kv_heads, c.head_dim, c.max_length) == (7, 128, 131072)


def test_biases_are_views_of_the_fused_bias(dream: fdt.MaskedDiffusionLM) -> None:
    stored = load_file(SOURCE / "model.safetensors")
    weights = dream.network.weights
    named = dict(weights.named(dream.config, architecture.NAMES))
    assert named.keys() == stored.keys()
    for i, layer in enumerate(weights.layers):
        assert layer.qkv_bias is not None
        names = [f"model.layers.{i}.self_attn.{p}_proj.bias" for p in "qkv"]
        assert torch.equal(layer.qkv_bias, torch.cat([stored[name] for name in names]))
        storage = layer.qkv_bias.untyped_storage().data_ptr()
        assert all(named[name].untyped_storage().data_ptr() == storage for name in names)


def test_the_biases_and_the_rounding_take_part(dream: fdt.MaskedDiffusionLM) -> None:
    exact = dream.logits(IDS)
    network = fdt.load(SOURCE, device="cpu", dtype="bfloat16").network
    rounded = network.logits(IDS)
    network.config = replace(network.config, rope_rounding="llada")
    assert not torch.equal(network.logits(IDS), rounded)
    for layer in dream.network.weights.layers:
        assert layer.qkv_bias is not None
        layer.qkv_bias.zero_()
    assert not torch.allclose(dream.logits(IDS), exact)


def _copy(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_raw(**fields)))
    return folder


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    untied = fdt.load(_copy(tmp_path, tensors)).logits(IDS)
    del tensors["lm_head.weight"]
    lm = fdt.load(_copy(tmp_path, tensors, tie_word_embeddings=True))
    assert torch.equal(lm.logits(IDS), untied)
    assert lm.network.weights.head is lm.network.weights.embedding


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(fdt.CheckpointError, match=r"the tensor model.layers.1.self_attn.k_proj.bias is missing"):
        fdt.load(_copy(tmp_path, tensors))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        # What transformers 5 writes in place of rope_theta and rope_scaling.
        {"rope_theta": "absent", "rope_scaling": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"sliding_window": 4096, "max_window_layers": 28},  # not switched on
        {"attention_dropout": 0.1},  # nothing is dropped when generating
        {"head_dim": 16},
        {"eos_token_id": [316]},
        {"model_type": "dream"},
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(fields: dict[str, Any]) -> None:
    assert architecture.config(_raw(**fields)) == architecture.config(_raw())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_sliding_window": True},
            r"use_sliding_window = True is not supported, only False; attention has no limit of dist",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling of type 'yarn' is not supported.*; set it to null"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters of type 'linear' is not supported"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be null or an object, got 'linear'"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported, only 'silu'; use the code that the model was released"),
        ({"mlp_bias": True}, r"mlp_bias = True is not supported"),
        ({"attention_bias": False}, r"attention_bias = False is not supported, only True"),
        ({"head_dim": 32}, r"head_dim = 32 is not supported, only 16"),
        ({"num_attention_heads": 5}, r"num_attention_heads = 5 does not divide hidden_size = 64"),
        ({"hidden_size": "absent"}, r"the field 'hidden_size' is missing"),
        ({"mask_token_id": "absent"}, r"the field 'mask_token_id' is missing"),
        ({"mask_token_id": None}, r"mask_token_id must be an integer of 0 or more, got None"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be an integer of 1 or more, got 0"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings must be true or false, got 'false'"),
        ({"mask_token_id": 316}, r"the mask token and an end-of-text token are the same, 316"),
    ],
)
def test_configs_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fdt.CheckpointError, match=message):
        architecture.config(_raw(**fields))

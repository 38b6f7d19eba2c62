"""SDAR's format: norms of heads, a head dim of its own, the block length, published sizes, and what of a config is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

import fastdllm_triton as fdt
from fastdllm_triton.engine.memory import Memory
from fastdllm_triton.models.published import SDAR_4B, SDAR_8B
from fastdllm_triton.models.registry import config_of
from fastdllm_triton.models.sdar import NAMES

SOURCE = GOLDEN / "sdar"
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318]])


def _raw(**fields: Any) -> dict[str, Any]:
    """The checkpoint's config with some fields replaced; ``absent`` removes one."""
    raw = json.loads((SOURCE / "config.json").read_text()) | fields
    return {name: value for name, value in raw.items() if value != "absent"}


def test_the_config_is_read() -> None:
    c = config_of(_raw(), folder=SOURCE)
    assert (c.architecture, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp) == ("sdar", 3, 64, 4, 2, 32, 160)
    assert (c.rope_theta, c.eps, c.max_length, c.mask_id, c.eos_ids) == (1e6, 1e-6, 2048, 318, (316,))
    assert (c.qkv_bias, c.shift, c.rope_rounding, c.tied) == (False, False, "dream", False)
    assert (c.qk_norm, c.norm_rounding, c.block_length, c.block_causal) == (True, "flash_attn", 4, True)


@pytest.mark.parametrize("length", [4, 8, 16, 32, 64])
def test_the_block_length_is_the_configs(length: int) -> None:
    assert config_of(_raw(block_size=length)).block_length == length


@pytest.mark.parametrize(
    ("fields", "expected", "stored_bytes"),
    [
        ({"hidden_size": 2560, "intermediate_size": 9728}, SDAR_4B, 8_822_848_512),
        ({"hidden_size": 4096, "intermediate_size": 12_288}, SDAR_8B, 16_381_470_720),
    ],
    ids=["4B", "8B"],
)
def test_the_released_models(fields: dict[str, Any], expected: Any, stored_bytes: int, tmp_path: Path) -> None:
    """With the bytes that the index of their weights counts. One published 8B config lacks the block length and the mask."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "pad_token_id": 151643}')
    common: dict[str, Any] = {
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "bos_token_id": 151_643, "eos_token_id": 151_643, "max_position_embeddings": 32_768, "torch_dtype": "bfloat16",
        "max_window_layers": 36,
    }  # fmt: skip
    whole = config_of(_raw(**common, **fields, mask_token_id=151_669), folder=tmp_path)
    assert whole == expected
    assert config_of(_raw(**common, **fields, mask_token_id="absent", block_size="absent"), folder=tmp_path) == whole
    assert Memory.of(whole, 0, 0, 2).weights == stored_bytes


def test_memory_minds_a_head_dim_of_its_own() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    assert lm.config.heads * lm.config.head_dim == 2 * lm.config.width
    stored = load_file(SOURCE / "model.safetensors")
    memory = Memory.of(lm.config, 3, 40, 4)
    assert memory.weights == sum(tensor.nbytes for tensor in stored.values())
    cache = lm.network.new_cache(torch.zeros(3, dtype=torch.int32), 40)
    assert memory.cache == cache.k.nbytes + cache.v.nbytes
    # The residual stream, and a layer's queries, keys and values, what it attended, and the queries rotated.
    assert memory.workspace == 4 * 3 * 40 * (4 * 64 + max(3 * 160, (4 + 2 * 2) * 32 + 2 * 4 * 32))


def test_a_layer_has_eleven_tensors() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    named = dict(lm.network.weights.named(lm.config, NAMES))
    stored = load_file(SOURCE / "model.safetensors")
    assert named.keys() == stored.keys()
    assert len(stored) == 3 * 11 + 3
    assert all(torch.equal(named[name], stored[name]) for name in stored)
    layer = lm.network.weights.layers[1]
    assert layer.q_norm is not None and layer.q_norm.shape == (32,)
    assert layer.qkv_bias is None
    assert layer.attn_out.weight.shape == (64, 128)


def test_the_norms_of_heads_take_part() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    exact = lm.logits(IDS)
    for name in ("q_norm", "k_norm"):
        norm = getattr(lm.network.weights.layers[2], name)
        former = norm.clone()
        norm.mul_(0.5)
        assert not torch.allclose(lm.logits(IDS), exact, atol=1e-2), name
        norm.copy_(former)


def test_no_block_sees_the_ones_behind_it() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    ids = torch.arange(22)[None] + 3
    changed = ids.clone()
    changed[0, 14] = 300
    before, after = lm.logits(ids), lm.logits(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


def test_a_module_is_accelerated_in_place() -> None:
    module: Any = nn.Module()
    module.config = SimpleNamespace(**_raw())
    for name, tensor in load_file(SOURCE / "model.safetensors").items():
        *path, last = name.split(".")
        place = module
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(tensor))
    fdt.accelerate(module)
    assert torch.equal(module.fast_forward(IDS), fdt.load(SOURCE, device="cpu").logits(IDS))
    with torch.no_grad():
        module.get_parameter("model.layers.0.self_attn.q_norm.weight").mul_(2)
    assert not torch.allclose(module.fast_forward(IDS), fdt.load(SOURCE, device="cpu").logits(IDS), atol=1e-2)


def test_a_missing_norm_is_named(tmp_path: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_raw()))
    wide = tensors["model.layers.1.self_attn.k_norm.weight"].repeat(2)
    save_file(tensors | {"model.layers.1.self_attn.k_norm.weight": wide}, tmp_path / "model.safetensors")
    with pytest.raises(
        fdt.CheckpointError, match=r"layers.1.self_attn.k_norm.weight has shape \(64,\), config.json asks for \(32,"
    ):
        fdt.load(tmp_path, device="cpu")
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(fdt.CheckpointError, match=r"the tensor model.layers.1.self_attn.k_norm.weight is missing"):
        fdt.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "SDAR"},
        {"rope_theta": 1e6},
        {"rope_scaling": {"type": "default"}},
        {"sliding_window": 4096},  # not switched on
        {"block_size": "absent"},
        {"attention_dropout": 0.1},  # nothing is dropped when generating
        {"layer_types": ["full_attention"] * 3},
        {"mask_token_id": 318, "eos_token_id": [316]},
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(fields: dict[str, Any]) -> None:
    assert config_of(_raw(**fields)) == config_of(_raw())


def test_a_head_dim_that_is_not_said_is_qwen3s() -> None:
    assert config_of(_raw(head_dim="absent")).head_dim == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, r"attention_bias = True is not supported, only False"),
        ({"mlp_bias": True}, r"mlp_bias = True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": 4.0}, r"rope_scaling must be null or an object, got 4.0"),
        ({"use_sliding_window": True}, r"use_sliding_window = True is not supported"),
        ({"head_dim": 0}, r"head_dim must be an integer of 1 or more, got 0"),
        ({"head_dim": 31}, r"rotary embedding needs an even head dim, got 31"),
        ({"head_dim": None}, r"head_dim must be an integer of 1 or more, got None"),
        ({"block_size": 0}, r"block_size must be an integer of 1 or more, got 0"),
        ({"block_size": -4}, r"block_size must be an integer of 1 or more, got -4"),
        ({"block_size": "4"}, r"block_size must be an integer of 1 or more, got '4'"),
        ({"block_size": 4.0}, r"block_size must be an integer of 1 or more, got 4.0"),
        ({"num_key_value_heads": 3}, r"3 KV heads do not divide 4 query heads"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers must be an integer of 1 or more, got -1"),
        ({"mask_token_id": 320}, r"mask_token_id must be an integer from 0 to 319, got 320"),
        ({"mask_token_id": 316}, r"the mask token and an end-of-text token are the same, 316"),
        ({"vocab_size": "absent"}, r"the field 'vocab_size' is missing"),
    ],
)
def test_configs_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fdt.CheckpointError, match=message):
        config_of(_raw(**fields))

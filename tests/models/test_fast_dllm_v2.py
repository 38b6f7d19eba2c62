"""Fast-dLLM v2's format: Dream's names, the block length, both published sizes, and what of a config is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _modules import load_module
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import fastdllm_triton as fdt
from fastdllm_triton.models import dream
from fastdllm_triton.models.published import FAST_DLLM_V2_1_5B, FAST_DLLM_V2_7B
from fastdllm_triton.models.registry import config_of

SOURCE = GOLDEN / "fast-dllm-v2"
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318]])


def _raw(**fields: Any) -> dict[str, Any]:
    """The checkpoint's config with some fields replaced; ``absent`` removes one."""
    raw = json.loads((SOURCE / "config.json").read_text()) | fields
    return {name: value for name, value in raw.items() if value != "absent"}


def _published(**fields: Any) -> dict[str, Any]:
    """What both published configs share."""
    common: dict[str, Any] = {
        "bd_size": 32, "bos_token_id": 151_643, "eos_token_id": 151_645, "pad_token_id": 151_645, "num_hidden_layers": 28,
        "layer_types": ["full_attention"] * 28, "max_position_embeddings": 32_768, "rope_scaling": None, "sliding_window": None,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    return _raw(**common, **fields)


def test_the_config_is_read() -> None:
    c = config_of(_raw(), folder=SOURCE)
    assert (c.architecture, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp) == ("fast_dllm_qwen", 3, 64, 4, 2, 16, 160)
    assert (c.rope_theta, c.eps, c.max_length, c.mask_id, c.eos_ids) == (1e6, 1e-6, 2048, 318, (316,))
    assert (c.qkv_bias, c.shift, c.rope_rounding, c.tied, c.qk_norm) == (True, True, "dream", False, False)
    assert (c.block_length, c.block_causal) == (32, True)


def test_the_released_1_5b_model() -> None:
    raw = _published(
        hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151_936,
        tie_word_embeddings=True, max_window_layers=21,
    )  # fmt: skip
    assert config_of(raw) == FAST_DLLM_V2_1_5B


def test_the_released_7b_model() -> None:
    raw = _published(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18_944, vocab_size=152_064,
        tie_word_embeddings=False, max_window_layers=28, conplemenrary_mask=True,
    )  # fmt: skip
    assert config_of(raw) == FAST_DLLM_V2_7B


def test_the_tensors_are_dreams_letter_for_letter() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    named = dict(lm.network.weights.named(lm.config, dream.NAMES))
    stored = load_file(SOURCE / "model.safetensors")
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[name], stored[name]) for name in stored)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name, tied in (("untied", False), ("tied", True)):
        (tmp_path / name).mkdir()
        save_file(
            {k: t for k, t in tensors.items() if not (tied and k == "lm_head.weight")}, tmp_path / name / "model.safetensors"
        )
        (tmp_path / name / "config.json").write_text(json.dumps(_raw(tie_word_embeddings=tied, mask_token_id=318)))
    tied_lm, untied = (fdt.load(tmp_path / name, device="cpu") for name in ("tied", "untied"))
    assert tied_lm.network.weights.head is tied_lm.network.weights.embedding
    assert torch.equal(tied_lm.logits(IDS), untied.logits(IDS))


def test_no_block_sees_the_ones_behind_it_and_blocks_are_of_the_configs_length() -> None:
    lm = fdt.load(SOURCE, device="cpu")
    ids = torch.arange(96)[None] + 3
    changed = ids.clone()
    changed[0, 70] = 300
    before, after = lm.logits(ids), lm.logits(changed)
    assert torch.equal(before[:, :64], after[:, :64])
    assert (before[:, 64:] != after[:, 64:]).any(-1).all()  # its whole block, the tokens in front of it included
    lm.network.config = replace(lm.config, block_length=16)
    assert not torch.allclose(lm.logits(ids), before)


def test_a_module_is_no_dream_to_decode() -> None:
    """It is accelerated with what lies beside it; Dream's decoding would let blocks see what is behind them."""
    module: Any = load_module(SOURCE)
    module.config._name_or_path = str(SOURCE)
    fdt.accelerate(module)
    lm = fdt.load(SOURCE, device="cpu")
    assert torch.equal(module.fast_forward(IDS), lm.logits(IDS))
    assert not hasattr(module, "diffusion_generate")
    with pytest.raises(TypeError, match=r"model must be a Dream for diffusion_generate, got a fast_dllm_qwen"):
        lm.diffusion_generate(IDS)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "fast_dllm_qwen"},
        {"layer_types": "absent"},
        {"bd_size": "absent"},
        {"rope_scaling": {"rope_type": "default"}},
        {"sliding_window": 4096},  # not switched on
        {"head_dim": 16},
        {"mask_token_id": 318},
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(fields: dict[str, Any]) -> None:
    assert config_of(_raw(**fields), folder=SOURCE) == config_of(_raw(), folder=SOURCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling of type 'yarn' is not supported"),
        ({"use_sliding_window": True}, r"use_sliding_window = True is not supported, only False"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types must be 'full_attention' for every layer, got 's",
        ),
        ({"layer_types": []}, r"layer_types must be 'full_attention' for every layer"),
        ({"layer_types": "full_attention"}, r"layer_types must be a list of strings, got 'full_attention'"),
        ({"layer_types": [["\x1b" * 1000]]}, r"layer_types must be a list of strings, got"),
        ({"attention_bias": False}, r"attention_bias = False is not supported, only True"),
        ({"head_dim": 32}, r"head_dim = 32 is not supported, only 16"),
        ({"bd_size": 0}, r"bd_size must be an integer of 1 or more, got 0"),
        ({"bd_size": -32}, r"bd_size must be an integer of 1 or more, got -32"),
        ({"bd_size": None}, r"bd_size must be an integer of 1 or more, got None"),
        ({"bd_size": 10**12}, r"bd_size must be an integer from 1 to 2147483647"),
        ({"hidden_size": -64}, r"hidden_size must be an integer of 1 or more, got -64"),
        ({"vocab_size": "320"}, r"vocab_size must be an integer of 1 or more, got '320'"),
        ({"num_attention_heads": 5}, r"num_attention_heads = 5 does not divide hidden_size = 64"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported, only 'silu'"),
    ],
)
def test_configs_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fdt.CheckpointError, match=message):
        config_of(_raw(**fields), folder=SOURCE)

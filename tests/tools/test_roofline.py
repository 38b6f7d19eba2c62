"""The roofline against numbers worked out by hand, and against the FLOPs and bytes of the real thing."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.roofline import gpu_of
from fastdllm_triton.decoding.cache_policy import play
from fastdllm_triton.models.published import DREAM_7B as DREAM
from fastdllm_triton.models.published import LLADA_8B as LLADA
from fastdllm_triton.tools.roofline import (
    GPUS,
    SHAPES,
    Cost,
    Gpu,
    Phase,
    Setting,
    floor,
    forward_cost,
    generation_cost,
    layer_parameters,
    op_costs,
    shape_of,
    streamed_parameters,
    what_if,
)

H200 = GPUS["h200"]


def test_weights_are_those_of_the_checkpoints() -> None:
    # LLaDA-8B: 4 x 4096^2 + 3 x 4096 x 12288 a layer, 32 layers, a head of 126464 x 4096.
    assert layer_parameters(LLADA) == 4 * 4096**2 + 3 * 4096 * 12_288 == 218_103_808
    assert streamed_parameters(LLADA) == 32 * 218_103_808 + 126_464 * 4096
    # With the embedding and 65 norms these are all the parameters that its model card counts.
    assert streamed_parameters(LLADA) + 126_464 * 4096 + 65 * 4096 == 8_015_581_184
    # Dream-7B: (28 + 2 x 4) x 128 columns of QKV.
    assert layer_parameters(DREAM) == 3584 * 36 * 128 + 3584**2 + 3 * 3584 * 18_944
    assert 2 * streamed_parameters(DREAM) == pytest.approx(14.14e9, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # Without the embedding: 12 query and 2 x 2 key and value heads of 128, and a tied head.
        ("fast-dllm-v2-1.5b", 28 * (1536 * (16 * 128 + 12 * 128) + 3 * 1536 * 8960) + 151_936 * 1536),
        ("fast-dllm-v2-7b", streamed_parameters(DREAM)),
        # 32 heads of 128 are wider than the model.
        ("sdar-4b", 36 * (2560 * (48 * 128 + 32 * 128) + 3 * 2560 * 9728) + 151_936 * 2560),
        ("sdar-8b", 36 * (4096 * (48 * 128 + 32 * 128) + 3 * 4096 * 12_288) + 151_936 * 4096),
        ("sdar-1.7b", 28 * (2048 * (32 * 128 + 16 * 128) + 3 * 2048 * 6144) + 151_936 * 2048),
    ],
)
def test_weights_of_the_block_causal_checkpoints(model: str, parameters: int) -> None:
    assert streamed_parameters(shape_of(model)) == parameters
    result = CliRunner().invoke(app, ["roofline", "--model", model])
    assert result.exit_code == 0
    assert f"{parameters * 2 / 1e9:.2f} GB of weights a forward" in " ".join(result.stdout.split())


def test_a_step_of_llada_streams_15_gb() -> None:
    cost = forward_cost(LLADA, 1, 32, 1024, 32)
    weights, cache = 14.99e9, 1024 * 512 * 2**10  # 512 KiB of keys and values a token
    assert cost.bytes == pytest.approx(weights + cache, rel=2e-3)
    assert cost.bound(H200) == "memory"
    assert cost.seconds(H200) == pytest.approx((weights + cache) / 4.8e12, rel=2e-3)


def test_a_refresh_of_2584_positions_is_40_tflop_and_42_with_the_official_head() -> None:
    # 2 x 2584 x 6.979e9 of the layers, 4 x 2584^2 x 4096 x 32 of attention, 2 x 32 x 518e6 of the block's head rows.
    by_hand = 2 * 2584 * 32 * 218_103_808 + 4 * 2584**2 * 4096 * 32 + 2 * 32 * 126_464 * 4096
    assert forward_cost(LLADA, 1, 2584, 2584, 32).flops == by_hand
    assert by_hand == pytest.approx(39.6e12, rel=1e-3)
    assert forward_cost(LLADA, 1, 2584, 2584, 2584).flops == pytest.approx(42.2e12, rel=1e-2)
    assert forward_cost(LLADA, 1, 2584, 2584, 32).bound(H200) == "matrix"


def test_flops_are_those_that_torch_counts() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    model = shape_of(GOLDEN / "llada-gqa")
    ids = torch.arange(24).reshape(2, 12)
    with FlopCounterMode(display=False) as counter:
        lm.logits(ids)
    attention = op_costs(model, 2, 12, 12, 12)["window_attention"].flops  # which torch does not count on a CPU
    assert attention == 3 * 4 * (2 * 12) * 12 * 64
    assert forward_cost(model, 2, 12, 12, 12).flops == counter.get_total_flops() + attention


def test_cached_bytes_are_those_of_the_cache() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    cache = lm.network.new_cache(torch.zeros(3, dtype=torch.int32), 40)
    ops = op_costs(shape_of(GOLDEN / "llada-gqa"), 3, 8, 40, 8, cache_bits=32)
    assert ops["window_attention"].bytes == cache.k.nbytes + cache.v.nbytes
    assert ops["rope_kv_write"].bytes == (cache.k.nbytes + cache.v.nbytes) * 8 / 40


def test_a_forward_is_the_sum_of_its_ops() -> None:
    ops = op_costs(DREAM, 2, 32, 1000, 16)
    total = forward_cost(DREAM, 2, 32, 1000, 16)
    assert total == Cost(sum(op.bytes for op in ops.values()), sum(op.flops for op in ops.values()))
    assert all(op.alone.bytes >= op.bytes for op in ops.values())


def test_fewer_weight_bits_stream_fewer_bytes_and_multiply_as_much() -> None:
    wide, narrow = (forward_cost(LLADA, 1, 32, 1024, 32, weight_bits=bits) for bits in (16, 8))
    assert wide.bytes - narrow.bytes == streamed_parameters(LLADA)
    assert wide.flops == narrow.flops


def test_the_schedule_of_the_dual_cache() -> None:
    # 8 blocks at 4 tokens a forward: 64 forwards, 8 of them refreshes.
    schedule = Setting(1000, 256, tokens_per_forward=4).schedule()
    assert schedule == [Phase("refresh", 8, 1, 1256, 1256, 32), Phase("step", 56, 1, 32, 1256, 16)]


def test_without_a_cache_every_forward_is_whole() -> None:
    schedule = Setting(1000, 64, cache="none").schedule()
    assert schedule == [Phase("step", 2, 1, 1064, 1064, 32), Phase("step", 62, 1, 1064, 1064, 16)]


def test_steps_over_a_prefix_reach_to_the_end() -> None:
    schedule = Setting(100, 96, cache="prefix", tokens_per_forward=16).schedule()
    steps = [(phase.window, phase.forwards) for phase in schedule if phase.name == "step"]
    assert steps == [(96, 1.0), (64, 1.0), (32, 1.0)]


def test_refreshes_between_those_of_the_prompt_recompute_the_generated_part_alone() -> None:
    schedule = Setting(1000, 256, tokens_per_forward=4, prompt_refresh=3).schedule()
    assert [(phase.name, phase.forwards, phase.window) for phase in schedule] == [
        ("refresh", 3, 1256),  # blocks 0, 3, 6
        ("step", 56, 32),
        ("refresh", 5, 256),
    ]
    # As the engine does it.
    model = fdt.load("tiny", device="cpu")
    generation = model.stream(
        [[40] * 20], gen_length=48, block_length=8, prompt_refresh=3, strategy=fdt.FixedSteps(12), stop_at_eos=False
    )
    rows = [end - first for forward in generation if forward.refresh for first, end in forward.windows]
    assert rows == [68, 48, 48, 68, 48, 48]


def test_an_end_token_leaves_out_the_blocks_after_its_own() -> None:
    setting = Setting(1560, 1024, tokens_per_forward=6, stop_at=230)
    assert (setting.blocks, setting.tokens) == (8, 230)
    assert sum(phase.forwards for phase in setting.schedule()) == pytest.approx(8 * 32 / 6)
    # Attention still goes over all slots: the suffix is part of the sequence.
    assert {phase.keys for phase in setting.schedule()} == {2584}


def test_every_schedule_has_as_many_forwards_as_its_tokens_need() -> None:
    for cache in ("none", "prefix", "dual"):
        for every in (1, 2, 5):
            setting = Setting(700, 512, 64, cache, 3.2, prompt_refresh=every)
            assert sum(phase.forwards for phase in setting.schedule()) == pytest.approx(512 / 3.2)


def test_the_floor_of_a_generation_is_the_sum_of_its_forwards() -> None:
    setting = Setting(1000, 256, tokens_per_forward=3.25)
    found = floor(LLADA, setting, H200)
    refresh, step = forward_cost(LLADA, 1, 1256, 1256, 32), forward_cost(LLADA, 1, 32, 1256, 16)
    assert found.refresh_seconds == pytest.approx(8 * refresh.flops / 989.4e12)
    assert found.step_seconds == pytest.approx((256 / 3.25 - 8) * step.bytes / 4.8e12)
    assert found.tokens_per_second == pytest.approx(256 / (found.refresh_seconds + found.step_seconds))
    assert found.forwards == pytest.approx(256 / 3.25)


def test_a_generation_costs_what_all_its_forwards_do() -> None:
    schedule = [Phase("refresh", 2, 1, 64, 64, 8), Phase("step", 3, 1, 8, 64, 8)]
    tiny = shape_of("tiny")
    costs = [cost for _, cost in generation_cost(tiny, schedule)]
    assert costs == [forward_cost(tiny, 1, 64, 64, 8) * 2, forward_cost(tiny, 1, 8, 64, 8) * 3]
    # At 1 byte and 1 FLOP a second, costs and times are the same numbers.
    assert [cost.seconds(Gpu("unit", 1.0, 1.0)) for cost in costs] == [max(cost.bytes, cost.flops) for cost in costs]


def test_batches_share_the_weights() -> None:
    one, eight = (floor(LLADA, Setting(1000, 256, tokens_per_forward=3.25, batch_size=b), H200) for b in (1, 8))
    assert eight.step_seconds < 1.5 * one.step_seconds
    assert eight.refresh_seconds == pytest.approx(8 * one.refresh_seconds, rel=1e-2)


def test_what_ifs_that_change_nothing_are_left_out() -> None:
    names = [name for name, _ in what_if(Setting(10, 64, batch_size=8, weight_bits=8, tokens_per_forward=32))]
    assert names == ["as given", "4-bit weights", "prompt refresh 2", "prompt refresh 4"]


@pytest.mark.parametrize(
    "model", ["llada-8b", "llada-1.5", "dream-7b", "tiny", "LLaDA-8B", str(GOLDEN / "llada-mha" / "config.json")]
)
def test_models_are_known_by_name_and_by_config(model: str | Path) -> None:
    assert streamed_parameters(shape_of(model)) > 0


def test_the_published_sizes_are_what_a_config_gives(tmp_path) -> None:
    config = {
        "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12_288, "vocab_size": 126_464,
        "max_sequence_length": 4096, "mask_token_id": 126_336, "eos_token_id": 126_081, "rope_theta": 5e5, "weight_tying": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(tmp_path) == shape_of("llada-8b") == LLADA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt2"], "model: got 'gpt2'"),
        (["--gpu", "v100"], "--gpu: got 'v100'"),
        (["--gpu", "v100", "--tflops", "100"], "both --bandwidth and --tflops"),
        (["--bandwidth", "-1"], "bandwidth must be a number above 0"),
        (["--block-length", "48"], "--block-length must divide --gen-length, 256, got 48"),
        (["--cache", "full"], "--cache: 'full' is not one of 'none', 'prefix', 'dual'"),
        (["--tokens-per-forward", "33"], "--tokens-per-forward must be in (0, --block-length], got 33"),
        (["--stop-at", "300"], "--stop-at must be in [1, --gen-length], got 300"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--weight-bits", "0"], "--weight-bits must be in (0, 64], got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["roofline", *arguments])
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_a_window_cannot_exceed_its_keys() -> None:
    with pytest.raises(ValueError, match="head_rows, window and keys must be in this order"):
        forward_cost(LLADA, 1, 64, 32, 8)
    with pytest.raises(ValueError, match="batch must be a number above 0, got nan"):
        forward_cost(LLADA, math.nan, 64, 64, 8)


def test_a_gpu_is_a_name_or_two_numbers() -> None:
    assert gpu_of("RTX 4090", None, None) == GPUS["rtx4090"]
    assert gpu_of("h200", 4300, None) == replace(H200, bandwidth=4.3e12)
    assert gpu_of("mine", 1000, 100) == Gpu("mine", 1e12, 1e14)


def test_the_command_prints_the_floor() -> None:
    arguments = ["roofline", "--model", "llada-8b", "--gpu", "h200", "--tokens-per-forward", "3.25"]
    text = CliRunner().invoke(app, [*arguments, "--ops"]).stdout
    for part in ("LLaDA-8B", "14.99 GB", "refresh", "fp8", "batch 8", "nothing here was measured", "head_statistics"):
        assert part in " ".join(text.split())
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    expected = floor(LLADA, Setting(1000, 256, tokens_per_forward=3.25), H200)
    assert (found["model"]["name"], found["model"]["mlp"]) == ("LLaDA-8B", 12_288)
    assert found["generation"]["as given"]["floor_ms"] == pytest.approx(expected.seconds * 1e3)
    assert [forward["name"] for forward in found["forwards"]] == ["refresh", "step"]


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none", "suffix_window": 64},
        {"cache": "prefix", "look_back": 16},
        {"cache": "dual", "suffix_window": 0},
        {"cache": "dual", "look_back": 16, "look_ahead": 16},
        {"cache": "dual", "refresh_every": 4},
        {"cache": "dual", "refresh_every": 4, "suffix_window": 64, "prompt_refresh": 4},
    ],
    ids=str,
)
def test_options_of_a_cache_are_priced_by_the_windows_that_its_policy_gives(options: dict[str, Any]) -> None:
    setting = Setting(1000, 256, tokens_per_forward=4, **options)
    policy = fdt.GenerationConfig(gen_length=256, block_length=32, **options).cache_policy()
    windows = list(play(policy, 1000, 256, 32, [8] * 8))
    phases = setting.schedule()
    assert sum(phase.forwards for phase in phases) == len(windows)
    assert sum(phase.forwards * phase.window for phase in phases) == sum(map(len, windows))
    assert sum(phase.forwards * phase.keys for phase in phases) == sum(window.attend_end for window in windows)
    refreshes = sum(phase.forwards for phase in phases if phase.name == "refresh")
    assert refreshes == (sum(window.kind == "refresh" for window in windows) if policy.reuses else 0)


def test_options_that_a_cache_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="look_ahead means nothing for cache = 'prefix'"):
        Setting(1000, 256, cache="prefix", look_ahead=3)
    with pytest.raises(ValueError, match="suffix_window must be 0 or more, got -1"):
        Setting(1000, 256, suffix_window=-1)


# Block-causal models.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sdar", {}),
        ("sdar", {"separate_store": True}),
        ("sdar", {"cache": "none"}),
        ("fast-dllm-v2", {"sub_block_length": None}),
        ("fast-dllm-v2", {}),
        ("fast-dllm-v2", {"sub_block_cache": True}),
        ("fast-dllm-v2", {"cache": "none"}),
    ],
)
def test_the_schedule_of_a_block_causal_model_is_that_of_its_engine(name: str, options: dict[str, Any]) -> None:
    """Kinds, numbers, windows and keys of forwards at one token a step."""
    model = fdt.load(GOLDEN / name, device="cpu")
    config = model.options(gen_length=64, stop_at_eos=False, strategy=fdt.Threshold(1, strict=True), **options)
    length = config.block_length
    prompt = list(range(3 * length - 3 if length < 32 else 61))  # Its end stands in the first block.
    seen: Counter[tuple[str, int]] = Counter()
    store = "refresh" if config.cache == "block_causal" else "step"
    for forward in model.stream([prompt], config):
        ((first, end),) = forward.windows
        seen[store if forward.refresh else "step", end - first] += 1
    names = ("sub_block_length", "sub_block_cache", "separate_store")
    setting = Setting(len(prompt), 64, length, config.cache, **{name: getattr(config, name) for name in names})
    # Of tokens that a store commits, the setting counts the store among the forwards.
    counted: Counter[tuple[str, int]] = Counter()
    for phase in setting.schedule(model.config):
        kind = "refresh" if phase.name == "refresh" else "step"
        counted[kind, int(phase.window)] += round(phase.forwards)
    if options.get("separate_store"):  # They commit nothing: as many steps fewer at the same tokens a forward.
        stores = sum(number for (kind, _), number in counted.items() if kind == "refresh")
        counted["step", length] += stores
    elif name == "fast-dllm-v2":  # The prefill commits nothing.
        counted["step", 8 if options.get("sub_block_cache") else length] += 1 if config.cache == "block_causal" else 0
    if config.sub_block_cache:  # A sub-block has more steps over the whole block until its first token is known.
        for counts in (seen, counted):
            counts["step", 0] = counts.pop(("step", length), 0) + counts.pop(("step", 8), 0)
    if config.cache == "none":
        assert seen.total() - counted.total() in (0, 1)
        assert {window for _, window in seen} == {window for _, window in counted}
    else:
        assert seen == counted


def test_settings_of_the_other_kind_of_attention_are_refused() -> None:
    with pytest.raises(
        ValueError, match="cache must be none or block_causal for sdar, whose attention is block-causal, got 'dual'"
    ):
        Setting(100, 64, 4).schedule(SHAPES["sdar-8b"])
    with pytest.raises(ValueError, match="cache must be none or prefix or dual for llada"):
        Setting(100, 64, 32, "block_causal").schedule(SHAPES["llada-8b"])
    with pytest.raises(ValueError, match="separate_store means nothing for cache = 'none'"):
        Setting(100, 64, 32, "none", separate_store=True)


def test_the_command_takes_a_models_own_blocks_and_cache() -> None:
    def record(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["roofline", "--json", *arguments])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    setting = record("--model", "sdar-8b", "--tokens-per-forward", "2")["setting"]
    assert (setting["cache"], setting["block_length"], setting["sub_block_length"]) == ("block_causal", 4, None)
    found = record("--model", "fast-dllm-v2-7b", "--sub-block-cache", "--prompt-length", "1001")
    assert (found["setting"]["cache"], found["setting"]["block_length"], found["setting"]["sub_block_length"]) == (
        "block_causal",
        32,
        8,
    )
    assert [phase["name"] for phase in found["forwards"]][:3] == ["refresh", "block_step", "step"]
    assert not any("prompt refresh" in name for name in found["generation"])
    result = CliRunner().invoke(app, ["roofline", "--model", "fast-dllm-v2-7b", "--ops"])
    assert result.exit_code == 0 and "cache block_causal" in result.stdout
    result = CliRunner().invoke(app, ["roofline", "--model", "sdar-8b", "--cache", "dual"])
    assert result.exit_code == 2 and "--cache must be none or block_causal for sdar" in result.stderr

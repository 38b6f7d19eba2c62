"""The number of launches of a step, counted on the engine's own code."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.engine.request import batch_requests
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.models.config import ModelConfig
from fastdllm_triton.models.published import PUBLISHED
from fastdllm_triton.ops.backends import resolve
from fastdllm_triton.tools.launch_count import count_launches

LLADA = ModelConfig(
    "llada", 126_464, 126_464, 4096, 32, 32, 32, 128, 12_288, 5e5, 1e-5, 4096, False, 126_336, (126_081,)
)  # fmt: skip
DREAM = ModelConfig(
    "dream", 152_064, 152_064, 3584, 28, 28, 4, 128, 18_944, 1e6, 1e-6, 131_072, False, 151_666, (151_643,), True, True, "dream"
)  # fmt: skip


@pytest.mark.parametrize("model", [LLADA, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_layer_launches_ten_kernels_and_seven_with_fused_products(model: ModelConfig, rows: int) -> None:
    plain = count_launches(model, rows=rows)
    assert plain.layer == {"rms_norm": 2, "linear": 5, "rope_kv_write": 1, "window_attention": 2}
    fused = count_launches(model, rows=rows, fused=True)
    assert fused.layer == {"linear": 4, "rope_kv_write": 1, "window_attention": 2}
    assert (plain.per_layer, fused.per_layer) == (10, 7)
    assert plain.per_step == 10 * model.layers + plain.around.total()


@pytest.mark.parametrize("model", [LLADA, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize(("rows", "head"), [(1, 2), (2, 2), (4, 3), (32, 2)])
def test_a_step_launches_at_most_six_kernels_outside_its_layers(model: ModelConfig, rows: int, head: int) -> None:
    around = count_launches(model, rows=rows).around
    # The head and its merge; or the library, the statistics and, of few rows, a merge.
    assert around == {"window_inputs": 1, "rms_norm": 1, "head_statistics": head, "commit_tokens": 1}
    assert around.total() <= 6


def test_what_is_counted_is_what_a_step_calls(llada: fdt.MaskedDiffusionLM) -> None:
    calls: Counter[str] = Counter()
    # The ops of a CPU add a residual within a product, whatever its size.
    llada.network.ops = resolve("reference", torch.device("cpu"))

    def counted(name: str) -> Any:
        op = getattr(llada.network.ops, name)
        return lambda *args, **kwargs: (calls.update([name]), op(*args, **kwargs))[1]

    names = (
        "rms_norm",
        "linear",
        "rope_kv_write",
        "window_attention",
        "head_statistics",
        "commit_tokens",
        "swiglu",
        "window_inputs",
    )
    llada.network.ops = replace(llada.network.ops, **{name: counted(name) for name in names})
    config = fdt.GenerationConfig(gen_length=8, block_length=8)
    requests = batch_requests([[1, 2, 3, 4]], None, config, llada.config)
    runner = ModelRunner(llada.network, 1, 12)
    runner.fill(0, requests)
    program = runner.program_of(requests, requests)
    requests[0].begin_block()
    runner.begin_blocks([0], requests)
    with torch.no_grad():
        runner.run(llada.network, runner.refresh_shape(program, 0, 1, 0, 12, 8))
        calls.clear()
        runner.run(llada.network, runner.step_shape(program, 0, 1, 8, 8))

    found = count_launches(llada.config, block_length=8, slots=12)
    layers = llada.config.layers
    assert calls["rope_kv_write"] == layers * found.layer["rope_kv_write"]
    assert calls["rms_norm"] == layers * found.layer["rms_norm"] + found.around["rms_norm"]
    assert calls["linear"] == 4 * layers  # the gated one is two launches
    assert found.layer["linear"] == 5
    assert (calls["window_inputs"], calls["head_statistics"], calls["commit_tokens"], calls["swiglu"]) == (1, 1, 1, 0)


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of .*sm_90.*, got 'sm_42'"):
        count_launches(LLADA, arch="sm_42")


def test_info_prints_the_launches() -> None:
    result = CliRunner().invoke(app, ["info", "--model", "tiny", "--launches"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^launches per layer: (\d+)$", result.output, flags=re.M)
    assert "with every product fused" in result.output
    assert CliRunner().invoke(app, ["info", "--launches"]).exit_code == 2
    assert CliRunner().invoke(app, ["info", "--launches", "--model", "tiny", "--arch", "sm_1"]).exit_code == 2


@pytest.mark.parametrize("name", ["fast-dllm-v2-7b", "sdar-8b"])
def test_a_step_of_a_block_causal_model_launches_what_those_of_others_do(name: str) -> None:
    found, llada = (count_launches(model) for model in (PUBLISHED[name], LLADA))
    assert found.layer == llada.layer
    assert found.around == llada.around
    result = CliRunner().invoke(app, ["info", "--model", str(GOLDEN / name.replace("-7b", "").replace("-8b", "")), "--launches"])
    assert result.exit_code == 0, result.output
    assert f"1 x {PUBLISHED[name].block_length} slots over 1,024, cache block_causal;" in " ".join(result.stdout.split())

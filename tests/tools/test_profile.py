"""Profiles: what they count is what runs, and what they leave behind is what was there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_BLOCK_CAUSAL, GOLDEN_DREAM
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.tools import profile as profiles
from fastdllm_triton.tools.profile import REST, Limits, OpTime, profile, traffic

LENGTHS: dict[str, Any] = {"gen_length": 16, "block_length": 8}


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "measure_limits", lambda device, dtype: Limits(copy=1e10, matrix=1e11))


@pytest.mark.parametrize("name", ["llada-gqa", GOLDEN_DREAM])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_ops_of_a_forward_are_those_that_the_model_runs(name: str, cache: Any) -> None:
    model = fdt.load(GOLDEN / name, device="cpu", backend="reference")
    config = fdt.GenerationConfig(**LENGTHS, cache=cache, strategy=fdt.FixedSteps(8), stop_at_eos=False)
    before = model.network.ops
    result = profile(model, [[1, 2, 3], [4]], config, repeat=1)
    assert model.network.ops is before
    assert result.forwards == {"refresh": 2, "step": 6}
    assert result.committed == 32 and result.tokens_per_second == 32 / result.seconds
    layers = model.config.layers
    for kind, ops in result.ops.items():
        calls = {op: time.calls for op, time in ops.items() if op != REST}
        assert calls == {
            "window_inputs": 1,
            "rms_norm": 2 * layers + 1,
            "linear": 4 * layers,
            "rope_kv_write": layers,
            "window_attention": layers,
            "head_statistics": 1,
            "commit_tokens": 1,
        }, kind
        assert all(time.ms > 0 and time.launches > 0 for op, time in ops.items() if op != REST)
    shift = int(model.config.shift and cache != "none")
    assert result.windows["refresh"] == 18
    assert result.windows["step"] == {"none": 18, "prefix": 12 + shift, "dual": 8 + shift}[cache]


def test_bytes_and_flops_are_those_of_the_tensors() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    config = fdt.GenerationConfig(**LENGTHS, strategy=fdt.FixedSteps(2), stop_at_eos=False)
    (refresh,) = profile(model, [[1] * 4], config, repeat=1).ops.values()
    c, slots, head = model.config, 20, 8
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    products = [(c.width, q + 2 * kv, 1), (q, c.width, 1), (c.width, 2 * c.mlp, 2), (c.mlp, c.width, 1)]
    assert refresh["linear"].flops == c.layers * 2 * slots * sum(k * n for k, n, _ in products)
    moved = sum(4 * (k * n + slots * (k + n / gate)) for k, n, gate in products)
    assert refresh["linear"].bytes == c.layers * moved
    assert refresh["window_attention"].flops == c.layers * 4 * slots * slots * q
    assert refresh["window_attention"].bytes == c.layers * 4 * (2 * slots * q + 2 * slots * kv)
    assert refresh["rope_kv_write"].bytes >= c.layers * 4 * slots * (2 * q + 4 * kv)
    assert refresh["head_statistics"].flops == 2 * head * c.vocab_size * c.width
    assert refresh["head_statistics"].bytes == pytest.approx(4 * c.vocab_size * c.width, rel=0.1)


def test_gathered_rows_are_read_and_the_rest_of_the_table_is_not() -> None:
    table, weight, rows = torch.zeros(1000, 8), torch.zeros(8), torch.zeros(5, dtype=torch.int64)
    moved, _ = traffic("rms_norm", (table, weight, 1e-5), {"rows": rows}, (torch.zeros(5, 8), torch.zeros(5, 8)))
    assert moved == 4 * (5 * 8 + 8 + 2 * 5 * 8) + 8 * 5


def test_fractions_are_of_the_nearer_limit() -> None:
    limits = Limits(copy=1e9, matrix=1e12)
    assert OpTime(ms=2.0, bytes=1e6).roofline_fraction(limits) == pytest.approx(0.5)
    assert OpTime(ms=2.0, bytes=1e3, flops=1e9).roofline_fraction(limits) == pytest.approx(0.5)
    assert OpTime().roofline_fraction(limits) == 0 == OpTime().gb_per_s


def test_an_op_that_fails_leaves_the_model_as_it_was() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    config = fdt.GenerationConfig(**LENGTHS)
    before = model.network.ops

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    model.network.ops = broken = replace(before, commit_tokens=fail)
    with pytest.raises(RuntimeError, match="broken"):
        profile(model, [[1]], config)
    assert model.network.ops is broken and model.buffers.use_cuda_graphs


def test_the_command_prints_tables_and_a_line_and_json() -> None:
    words = [
        "profile",
        "--prompt",
        "Tom has 3 coins. How many?",
        "--gen-length",
        "32",
        "--block-length",
        "16",
        "--repeat",
        "1",
        "--no-stop-at-eos",
    ]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "refresh: 2 in a generation" in shown.output and "of roofline" in shown.output
    assert "tokens/s" in shown.output.splitlines()[-1] and "GB/s" in shown.output.splitlines()[-1]
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert set(data["ops"]) <= {"refresh", "step"} and data["ops"]["refresh"]["linear"]["calls"] == 16
    assert data["tokens_per_second"] > 0 and data["machine"]


@pytest.mark.parametrize("name", GOLDEN_BLOCK_CAUSAL)
def test_stores_of_block_causal_models_are_refreshes(name: str) -> None:
    model = fdt.load(GOLDEN / name, device="cpu", backend="reference")
    config = model.options(gen_length=40, stop_at_eos=False, strategy=fdt.Threshold(1, strict=True))
    result = profile(model, [list(range(9))], config, repeat=1)
    out = model.generate([list(range(9))], config)
    assert result.forwards == {"refresh": out.refreshes, "step": out.steps}
    assert result.windows["step"] == config.block_length
    # A store of a Fast-dLLM v2 is over the block alone; SDAR's has the next block's first step with it.
    layers = model.config.layers
    assert result.ops["refresh"]["window_attention"].calls == layers
    assert result.ops["step"]["head_statistics"].calls == 1

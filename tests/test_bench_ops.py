"""The benches of the ops, but for the timing itself: formulas, the check before timing, rejected shapes, and no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from _support import DEVICE
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
timing = importlib.import_module("_timing")

#: A small shape of each bench, and the baselines that run anywhere.
SMALL = {
    "rms_norm": ({"rows": 3, "width": 64, "residual": True}, ["torch"]),
    "swiglu": ({"rows": 3, "width": 64}, ["torch"]),
    "rope_kv_write": ({"model": "dream", "batch": 1, "window": 2, "slots": 4}, ["torch"]),
    "window_attention": (
        {"model": "dream", "batch": 1, "window": 2, "slots": 40},
        ["triton plain", "triton swapped", "sdpa math"],
    ),
    "linear": (
        {"name": "small", "rows": 3, "n": 64, "k": 128, "norm": True, "activation": "swiglu", "residual": False},
        ["library"],
    ),
}


def bench_of(op):
    """The bench of an op on its small shape, in a dtype that the interpreter has, and its module."""
    module = importlib.import_module(f"bench_{op}")
    return replace(module.BENCH, shapes=[SMALL[op][0]], inputs=partial(module.inputs, dtype=torch.float16)), module


def run_once(run, inputs):
    """A timer that runs everything and takes a millisecond."""
    for one in inputs:
        run(one)
    return timing.Timing(1.0, 0.9, 1.2)


@pytest.mark.parametrize("op", SMALL)
def test_every_provider_runs_and_is_put_next_to_its_ceiling(op):
    bench, _ = bench_of(op)
    rows = timing.measure(bench, DEVICE, timer=run_once, bandwidth=1e12, cache=1, only=SMALL[op][1])
    assert [row["provider"] for row in rows] == ["triton", *SMALL[op][1]]
    timed = [row for row in rows if "rejected" not in row]
    # In window_attention one operand order is the chosen one.
    assert len(timed) == len(rows) - (op == "window_attention")
    for row in timed:
        assert row["gb_per_s"] == pytest.approx(bench.bytes(bench.shapes[0]) / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1e3)
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"], row["times_triton"]) == (1.0, 0.9, 1.2, 1.0)
    json.dumps(rows)
    console = Console(width=250, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(timing.table(rows, 1e12))
    text = console.export_text()
    assert "copy: 1000 GB/s" in text
    assert all(row["provider"] in text for row in rows)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_bytes_are_those_of_the_tensors(op):
    bench, _ = bench_of(op)
    shape = bench.shapes[0]
    assert bench.bytes(shape) == sum(tensor.nbytes for tensor in bench.inputs(shape, torch.device("cpu"), 0).values())
    if op == "rms_norm":
        shape = {**shape, "residual": False}
        assert bench.bytes(shape) == sum(tensor.nbytes for tensor in bench.inputs(shape, torch.device("cpu"), 0).values())


def test_bytes_of_rope_kv_write_are_the_projection_twice():
    bench, _ = bench_of("rope_kv_write")
    shape = bench.shapes[0]
    assert bench.bytes(shape) == 2 * bench.inputs(shape, torch.device("cpu"), 0)["qkv"].nbytes


def test_bytes_and_flops_of_window_attention_are_those_of_the_tensors_and_products():
    bench, _ = bench_of("window_attention")
    shape = bench.shapes[0]
    inputs = bench.inputs(shape, torch.device("cpu"), 0)
    assert bench.bytes(shape) == 2 * inputs["q"].nbytes + inputs["k_cache"].nbytes + inputs["v_cache"].nbytes
    k, v = (inputs[name].repeat_interleave(7, dim=1) for name in ("k_cache", "v_cache"))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(inputs["q"].transpose(1, 2) @ k.mT, dim=-1) @ v
    assert bench.flops(shape) == counter.get_total_flops() > 0


@pytest.mark.parametrize("residual", [False, True])
def test_bytes_and_flops_of_linear_are_those_of_the_tensors_and_the_product(residual):
    bench, _ = bench_of("linear")
    shape = bench.shapes[0] | {"residual": residual}
    inputs = bench.inputs(shape, torch.device("cpu"), 0)
    assert bench.bytes(shape) == sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(inputs["x"], inputs["weight"])
    assert bench.flops(shape) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("library_ms", "wins"), [(2.0, True), (1.0, False)])
def test_linear_is_tuned_against_the_library_and_only_winners_are_committed(library_ms, wins, monkeypatch, tmp_path):
    bench, module = bench_of("linear")
    choice = module.candidates(module.arch_of(DEVICE), 3, 64, 128, 2, "swiglu")[:2]
    monkeypatch.setattr(module, "candidates", lambda *_: choice)
    monkeypatch.setattr(module._tuned, "FOLDER", tmp_path / "tuned")

    def timer(run, inputs):
        run(inputs[0])
        return timing.Timing(library_ms if run is module.library else 1.0, 0, 0)

    entries = module.tune(bench.shapes, DEVICE, timer=timer, cache=1, dtype=torch.float16)
    module.commit(entries, "NVIDIA Test 7")
    found = module._tuned.tuned(
        "NVIDIA Test 7", "linear", rows=3, n=64, k=128, norm=True, activation="swiglu", residual=False, dtype="float16"
    )
    assert found == (asdict(choice[0]) if wins else None)
    module._tuned._entries.cache_clear()


def test_a_wrong_kernel_is_not_timed():
    bench, _ = bench_of("swiglu")
    wrong = replace(bench, ours=lambda i: torch.zeros_like(i["out"]))
    with pytest.raises(AssertionError, match=r"swiglu .*'rows': 3"):
        timing.measure(wrong, DEVICE, timer=run_once, bandwidth=1e12, cache=1)


def test_a_baseline_that_rejects_a_shape_is_listed_with_its_reason():
    bench, _ = bench_of("swiglu")

    def picky(inputs):
        raise NotImplementedError("only powers of two\nand more")

    rows = timing.measure(replace(bench, baselines={"picky": picky}), DEVICE, timer=run_once, bandwidth=1e12, cache=1)
    assert rows[1]["rejected"] == "NotImplementedError: only powers of two"
    assert "median_ms" not in rows[1]


def test_inputs_outgrow_the_cache_within_the_memory():
    assert timing.sets_of_inputs(2**20, 50 * 2**20) == 150
    assert timing.sets_of_inputs(2**30, 50 * 2**20) == 2
    assert timing.sets_of_inputs(2**33, 2**33) == 2


def test_percentiles_are_of_the_replays():
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Timing(3.5, 2.0, 5.0)


@pytest.mark.parametrize("op", SMALL)
def test_without_a_gpu_nothing_is_measured_and_that_is_said(op, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, module = bench_of(op)
    assert timing.main(module.BENCH, ["--json", str(tmp_path / "rows.json")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "rows.json").exists()


def test_an_unknown_baseline_is_named(capsys):
    _, module = bench_of("swiglu")
    with pytest.raises(SystemExit):
        timing.main(module.BENCH, ["--only", "numpy"])
    assert "got numpy" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE.type == "cuda", reason="would measure")
def test_a_bench_is_a_script():
    environment = os.environ | {"PYTHONPATH": str(BENCH.parent)}
    script = [sys.executable, str(BENCH / "bench_rms_norm.py")]
    found = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert "no GPU" in found.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("op", SMALL)
def test_a_bench_times_on_a_gpu(op):
    bench, _ = bench_of(op)
    rows = timing.measure(bench, DEVICE, timer=timing.time_cold, bandwidth=1e12, cache=2**20, only=SMALL[op][1])
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows if "rejected" not in row)


def test_rows_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    bench, _ = bench_of("swiglu")
    rows = timing.measure(bench, DEVICE, timer=run_once, bandwidth=1e12, cache=1, only=["torch"])
    timing.plot(rows, 1e12, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<path") > 5

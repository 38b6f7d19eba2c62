"""The benches of the ops, but for the timing itself: providers run and agree, formulas, ceilings, and rejected shapes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from _bench import CEILINGS, DEVICE, bench_of, half_inputs, module_of, rows_of, run_once, session
from _cuda import PretendCuda
from torch.utils.flop_counter import FlopCounterMode

from fastdllm_triton.bench import _baselines as baselines
from fastdllm_triton.bench import _timing as timing
from fastdllm_triton.bench._session import benches, check, label, sets_of_inputs, timed
from fastdllm_triton.tools import roofline

OPS = [bench.op for bench in benches("ops")]
CPU = torch.device("cpu")


def small(op: str, **options):
    """The bench of an op on its small shape, in float16, without what needs a compiler."""
    bench = bench_of(op)
    anywhere = {name: run for name, run in bench.baselines.items() if name not in bench.gpu_only}
    return replace(bench, **{"shapes": bench.quick[:1], "key": (), "inputs": half_inputs(op), "baselines": anywhere} | options)


@pytest.mark.parametrize("op", OPS)
def test_every_provider_runs_and_is_put_next_to_its_ceiling(op):
    bench = small(op)
    rows = rows_of(bench, session())
    assert [row["provider"] for row in rows] == ["triton", *bench.baselines]
    timed_rows = [row for row in rows if "missing" not in row]
    assert timed_rows[0]["provider"] == "triton"
    if DEVICE.type == "cpu":
        # One operand order of window_attention is the chosen one; two backends of PyTorch's want a GPU, one a package.
        missing = {"window_attention": 4, "commit_tokens": 1}
        assert len(rows) - len(timed_rows) == missing.get(op, 0)
    for row in timed_rows:
        assert row["shape"] == bench.quick[0] and row["axis"] in row["shape"]
        assert row["gb_per_s"] == pytest.approx(bench.bytes(row["shape"]) / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1e3)
        assert row["of_matrix"] == pytest.approx(bench.flops(row["shape"]) / 1e-3 / 1e14)
        assert row["of_floor"] == pytest.approx(max(row["of_copy"], row["of_matrix"]))
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"], row["times_triton"]) == (1.0, 0.9, 1.2, 1.0)
    json.dumps(rows)


def test_a_time_is_a_fraction_of_the_nearer_ceiling():
    row = timed(timing.Timing(2.0, 1.9, 2.1), 10**9, 10**11, CEILINGS)
    # 1 ms at the copy bandwidth, 1 ms at the matrix rate.
    assert (row["of_copy"], row["of_matrix"], row["of_floor"]) == pytest.approx((0.5, 0.5, 0.5))
    assert timed(timing.Timing(2.0, 1.9, 2.1), 10**9, 0, CEILINGS)["of_floor"] == pytest.approx(0.5)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_bytes_are_those_of_the_tensors(op):
    bench = bench_of(op)
    for shape in (bench.quick[0], *([bench.quick[0] | {"residual": False}] if op == "rms_norm" else [])):
        assert bench.bytes(shape) == sum(tensor.nbytes for tensor in bench.inputs(shape, CPU, 0).values())


def test_bytes_of_rope_kv_write_are_the_projection_twice():
    bench = bench_of("rope_kv_write")
    assert bench.bytes(bench.quick[0]) == 2 * bench.inputs(bench.quick[0], CPU, 0)["qkv"].nbytes


def test_bytes_and_flops_of_window_attention_are_those_of_the_tensors_and_products():
    bench = bench_of("window_attention")
    shape = bench.quick[0]
    inputs = bench.inputs(shape, CPU, 0)
    assert bench.bytes(shape) == 2 * inputs["q"].nbytes + inputs["k_cache"].nbytes + inputs["v_cache"].nbytes
    k, v = (inputs[name].repeat_interleave(7, dim=1) for name in ("k_cache", "v_cache"))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(inputs["q"].transpose(1, 2) @ k.mT, dim=-1) @ v
    assert bench.flops(shape) == counter.get_total_flops() > 0


@pytest.mark.parametrize("residual", [False, True])
def test_bytes_and_flops_of_linear_are_those_of_the_tensors_and_the_product(residual):
    bench = bench_of("linear")
    shape = bench.quick[0] | {"residual": residual}
    inputs = bench.inputs(shape, CPU, 0)
    assert bench.bytes(shape) == sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(inputs["x"], inputs["weight"])
    assert bench.flops(shape) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("op", "needed"),
    [("token_statistics", 2 * 3 * 500 + 3 * 28), ("head_statistics", 2 * (500 + 3) * 32), ("commit_tokens", 2 * 8 * 40)],
)
def test_bytes_of_the_selection_ops(op, needed):
    bench = bench_of(op)
    assert bench.bytes(bench.quick[0]) == needed


def test_the_formulas_are_those_of_the_roofline():
    shape = roofline.SHAPES["llada-8b"]
    ops = roofline.op_costs(shape, 4, 32, 4096, 32)
    attention = {"model": "llada", "batch": 4, "window": 32, "slots": 4096}
    assert bench_of("window_attention").bytes(attention) * 32 == ops["window_attention"].alone.bytes
    assert bench_of("window_attention").flops(attention) * 32 == ops["window_attention"].flops
    assert bench_of("swiglu").bytes({"rows": 128, "width": 12_288}) * 32 == ops["swiglu"].alone.bytes
    assert bench_of("rms_norm").bytes({"rows": 128, "width": 4096, "residual": True}) * 64 == ops["rms_norm"].alone.bytes
    rope = {"model": "llada", "batch": 4, "window": 32, "slots": 4096}
    assert bench_of("rope_kv_write").bytes(rope) * 32 == ops["rope_kv_write"].alone.bytes
    head = {"rows": 128, "vocabulary": 126_464, "width": 4096}
    assert bench_of("head_statistics").bytes(head) == ops["head_statistics"].alone.bytes
    assert bench_of("head_statistics").flops(head) == ops["head_statistics"].flops
    down = {"rows": 128, "n": 4096, "k": 12_288, "norm": False, "activation": None, "residual": False}
    assert bench_of("linear").bytes(down) * 32 == ops["down"].alone.bytes
    assert bench_of("linear").flops(down) * 32 == ops["down"].flops


def test_a_wrong_kernel_is_not_timed():
    wrong = small("swiglu", ours=lambda i: torch.zeros_like(i["out"]))
    with pytest.raises(AssertionError, match=r"swiglu .*'rows': 3"):
        check(wrong, wrong.shapes[0], wrong.inputs(wrong.shapes[0], DEVICE, 0))
    (row,) = rows_of(wrong, session())
    assert row["refused"] and "median_ms" not in row
    assert row["missing"].startswith("refused: wrong on these inputs: swiglu {'rows': 3, 'width': 64}")
    for row in rows_of(wrong, session(unverified=True)):
        assert row["median_ms"] == 1.0 and row["wrong"].startswith("swiglu {'rows': 3, 'width': 64}")


def test_a_baseline_that_rejects_a_shape_is_listed_with_its_reason():
    def picky(inputs):
        raise NotImplementedError("only powers of two\nand more")

    def absent(inputs):
        import no_such_package  # noqa: F401

    def hungry(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = rows_of(small("swiglu", baselines={"picky": picky, "absent": absent, "hungry": hungry}), session())
    assert [row.get("missing") for row in rows] == [
        None,
        "NotImplementedError: only powers of two",
        "not installed",
        "too little GPU memory",
    ]


def test_a_shape_too_large_for_the_memory_is_a_row_with_the_reason_and_the_others_go_on():
    bench = small("swiglu")

    def inputs(shape, device, seed, **dtype):
        if shape["rows"] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bench.inputs(shape, device, seed)

    found = rows_of(replace(bench, inputs=inputs, shapes=[{"rows": 101, "width": 64}, bench.shapes[0]]), session())
    assert [row.get("missing") for row in found] == ["too little GPU memory", None, None]


def test_cases_of_an_earlier_run_and_after_the_deadline_are_not_begun():
    bench = small("swiglu", shapes=[{"rows": rows, "width": 64} for rows in (3, 4)])
    assert {row["shape"]["rows"] for row in rows_of(bench, session(done={("swiglu", "rows=3 width=64", "triton")}))} == {4}
    over = session(deadline=0.0)
    assert rows_of(bench, over) == [] and over.is_cut
    all_done = session(deadline=0.0, done={("swiglu", f"rows={rows} width=64", "triton") for rows in (3, 4)})
    assert rows_of(bench, all_done) == [] and not all_done.is_cut


@pytest.mark.parametrize("op", OPS)
def test_on_a_gpu_the_key_shapes_come_first_and_quick_is_they_alone(op):
    bench = bench_of(op)
    assert 2 <= len(bench.key) <= 8
    assert bench.chosen(session(quick=True)) == bench.key
    chosen = bench.chosen(session())
    assert chosen[: len(bench.key)] == bench.key
    assert sorted(map(label, chosen)) == sorted(map(label, bench.shapes))
    assert bench.chosen(session(timer=None)) == bench.quick


def test_only_the_baselines_that_are_asked_for_run():
    assert [row["provider"] for row in rows_of(small("swiglu"), session(only=["torch"]))] == ["triton", "torch"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_timed():
    rows = rows_of(bench_of("swiglu"), session(timer=None, ceilings=None))
    assert [row["missing"] for row in rows] == ["ran, untimed", "ran, untimed", "needs a GPU"]


def test_inputs_outgrow_the_cache_within_the_memory():
    assert sets_of_inputs(2**20, 50 * 2**20) == 150
    assert sets_of_inputs(2**30, 50 * 2**20) == 2
    assert sets_of_inputs(2**33, 2**33) == 2


def test_a_provider_that_cannot_be_captured_spoils_nothing_for_the_others(monkeypatch):
    cuda = PretendCuda(monkeypatch)
    streams = []

    def reads_the_device(inputs):
        cuda.invalidate()

    found = timing.time_in_turns(
        {"first": lambda i: None, "reads": reads_the_device, "last": lambda i: streams.append(cuda.current)}, [{}, {}]
    )
    assert found["reads"] == "RuntimeError: CUDA error: operation failed due to a previous error during capture"
    assert found["first"] == found["last"] == timing.Timing(*[1.5 / 2] * 3)
    assert cuda.current is cuda.default
    assert cuda.default not in streams
    assert cuda.modes == ["thread_local"] * 3


def test_a_gpu_that_a_kernel_has_broken_is_lost(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not timing.is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert timing.is_lost(torch.device("cuda"))
    assert not timing.is_lost(CPU)


def test_percentiles_are_of_the_turns():
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Timing(3.5, 2.0, 5.0)


def test_benches_come_in_the_order_of_importance_and_by_suite():
    assert OPS[:3] == ["window_attention", "head_statistics", "linear"]
    assert [bench.op for bench in benches("ops", ["swiglu", "rms_norm"])] == ["rms_norm", "swiglu"]
    with pytest.raises(ValueError, match="suite: got 'fast', needs all, step or generate or ops"):
        benches("fast")
    with pytest.raises(ValueError, match="--op: got gemv, needs names among"):
        benches("ops", ["gemv"])


@pytest.mark.gpu
def test_ceilings_are_measured_on_a_gpu():
    found = timing.measure_ceilings(DEVICE, timing.time_in_turns)
    assert 1e11 < found.copy < 1e13 and 1e13 < found.matrix < 1e16


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_bench_times_on_a_gpu(op):
    bench = replace(bench_of(op), shapes=bench_of(op).quick, key=())
    rows = rows_of(bench, session(timer=timing.time_in_turns))
    assert "missing" not in rows[0]
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows if "missing" not in row)


# --- the baselines --------------------------------------------------------------------------------------------------------


def test_flex_is_compiled_at_every_shape(monkeypatch):
    module = module_of("window_attention")
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=count, **options))
    module.compiled_flex.cache_clear()
    shapes = [{"model": "llada", "batch": 1, "window": 32, "slots": slots} for slots in (64, 80, 96)]
    with torch._dynamo.config.patch(recompile_limit=2):  # of which there are more shapes
        for shape in shapes:
            i = module.inputs(shape, CPU, 0, torch.float32)
            for _ in range(2):
                got = module.flex(i)
    assert len(compiled) == len(shapes)
    torch.testing.assert_close(got.transpose(1, 2), module.reference(**i), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one row and windows of 32 or all"):
        module.flex(module.inputs({"model": "llada", "batch": 2, "window": 32, "slots": 64}, CPU, 0, torch.float32))
    module.compiled_flex.cache_clear()


@pytest.mark.parametrize("choose", [baselines.official_float64, baselines.torch_float32])
def test_the_baselines_choose_what_the_kernel_chooses(choose):
    module = module_of("token_statistics")
    logits = module.inputs({"rows": 4, "vocabulary": 300, "temperature": 0.0}, DEVICE, 0, torch.float32)["logits"]
    token, confidence = choose(logits)
    found = module.reference(logits)
    assert token.tolist() == found.token.tolist()
    torch.testing.assert_close(confidence.float(), found.confidence)


def test_the_official_baseline_commits_what_the_threshold_rule_commits():
    module = module_of("commit_tokens")
    i = module.inputs({"batch": 5, "block": 16, "rule": "threshold"}, DEVICE, 0)
    statistics = i["statistics"]
    statistics.token.copy_(torch.arange(16))
    statistics.rest[4] += 1  # nothing passes: the best alone
    x = i["x"].clone()
    done = baselines.official_threshold(x, statistics.token, statistics.confidence.double(), module.START, module.MASK, 0.7)
    module.reference(i["x"], statistics, i["window_start"], i["state"])
    assert x.tolist() == i["x"].tolist() and (x[4] != module.MASK).sum() == 1
    assert done.tolist() == i["state"].done.tolist()


def test_every_launch_of_the_commit_bench_decides_anew():
    module = module_of("commit_tokens")
    i = module.inputs({"batch": 2, "block": 8, "rule": "factor"}, DEVICE, 0)
    counts = [module.run_kernel(i)[0].tolist() for _ in range(3)]
    assert counts[0] == counts[1] == counts[2] and max(counts[0]) < 8
    assert math.isnan(i["state"].confidence[0, 0].item())


def test_a_timer_of_tests_gives_reasons_as_the_real_one_does():
    def broken(i):
        raise ValueError("")

    assert run_once({"broken": broken}, [{}]) == {"broken": "ValueError"}

"""The benches of the ops, but for the timing itself: providers run and agree, formulas, ceilings, and rejected shapes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from _bench import CEILINGS, DEVICE, bench_of, rows_of, run_once, session, small
from _cuda import PretendCuda
from torch.utils.flop_counter import FlopCounterMode

from fastdllm_triton.bench import _timing as timing
from fastdllm_triton.bench import bench_ops
from fastdllm_triton.bench._run import benches
from fastdllm_triton.bench._session import check, label, sets_and_results, sets_of_inputs, timed
from fastdllm_triton.models.published import LLADA_8B
from fastdllm_triton.tools import roofline
from fastdllm_triton.verify.cases import OPS as OP_CASES
from fastdllm_triton.verify.cases.commit_tokens import MASK
from fastdllm_triton.verify.cases.window_attention import attended
from fastdllm_triton.verify.ops import Expected

OPS = [bench.op for bench in benches("ops")]
CPU = torch.device("cpu")


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
        assert row["shape"] == bench.cases.small and row["axis"] in row["shape"]
        assert row["gb_per_s"] == pytest.approx(bench.cases.bytes(row["shape"]) / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1e3)
        assert row["of_matrix"] == pytest.approx(bench.cases.flops(row["shape"]) / 1e-3 / 1e14)
        assert row["of_floor"] == pytest.approx(max(row["of_copy"], row["of_matrix"]))
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"], row["times_triton"]) == (1.0, 0.9, 1.2, 1.0)
    json.dumps(rows)


def test_a_time_is_a_fraction_of_the_nearer_ceiling():
    row = timed(timing.Timing(2.0, 1.9, 2.1), 10**9, 10**11, CEILINGS)
    # 1 ms at the copy bandwidth, 1 ms at the matrix rate.
    assert (row["of_copy"], row["of_matrix"], row["of_floor"]) == pytest.approx((0.5, 0.5, 0.5))
    assert timed(timing.Timing(2.0, 1.9, 2.1), 10**9, 0, CEILINGS)["of_floor"] == pytest.approx(0.5)


def nbytes(op, shape):
    """Of the inputs and the results of a call."""
    (inputs,), _ = sets_and_results(OP_CASES[op], shape, DEVICE, torch.float16)
    return sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("op", "change"),
    [("rms_norm", {}), ("rms_norm", {"residual": False}), ("swiglu", {}), ("linear", {}), ("linear", {"residual": True})],
)
def test_bytes_are_those_of_the_tensors(op, change):
    shape = OP_CASES[op].small | change
    assert OP_CASES[op].bytes(shape) == nbytes(op, shape)


def test_bytes_of_rope_kv_write_are_the_projection_twice():
    cases = OP_CASES["rope_kv_write"]
    assert cases.bytes(cases.small) == 2 * cases.inputs(cases.small, CPU, torch.float16)["qkv"].nbytes


def test_bytes_and_flops_of_window_attention_are_those_of_the_tensors_and_products():
    cases = OP_CASES["window_attention"]
    shape = cases.small
    inputs = cases.inputs(shape, CPU, torch.float16)
    assert cases.bytes(shape) == 2 * inputs["q"].nbytes + inputs["k_cache"].nbytes + inputs["v_cache"].nbytes
    k, v = (inputs[name].repeat_interleave(7, dim=1) for name in ("k_cache", "v_cache"))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(inputs["q"].transpose(1, 2) @ k.mT, dim=-1) @ v
    assert cases.flops(shape) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("window", "slots", "block"), [(40, 40, 8), (8, 40, 4), (13, 45, 32)])
def test_flops_of_block_causal_attention_are_those_of_the_pairs_that_are_attended(window, slots, block):
    cases = OP_CASES["window_attention"]
    shape = {"model": "sdar", "batch": 2, "window": window, "slots": slots, "block": block}
    pairs = attended(cases.inputs(shape, CPU, torch.float16)).sum().item()
    assert cases.flops(shape) == 2 * 2 * 32 * 128 * pairs
    assert cases.bytes(shape) == cases.bytes(shape | {"block": None})


def test_the_masks_of_the_baselines_are_block_causal():
    shape = {"model": "sdar", "batch": 1, "window": 40, "slots": 40, "block": 8}
    i = OP_CASES["window_attention"].inputs(shape, CPU, torch.float32)
    want = OP_CASES["window_attention"].reference(**i)
    got = bench_ops.sdpa(torch.nn.attention.SDPBackend.MATH)(i).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="it has no block-causal mask"):
        bench_ops.flash_attn(i)
    allowed = bench_ops.flex_mask(8, 40, 4, CPU).mask_mod
    query, key = torch.arange(8)[:, None], torch.arange(40)
    assert torch.equal(allowed(None, None, query, key), bench_ops.block_mask(8, 40, 4, CPU))


def test_the_baseline_of_rope_kv_write_norms_as_the_reference_does():
    cases = OP_CASES["rope_kv_write"]
    i = cases.inputs({"model": "sdar", "batch": 1, "window": 4, "slots": 8}, CPU, torch.bfloat16)
    caches = {name: i[name].clone() for name in ("k_cache", "v_cache")}
    q, k_cache, v_cache = bench_ops.torch_rope(i | {name: cache.clone() for name, cache in caches.items()})
    want = cases.outputs(cases.reference, i | caches)
    assert torch.equal(q, want["q"]) and torch.equal(k_cache, want["k_cache"]) and torch.equal(v_cache, want["v_cache"])


def test_flops_of_linear_are_those_of_the_product():
    cases = OP_CASES["linear"]
    inputs = cases.inputs(cases.small, CPU, torch.float16)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(inputs["x"], inputs["weight"])
    assert cases.flops(cases.small) == counter.get_total_flops() > 0


def test_bytes_of_window_inputs_are_the_masks_read_and_the_results():
    cases = OP_CASES["window_inputs"]
    for sample in (False, True):
        shape = cases.small | {"sample": sample}
        inputs = cases.inputs(shape, DEVICE, torch.float32)
        found = cases.outputs(cases.reference, inputs)
        results = sum(found[name].nbytes for name in ("ids", "rows", "place") + ("keys",) * sample)
        assert cases.bytes(shape) == results + 8 * shape["batch"] * shape["window"]


@pytest.mark.parametrize(
    ("op", "needed"),
    [("token_statistics", 2 * 3 * 500 + 3 * 28), ("head_statistics", 2 * (500 + 3) * 32), ("commit_tokens", 2 * 8 * 40)],
)
def test_bytes_of_the_selection_ops(op, needed):
    assert OP_CASES[op].bytes(OP_CASES[op].small) == needed


def test_the_formulas_are_those_of_the_roofline():
    ops = roofline.op_costs(LLADA_8B, 4, 32, 4096, 32)
    attention = {"model": "llada", "batch": 4, "window": 32, "slots": 4096}
    assert OP_CASES["window_attention"].bytes(attention) * 32 == ops["window_attention"].alone.bytes
    assert OP_CASES["window_attention"].flops(attention) * 32 == ops["window_attention"].flops
    assert OP_CASES["swiglu"].bytes({"rows": 128, "width": 12_288}) * 32 == ops["swiglu"].alone.bytes
    assert OP_CASES["rms_norm"].bytes({"rows": 128, "width": 4096, "residual": True}) * 64 == ops["rms_norm"].alone.bytes
    rope = {"model": "llada", "batch": 4, "window": 32, "slots": 4096}
    assert OP_CASES["rope_kv_write"].bytes(rope) * 32 == ops["rope_kv_write"].alone.bytes
    head = {"rows": 128, "vocabulary": 126_464, "width": 4096}
    assert OP_CASES["head_statistics"].bytes(head) == ops["head_statistics"].alone.bytes
    assert OP_CASES["head_statistics"].flops(head) == ops["head_statistics"].flops
    down = {"rows": 128, "n": 4096, "k": 12_288, "norm": False, "activation": None, "residual": False}
    assert OP_CASES["linear"].bytes(down) * 32 == ops["down"].alone.bytes
    assert OP_CASES["linear"].flops(down) * 32 == ops["down"].flops


def test_a_wrong_kernel_is_not_timed():
    wrong = small("swiglu", ours=lambda gate_up, out: out.zero_())
    (inputs,), expected = sets_and_results(wrong.cases, wrong.cases.small, DEVICE, torch.float16)
    with pytest.raises(AssertionError, match=r"swiglu .*'rows': 3.*: y: error .* allowed"):
        check(wrong.cases, wrong.cases.small, wrong.function, inputs, expected)
    (row,) = rows_of(wrong, session())
    assert row["refused"] and "median_ms" not in row
    assert row["missing"].startswith("refused: wrong on these inputs: swiglu {'rows': 3, 'width': 64}")
    for row in rows_of(wrong, session(unverified=True)):
        assert row["median_ms"] == 1.0 and row["wrong"].startswith("swiglu {'rows': 3, 'width': 64}")


@pytest.mark.parametrize("factor", [0.98, 1.0])
def test_what_is_timed_must_hold_by_the_rule_of_verify(factor):
    bench = bench_of("swiglu")
    (inputs,), expected = sets_and_results(bench.cases, bench.cases.small, DEVICE, torch.float16)
    scaled = lambda **i: bench.cases.kernel(**i).mul_(factor)  # noqa: E731
    if factor == 1:
        check(bench.cases, bench.cases.small, scaled, inputs, expected)
    else:  # two percent, which float16 does not explain
        with pytest.raises(AssertionError, match="y: error"):
            check(bench.cases, bench.cases.small, scaled, inputs, expected)


def test_without_room_for_float64_a_result_is_held_against_float32(monkeypatch):
    cases = OP_CASES["swiglu"]
    reference, seen = cases.reference, []

    def cramped(gate_up):
        seen.append(gate_up.dtype)
        if gate_up.dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference(gate_up)

    monkeypatch.setattr(sys.modules["fastdllm_triton.reference.swiglu"], "swiglu", cramped)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    expected = Expected.of(cases, cases.inputs(cases.small, CPU, torch.float16))
    assert seen == [torch.float16, torch.float64, torch.float32]
    assert expected.exact["y"].dtype == torch.float32


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
    cases = OP_CASES["swiglu"]

    def make(random, rows, width):
        if rows > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cases.make(random, rows, width)

    found = rows_of(small("swiglu", make=make, shapes=[{"rows": 101, "width": 64}, cases.small]), session())
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
    cases = bench.cases
    assert 2 <= len(cases.key) <= 8
    assert bench.chosen(session(quick=True)) == cases.key
    chosen = bench.chosen(session())
    assert chosen[: len(cases.key)] == cases.key
    assert sorted(map(label, chosen)) == sorted(map(label, cases.shapes))
    assert bench.chosen(session(timer=None)) == [cases.small]


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
    bench = bench_of(op)
    bench = replace(bench, cases=replace(bench.cases, shapes=[bench.cases.small], key=()))
    rows = rows_of(bench, session(timer=timing.time_in_turns))
    assert "missing" not in rows[0]
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows if "missing" not in row)


# --- the baselines --------------------------------------------------------------------------------------------------------


def test_flex_is_compiled_at_every_shape(monkeypatch):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=count, **options))
    bench_ops.compiled_flex.cache_clear()
    shapes = [{"model": "llada", "batch": 1, "window": 32, "slots": slots} for slots in (64, 80, 96)]
    with torch._dynamo.config.patch(recompile_limit=2):  # of which there are more shapes
        for shape in shapes:
            i = OP_CASES["window_attention"].inputs(shape, CPU, torch.float32)
            for _ in range(2):
                got = bench_ops.flex(i)
    assert len(compiled) == len(shapes)
    torch.testing.assert_close(got.transpose(1, 2), OP_CASES["window_attention"].reference(**i), rtol=1e-4, atol=1e-4)
    two_rows = OP_CASES["window_attention"].inputs({**shapes[0], "batch": 2}, CPU, torch.float32)
    with pytest.raises(ValueError, match="one row and windows of 32 or all"):
        bench_ops.flex(two_rows)
    bench_ops.compiled_flex.cache_clear()


@pytest.mark.parametrize("choose", [bench_ops.llada_confidence, bench_ops.torch_float32])
def test_the_baselines_choose_what_the_kernel_chooses(choose):
    cases = OP_CASES["token_statistics"]
    logits = cases.inputs({"rows": 4, "vocabulary": 300}, DEVICE, torch.float32)["logits"]
    token, confidence = choose(logits)
    found = cases.reference(logits)
    assert token.tolist() == found.token.tolist()
    torch.testing.assert_close(confidence.float(), found.confidence)


def test_the_official_baseline_commits_what_the_threshold_rule_commits():
    i = OP_CASES["commit_tokens"].inputs({"batch": 5, "block": 16, "rule": "threshold"}, DEVICE, torch.float32)
    statistics = i["statistics"]
    for name, value in vars(statistics).items():
        value.copy_(torch.rand(5, 16) if name != "token" else torch.arange(16))
    statistics.logsumexp.copy_(statistics.logit + torch.log1p(statistics.rest))
    statistics.rest[4] += 1  # nothing passes: the best alone
    statistics.logsumexp[4] = (statistics.logit + torch.log1p(statistics.rest))[4]
    x = i["x"].clone()
    done = bench_ops.official_commit({**i, "x": x})
    OP_CASES["commit_tokens"].reference(**i)
    assert x.tolist() == i["x"].tolist() and (x[4] != MASK).sum() == 1
    assert done.tolist() == i["state"].done.tolist()


def test_every_launch_of_the_commit_bench_decides_anew():
    cases, left = OP_CASES["commit_tokens"], []
    i = cases.inputs({"batch": 2, "block": 8, "rule": "factor"}, DEVICE, torch.float32)
    for _ in range(3):
        cases.kernel(**i)
        left.append(i["state"].remaining.tolist())
    assert left[0] == left[1] == left[2] and max(left[0]) < 8
    assert math.isnan(i["state"].confidence[0, 0].item())


def test_a_timer_of_tests_gives_reasons_as_the_real_one_does():
    def broken(i):
        raise ValueError("")

    assert run_once({"broken": broken}, [{}]) == {"broken": "ValueError"}

"""The benches of whole steps and generations, but for the timing itself: same work on both sides, schedules, and their rows."""

from __future__ import annotations

import functools
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _bench import rows_of
from _cuda import PretendCuda
from _support import DEVICE

from fastdllm_triton.bench import _models, bench_generate, bench_step
from fastdllm_triton.bench._session import Session, label
from fastdllm_triton.bench._timing import Ceilings
from fastdllm_triton.bench.official_blocks import OfficialBlockModel
from fastdllm_triton.bench.official_step import OfficialModel
from fastdllm_triton.kernels import _pdl
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.model import MaskedDiffusionLM
from fastdllm_triton.models.published import PUBLISHED

CPU = torch.device("cpu")


def sides(model: str, batch: int, window: int = 8, context: int = 40) -> tuple[bench_step.OurStep, bench_step.OfficialStep]:
    network = _models.network_of(model, CPU, torch.float32)
    ours = bench_step.OurStep(network, _models.prompt_of(model, batch, context, CPU), window)
    official = bench_step.OfficialBlockStep if network.config.block_causal else bench_step.OfficialStep
    return ours, official(network, ours.sequences, ours.start, window)


@pytest.mark.parametrize("model", ["llada-8b", "dream-7b"])
def test_the_large_models_have_the_sizes_of_the_released_ones(model):
    config = _models.config_of(model)
    assert replace(config, max_length=PUBLISHED[model].max_length) == PUBLISHED[model]
    assert config.shift == config.qkv_bias == (model == "dream-7b")
    assert config.mask_id == {"llada-8b": 126_336, "dream-7b": 151_666}[model]


@pytest.mark.parametrize(("model", "batch"), [("tiny llada", 1), ("tiny llada", 2), ("tiny dream", 1)])
def test_a_step_of_ours_computes_the_logits_of_the_official_one(model, batch):
    ours, theirs = sides(model, batch)
    assert bench_step.difference(ours.logits(), theirs.logits()) < 1e-5


def test_both_sides_commit_the_same_tokens():
    ours, theirs = sides("tiny llada", 2)
    for side in (ours, theirs):
        side.reset()
        side.refresh()
        for _ in range(3):
            side.step()
    assert (theirs.x == theirs.mask_id).any(1).all()  # the block is not done, so that each step had something to do
    assert torch.equal(ours.batch.x, theirs.x)
    ours.reset()
    assert torch.equal(ours.batch.x, ours.sequences)


BLOCK_CAUSAL = [("tiny sdar", 1, 4, 40), ("tiny sdar", 2, 8, 64), ("tiny v2", 2, 16, 48), ("tiny v2", 1, 8, 16)]


@pytest.mark.parametrize(("model", "batch", "window", "context"), BLOCK_CAUSAL)
def test_both_sides_of_a_block_causal_model_do_the_same(model, batch, window, context):
    ours, theirs = sides(model, batch, window, context)
    assert bench_step.difference(ours.logits(), theirs.logits()) < 1e-5
    for _ in range(2):
        for side in (ours, theirs):
            side.reset()
            side.refresh()
            for _ in range(bench_step.STEPS - 1):
                side.step()
        assert torch.equal(ours.batch.x, theirs.loop.x)
        changed = ours.batch.x != ours.sequences
        assert changed.any(1).all() and not changed[:, : ours.start].any()
        assert (theirs.loop.past[0][0].shape[2], changed[:, ours.start + window :].any()) == (ours.start, False)
    if window > 4:
        assert (ours.batch.x == theirs.loop.model.config.mask_id)[:, ours.start : ours.start + window].any()


@pytest.mark.parametrize(("model", "batch", "window", "context"), BLOCK_CAUSAL)
def test_forwards_of_a_block_causal_model_have_the_sizes_that_are_counted(model, batch, window, context, monkeypatch):
    ours, _ = sides(model, batch, window, context)
    network, seen = ours.network, []
    forward = type(network).forward
    monkeypatch.setattr(
        type(network), "forward", lambda self, ids, *args, **more: seen.append(ids.shape) or forward(self, ids, *args, **more)
    )
    ours.reset()
    ours.refresh()
    ours.step()
    shape = {"model": model, "batch": batch, "window": window, "context": context}
    assert [bench_step.sizes(forward, shape)[0] for forward in ("refresh", "step")] == [length for _, length in seen]


def test_a_step_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(OfficialModel, "_angles", lambda self, length, device: torch.zeros(length, self.config.head_dim))
    before, after = bench_step.BENCH.rows_of(bench_step.QUICK[0], Session(CPU))
    # What was written before the comparison is doubted, and replaced.
    assert all(row["wrong"] == "not compared with the official logits yet" for row in before)
    assert {(row["shape"]["forward"], row["provider"]) for row in before} == {
        (row["shape"]["forward"], row["provider"]) for row in after
    }
    for row in after:
        assert row["refused"] and "differ from the official ones" in row["missing"]
    *_, rows = bench_step.BENCH.rows_of(bench_step.QUICK[0], Session(CPU, unverified=True))
    assert len(rows) == 6 and all("differ from the official ones" in row["wrong"] for row in rows)


def test_rows_of_a_step_without_a_gpu_say_that_nothing_was_timed():
    rows = rows_of(bench_step.BENCH, Session(CPU))
    assert [(row["shape"]["forward"], row["provider"]) for row in rows[:6]] == [
        ("refresh", "triton"), ("step", "triton"), ("step", "triton serial"), ("step", "triton fused"),
        ("refresh", "official"), ("step", "official"),
    ]  # fmt: skip
    assert not any("wrong" in row for row in rows)
    assert len(rows) == 6 * len(bench_step.QUICK)
    reasons = {row["missing"] for row in rows}
    assert reasons == {"ran; not timed without a GPU", "NotImplementedError: the official loop is for one row", "needs a GPU"}
    only = rows_of(bench_step.BENCH, Session(CPU, only=["triton serial"]))
    assert {row["provider"] for row in only} == {"triton", "triton serial"}
    json.dumps(rows)


@pytest.mark.parametrize(("model", "batch", "window", "context"), BLOCK_CAUSAL[:1] + BLOCK_CAUSAL[2:3])
def test_rows_of_a_block_causal_step_are_put_next_to_the_floors_of_their_sizes(model, batch, window, context, monkeypatch):
    PretendCuda(monkeypatch)
    monkeypatch.setattr(bench_step, "network_of", lambda model, device, dtype: _models.network_of(model, CPU, torch.float32))
    session = Session(CPU, timer=lambda runs, inputs: {}, ceilings=Ceilings(copy=1e12, matrix=1e14))
    shape = {"forward": "step", "model": model, "batch": batch, "window": window, "context": context}
    *_, rows = bench_step.BENCH.rows_of(shape, session)
    found = {(row["shape"]["forward"], row["provider"]): row for row in rows}
    assert not any("wrong" in row for row in rows)
    step, refresh = found["step", "triton"], found["refresh", "triton"]
    assert (step["median_ms"], refresh["median_ms"]) == (0.375, 1.5)
    assert found["refresh", "official"]["times_triton"] == 1.0
    # SDAR's refresh is over two blocks, and decodes one; that of Fast-dLLM v2 passes one row through the head.
    assert (refresh["flops"] > step["flops"]) == (model == "tiny sdar")


@pytest.mark.parametrize("model", ["tiny llada", "tiny dream"])
def test_a_step_with_every_product_fused_computes_the_same(model):
    network = _models.network_of(model, DEVICE, torch.float32, "triton")
    ids = _models.prompt_of(model, 1, 12, DEVICE)
    want, got = network.logits(ids), bench_step.launched(network, "triton fused").logits(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, want)  # in another order


def test_serial_launches_are_an_option_of_the_ops(monkeypatch):
    monkeypatch.setattr(_pdl, "INTERPRETED", False)
    network = _models.network_of("tiny llada", DEVICE, torch.float32, "triton")
    serial = bench_step.launched(network, "triton serial")
    assert _pdl.dependent_launch(ARCHS["sm_90"], serial.ops.options) == {"PDL": False}
    assert _pdl.dependent_launch(ARCHS["sm_90"], network.ops.options)["PDL"]


@pytest.mark.parametrize(("gen_length", "tokens", "total"), [(1024, 1024 / 140, 140), (256, 3.01, 85), (512, 5.8, 88)])
def test_a_schedule_has_the_paper_s_number_of_forwards(gen_length, tokens, total):
    counts = bench_generate.spread(gen_length, tokens)
    assert len(counts) == gen_length // 32
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


def test_the_end_token_lies_in_the_last_block_that_is_decoded():
    assert [bench_generate.blocks_until(end) for end in (1, 32, 33, 230)] == [1, 1, 2, 8]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_ours_and_the_official_loop_follow_the_same_schedule_to_the_same_tokens(cache):
    network = _models.network_of("tiny llada", CPU, torch.float32)
    prompts = _models.prompt_of("tiny llada", 2, 9, CPU)
    counts = [2, 5]
    ours = bench_generate.run_ours(MaskedDiffusionLM(network, None), prompts, cache, counts, 96)
    official = bench_generate.run_official(OfficialModel(network), prompts, cache, counts, 96)
    assert torch.equal(ours, official)
    masked = ours == network.config.mask_id
    assert masked[:, -32:].all()
    assert not masked[:, :-32].any()


@pytest.mark.parametrize("model", ["tiny sdar", "tiny v2"])
@pytest.mark.parametrize("rate", [1.0, 2.7, 8.0])
def test_ours_and_the_official_loop_of_a_block_causal_model_follow_the_same_schedule(model, rate):
    (shape,) = (shape for shape in bench_generate.QUICK if shape["model"] == model)
    network = _models.network_of(model, CPU, torch.float32)
    prompts = _models.prompt_of(model, 2, shape["prompt"], CPU)
    length, gen_length = bench_generate.decoded_length(shape), shape["gen_length"]
    counts = bench_generate.forwards_of(shape, rate)
    ours = bench_generate.run_ours(MaskedDiffusionLM(network, None), prompts, "", counts, gen_length, shape["block"])
    loop = OfficialBlockModel(network)
    official = bench_generate.run_official(loop, prompts, "", counts, gen_length, block=shape["block"])
    assert torch.equal(ours, official[:, : ours.shape[1]])
    assert not (ours == network.config.mask_id).any()
    some = bench_generate.run_ours(MaskedDiffusionLM(network, None), prompts, "", counts[:2], gen_length, shape["block"])
    assert torch.equal(some[:, : shape["prompt"] + 2 * length], ours[:, : shape["prompt"] + 2 * length])
    assert (some[:, shape["prompt"] + 2 * length :] == network.config.mask_id).any()


@pytest.mark.parametrize("model", ["sdar-8b", "fast-dllm-v2-7b"])
def test_the_floor_of_a_block_causal_generation_is_its_weights_again_and_again(model):
    session = Session(CPU, ceilings=Ceilings(copy=4e12, matrix=7e14))
    shape = next(shape for shape in bench_generate.SHAPES if shape["model"] == model and shape["batch"] == 1)
    length = bench_generate.decoded_length(shape)
    counts = bench_generate.forwards_of(shape, shape["tokens_per_forward"])
    row = bench_generate.BENCH.row_of(shape, counts, 5.0, session, "triton")
    stopped = bench_generate.BENCH.row_of(shape, counts[: bench_generate.blocks_until(230, length)], 2.0, session, "triton eos")
    assert sum(counts) == pytest.approx(512 / 2.7, abs=2)
    assert (row["tokens_per_s"], stopped["tokens_per_s"]) == (512 / 5, 230 / 2)
    stores = 512 // 32 if model == "fast-dllm-v2-7b" else 0
    # 15 GB of weights a forward; a store of Fast-dLLM v2 reads them too.
    assert 5.0 * row["of_floor"] == pytest.approx((sum(counts) + stores) * 15e9 / 4e12, rel=0.1)
    assert not row["extrapolated"]


@pytest.mark.parametrize("model", ["tiny llada", "tiny dream"])
def test_the_vanilla_sample_has_its_number_of_forwards(model, monkeypatch):
    forwards = []
    forward = OfficialModel.__call__
    monkeypatch.setattr(
        OfficialModel, "__call__", lambda self, *args, **kwargs: forwards.append(args) or forward(self, *args, **kwargs)
    )
    network = _models.network_of(model, CPU, torch.float32)
    prompts = _models.prompt_of(model, 1, 9, CPU)
    bench_generate.run_official(OfficialModel(network), prompts, "none", [32, 32], 64, bench_generate.SAMPLED)
    assert [len(args[0][0]) for args in forwards] == [9 + 64] * bench_generate.SAMPLED


def test_a_generation_is_put_next_to_its_floor():
    session = Session(CPU, ceilings=Ceilings(copy=4e12, matrix=7e14))
    shape = bench_generate.SHAPES[0]
    counts = bench_generate.spread(shape["gen_length"], shape["tokens_per_forward"])
    row = bench_generate.BENCH.row_of(shape, counts, 5.0, session, "triton")
    stopped = bench_generate.BENCH.row_of(shape, counts[:8], 1.25, session, "triton eos")
    vanilla = bench_generate.BENCH.row_of(shape, [32] * 32, 100.0, session, "vanilla")
    assert (row["forwards"], stopped["forwards"], vanilla["forwards"]) == (140, 35, 1024)
    assert (row["tokens_per_s"], stopped["tokens_per_s"]) == (1024 / 5, 230 / 1.25)
    # 32 refreshes of 2584 tokens, some 40 TFLOP each, at the matrix rate; the steps stream 15 GB each.
    assert 5.0 * row["of_floor"] == pytest.approx(32 * 40e12 / 7e14 + 108 * 15e9 / 4e12, rel=0.1)
    assert stopped["of_floor"] == pytest.approx(row["of_floor"], rel=0.01)
    assert vanilla["of_floor"] * 100 == pytest.approx(1024 * 41e12 / 7e14, rel=0.1)
    assert vanilla["extrapolated"]
    assert not row["extrapolated"]


def test_ratios_are_to_ours_and_to_vanilla():
    rows = {name: {"median_ms": time} for name, time in (("triton", 4.0), ("triton eos", 1.0), ("vanilla", 120.0))}
    assert bench_generate.ratios(rows["triton eos"], rows) == {"times_triton": 0.25, "over_vanilla": 120.0}
    assert bench_generate.ratios(rows["vanilla"], rows) == {"times_triton": 30.0, "over_vanilla": 1.0}
    assert bench_generate.ratios({"missing": "too little GPU memory"}, rows) == {}
    assert bench_generate.ratios(rows["triton"], {"triton": rows["triton"], "vanilla": {"missing": "?"}}) == {"times_triton": 1.0}


def test_rows_of_a_generation_without_a_gpu_say_that_nothing_was_timed():
    rows = rows_of(bench_generate.BENCH, Session(CPU))
    assert [row["provider"] for row in rows[:4]] == ["triton", "triton eos", "official", "vanilla"]
    assert len(rows) == 4 * len(bench_generate.QUICK)
    assert {row["missing"] for row in rows} == {"ran; not timed without a GPU"}
    json.dumps(rows)


@pytest.fixture
def timed_session(monkeypatch):
    """A session that times, without a GPU, and its pretended CUDA."""
    cuda = PretendCuda(monkeypatch)
    # Networks stay where they can be.
    session = Session(CPU, timer=lambda runs, inputs: {}, ceilings=Ceilings(copy=1e12, matrix=1e14))
    small = functools.partial(_models.network_of, "tiny llada", CPU, torch.float32)
    for module in (bench_step, bench_generate):
        monkeypatch.setattr(module, "network_of", lambda model, device, dtype: small())
    return session, cuda


def test_a_step_and_a_refresh_are_timed_on_both_sides(timed_session):
    *_, rows = bench_step.BENCH.rows_of(bench_step.QUICK[0], timed_session[0])
    times = {(row["shape"]["forward"], row["provider"]): row.get("median_ms") for row in rows}
    assert times == {
        ("refresh", "triton"): 1.5, ("step", "triton"): 0.375, ("refresh", "official"): 1.5, ("step", "official"): 0.375,
        ("step", "triton serial"): None, ("step", "triton fused"): None,  # these need the kernels
    }  # fmt: skip
    assert {row["times_triton"] for row in rows if "median_ms" in row} == {1.0}


def test_the_peak_of_a_captured_step_counts_the_memory_of_its_graph(timed_session, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    session, _ = timed_session
    pools = [{"segment_pool_id": (0, 0), "total_size": 7}, {"segment_pool_id": [0, 3], "total_size": 100}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pools)
    step = bench_step.OurStep.step

    def captured(self):
        if len(pools) == 2:  # the capture takes memory, and a replay allocates nothing
            pools.append({"segment_pool_id": (0, 4), "total_size": 5000})
        step(self)

    monkeypatch.setattr(bench_step.OurStep, "step", captured)
    *_, rows = bench_step.BENCH.rows_of(bench_step.QUICK[0], session)
    peaks = {(row["shape"]["forward"], row["provider"]): row.get("peak_bytes") for row in rows}
    assert peaks["step", "triton"] == 5000
    assert peaks["refresh", "triton"] == peaks["step", "official"] == 0


def test_our_buffers_are_gone_before_the_official_step_is_made(monkeypatch):
    alive = []
    our_step, official_step = bench_step.OurStep, bench_step.OfficialStep

    def watched(*args):
        side = our_step(*args)
        alive.append(weakref.ref(side.batch.cache.k))
        return side

    def official(*args):
        assert [cache() for cache in alive] == [None]
        return official_step(*args)

    monkeypatch.setattr(bench_step, "OurStep", watched)
    monkeypatch.setattr(bench_step, "OfficialStep", official)
    *_, rows = bench_step.BENCH.rows_of(bench_step.QUICK[0], Session(CPU))
    assert len(rows) == 6


def test_what_generations_keep_is_given_back_before_the_official_loop_runs(monkeypatch):
    log = []
    for name in ("run_ours", "run_official", "release"):
        monkeypatch.setattr(bench_generate, name, lambda *args, name=name: log.append(name))
    list(bench_generate.BENCH.rows_of(bench_generate.QUICK[0], Session(CPU)))
    assert log == ["run_ours", "run_ours", "release", "run_official", "release", "run_official", "release"]
    model = MaskedDiffusionLM(_models.network_of("tiny llada", CPU, torch.float32), None)
    model.buffers.limit = 1
    model.buffers.give(SimpleNamespace(nbytes=1, release=lambda: log.append("freed")))
    _models.release(model)
    assert log[-1] == "freed" and len(model.buffers) == 0


def test_a_generation_is_written_provider_by_provider(monkeypatch):
    counts = [len(rows) for rows in bench_generate.BENCH.rows_of(bench_generate.QUICK[0], Session(CPU))]
    assert counts == [1, 2, 3, 4]


@pytest.mark.parametrize(("bench", "key"), [(bench_step, 1), (bench_generate, 4)])
def test_the_key_shapes_come_first_and_are_of_one_row(bench, key, monkeypatch):
    assert key == bench.KEY
    assert all(shape["batch"] == 1 for shape in bench.SHAPES[:key])
    assert bench.SHAPES[0]["model"] == "llada-8b"
    ran = []
    monkeypatch.setattr(type(bench.BENCH), "rows_of", lambda self, shape, session: iter([[ran.append(shape)]]))
    quick = Session(CPU, timer=lambda runs, inputs: {}, quick=True)
    list(bench.BENCH.measure(quick))
    assert ran == bench.SHAPES[:key]
    # A case that was cut before its last provider is measured again.
    forward = {"forward": "step"} if bench is bench_step else {}
    providers = ["triton", *bench.BENCH.baselines] + (["triton eos"] if bench is bench_generate else [])
    done = [(bench.BENCH.op, label(forward | bench.SHAPES[0]), provider) for provider in providers]
    for count in (len(done) - 1, len(done)):
        ran.clear()
        list(bench.BENCH.measure(replace(quick, done=set(done[:count]))))
        assert (bench.SHAPES[0] in ran) == (count < len(done))


@pytest.mark.gpu
def test_steps_are_timed_on_a_gpu():
    session = Session(DEVICE, timer=lambda runs, inputs: {}, ceilings=Ceilings(copy=1e12, matrix=1e14))
    *_, rows = bench_step.BENCH.rows_of(bench_step.QUICK[0], session)
    step = next(row for row in rows if (row["shape"]["forward"], row["provider"]) == ("step", "triton"))
    assert step["median_ms"] > 0
    assert step["peak_bytes"] > 0
    assert next(row for row in rows if (row["shape"]["forward"], row["provider"]) == ("step", "official"))["times_triton"] > 0


@pytest.mark.gpu
def test_generations_are_timed_on_a_gpu():
    session = Session(DEVICE, timer=lambda runs, inputs: {}, ceilings=Ceilings(copy=1e12, matrix=1e14))
    *_, rows = bench_generate.BENCH.rows_of(bench_generate.QUICK[0], session)
    assert [row["provider"] for row in rows] == ["triton", "triton eos", "official", "vanilla"]
    assert all(row["median_ms"] > 0 and row["times_triton"] > 0 for row in rows)

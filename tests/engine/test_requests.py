"""Requests that come and go: each gets what it gets alone, whoever is decoded beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdllm_triton as fdt
from fastdllm_triton.decoding.strategies import SpreadStrategy
from fastdllm_triton.engine.request import Aborted, Request, batch_requests
from fastdllm_triton.engine.scheduler import ForwardPlan, RowFlags, Scheduler

OPTIONS: dict[str, Any] = {"gen_length": 16, "block_length": 8}


@pytest.fixture(scope="module", params=[("llada-gqa", "cpu"), ("llada-gqa", "reference"), (GOLDEN_DREAM, "cpu")])
def lm(request: pytest.FixtureRequest) -> fdt.MaskedDiffusionLM:
    model, backend = request.param
    return fdt.load(GOLDEN / model, device="cpu", backend=backend)


def _finish(engine: fdt.Engine) -> list[fdt.StepOutput]:
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


def _is_alone(request: Request, lm: fdt.MaskedDiffusionLM) -> None:
    """Its tokens and their forwards are those of a generation of its own."""
    prompt = request.tokens[: request.prompt_length]
    alone, own = lm.generate([prompt], request.config), request.output
    assert own.sequences.tolist() == alone.sequences.tolist()
    assert own.step_map.tolist() == alone.step_map.tolist()
    assert (own.refreshes, own.steps) == (alone.refreshes, alone.steps)
    torch.testing.assert_close(own.confidence, alone.confidence, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert own.row_forwards.tolist() == alone.row_forwards.tolist()


@dataclass
class Arrival:
    """A request, the step before which it comes, and that before which it is aborted, if it is."""

    at: int
    prompt: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    abort: int | None = None


_IDS = st.integers(0, 300)


@st.composite
def _arrivals(draw: st.DrawFn) -> Arrival:
    block = draw(st.sampled_from([4, 8]))
    cache = draw(st.sampled_from(["none", "prefix", "dual"]))
    score = draw(st.sampled_from(["confidence", "random"]))
    strategy = draw(
        st.one_of(
            st.floats(0.1, 1.0).map(lambda t: fdt.Threshold(t, score=score)),
            st.sampled_from([1, 2, 4]).map(lambda n: fdt.FixedSteps(4 * n, score=score)),
            st.sampled_from([1, 2, 4]).map(lambda n: fdt.CappedThreshold(4 * n, 0.5, score=score)),
            st.floats(0.2, 3.0).map(lambda f: fdt.Factor(f, score=score)),
        )
    )
    options: dict[str, Any] = {
        "gen_length": block * draw(st.sampled_from([1, 2, 4])),
        "block_length": block,
        "cache": cache,
        "strategy": strategy,
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        "seed": draw(st.integers(0, 99)),
        "forbidden": tuple(draw(st.lists(_IDS, max_size=3))),
        "refresh_every": draw(st.sampled_from([None, None, 1, 2])),
        "suffix_window": draw(st.sampled_from([None, 3])),
    }
    if draw(st.booleans()):
        options["eos_ids"] = tuple(draw(st.lists(_IDS, min_size=1, max_size=3)))
    else:
        options["stop_at_eos"] = False
    if cache != "none":
        options |= {"look_back": draw(st.sampled_from([0, 2])), "prompt_refresh": draw(st.sampled_from([None, 2]))}
    if isinstance(strategy, SpreadStrategy):  # which the blocks must divide
        options["strategy"] = replace(strategy, steps=strategy.steps * (options["gen_length"] // block))
    at = draw(st.integers(0, 12))
    abort = draw(st.one_of(st.none(), st.none(), st.integers(at, at + 8)))
    return Arrival(at, draw(st.lists(_IDS, min_size=1, max_size=9)), options, abort)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(_arrivals(), min_size=1, max_size=6), st.integers(1, 4))
def test_every_request_gets_what_it_gets_alone(lm: fdt.MaskedDiffusionLM, arrivals: list[Arrival], max_rows: int) -> None:
    engine = fdt.Engine(lm, max_rows=max_rows, max_length=48)
    requests: dict[int, Request] = {}
    committed: dict[int | str, dict[int, int]] = {i: {} for i in range(len(arrivals))}
    step = 0
    while engine.has_unfinished or len(requests) < len(arrivals):
        for i, arrival in enumerate(arrivals):
            if arrival.at == step:
                requests[i] = engine.add_request(arrival.prompt, request_id=i, **arrival.options)
            if arrival.abort == step and i in requests:
                engine.abort(i)
        for output in engine.step():
            for token in output.committed:
                assert token.position not in committed[output.request_id], "a token is committed once"
                committed[output.request_id][token.position] = token.token
        step += 1
    for i, request in requests.items():
        assert request.finished
        if request.error is not None:
            assert isinstance(request.error, Aborted)
            continue
        _is_alone(request, lm)
        steps, generated = request.output.step_map[0].tolist(), request.output.generated[0].tolist()
        assert committed[i] == {p: token for p, (token, at) in enumerate(zip(generated, steps, strict=True)) if at >= 0}


def test_outputs_are_values(lm: fdt.MaskedDiffusionLM) -> None:
    engine = fdt.Engine(lm, max_rows=2, max_length=48)
    request = engine.add_request([1, 2, 3], **OPTIONS, strategy=fdt.FixedSteps(8), stop_at_eos=False)
    outputs = _finish(engine)
    assert [len(output.committed) for output in outputs] == [2] * 8
    assert [output.block for output in outputs] == [0] * 4 + [1] * 4
    assert [output.finished for output in outputs] == [False] * 7 + [True]
    assert all(output.request_id == request.request_id and output.error is None for output in outputs)
    tokens = {token.position: token.token for output in outputs for token in output.committed}
    assert [tokens[i] for i in range(16)] == request.output.generated[0].tolist()


def test_requests_wait_for_a_row_first_come_first_served(lm: fdt.MaskedDiffusionLM) -> None:
    engine = fdt.Engine(lm, max_rows=2, max_length=48)
    requests = [engine.add_request([i + 1], **OPTIONS) for i in range(5)]
    begun: list[int | str] = []
    while engine.has_unfinished:
        begun += [output.request_id for output in engine.step() if output.request_id not in begun]
    assert begun == [request.request_id for request in requests]
    for request in requests:
        _is_alone(request, lm)


def test_an_aborted_request_leaves_the_others_alone_and_has_what_there_was(lm: fdt.MaskedDiffusionLM) -> None:
    engine = fdt.Engine(lm, max_rows=2, max_length=48)
    first, second, third = (
        engine.add_request([i + 1, 7], request_id=name, **OPTIONS, strategy=fdt.FixedSteps(16)) for i, name in enumerate("abc")
    )
    engine.step()
    engine.abort("a")
    engine.abort("c")  # which has not begun
    engine.abort("nobody")
    assert first.finished and isinstance(first.error, Aborted)
    assert first.output.committed == 1 and int((first.output.sequences == lm.config.mask_id).sum()) == 15
    assert third.finished
    with pytest.raises(RuntimeError, match="request 'c' was aborted before it began"):
        _ = third.output
    _finish(engine)
    _is_alone(second, lm)


def test_a_text_goes_through_the_tokenizer_and_guided_requests_run_beside_others() -> None:
    model = fdt.load("tiny", device="cpu")
    engine = fdt.Engine(model, max_rows=3, max_length=128)
    text = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
    requests = [engine.add_request(text, gen_length=48, block_length=16, **more) for more in ({}, {"cfg_scale": 0.5})]
    _finish(engine)
    assert requests[0].output.texts[0].endswith("#### 59")
    for request in requests:
        _is_alone(request, model)


def test_a_row_with_nan_logits_fails_and_the_others_go_on() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    model.network.weights.embedding[299] = torch.nan
    engine = fdt.Engine(model, max_rows=2, max_length=48)
    bad, good = (engine.add_request(prompt, **OPTIONS) for prompt in ([299, 5], [4, 5]))
    outputs = _finish(engine)
    assert isinstance(bad.error, FloatingPointError) and bad.finished
    assert any(output.error is bad.error for output in outputs)
    _is_alone(good, model)


def test_buffers_serve_the_next_engine_once_one_is_closed(lm: fdt.MaskedDiffusionLM) -> None:
    lm.buffers.limit = 2**40
    try:
        for _ in range(2):
            engine = fdt.Engine(lm, max_rows=2, max_length=48)
            engine.add_request([1, 2], **OPTIONS)
            _finish(engine)
            engine.close()
            assert len(lm.buffers) == 1
    finally:
        lm.release()
        lm.buffers.limit = 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": []}, ValueError, "prompt is empty"),
        ({"prompt": [1] * 33}, ValueError, r"prompt has 33 tokens; with gen_length = 16 the engine takes at most 32"),
        ({"prompt": [10**6]}, ValueError, "prompt .* 1000000"),
        ({"prompt": 5}, TypeError, "prompt must be"),
        ({"prompt": [1], "request_id": "taken"}, ValueError, "request_id: 'taken' is an unfinished request"),
        ({"prompt": [1], "request_id": 1.5}, ValueError, "request_id must be a string or an integer, got 1.5"),
        ({"prompt": [1], "seed": [1]}, ValueError, "seed must be one integer"),
        ({"prompt": [1], "nothing": 1}, TypeError, "nothing"),
        ({"prompt": [1], "cache": "full"}, ValueError, "cache must be one of none, prefix, dual"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_done(
    lm: fdt.MaskedDiffusionLM, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = fdt.Engine(lm, max_rows=2, max_length=48)
    engine.add_request([1], request_id="taken", **OPTIONS)
    with pytest.raises(error, match=message):
        engine.add_request(**OPTIONS | arguments)
    _finish(engine)


@pytest.mark.parametrize("sizes", [{"max_rows": 0}, {"max_rows": 1.5}, {"max_length": 0}, {"max_length": 10**9}])
def test_bad_sizes(lm: fdt.MaskedDiffusionLM, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        fdt.Engine(lm, **{"max_rows": 2, "max_length": 48} | sizes)


# ----------------------------------------------------------------------------------------------------------------------
# The scheduler, without a model.


def _played(requests: list[Request], max_rows: int, forwards_per_block: int) -> list[list[ForwardPlan]]:
    """The forwards of each iteration, where every block takes the same number."""
    scheduler = Scheduler(max_rows)
    for request in requests:
        scheduler.add(request)
    iterations: list[list[ForwardPlan]] = []
    had = dict.fromkeys(requests, 0)
    while scheduler.rows or scheduler.waiting:
        scheduler.admit()
        plan = scheduler.schedule()
        iterations.append(plan.forwards)
        for forward in plan.forwards:
            for request in forward.requests:
                had[request] += 1
                request.pending.append(0)
        left = [not (r.block_done or r.block_forwards >= forwards_per_block) for r in scheduler.rows]
        flags = [RowFlags(int(some), False, False, had[r]) for some, r in zip(left, scheduler.rows, strict=True)]
        for row in scheduler.update(flags):
            scheduler.retire(row)
    return iterations


def _requests(lm: fdt.MaskedDiffusionLM, *options: dict[str, Any]) -> list[Request]:
    requests = []
    for i, more in enumerate(options):
        requests += batch_requests([[1] * (i + 1)], None, fdt.GenerationConfig(**OPTIONS | more), lm.config)
    return requests


def test_rows_of_one_group_share_forwards_and_others_have_their_own(lm: fdt.MaskedDiffusionLM) -> None:
    same: list[dict[str, Any]] = [{"strategy": fdt.Threshold(t), "temperature": t, "forbidden": (9,)} for t in (0.5, 0.9)]
    (first, *_) = _played(_requests(lm, *same), 4, 2)
    assert [(plan.kind, plan.first, plan.last) for plan in first] == [("refresh", 0, 2)]
    other = [*same, {"cache": "prefix"}, {"strategy": fdt.Factor(1.0)}, {"block_length": 4}]
    (first, *_) = _played(_requests(lm, *other), 8, 2)
    assert [(plan.kind, plan.first, plan.last) for plan in first] == [("refresh", 0, 2)] + [
        ("refresh", i, i + 1) for i in (2, 3, 4)
    ]
    assert [plan.is_last_group for plan in first] == [False, False, False, True]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_starves(lm: fdt.MaskedDiffusionLM, max_rows: int, count: int, forwards: int) -> None:
    """Every iteration moves every row that runs, and rows are never idle while somebody waits."""
    requests = _requests(lm, *[{"cache": cache} for cache, _ in zip(("dual", "none", "prefix") * 3, range(count), strict=False)])
    iterations = _played(requests, max_rows, forwards)
    waves = -(-count // max_rows)
    assert len(iterations) <= waves * 2 * forwards
    for plans in iterations:
        rows = [request for plan in plans for request in plan.requests]
        assert rows and len(set(rows)) <= max_rows

"""The ops of a CPU on the cases of the kernels, and where they take another way than the reference."""

from __future__ import annotations

import pytest
import torch
from _support import ints, randn, small_cases

from fastdllm_triton import reference
from fastdllm_triton.ops import NAMES, cpu, cpu_attention
from fastdllm_triton.types import TokenStatistics
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.ops import Expected, wrong
from fastdllm_triton.verify.tolerance import bitwise

CPU = torch.device("cpu")
OWN = [op for op in NAMES if getattr(cpu, op) is not getattr(reference, op)]
CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case}-{str(dtype).removeprefix('torch.')}")
    for op in OWN
    for case in small_cases(op)
    for dtype in OPS[op].dtypes
]


def test_every_op_is_there():
    assert {name: callable(getattr(cpu, name)) for name in NAMES} == dict.fromkeys(cpu.__all__, True)
    assert {"head_statistics", "linear", "rms_norm", "rope_kv_write", "token_statistics", "window_attention"} == set(OWN)


@pytest.fixture
def small_chunks(monkeypatch):
    """Vocabularies of some hundred tokens come in several chunks."""
    monkeypatch.setattr(cpu, "_CACHED_BYTES", 1)
    monkeypatch.setattr(cpu, "_LEAST_CHUNK", 64)


def assert_case_holds(op, case, dtype):
    cases, function = OPS[op], getattr(cpu, op)
    inputs = cases.inputs(case.sizes, CPU, dtype)
    expected = Expected.of(cases, inputs)
    got = cases.outputs(function, inputs, **cases.common)
    judged = expected.judge(got)
    assert not wrong(judged), judged
    again = cases.outputs(function, inputs | cases.result_memory(expected.plain), **cases.common)
    assert all(bitwise(got[name], again[name]) for name in got)


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_a_case_is_as_close_as_torch_and_twice_the_same(op, case, dtype):
    assert_case_holds(op, case, dtype)


@pytest.mark.parametrize(("op", "case", "dtype"), [case for case in CASES if "statistics" in case.values[0]])
def test_a_case_in_chunks_is_as_close_as_torch(op, case, dtype, small_chunks):
    assert_case_holds(op, case, dtype)


def assert_same(got: TokenStatistics, want: TokenStatistics) -> None:
    assert got.token.tolist() == want.token.tolist()
    for name, values in vars(want).items():
        torch.testing.assert_close(getattr(got, name), values, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def hard_logits() -> torch.Tensor:
    """Ties within and between chunks of 64 tokens, rows of -inf, with a NaN and with +inf in one of them, a lone token."""
    logits = randn(9, 333, dtype=torch.float32) * 3
    logits[0, [70, 100, 300]] = 30.0
    logits[1], logits[2, 200], logits[3, 330] = -torch.inf, torch.nan, torch.inf
    logits[4, :290] = -torch.inf
    logits[5], logits[5, 332] = -torch.inf, 1.0
    logits[6] = 0.0
    logits[7, 64] = 200.0
    return logits


EACH_ROW = torch.tensor([[-1, 70], [3, -1], [-1, -1], [330, 330], [0, 332], [332, 1], [0, -1], [64, 128], [-1, 5]])


@pytest.mark.parametrize("forbidden", [None, (70,), (0, 64, 332), EACH_ROW], ids=["none", "one", "three", "each row its own"])
@pytest.mark.parametrize("temperature", [0.0, 0.8, torch.arange(9) * 0.2], ids=["argmax", "samples", "each row its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_hard_rows_are_the_references(forbidden, temperature, dtype, small_chunks):
    logits = hard_logits().to(dtype)
    before = logits.clone()
    options = {"temperature": temperature, "seed": 3, "step": 2, "position": torch.arange(9) * 5, "forbidden": forbidden}
    assert_same(cpu.token_statistics(logits, **options), reference.token_statistics(logits, **options))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_head_draws_the_same_in_chunks_and_rounds_where_it_is_asked_to(temperature, small_chunks):
    hidden, weight = randn(7, 32, dtype=torch.float32), randn(500, 32, dtype=torch.float32, seed=1)
    options = {
        "temperature": temperature,
        "seed": torch.arange(6),
        "rows": torch.tensor([4, -1, 0, 6, 6, -1]),
        "forbidden": EACH_ROW[:6],
    }
    for more in ({}, {"bias": weight[:, 0]}, {"logits_dtype": torch.bfloat16}):
        assert_same(
            cpu.head_statistics(hidden, weight, **options, **more), reference.head_statistics(hidden, weight, **options, **more)
        )
    none = {"rows": torch.tensor([-1, -1])}
    assert_same(cpu.head_statistics(hidden, weight, **none), reference.head_statistics(hidden, weight, **none))


def test_logits_in_the_weights_dtype_are_one_product():
    hidden, weight = randn(7, 32, dtype=torch.bfloat16), randn(500, 32, dtype=torch.bfloat16, seed=1)
    got = cpu.head_statistics(hidden, weight, logits_dtype=torch.bfloat16)
    assert_same(got, reference.token_statistics(hidden @ weight.T))


def test_noise_without_a_seed_is_an_error():
    with pytest.raises(ValueError, match="temperature > 0 needs a seed"):
        cpu.token_statistics(randn(1, 4), temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_rows_that_attend_other_slots_get_what_they_get_alone_and_nothing_else_is_read(heads, dtype):
    q, (k, v) = randn(6, 5, heads[0], 16, dtype=dtype), (randn(6, heads[1], 40, 16, dtype=dtype, seed=i) for i in (1, 2))
    start, end = ints([0, 0, 7, 40, -3, 7]), ints([40, 40, 33, 40, 20, 5])
    slot = torch.arange(40)
    unattended = ((slot < start[:, None]) | (slot >= end[:, None]))[:, None, :, None]
    k.masked_fill_(unattended, torch.nan), v.masked_fill_(unattended, torch.nan)
    together = cpu.window_attention(q, k, v, start, end)
    for b in range(6):
        row = slice(b, b + 1)
        assert torch.equal(together[row], cpu.window_attention(q[row], k[row], v[row], start[row], end[row]))
    assert not together[[3, 5]].any()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}  # of weights in bfloat16
    torch.testing.assert_close(together, reference.window_attention(q, k, v, start, end), **tolerance)
    y, lse = cpu.window_attention(q, k, v, start, end, return_lse=True)
    assert lse[3].isinf().all() and y.shape == together.shape
    same = cpu.window_attention(q[:2], k[:2], v[:2], start[:2], end[:2], span=(0, 40))
    assert torch.equal(same, together[:2])


@pytest.mark.parametrize("block", [1, 4, 24, 32, 64, 100, 1000])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_strips_of_block_causal_queries_are_what_the_reference_attends(monkeypatch, heads, block):
    q, (k, v) = randn(5, 150, heads[0], 16), (randn(5, heads[1], 160, 16, seed=i) for i in (1, 2))
    start, end, first = ints([0, 0, 7, -9, 20]), ints([150, 150, 157, 140, 60]), ints([0, 0, 7, 0, 3])
    calls, attend = [], cpu_attention._attend
    monkeypatch.setattr(cpu_attention, "_attend", lambda *args: calls.append(args) or attend(*args))
    got = cpu.window_attention(q, k, v, start, end, block_causal=(first, block), span=(0, 160))
    torch.testing.assert_close(got, reference.window_attention(q, k, v, start, end, block_causal=(first, block)))
    assert len(calls) <= 4 * 5  # runs of rows, times strips of a row, not blocks
    for args in calls:
        assert args[1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()  # views of the cache
    if block == 64:  # strips are blocks, and need no mask
        assert all(args[-1] is None for args in calls)


@pytest.mark.parametrize("rounding", ["llada", "dream"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rotation_is_bitwise_the_references(rounding, dtype):
    qkv = randn(4, 6, 8 * 16, dtype=dtype)
    for starts, origins in (([2] * 4, [0] * 4), ([0, 3, 9, 12], [0, 3, 4, 0]), ([0] * 4, [3, 0, 12, 1]), ([8] * 4, [4, 1, 4, 4])):
        caches = [torch.full((4, 2, 12, 16), torch.nan, dtype=dtype) for _ in range(4)]
        call = (ints(starts), ints(origins), 1e4)
        got = cpu.rope_kv_write(qkv, *caches[:2], *call, bias=qkv[0, 0], rounding=rounding)
        want = reference.rope_kv_write(qkv, *caches[2:], *call, bias=qkv[0, 0], rounding=rounding)
        assert torch.equal(got, want)
        for cache, other in zip(caches[:2], caches[2:], strict=True):
            torch.testing.assert_close(cache, other, rtol=0, atol=0, equal_nan=True)


def test_angles_that_are_kept_are_ordinary_tensors_of_the_cpu():
    cpu._table.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        cos, sin = cpu._table(8, 4, 1e4, torch.float32)
    assert not (cos.is_inference() or sin.is_inference() or cos.is_meta)


def test_no_rows_are_no_error():
    q, cache, none = randn(0, 3, 2, 4), randn(0, 2, 5, 4), ints([])
    assert cpu.window_attention(q, cache, cache, none, none).shape == q.shape
    assert cpu.rope_kv_write(randn(0, 3, 24), cache, cache, none, none, 1e4).shape == q.shape
    assert cpu.token_statistics(randn(0, 5)).token.shape == (0,)

"""head_statistics: token statistics straight from hidden states."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from fastdllm_triton.kernels.head_statistics import head_statistics as kernel
from fastdllm_triton.reference.head_statistics import head_statistics as reference
from fastdllm_triton.reference.token_statistics import token_statistics
from fastdllm_triton.types import TokenStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {"reference": reference, "triton": kernel}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def head(rows: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary + width)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 3 / math.sqrt(width)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def check(found: TokenStatistics, logits: torch.Tensor, error: float = 1e-5) -> None:
    """Compares with the statistics of float64 logits; ``error`` is what float32 products may differ by."""
    exact = token_statistics(logits.double())
    assert found.token.tolist() == exact.token.tolist()
    for name in ("logit", "second_logit", "logsumexp", "entropy", "confidence"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), atol=error, rtol=error)
    torch.testing.assert_close(found.rest.double(), exact.rest, atol=1e-30, rtol=10 * error)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dtype"),
    [
        (1, 1, 16, torch.float32),  # one token
        (1, 320, 128, torch.float32),  # the built-in model's shape
        (5, 999, 80, torch.float32),  # nothing divides a tile
        (17, 4096, 96, torch.float16),
        (33, 1000, 64, torch.float32),
        (64, 640, 130, torch.float16),
        (130, 640, 64, torch.float32),  # more rows than one program takes
    ],
)
def test_statistics_are_those_of_the_logits(op, rows, vocabulary, width, dtype):
    hidden, weight = head(rows, vocabulary, width, dtype)
    check(op(hidden, weight), hidden.double() @ weight.double().T)


@pytest.mark.parametrize("listed", [[4], [0, 1, 2, 3, 4, 5], [5, 2, 2, 0], [3] * 70])
def test_only_listed_rows_take_part(op, listed):
    hidden, weight = head(6, 500, 32)
    hidden[[row for row in range(6) if row not in listed]] = math.nan
    rows = torch.tensor(listed, device=DEVICE)
    check(op(hidden, weight, rows=rows), (hidden.double() @ weight.double().T)[rows])


@pytest.mark.parametrize("count", [4, 70])
def test_minus_one_asks_for_nothing(op, count):
    hidden, weight = head(3, 500, 32)
    rows = torch.full((count,), -1, device=DEVICE)
    rows[1] = 2
    found = op(hidden, weight, rows=rows)
    missing = [row for row in range(count) if row != 1]
    assert found.token[missing].tolist() == [-1] * (count - 1)
    assert found.rest[missing].tolist() == [math.inf] * (count - 1)
    for field in (found.logit, found.second_logit, found.logsumexp, found.entropy):
        assert field[missing].isnan().all()
    check(TokenStatistics(*(getattr(found, f.name)[1:2] for f in fields(found))), (hidden.double() @ weight.double().T)[2:])


def test_nothing_asked_and_nothing_listed(op):
    hidden, weight = head(3, 500, 32)
    assert op(hidden, weight, rows=torch.full((2,), -1, device=DEVICE)).token.tolist() == [-1, -1]
    assert op(hidden, weight, rows=torch.zeros(0, dtype=torch.int64, device=DEVICE)).token.shape == (0,)


@pytest.mark.parametrize("rows", [3, 80])
def test_bias_is_added(op, rows):
    hidden, weight = head(rows, 500, 32)
    bias = torch.linspace(-4, 4, 500, device=DEVICE)
    check(op(hidden, weight, bias=bias), hidden.double() @ weight.double().T + bias.double())


@pytest.mark.parametrize("rows", [3, 80])
def test_logits_are_rounded_on_request(op, rows):
    hidden, weight = head(rows, 500, 32)
    rounded = (hidden @ weight.T).to(torch.float16)
    found = op(hidden, weight, logits_dtype=torch.float16)
    # A logit on the edge between two float16 numbers may go either way; a tenth of that is far more than such edges.
    agree = found.logit.double() == rounded.double().max(1).values
    assert agree.double().mean() > 0.9
    assert (found.logit == found.logit.half()).all() and (found.second_logit == found.second_logit.half()).all()
    exact = token_statistics(rounded.double())
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [2, 80])
def test_rounding_makes_ties_that_go_to_the_lowest_id(op, rows):
    hidden = torch.ones(rows, 16, device=DEVICE)
    weight = torch.zeros(300, 16, device=DEVICE)
    weight[7, 0], weight[290, 0] = 100.0, 100.01  # one float16 number
    assert set(op(hidden, weight).token.tolist()) == {290}
    found = op(hidden, weight, logits_dtype=torch.float16)
    assert set(found.token.tolist()) == {7} and set(found.second_logit.tolist()) == {100.0}


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_forbidden_tokens_take_no_part(op, rows, as_tensor):
    hidden, weight = head(rows, 500, 32)
    logits = hidden.double() @ weight.double().T
    ids = sorted(set(logits.argmax(1).tolist()))[:5] + [499]
    logits[:, ids] = -math.inf
    check(op(hidden, weight, forbidden=torch.tensor(ids, device=DEVICE) if as_tensor else ids), logits)


def test_broken_rows_say_so_and_leave_the_others_alone(op):
    hidden, weight = head(4, 500, 32)
    hidden[1, 3] = math.nan
    hidden[2] = math.inf
    found = op(hidden, weight)
    assert (found.token[[0, 3]] >= 0).all()
    assert found.token[[1, 2]].tolist() == [-1, -1] and found.rest[[1, 2]].tolist() == [math.inf] * 2


@pytest.mark.parametrize("repeat", [1, 13])
def test_samples_are_those_of_token_statistics(op, repeat):
    hidden, weight = head(6, 700, 32)
    listed = torch.tensor([3, -1, 0, 5, 5, 1] * repeat, device=DEVICE)
    seed = torch.arange(len(listed), device=DEVICE) + 40
    keys = {"position": torch.arange(len(listed), device=DEVICE) * 3, "step": 2}
    found = op(hidden, weight, rows=listed, temperature=1.3, seed=seed, **keys)
    asked = listed >= 0
    logits = (hidden.double() @ weight.double().T)[listed[asked]]
    keys["position"] = keys["position"][asked]
    exact = token_statistics(logits, temperature=1.3, seed=seed[asked], **keys)
    assert found.token[asked].tolist() == exact.token.tolist()
    assert (found.token[~asked] == -1).all()
    torch.testing.assert_close(found.rest[asked].double(), exact.rest, atol=0, rtol=1e-4)
    assert op(hidden, weight, temperature=1.3, seed=7).token.tolist() == [
        op(
            hidden,
            weight,
            rows=torch.tensor([i], device=DEVICE),
            position=torch.tensor([i], device=DEVICE),
            temperature=1.3,
            seed=7,
        ).token.item()
        for i in range(6)
    ]


def test_out_is_overwritten_and_returned(op):
    hidden, weight = head(3, 500, 32)
    poisoned = [torch.full((3,), math.nan, device=DEVICE) for _ in range(5)]
    out = TokenStatistics(torch.full((3,), -7, device=DEVICE), *poisoned)
    assert op(hidden, weight, out=out) is out
    check(out, hidden.double() @ weight.double().T)


def test_bad_temperature(op):
    hidden, weight = head(3, 500, 32)
    with pytest.raises(ValueError, match="temperature must be 0 or more, got -1"):
        op(hidden, weight, temperature=-1.0)
    with pytest.raises(ValueError, match="needs a seed"):
        op(hidden, weight, temperature=1.0)

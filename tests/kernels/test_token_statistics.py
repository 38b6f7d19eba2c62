"""token_statistics: facts about logits rows, against float64 formulas on the same logits."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels._statistics import merge_distribution
from fastdllm_triton.kernels.token_statistics import Config, select_config
from fastdllm_triton.kernels.token_statistics import token_statistics as kernel
from fastdllm_triton.reference._random import gumbel, philox, uniform
from fastdllm_triton.reference.token_statistics import statistics_merge
from fastdllm_triton.reference.token_statistics import token_statistics as reference
from fastdllm_triton.types import TokenStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
OPS = {"reference": reference, "triton": kernel}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def normal(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator).mul_(scale).to(DEVICE)


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


def check(found: TokenStatistics, logits: torch.Tensor, chosen: list[int] | None = None) -> None:
    """Compares with plain float64 formulas, row by row; ``chosen`` replaces the argmax."""
    assert found.token.dtype == torch.int64 and found.token.shape == (len(logits),)
    for row, values in enumerate(logits.double().cpu()):
        # The first of the largest, by a scan that knows no argmax.
        token = values.tolist().index(values.max().item()) if chosen is None else chosen[row]
        logit, others = values[token], torch.cat((values[:token], values[token + 1 :]))
        p = torch.softmax(values, 0)
        entropy = -(p * p.log()).nan_to_num(0).sum().item()
        logsumexp = values.logsumexp(0).item()
        rest = (others - logit).exp().sum().item()

        assert found.token[row].item() == token
        assert found.logit[row].item() == logit.item()
        assert found.second_logit[row].item() == (others.max().item() if len(others) else -INF)
        half_ulp = abs(logsumexp) * 2.0**-24  # what rounding the exact value to float32 costs
        assert abs(found.logsumexp[row].item() - logsumexp) <= 2e-6 + half_ulp
        assert found.confidence[row].item() == pytest.approx(1 / (1 + rest), rel=1e-6)
        assert found.rest[row].item() == pytest.approx(rest, rel=5e-6, abs=1e-38)
        assert found.entropy[row].item() == pytest.approx(entropy, abs=5e-6)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"),
    [
        (1, 1, torch.float32),  # nothing but the one token
        (2, 7, torch.float32),  # less than any tile
        (130, 320, torch.float16),  # the built-in model; many rows
        (3, 32_000, torch.float32),
        (2, 50_257, torch.float16),  # odd: no two rows aligned alike
        (1, 126_464, torch.float32),  # LLaDA
        (1, 151_936, torch.float16),  # Qwen
        (1, 262_144, torch.float32),  # the largest
    ],
)
def test_statistics_are_those_of_float64(op, rows, vocabulary, dtype):
    logits = normal(rows, vocabulary).to(dtype)
    check(op(logits), logits)


def test_float64_logits_keep_float64():
    found = reference(normal(2, 50).double())
    assert found.rest.dtype == found.entropy.dtype == torch.float64


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 30.0, 3000.0])
def test_constant_tiny_and_huge_logits(op, scale):
    logits = normal(2, 5000, scale)
    check(op(logits), logits)
    check(op(logits - 20), logits - 20)


@pytest.mark.parametrize("ids", [(0, 1), (4, 7), (3, 2900), (5000, 5001), (12, 4096, 9999)])
def test_ties_go_to_the_lowest_token_id(op, ids):
    logits = normal(1, 10_000)
    logits[0, list(ids)] = 40.0
    found = op(logits)
    assert found.token.item() == min(ids)
    assert found.second_logit.item() == 40.0
    assert found.confidence.item() == pytest.approx(1 / len(ids), rel=1e-6)


def test_rest_orders_what_a_float32_confidence_cannot(op):
    logits = torch.full((3, 4000), -30.0, device=DEVICE)
    logits[:, 17] = torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    found = op(logits)
    assert found.confidence.tolist() == [1.0, 1.0, 1.0]
    exact = [3999 * math.exp(-30 - x) for x in (0, 1, 2)]
    assert found.rest.tolist() == pytest.approx(exact, rel=3e-6)
    assert found.rest[0] > found.rest[1] > found.rest[2] > 0
    assert found.entropy.tolist() == pytest.approx([r * (31 + x) for x, r in enumerate(exact)], rel=3e-6)


def test_minus_infinity_is_a_probability_of_zero(op):
    logits = normal(4, 3000)
    logits[0, ::2] = -INF
    logits[1, :2990] = -INF
    logits[2, 1:] = -INF
    logits[3, :-1] = -INF
    found = op(logits)
    check(found, logits)
    assert found.rest[2:].tolist() == [0, 0] and found.entropy[2:].tolist() == [0, 0]
    assert found.token[2:].tolist() == [0, 2999]


def test_rows_without_a_choice_say_so(op):
    logits = normal(6, 3000)
    logits[1] = -INF
    logits[2, 1234] = NAN
    logits[3] = NAN
    logits[4, 2] = INF
    logits[5, :] = -INF
    logits[5, 2999] = NAN
    found = op(logits)
    check(TokenStatistics(*(field[:1] for field in vars(found).values())), logits[:1])
    assert found.token[1:].tolist() == [-1] * 5
    assert found.rest[1:].tolist() == [INF] * 5
    assert found.confidence[1:].tolist() == [0] * 5
    for field in (found.logit, found.second_logit, found.logsumexp):
        assert field[1].item() == -INF
        assert field[2:].isnan().all()
    assert found.entropy[1:].isnan().all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_forbidden_tokens_take_no_part(op, as_tensor):
    logits = normal(3, 3000)
    logits[:, 2077] = 50.0
    logits[1, 5] = NAN
    ids = [2077, 5, 2999, 5]
    found = op(logits, forbidden=torch.tensor(ids, device=DEVICE) if as_tensor else ids)
    logits[:, ids] = -INF
    check(found, logits)


def test_a_row_of_forbidden_tokens_has_no_choice(op):
    found = op(normal(1, 3), forbidden=[0, 1, 2])
    assert found.token.item() == -1 and found.logsumexp.item() == -INF


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 3:-2], lambda x: x[::2], lambda x: x.t().contiguous().t(), lambda x: x[:, ::3]],
    ids=["columns", "rows", "transposed", "strided"],
)
def test_any_strides(op, view):
    logits = view(normal(6, 2053))
    check(op(logits), logits)


def test_out_is_overwritten_and_returned(op):
    logits = normal(3, 400)
    poisoned = [torch.full((3,), NAN, device=DEVICE) for _ in range(5)]
    out = TokenStatistics(torch.full((3,), -7, device=DEVICE), *poisoned)
    assert op(logits, out=out) is out
    check(out, logits)


def test_no_rows(op):
    assert op(normal(0, 400)).token.shape == (0,)


def test_bad_temperature(op):
    with pytest.raises(ValueError, match="temperature must be 0 or more, got -1"):
        op(normal(1, 4), temperature=-1.0)
    with pytest.raises(ValueError, match="temperature must be 0 or more, got nan"):
        op(normal(1, 4), temperature=NAN)
    with pytest.raises(ValueError, match="needs a seed"):
        op(normal(1, 4), temperature=1.0)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [  # the known answers of Random123 for philox4x32, 10 rounds
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(key, counter, answer):
    signed = (key[0] | key[1] << 32) - (1 << 64 if key[1] >> 31 else 0)
    words = philox(torch.tensor(signed), *(torch.tensor(c) for c in counter[:3]), counter[3])
    assert tuple(word.item() for word in words) == answer


def test_a_negative_counter_is_its_low_word():
    seed, zero = torch.tensor(5), torch.tensor(0)
    assert philox(seed, zero, torch.tensor(-3), zero, 0) == philox(seed, zero, torch.tensor(2**32 - 3), zero, 0)


def test_uniform_numbers_stay_inside_the_open_interval():
    extremes = uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert extremes.dtype == torch.float32
    assert extremes.min() > 0 and extremes.max() < 1
    noise = -torch.log(-torch.log1p(-extremes))
    assert noise.isfinite().all() and noise[0] > 22


def test_gumbel_noise_has_the_moments_of_its_distribution():
    zero = torch.zeros(1, dtype=torch.int64)
    noise = gumbel(zero + 3, zero, zero, 400_001)
    assert noise.shape == (1, 400_001)
    error = 6 * math.sqrt(math.pi**2 / 6 / 400_000)
    assert noise.double().mean().item() == pytest.approx(0.5772157, abs=error)
    assert noise.double().var().item() == pytest.approx(math.pi**2 / 6, abs=4 * error)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Standardised: about normal(0, 1) if the counts are draws from ``p``."""
    expected = p * counts.sum()
    freedom = len(p) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def draws(op) -> int:
    """Rows to draw from: each is a program, which Triton's interpreter takes its time over."""
    return 90 if op is kernel and DEVICE == "cpu" else 4000


@pytest.mark.parametrize("temperature", [1.7])
def test_samples_follow_the_tempered_softmax(op, temperature):
    values = torch.linspace(-1, 1, 6, device=DEVICE)
    found = op(values.expand(draws(op), 6), temperature=temperature, seed=1)
    p = torch.softmax(values.double() / temperature, 0).cpu()
    assert abs(chi_square(torch.bincount(found.token.cpu(), minlength=6).double(), p)) < 4


def test_samples_of_a_full_vocabulary_follow_the_softmax():
    values = normal(1, 32_000)[0].sort().values
    sampler = kernel if DEVICE == "cuda" else reference
    found = sampler(values.expand(150, 32_000), temperature=1.0, seed=2)
    p = torch.softmax(values.double(), 0).cpu()
    bucket = (p.cumsum(0) * 10).long().clamp(max=9)  # ten of about a tenth each
    mass = torch.zeros(10, dtype=torch.float64).index_add(0, bucket, p)
    assert abs(chi_square(torch.bincount(bucket[found.token.cpu()], minlength=10).double(), mass)) < 4


def test_the_statistics_of_a_sample_are_those_at_temperature_one(op):
    logits = normal(12, 500, 1.0)
    found = op(logits, temperature=2.0, seed=3)
    tokens = found.token.tolist()
    assert tokens != logits.argmax(1).tolist()
    check(found, logits, tokens)


def test_a_sample_far_below_the_best_has_finite_statistics(op):
    logits = torch.full((24, 8), -200.0, device=DEVICE)
    logits[:, 3] = 0.0
    found = op(logits, temperature=1e6, seed=4)
    unlikely = found.token != 3
    assert unlikely.any()
    assert (found.rest[unlikely] == INF).all() and (found.confidence[unlikely] == 0).all()
    assert (found.margin[unlikely] == -1).all() and (found.margin[~unlikely] == 1).all()


def test_a_draw_depends_on_its_keys_and_on_nothing_else(op):
    logits = normal(1, 700, 0.0).expand(9, 700)
    position = torch.tensor([4, 9, 4, 0, 77, 123_456, 2, 3, 5], device=DEVICE)
    seed = torch.tensor([1, 1, 2, 1, 1, 1, -(2**62), 1, 1], device=DEVICE)
    step = torch.tensor([0, 0, 0, 0, 3, 0, 0, 0, 0], device=DEVICE)
    together = op(logits, temperature=1.0, seed=seed, position=position, step=step).token
    assert len(set(together.tolist())) == 9
    alone = [
        op(logits[:1], temperature=1.0, seed=seed[i], position=position[i : i + 1], step=int(step[i])).token.item()
        for i in range(9)
    ]
    assert alone == together.tolist()
    defaults = op(logits, temperature=1.0, seed=1).token
    assert defaults[4].item() == together[0].item() and defaults[0].item() == together[3].item()


@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 1003), (1, 40_000)])
def test_a_draw_is_the_argmax_of_the_logits_plus_the_published_noise(op, rows, vocabulary):
    logits = normal(rows, vocabulary)
    keys = torch.arange(rows)
    noise = gumbel(torch.full((rows,), 11), keys, torch.zeros(rows, dtype=torch.int64), vocabulary)
    expected = (logits.cpu().double() + 0.7 * noise.double()).argmax(1)
    assert op(logits, temperature=0.7, seed=11).token.tolist() == expected.tolist()


def test_a_low_temperature_gives_the_argmax(op):
    logits = normal(6, 300)
    assert op(logits, temperature=1e-6, seed=1).token.tolist() == logits.argmax(1).tolist()


def test_what_is_impossible_or_forbidden_is_never_drawn(op):
    logits = torch.zeros(40, 40, device=DEVICE)
    logits[:, 1::2] = -INF
    drawn = op(logits, temperature=5.0, seed=1, forbidden=[0, 2]).token
    assert set(drawn.tolist()) <= set(range(4, 40, 2)) and len(set(drawn.tolist())) > 8


def rows_of(statistics: TokenStatistics, i) -> list[torch.Tensor]:
    return [field[i] for field in vars(statistics).values()]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 1.0, 7.5]), st.lists(st.integers(-1, 29), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", OPS)
def test_options_of_a_row_give_what_they_give_for_all_rows(name, rows, seed):
    logits, keys = normal(len(rows), 30, seed=seed), {"seed": seed, "step": 4}
    temperature = torch.tensor([t for t, _ in rows], device=DEVICE)
    forbidden = torch.tensor([ids for _, ids in rows], device=DEVICE)
    together = OPS[name](logits, temperature=temperature, forbidden=forbidden, **keys)
    for row, (t, ids) in enumerate(rows):
        alone = OPS[name](logits, temperature=t, forbidden=[i for i in ids if i >= 0], **keys)
        for found, want in zip(rows_of(together, row), rows_of(alone, row), strict=True):
            assert found.item() == want.item() or (found.isnan() and want.isnan())


def test_rows_of_a_split_vocabulary_have_options_of_their_own():
    logits = normal(2, 20_000)
    best = logits.argmax(1, keepdim=True)
    forbidden = torch.cat((best, best.flip(0)), dim=1)  # the other row's best token lies in another chunk
    together = kernel(logits, temperature=torch.tensor([0.0, 1.5], device=DEVICE), forbidden=forbidden, seed=3)
    for row, temperature in enumerate((0.0, 1.5)):
        alone = kernel(logits, temperature=temperature, forbidden=forbidden[row], seed=3)
        assert [f.item() for f in rows_of(together, row)] == [f.item() for f in rows_of(alone, row)]
    assert together.token[0] != best[0]


def test_rows_without_a_choice_are_not_drawn_from(op):
    logits = torch.zeros(3, 40, device=DEVICE)
    logits[0] = -INF
    logits[1, 7] = NAN
    logits[2, 7] = INF
    found = op(logits, temperature=1.0, seed=1)
    assert found.token.tolist() == [-1] * 3 and found.rest.tolist() == [INF] * 3
    assert found.logsumexp[0].item() == -INF and found.logit[1:].isnan().all()


# --- the kernel alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 32, 512])
@pytest.mark.parametrize("vocabulary", [1, 320, 126_464, 152_064, 262_144])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_the_chunks_cover_the_vocabulary(arch, rows, vocabulary):
    for element_size in (2, 4):
        config = select_config(arch, rows, vocabulary, element_size)
        assert (config.splits - 1) * config.chunk < vocabulary <= config.splits * config.chunk
        assert config.chunk % (config.lanes * config.width) == 0
        assert config.width * element_size == 16 and config.width % 4 == 0
        assert rows * config.splits <= 4 * arch.sms + rows


def test_few_rows_are_split_and_many_are_not():
    arch = ARCHS["sm_90"]
    assert select_config(arch, 1, 126_464, 2).splits > 8
    assert select_config(arch, 32, 126_464, 2).splits * 32 > 2 * arch.sms
    assert select_config(arch, 1024, 126_464, 2).splits == 1


@pytest.mark.parametrize("vocabulary", [300, 9000])  # one program a row, several
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_asks_for_nothing_is_not_read_and_says_so(vocabulary, temperature):
    logits = normal(4, vocabulary).to(DEVICE)
    logits[[1, 3]] = math.nan
    found = kernel(logits, temperature=temperature, seed=1, rows=torch.tensor([0, -1, 7, -5], device=DEVICE))
    want = kernel(logits[[0, 2]], temperature=temperature, seed=1, position=torch.tensor([0, 2], device=DEVICE))
    for name, field in vars(found).items():
        assert torch.equal(field[[0, 2]], getattr(want, name))
    assert found.token[[1, 3]].tolist() == [-1, -1]
    assert found.rest[[1, 3]].tolist() == [INF, INF]
    assert found.entropy[[1, 3]].isnan().all() and found.logit[[1, 3]].isnan().all()


@pytest.mark.parametrize("splits", [1, 2, 5, 9])
def test_no_split_changes_a_choice(splits, monkeypatch):
    def config(arch, rows, vocabulary, element_size, sample, gpu):
        chunk = -(-vocabulary // splits // 1024) * 1024
        return Config(256, 4, chunk, -(-vocabulary // chunk))

    logits = normal(2, 9000)
    logits[1, 100:4200] = -INF  # a chunk with nothing in it
    logits[1, [7, 8000]] = 50.0  # a tie between chunks
    unsplit = [kernel(logits), kernel(logits, temperature=1.0, seed=3)]
    monkeypatch.setattr("fastdllm_triton.kernels.token_statistics.select_config", config)
    for expected, found in zip(unsplit, [kernel(logits), kernel(logits, temperature=1.0, seed=3)], strict=True):
        for name in ("token", "logit", "second_logit"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        torch.testing.assert_close(found.rest, expected.rest, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.logsumexp, expected.logsumexp, rtol=0, atol=4e-6)
    check(kernel(logits), logits)


def test_unwritten_workspace_would_show(monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(NAN if memory.is_floating_point() else -1)

    logits = normal(2, 20_000)
    monkeypatch.setattr(torch, "empty", poisoned)
    check(kernel(logits), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[R, V\], got shape \[3\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "float32, float16 or bfloat16, got torch.int32"),
        ({"logits": torch.zeros(3, 4).double()}, "float32, float16 or bfloat16, got torch.float64"),
        ({"logits": torch.zeros(3, 0)}, "1 to 2.30 tokens, got 0"),
        ({"logits": torch.zeros(3, 4, device="meta")}, "logits must be a GPU tensor .*, got a tensor on meta"),
        ({"forbidden": [4]}, r"forbidden must hold ids in \[0, 4\), got \[4\]"),
        ({"forbidden": [-1]}, "forbidden must hold ids"),
        ({"forbidden": list(range(65))}, "forbidden has 65 ids; at most 64"),
        ({"forbidden": torch.tensor([0.5])}, "forbidden must be .* integers"),
        ({"forbidden": torch.zeros(2, 1, dtype=torch.int64)}, r"forbidden must be \[F\] or \[3, F\] integers"),
        ({"forbidden": torch.zeros(3, 65, dtype=torch.int64)}, "forbidden has 65 ids; at most 64"),
        ({"temperature": torch.zeros(3)}, "temperature > 0 needs a seed"),
        ({"temperature": torch.zeros(2), "seed": 1}, r"temperature must be a number or contiguous torch.float32 \[3\]"),
        ({"temperature": torch.zeros(3).double(), "seed": 1}, "temperature must be .* got torch.float64"),
        ({"temperature": 1.0, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one integer or .3. integers"),
        ({"temperature": 1.0, "seed": 1, "position": torch.zeros(3)}, "position must be .* integers"),
        ({"temperature": 1.0, "seed": 1, "step": torch.zeros(3, 1, dtype=torch.int64)}, "step must be"),
        ({"out": reference(torch.zeros(2, 4))}, r"out.token must be a contiguous torch.int64 \[3\]"),
        ({"out": reference(torch.zeros(3, 4).double())}, "out.logit must be a contiguous torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(3, 4, device=DEVICE)} | change
    with pytest.raises(ValueError, match=message):
        kernel(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [320, 126_464, 152_064])
@pytest.mark.parametrize("rows", [1, 32, 130, 512])
def test_bfloat16_on_a_gpu(rows, vocabulary):
    logits = normal(rows, vocabulary).bfloat16()
    found, exact = kernel(logits), reference(logits.double())
    assert found.token.tolist() == exact.token.tolist()
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, rtol=0, atol=4e-6)
    torch.testing.assert_close(found.confidence.double(), exact.confidence, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=0, atol=5e-6)
    again = kernel(logits)
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(again).values(), strict=True))


# --- merging parts of a vocabulary ----------------------------------------------------------------------------------------

some_logit = st.sampled_from([-INF, -100.0, -1.0, 0.0, 0.0, 2.5, 2.5, 7.0, 30.0, NAN])
part = st.lists(some_logit, min_size=1, max_size=6)


def shard(values: list[float], offset: int) -> TokenStatistics:
    found = reference(torch.tensor([values], dtype=torch.float64))
    found.token += torch.where(found.token >= 0, offset, 0)
    return found


def assert_same(a: TokenStatistics, b: TokenStatistics, rel: float = 1e-12) -> None:
    assert a.token.tolist() == b.token.tolist()
    for name in ("logit", "second_logit", "logsumexp", "rest", "entropy"):
        x, y = getattr(a, name).item(), getattr(b, name).item()
        assert x == pytest.approx(y, rel=rel, abs=rel, nan_ok=True), name


@given(part, part)
def test_merged_shards_are_the_statistics_of_the_whole(a, b):
    left, right = shard(a, 0), shard(b, len(a))
    assert_same(statistics_merge(left, right), shard(a + b, 0))
    assert_same(statistics_merge(right, left), shard(a + b, 0))


@given(part, part, part)
def test_merging_is_associative(a, b, c):
    x, y, z = shard(a, 0), shard(b, len(a)), shard(c, len(a) + len(b))
    assert_same(statistics_merge(statistics_merge(x, y), z), statistics_merge(x, statistics_merge(y, z)))


@given(part)
def test_an_empty_part_is_the_identity_of_merging(a):
    nothing = shard([-INF], 99)
    assert_same(statistics_merge(shard(a, 0), nothing), shard(a, 0))
    assert_same(statistics_merge(nothing, shard(a, 0)), shard(a, 0))


@settings(max_examples=50)
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=9))
def test_margin_and_neg_entropy_are_what_they_say(values):
    found = reference(torch.tensor([values]))
    p = sorted(torch.softmax(torch.tensor(values, dtype=torch.float64), 0).tolist())
    assert found.margin.item() == pytest.approx(p[-1] - p[-2], abs=1e-6)
    assert found.neg_entropy.item() == -found.entropy.item()


@triton.jit
def _merge_kernel(states, merged, N: tl.constexpr):
    o = tl.arange(0, N)
    m, t, r, u = tl.load(states + o), tl.load(states + N + o), tl.load(states + 2 * N + o), tl.load(states + 3 * N + o)
    m_b, t_b = tl.load(states + 4 * N + o), tl.load(states + 5 * N + o)
    m, t, r, u = merge_distribution(m, t, r, u, m_b, t_b, tl.load(states + 6 * N + o), tl.load(states + 7 * N + o))
    tl.store(merged + o, m)
    tl.store(merged + N + o, t)
    tl.store(merged + 2 * N + o, r)
    tl.store(merged + 3 * N + o, u)


def merge_states(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernels' merge of ``[4, N]`` states."""
    merged = torch.full_like(a, NAN)
    _merge_kernel[(1,)](torch.cat((a, b)).contiguous(), merged, N=a.shape[1])
    return merged


def state_of(values: list[float]) -> torch.Tensor:
    """(m, t, r, u) of some logits, from its definition."""
    m = max(values)
    others = sorted(values)[:-1]
    below = [x - m for x in others if x > -INF]
    t = others[-1] if others else -INF
    return torch.tensor([m, t, math.fsum(map(math.exp, below)), math.fsum(x * math.exp(x) for x in below)])


finite_or_not = st.lists(st.sampled_from([-INF, -60.0, -1.0, 0.0, 2.5, 2.5, 7.0, 30.0]), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(finite_or_not, finite_or_not, finite_or_not), min_size=8, max_size=8))
def test_the_kernels_merge_is_the_union_of_sets(triples):
    a, b, c, whole = (
        torch.stack([state_of(values) for values in column], 1).to(DEVICE)
        for column in (*zip(*triples, strict=True), [x + y + z for x, y, z in triples])
    )
    nothing = torch.tensor([[-INF], [-INF], [0.0], [0.0]], device=DEVICE).expand(4, 8)
    left, right = merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c))
    for merged in (left, right, merge_states(merge_states(c, b), a), merge_states(merge_states(whole, nothing), nothing)):
        assert merged[:2].tolist() == whole[:2].tolist()
        torch.testing.assert_close(merged[2:], whole[2:], rtol=1e-5, atol=1e-30)
    assert merge_states(nothing, whole).tolist() == whole.tolist() == merge_states(whole, nothing).tolist()

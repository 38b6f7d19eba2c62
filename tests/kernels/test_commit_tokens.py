"""commit_tokens: which masked tokens a step commits, against the rules restated in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdllm_triton.decoding.strategies import DenoisingSteps, Threshold
from fastdllm_triton.engine.dream.rules import transfer_count
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels.commit_tokens import commit_tokens as kernel
from fastdllm_triton.kernels.commit_tokens import select_config
from fastdllm_triton.reference.commit_tokens import commit_tokens as reference
from fastdllm_triton.reference.token_statistics import token_statistics
from fastdllm_triton.types import PolicyState, TokenStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 9
INF = math.inf
OPS = {"reference": reference, "triton": kernel}
SCORES = ["confidence", "margin", "neg_entropy", "random", "leftmost"]
RULES = ["quota", "threshold", "floored_threshold", "factor", "entropy_budget", "schedule"]


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


#: Shares of a schedule: one commits nothing of a small block, 1/3 falls short of an integer in no rounding but its own.
SHARES = [0.04, 1 / 3, 0.7, 1.0, 0.25]


# --- the rules in plain Python ------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """What is known about one slot of the block."""

    masked: bool
    token: int
    gap: float  # second logit less the chosen one
    rest: float
    entropy: float


def draw(seed: int, position: int, step: int) -> float:
    """The random score: first word of Philox-4x32-10 for counter (0, position, step, 1), as a float32 in (0, 1)."""
    c, k = [0, position, step, 1], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (torch.tensor(c[0]).float() + 0.5).item() * 2.0**-32


def probability(slot: Slot) -> Fraction:
    return Fraction(0) if slot.rest == INF else 1 / (1 + Fraction(slot.rest))


def score_of(score: str, slot: Slot, random: float, index: int) -> Fraction:
    if score == "leftmost":
        return Fraction(-index)
    if score == "confidence":
        return probability(slot)
    if score == "margin":
        if slot.gap > 0:  # a sample: the best other token has exp(gap) times its probability
            share = 1.0 if slot.rest == INF else math.exp(slot.gap) / (1 + slot.rest)
            return Fraction(share * math.expm1(-slot.gap))
        return Fraction(-math.expm1(slot.gap)) * probability(slot)
    return -Fraction(slot.entropy) if score == "neg_entropy" else Fraction(random)


def committed(score: str, rule: str, value: float, steps: int, step: int, masked: int, slots: list[Slot], random: list[float]):
    """Indices of the slots one row commits, best first."""
    scores = [score_of(score, slot, u, i) for i, (slot, u) in enumerate(zip(slots, random, strict=True))]
    eligible = [i for i, slot in enumerate(slots) if slot.masked and slot.token >= 0]
    ranked = sorted(eligible, key=lambda i: (-scores[i], i))
    total = len(ranked)
    if total == 0:
        return []
    if rule == "schedule":
        # The share in double, the product rounded to float32, and no bound of one.
        now = sum(slot.masked for slot in slots)
        return ranked[: min(int(torch.tensor(float(now)) * SHARES[min(step, len(SHARES) - 1)]), total)]
    if rule == "quota":
        count = [masked // steps + (1 if i < masked % steps else 0) for i in range(max(steps, step + 1))][step]
    elif rule == "threshold":
        count = sum(float(scores[i]) >= value for i in ranked)
    elif rule == "floored_threshold":
        spread = [len(slots) // steps + (1 if i < len(slots) % steps else 0) for i in range(max(steps, step + 1))]
        count = max(sum(float(scores[i]) >= value for i in ranked), spread[step])
    elif rule == "capped_threshold":
        spread = [masked // steps + (1 if i < masked % steps else 0) for i in range(steps)]
        now = sum(slot.masked for slot in slots)
        count = min(sum(float(scores[i]) >= value for i in ranked), sum(spread[: step + 1]) - (masked - now))
    elif rule == "factor":
        # The official scan: 1-based rank n fails below 1 - f / (n + 1), the first never; then its index arithmetic.
        limits = [Fraction(-1000)] + [1 - Fraction(value) / (n + 1) for n in range(2, total + 1)]
        failed = [n for n in range(total) if scores[ranked[n]] < limits[n]]
        count = failed[0] if failed else total - 1
        if count in (0, total - 1):
            count += 1
    else:
        count = 0
        for n in range(1, total + 1):
            entropies = [slots[i].entropy for i in ranked[:n]]
            if sum(entropies) - max(entropies) > value:
                break
            count = n
    return ranked[: min(max(count, 1), total)]


# --- building inputs ------------------------------------------------------------------------------------------------------


def statistics_of(rows: list[list[Slot]]) -> TokenStatistics:
    def field(get, dtype=torch.float32):
        return torch.tensor([[get(slot) for slot in row] for row in rows], dtype=dtype, device=DEVICE)

    rest = field(lambda slot: slot.rest)
    logit = field(lambda slot: 0.0)
    return TokenStatistics(
        token=field(lambda slot: slot.token, torch.int64),
        logit=logit,
        second_logit=field(lambda slot: slot.gap),
        # A sample whose odds overflow has a far better token beside it.
        logsumexp=torch.where(rest == INF, field(lambda slot: slot.gap), torch.log1p(rest)),
        rest=rest,
        entropy=field(lambda slot: slot.entropy),
    )


def state_of(score, rule, value=0.0, steps=1, rows=1, slots=8, seed=0) -> PolicyState:
    state = PolicyState.create(
        score,
        rule,
        value=value,
        steps=steps,
        shares=SHARES if rule == "schedule" else None,
        mask_id=MASK,
        kv_start=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        seed=torch.full((rows,), seed, device=DEVICE),
        slots=slots,
    )
    state.remaining.fill_(-99)  # an output only
    return state


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def by_rest(rests: list[float]) -> list[Slot]:
    return [Slot(True, i % MASK, -1.0, rest, 0.1) for i, rest in enumerate(rests)]


def run(op, slots: list[Slot], score: str, rule: str, value=0.0, steps=1, step=0, **more) -> list[int]:
    """One row, one step: the committed slots in ascending order."""
    state = state_of(score, rule, value, steps, slots=len(slots), **more)
    state.step.fill_(step)
    x = torch.tensor([[MASK if slot.masked else 0 for slot in slots]], device=DEVICE)
    op(x, statistics_of([slots]), int32(0), state)
    return (state.step_map[0] >= 0).nonzero()[:, 0].tolist()


def odds(*confidences: float) -> list[float]:
    return [1 / c - 1 for c in confidences]


# --- every rule and score against plain Python --------------------------------------------------------------------------


@st.composite
def problems(draw_from):
    block = draw_from(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33]))
    rows = draw_from(st.integers(1, 3))
    slot = st.builds(
        Slot,
        masked=st.sampled_from([True, True, True, False]),
        token=st.sampled_from([-1, 0, 1, 2, 3, 4, 5]),
        gap=st.sampled_from([-INF, -30.0, -2.0, -0.5, 0.0, 0.5, 2.0]),
        # From certain through what float32 probabilities cannot tell apart to hopeless; repeated, so that there are ties.
        rest=st.sampled_from([0.0, 1e-12, 1e-9, 2e-9, 0.0625, 0.125, 0.25, 0.5, 1.0, 1.0, 3.0, 1e9, INF]),
        entropy=st.sampled_from([0.0, 1e-9, 0.125, 0.25, 0.25, 0.5, 2.0]),
    )
    return {
        "score": draw_from(st.sampled_from(SCORES)),
        "rule": draw_from(st.sampled_from(RULES)),
        "value": draw_from(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.8, 0.9, 1.0, 1.5, 2.0])),
        "steps": draw_from(st.integers(1, 9)),
        "step": draw_from(st.integers(0, 9)),
        "masked": draw_from(st.integers(0, 33)),
        "slots": draw_from(st.lists(st.lists(slot, min_size=block, max_size=block), min_size=rows, max_size=rows)),
        "offset": draw_from(st.integers(0, 3)),
        "seed": draw_from(st.integers(-(2**63), 2**63 - 1)),
    }


def torch_rest(slot: Slot) -> Slot:
    """The slot as float32 stores it."""
    return slot._replace(rest=torch.tensor(slot.rest).item(), entropy=torch.tensor(slot.entropy).item())


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_commits_what_plain_python_commits(name, problem):
    p = problem
    rows, block = len(p["slots"]), len(p["slots"][0])
    length = block + 5
    x = torch.full((rows, length), MASK, device=DEVICE)  # masked outside the block too
    starts = int32(*((p["offset"] + row) % 6 for row in range(rows)))
    state = state_of(p["score"], p["rule"], p["value"], p["steps"], rows, length, p["seed"])
    state.kv_start.copy_(int32(*range(rows)))
    state.step.fill_(p["step"])
    state.masked.fill_(p["masked"])
    state.forward.copy_(int32(*range(40, 40 + rows)))
    slots = [[torch_rest(slot) for slot in row] for row in p["slots"]]
    for row, start in enumerate(starts.tolist()):
        for i, slot in enumerate(slots[row]):
            x[row, start + i] = MASK if slot.masked else 7
    before, statistics = x.clone(), statistics_of(slots)
    confidence = statistics.confidence.cpu()
    OPS[name](x, statistics, starts, state)

    expected, step_map = before.clone(), torch.full((rows, length), -1)
    recorded = torch.full((rows, length), math.nan)
    for row, start in enumerate(starts.tolist()):
        masked = sum(slot.masked for slot in slots[row])
        first = masked if p["step"] == 0 else p["masked"]
        random = [draw(p["seed"], start + i - row, p["step"]) for i in range(block)]
        chosen = committed(p["score"], p["rule"], p["value"], p["steps"], p["step"], first, slots[row], random)
        for i in chosen:
            expected[row, start + i] = slots[row][i].token
            step_map[row, start + i] = 40 + row
            recorded[row, start + i] = confidence[row, i]
        assert state.masked[row].item() == first
        assert state.remaining[row].item() == masked - len(chosen)
        assert state.done[row].item() == (masked == len(chosen))
        assert state.invalid[row].item() == any(slot.masked and slot.token < 0 for slot in slots[row])
        assert state.step[row].item() == p["step"] + (masked > 0)
        assert state.forward[row].item() == 40 + row + (masked > 0)
    assert x.tolist() == expected.tolist()
    assert state.step_map.tolist() == step_map.tolist()
    torch.testing.assert_close(state.confidence.cpu(), recorded, equal_nan=True, rtol=1e-6, atol=0)


# --- the published edge cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidences", "count"),
    [([0.9, 0.8, 0.1], 3), ([0.3, 0.2], 2), ([0.9, 0.5, 0.1], 1), ([0.99, 0.95, 0.2, 0.1], 2), ([0.01], 1), ([0.9] * 7, 7)],
)
def test_factor_keeps_the_official_last_rank(op, confidences, count):
    assert run(op, by_rest(odds(*confidences)), "confidence", "factor", 1.0) == list(range(count))


@pytest.mark.parametrize(
    ("value", "confidences", "chosen"),
    [
        (0.9, [0.95, 0.2, 0.91, 0.89], [0, 2]),
        (0.9, [0.1, 0.3, 0.3, 0.2], [1]),  # none reaches it: the best, and the first of equals
        (0.5, [0.5, 0.4, 0.5], [0, 2]),  # at least, not above
        (1.0, [0.999, 1.0, 0.5], [1]),
        (0.0, [0.001, 1.0, 0.5], [0, 1, 2]),
    ],
)
def test_threshold(op, value, confidences, chosen):
    assert run(op, by_rest(odds(*confidences)), "confidence", "threshold", value) == chosen


def test_a_threshold_of_one_wants_certainty_beyond_float32(op):
    assert run(op, by_rest([1e-9, 0.0, 1e-12, 0.0]), "confidence", "threshold", 1.0) == [1, 3]
    assert run(op, by_rest([3e-9, 1e-9, 2e-9]), "confidence", "quota", steps=3) == [1]


@pytest.mark.parametrize(
    ("gamma", "entropies", "chosen"),
    [
        (0.0, [0.5, 0.25, 2.0], [1]),  # a zero budget commits the surest one
        (0.0, [0.5, 0.0, 0.0], [0, 1, 2]),  # the others' entropies sum to nothing
        (0.5, [0.25, 0.25, 0.5, 2.0], [0, 1, 2]),
        (1.0, [0.25, 0.25, 0.5, 2.0], [0, 1, 2, 3]),
        (INF, [5.0, 6.0, 7.0], [0, 1, 2]),
    ],
)
def test_entropy_budget_bounds_the_sum_of_all_but_the_largest(op, gamma, entropies, chosen):
    slots = [Slot(True, 1, -1.0, 1.0, entropy) for entropy in entropies]
    assert run(op, slots, "neg_entropy", "entropy_budget", gamma) == chosen


@pytest.mark.parametrize(("masked", "steps", "quotas"), [(8, 3, [3, 3, 2]), (5, 8, [1] * 5), (4, 4, [1] * 4), (7, 1, [7])])
def test_quotas_of_a_block_are_those_of_llada(op, masked, steps, quotas):
    x = torch.tensor([[MASK] * masked + [0] * (8 - masked)], device=DEVICE)
    state = state_of("confidence", "quota", steps=steps)
    statistics = statistics_of([by_rest([0.1 * i for i in range(8)])])
    seen = []
    while not seen or not state.done.item():
        op(x, statistics, int32(0), state)
        seen.append(masked - sum(seen) - state.remaining.item())
    assert seen == quotas
    assert state.step_map[0, :masked].tolist() == sorted(state.step_map[0, :masked].tolist())
    assert state.forward.item() == state.step.item() == len(quotas)


@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_first_position(op, rule):
    slots = [Slot(True, 1, -1.0, 1.0, 0.5)] * 6
    value = {"threshold": 0.9, "floored_threshold": 0.9, "factor": 0.1, "entropy_budget": 0.5}.get(rule, 0.0)
    # A threshold of 0 lets the whole share through; six slots in three forwards are two each.
    two = ("quota", "capped_threshold", "floored_threshold", "entropy_budget", "schedule")
    expected = [0, 1] if rule in two else [0]
    for score in SCORES[:3]:
        assert run(op, slots, score, rule, value, steps=3, step=1 if rule == "schedule" else 0) == expected


@pytest.mark.parametrize(
    ("t", "confidences", "step", "chosen"),
    [
        (0.9, [0.95, 0.2, 0.91, 0.93], 0, [0, 2, 3]),  # more than the floor of two
        (0.9, [0.95, 0.2, 0.91, 0.5], 0, [0, 2]),  # as many
        (0.9, [0.95, 0.2, 0.3, 0.5], 0, [0, 3]),  # fewer: the two best
        (0.9, [0.2, 0.2, 0.3, 0.5], 2, [3]),  # the floor of the third forward
        (0.5, [0.5, 0.5, 0.75, 0.5], 2, [2]),  # above, not at least
        (None, [1.0, 1.0, 1.0, 1.0], 2, [0]),  # no threshold: whatever the confidence
        (None, [0.1, 0.2, 0.3, 0.4], 0, [2, 3]),
    ],
)
def test_denoising_steps_of_sdar(op, t, confidences, step, chosen):
    # Five slots in three forwards are two, two and one, although one slot of the block is given.
    slots = [*by_rest(odds(*confidences)), Slot(False, 0, -1.0, 0.0, 0.0)]
    value = DenoisingSteps(3, t).value
    assert run(op, slots, "confidence", "floored_threshold", value, steps=3, step=step) == chosen


@pytest.mark.parametrize("given", range(8))
def test_static_and_sequential_schedules_are_those_of_sdars_loop(op, given):
    generator = torch.Generator().manual_seed(given)
    confidence = torch.rand(8, generator=generator)
    mask = torch.ones(8, dtype=torch.bool)
    mask[torch.randperm(8, generator=generator)[:given]] = False
    for score, steps in itertools.product(("confidence", "leftmost"), (1, 3, 5, 8)):
        left, want = mask.clone(), []
        for i in range(steps):
            if not left.any():
                break
            quota = min(8 // steps + (i < 8 % steps), int(left.sum()))
            ranks = torch.where(left, confidence, -1) if score == "confidence" else torch.where(left, -torch.arange(8), -99)
            best = ranks.topk(quota).indices
            left[best] = False
            want.append(sorted(best.tolist()))
        x = torch.where(mask, MASK, 0)[None].to(DEVICE)
        state = state_of(score, "floored_threshold", math.inf, steps)
        statistics = statistics_of([[Slot(True, 1, -1.0, 1 / c - 1, 0.1) for c in confidence.tolist()]])
        for _ in want:
            op(x, statistics, int32(0), state)
        assert [(state.step_map[0] == i).nonzero()[:, 0].tolist() for i in range(len(want))] == want
        assert state.done.tolist() == [True]


@pytest.mark.parametrize(("t", "chosen"), [(0.5, [2]), (0.25, [0, 1, 2]), (1.0, [2]), (0.75, [2])])
def test_a_strict_threshold_is_above_and_never_at(op, t, chosen):
    slots = by_rest([1.0, 1.0, 1 / 3, 3.0])  # exactly 1/2, 1/2, about 3/4, 1/4
    assert run(op, slots, "confidence", "threshold", Threshold(t, strict=True).value) == chosen
    certain = by_rest([0.0, 0.0, 0.0])
    assert run(op, certain, "confidence", "threshold", Threshold(1.0, strict=True).value) == [0]  # one token a forward
    assert run(op, certain, "confidence", "threshold", Threshold(1.0).value) == [0, 1, 2]


@pytest.mark.parametrize("rule", ["quota", "threshold", "floored_threshold", "factor"])
def test_a_block_of_one_slot_is_committed_whatever_its_score(op, rule):
    # Fast-dLLM v2: the token that the last row of a finished block predicts stands behind it.
    x = torch.tensor([[1, 2, MASK, MASK], [1, MASK, MASK, MASK]], device=DEVICE)
    state = state_of("confidence", rule, math.inf if "threshold" in rule else 0.0, rows=2, slots=4)
    op(x, statistics_of([[Slot(True, 5, -1.0, 1e9, 9.0)], [Slot(True, 6, -1.0, INF, 9.0)]]), int32(2, 1), state)
    assert x.tolist() == [[1, 2, 5, MASK], [1, 6, MASK, MASK]]
    assert state.done.all() and state.forward.tolist() == [1, 1]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rule", RULES)
def test_a_finished_row_is_untouched(op, score, rule):
    x = torch.tensor([[1, 2, 3, 4], [MASK, MASK, 3, MASK]], device=DEVICE)
    state = state_of(score, rule, 0.5, 2, rows=2, slots=4)
    state.step.copy_(int32(3, 0))
    if rule == "schedule":
        state.shares.fill_(0.7)
    slots = by_rest([0.0, 0.0, 0.0, 0.0])
    op(x, statistics_of([slots, slots]), int32(0, 0), state)
    assert x[0].tolist() == [1, 2, 3, 4]
    assert state.step_map[0].tolist() == [-1] * 4 and state.confidence[0].isnan().all()
    assert state.remaining[0].item() == 0 and state.done.tolist()[0] is True
    assert state.step[0].item() == 3 and not state.invalid.any()
    assert state.forward.tolist() == [0, 1]
    assert (x[1] != MASK).sum() > 1 and state.step[1].item() == 1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_masked_is_not_read(op, score, rule):
    rubbish = Slot(False, -1, math.nan, math.nan, math.nan)
    slots = [rubbish, Slot(True, 4, -1.0, 1.0, 0.5), rubbish, Slot(True, 5, -1.0, 1.0, 0.5)]
    assert set(run(op, slots, score, rule, 0.25, steps=1)) <= {1, 3}
    assert run(op, slots, score, rule, 0.25, steps=2, step=2)


@pytest.mark.parametrize("score", SCORES)
def test_a_masked_slot_without_a_token_is_flagged_and_left(op, score):
    x = torch.tensor([[MASK, MASK, 0], [MASK, MASK, MASK]], device=DEVICE)
    state = state_of(score, "threshold", 0.0, rows=2, slots=3)
    good, broken = Slot(True, 4, -1.0, 0.0, 0.0), Slot(True, -1, math.nan, INF, math.nan)
    op(x, statistics_of([[broken, good, broken], [good, good, good]]), int32(0, 0), state)
    assert x[0, 0].item() == MASK and x[1, 0].item() == 4
    assert state.invalid.tolist() == [True, False]
    assert state.done.tolist()[0] is False and state.remaining.tolist()[0] == 2 - int((x[0] == 4).sum())
    op(x, statistics_of([[good] * 3] * 2), int32(0, 0), state)
    assert state.invalid.tolist() == [True, False]  # kept


def test_random_scores_depend_on_seed_position_and_step(op):
    slots = by_rest([1.0] * 32)
    picks = {tuple(run(op, slots, "random", "quota", steps=8, seed=seed)) for seed in range(6)}
    assert len(picks) == 6 and all(len(pick) == 4 for pick in picks)
    assert run(op, slots, "random", "quota", steps=8, seed=3) in [list(pick) for pick in picks]


def test_random_order_is_uniform(op):
    rows = 150
    x = torch.full((rows, 5), MASK, device=DEVICE)
    state = state_of("random", "quota", steps=5, rows=rows, slots=5)
    state.seed.copy_(torch.arange(rows))
    op(x, statistics_of([by_rest([1.0] * 5)] * rows), int32(*[0] * rows), state)
    counts = (x != MASK).sum(0).double()
    assert ((counts - rows / 5) ** 2 / (rows / 5)).sum().item() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_a_row_decides_alone(op):
    generator = torch.Generator().manual_seed(1)
    rest = torch.rand(4, 16, generator=generator).tolist()
    batch = [by_rest(row) for row in rest]
    state = state_of("random", "factor", 1.2, rows=4, slots=16)
    state.seed.copy_(torch.tensor([5, 6, 7, 8]))
    x = torch.full((4, 16), MASK, device=DEVICE)
    op(x, statistics_of(batch), int32(0, 0, 0, 0), state)
    for row in (0, 3):
        alone = state_of("random", "factor", 1.2, slots=16, seed=5 + row)
        y = torch.full((1, 16), MASK, device=DEVICE)
        op(y, statistics_of(batch[row : row + 1]), int32(0), alone)
        assert y[0].tolist() == x[row].tolist()


@pytest.mark.parametrize(("score", "rule", "value"), [("confidence", "factor", 1.0), ("margin", "threshold", 0.3)])
def test_blocks_of_a_thousand_slots(op, score, rule, value):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1000, 6, generator=generator) * 3
    top = logits.topk(2).values
    p = torch.softmax(logits, 1)
    slots = [
        torch_rest(Slot(i % 7 != 0, i % MASK, (top[i, 1] - top[i, 0]).item(), (1 / p[i].max() - 1).item(), 0.0))
        for i in range(1000)
    ]
    first = sum(slot.masked for slot in slots)
    expected = committed(score, rule, value, 1, 0, first, slots, [0.0] * 1000)
    assert 4 < len(expected) < 800
    assert run(op, slots, score, rule, value) == sorted(expected)


# --- the kernel alone ---------------------------------------------------------------------------------------------------


def test_no_rows_are_no_launch():
    state = state_of("confidence", "quota", rows=0)
    statistics = TokenStatistics(*(torch.zeros(0, 4, dtype=d, device=DEVICE) for d in (torch.int64, *[torch.float32] * 5)))
    kernel(torch.zeros(0, 8, dtype=torch.int64, device=DEVICE), statistics, int32(), state)
    assert state.forward.shape == (0,)


def test_a_block_that_leaves_the_row_touches_nothing_else():
    memory = torch.full((3, 12), MASK, device=DEVICE)
    x = memory[:, 2:10]  # rows of 8, with masked neighbours
    state = state_of("confidence", "threshold", 0.0, rows=3, slots=8)
    slots = by_rest([0.0] * 4)
    kernel(x, statistics_of([slots] * 3), int32(-2, 6, 2), state)
    assert (memory[0, :2] == MASK).all() and (memory[2, 10:] == MASK).all() and (memory[1, 10:] == MASK).all()
    assert (x != MASK).nonzero().tolist() == [[0, 0], [0, 1], [1, 6], [1, 7], [2, 2], [2, 3], [2, 4], [2, 5]]
    assert (state.step_map >= 0).nonzero().tolist() == (x != MASK).nonzero().tolist()


@pytest.mark.parametrize("block", [1, 2, 31, 32, 33, 128, 700, 1024])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_a_tile_of_comparisons_stays_small(arch, block):
    for rule in RULES:
        config = select_config(arch, rule, block)
        assert block <= config.block < 2 * block
        assert config.chunk == 1 or config.block * config.chunk <= 32 * config.num_warps * (4 if rule == "entropy_budget" else 8)
        assert 1 <= config.chunk <= config.block


def bad(**changes):
    state = state_of("confidence", "quota", rows=2)
    arguments = {
        "x": torch.full((2, 8), MASK, device=DEVICE),
        "statistics": statistics_of([by_rest([1.0] * 4)] * 2),
        "window_start": int32(0, 0),
        "state": state,
    }
    for name, value in changes.items():
        holder, _, field = name.partition("__")
        if field:
            setattr(arguments[holder], field, value)
        else:
            arguments[name] = value
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x must be \[B, L\] torch.int64 of last stride 1, got torch.float32"),
        ({"x": torch.zeros(8, 2, dtype=torch.int64).t()}, "last stride 1"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64, device="meta")}, "x must be a GPU tensor .*, got a tensor on meta"),
        ({"x": torch.full((2, 3), MASK)}, r"1 to 3 slots a row, got \[2, 4\]"),
        ({"x": torch.full((1025, 8), MASK)}, "at most 1024 rows, got 1025"),
        ({"statistics__token": torch.zeros((), dtype=torch.int64)}, r"1 to 8 slots a row, got \[\]"),
        ({"statistics__token": torch.zeros(2, 4, dtype=torch.int32)}, "statistics.token must be a contiguous torch.int64"),
        ({"statistics__rest": torch.zeros(2, 8)[:, ::2]}, "statistics.rest must be a contiguous torch.float32"),
        ({"statistics__entropy": torch.zeros(2, 4).double()}, "statistics.entropy must be a contiguous torch.float32"),
        ({"window_start": torch.zeros(2, dtype=torch.int64)}, "window_start must be a contiguous torch.int32"),
        (
            {"state__score": "entropy"},
            "state.score must be one of confidence, .*, random, leftmost, got 'entropy'",
        ),
        (
            {"state__rule": "all"},
            "state.rule must be one of quota, threshold, capped_threshold, floored_threshold, factor, .*, schedule, got 'all'",
        ),
        ({"state__ends": "row"}, "state.ends must be one of block, token, got 'row'"),
        ({"state__prompt_end": torch.zeros(2, dtype=torch.int64)}, r"state.prompt_end must be a contiguous torch.int32 \[2\]"),
        ({"state__value": torch.zeros(())}, "state.value must be a contiguous torch.float64"),
        ({"state__eos_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"state.eos_ids must be a contiguous torch.int64 \[2, 1\]"),
        ({"state__shares": torch.zeros(2, 3, 1)}, r"state.shares must be a contiguous torch.float32 \[2, 1\]"),
        ({"state__rule": "schedule"}, "state.shares must hold at least one share a row for the rule 'schedule', got none"),
        ({"state__kv_start": int32(0)}, r"state.kv_start must be a contiguous torch.int32 \[2\]"),
        ({"state__step_map": torch.zeros(2, 4, dtype=torch.int32)}, r"state.step_map must be a contiguous torch.int32 \[2, 8\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        kernel(**bad(**changes))


def test_the_state_starts_empty():
    state = state_of("confidence", "threshold", 0.9, rows=2, slots=5)
    assert state.value.dtype == torch.float64 and state.value.tolist() == [0.9, 0.9]
    assert state.step_map.shape == state.confidence.shape == (2, 5)
    assert {field.name for field in fields(state)} >= {"seed", "kv_start", "invalid"}
    assert all(len(tensor) == 2 for tensor in state.by_row.values())


# --- the end of a row -----------------------------------------------------------------------------------------------------

EOS, EOT, WORD = 1, 2, 3


@pytest.mark.parametrize("block", [3, 40])  # 40: more slots after the block than a program holds at a time
@pytest.mark.parametrize(
    ("eos_ids", "before", "tokens", "ended"),
    [
        ((EOS, EOT), (WORD, MASK, WORD), (0, EOS, 0), True),
        ((EOS, EOT), (WORD, MASK, WORD), (0, EOT, 0), True),  # any of them ends a row, the first of them fills it
        ((EOS, EOT), (EOS, MASK, WORD), (0, WORD, 0), True),  # committed by an earlier forward
        ((EOS, EOT), (WORD, MASK, WORD), (0, WORD, 0), False),
        ((EOS, EOT), (EOS, MASK, MASK), (0, WORD, WORD), False),  # the block is not complete
        ((EOS, EOT), (EOS, WORD, WORD), (0, 0, 0), False),  # nothing masked: a no-op
        ((), (WORD, MASK, WORD), (0, EOS, 0), False),  # no rule
    ],
)
def test_a_row_ends_with_the_block_that_holds_an_end_token(op, block, eos_ids, before, tokens, ended):
    length = 1 + block + 70
    state = state_of("confidence", "quota", steps=2 if before.count(MASK) == 2 else 1, slots=length)
    state.eos_ids = torch.tensor([eos_ids], dtype=torch.int64, device=DEVICE)
    filler = [WORD] * (block - 3)
    x = torch.tensor([[EOS, *before, *filler, *[MASK] * 69, WORD]], device=DEVICE)
    slots = [Slot(token == MASK, new, -1.0, 0.5, 0.1) for token, new in zip(before, tokens, strict=True)]
    op(x, statistics_of([slots + [Slot(False, 0, -1.0, 0.5, 0.1)] * len(filler)]), int32(1), state)
    after = x[0, 1 + block :].tolist()
    assert state.ended.tolist() == [ended]
    assert after == [EOS if ended else MASK] * 69 + [WORD]
    assert x[0, 0].item() == EOS  # before the block nothing is looked at, or written
    assert (state.step_map[0, 1 + block :] == -1).all()
    op(x, statistics_of([slots + [Slot(False, 0, -1.0, 0.5, 0.1)] * len(filler)]), int32(1), state)
    assert state.ended.tolist() == [ended or before.count(MASK) == 2]  # kept; a block that the second forward completed


@pytest.mark.parametrize(
    ("before", "tokens", "prompt_end", "ended"),
    [
        ((WORD, MASK, MASK), (0, EOS, WORD), 0, True),  # masked behind it, and filled
        ((MASK, MASK, WORD), (EOS, WORD, 0), 0, True),
        ((MASK, MASK, WORD), (WORD, EOS, 0), 0, False),  # the second is not decoded yet
        ((MASK, EOS, MASK), (WORD, 0, WORD), 0, True),  # what was before it is decoded now
        ((MASK, MASK, EOS), (WORD, WORD, 0), 0, False),  # something before it is not
        ((MASK, EOS, EOS), (EOS, 0, 0), 0, True),  # the first of several
        ((EOS, WORD, MASK), (0, 0, WORD), 2, False),  # a prompt's
        ((EOS, EOS, MASK), (0, 0, WORD), 2, True),
        ((EOS, EOS, MASK), (0, 0, WORD), 3, False),
        ((EOS, WORD, WORD), (0, 0, 0), 0, False),  # nothing masked: a no-op
    ],
)
def test_a_row_ends_as_soon_as_nothing_is_masked_before_an_end_token(op, before, tokens, prompt_end, ended):
    x = torch.tensor([[EOS, *before, *[MASK] * 69, WORD]], device=DEVICE)
    state = state_of("leftmost", "quota", steps=before.count(MASK) or 1, slots=x.shape[1])  # one token
    state.eos_ids, state.ends = torch.tensor([[EOT, EOS]], device=DEVICE), "token"
    state.prompt_end.fill_(prompt_end)
    slots = [Slot(token == MASK, new, -1.0, 0.5, 0.1) for token, new in zip(before, tokens, strict=True)]
    if before == (WORD, MASK, MASK):
        state.score = "confidence"
        slots[1] = slots[1]._replace(rest=0.1)
    op(x, statistics_of([slots]), int32(1), state)
    first = before.index(MASK) if MASK in before else None
    want = [tokens[i] if i == first else token for i, token in enumerate(before)]
    if ended:
        want = [EOT if token == MASK else token for token in want]
    assert x[0].tolist() == [EOS, *want, *[EOT if ended else MASK] * 69, WORD]
    assert state.ended.tolist() == [ended]
    assert state.remaining.tolist() == [0 if ended else max(before.count(MASK) - 1, 0)]
    assert (state.step_map >= 0).sum() == (first is not None)


@pytest.mark.parametrize("prompt_end", [0, 1, 2])
def test_end_tokens_of_a_prompt_do_not_end_a_finished_block(op, prompt_end):
    x = torch.tensor([[EOS, MASK, MASK, MASK]], device=DEVICE)
    state = state_of("confidence", "quota", slots=4)
    state.eos_ids = torch.tensor([[EOS]], device=DEVICE)
    state.prompt_end.fill_(prompt_end)
    op(x, statistics_of([[Slot(i > 0, WORD, -1.0, 0.5, 0.1) for i in range(2)]]), int32(0), state)
    assert state.ended.tolist() == [prompt_end == 0]
    assert x.tolist() == [[EOS, WORD, EOS, EOS] if prompt_end == 0 else [EOS, WORD, MASK, MASK]]


def official_stop(x: list[int], known: int, end: int) -> bool:
    """The stop test of Fast-dLLM v2's ``generate``: nothing masked between what was known and the first end token behind it."""
    found = next((i for i in range(known, end) if x[i] == EOS), None)
    return found is not None and MASK not in x[known:found]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_sub_blocks_end_a_row_where_the_official_loop_leaves_the_block(data):
    start, known = 3, data.draw(st.integers(1, 7))
    x = [WORD] * 3 + [EOS] * known + [MASK] * (8 - known) + [MASK] * 5
    state = state_of("confidence", "threshold", 0.6, slots=len(x))
    state.eos_ids, state.ends = torch.tensor([[EOS]], device=DEVICE), "token"
    state.prompt_end.fill_(start + known)
    mine, official, ops = torch.tensor([x], device=DEVICE), list(x), data.draw(st.sampled_from(list(OPS)))
    for sub in (start, start + 4):
        while MASK in official[sub : sub + 4] and not official_stop(official, start + known, start + 8):
            confidences = data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.7, 0.9]), min_size=4, max_size=4))
            tokens = data.draw(st.lists(st.sampled_from([WORD, WORD, EOS]), min_size=4, max_size=4))
            slots = [Slot(True, token, -1.0, 1 / c - 1, 0.1) for token, c in zip(tokens, confidences, strict=True)]
            masked = [i for i in range(4) if official[sub + i] == MASK]
            best = max(masked, key=lambda i: confidences[i])
            for i in masked:
                if confidences[i] > 0.6 or i == best:
                    official[sub + i] = tokens[i]
            OPS[ops](mine, statistics_of([slots]), int32(sub), state)
            stop = official_stop(official, start + known, start + 8)
            assert state.ended.tolist() == [stop]
            filled = [EOS if token == MASK and stop else token for token in official]
            assert mine[0].tolist() == filled
            assert state.done.tolist() == [MASK not in official[sub : sub + 4] or stop]


def test_rows_end_apart(op):
    state = state_of("confidence", "quota", rows=3, slots=6)
    state.eos_ids = torch.tensor([[EOS]] * 3, device=DEVICE)
    x = torch.tensor([[MASK] * 6] * 3, device=DEVICE)
    blocks = [[Slot(True, token, -1.0, 0.5, 0.1)] * 2 for token in (WORD, EOS, WORD)]
    op(x, statistics_of(blocks), int32(0, 2, 4), state)
    assert state.ended.tolist() == [False, True, False]
    assert x.tolist() == [[WORD] * 2 + [MASK] * 4, [MASK] * 2 + [EOS] * 4, [MASK] * 4 + [WORD] * 2]


def test_each_row_has_end_tokens_of_its_own(op):
    state = state_of("confidence", "quota", rows=4, slots=6)
    state.eos_ids = torch.tensor([[EOT, EOS], [EOT, -1], [-1, -1], [EOS, -1]], device=DEVICE)
    x = torch.tensor([[MASK] * 6] * 4, device=DEVICE)
    op(x, statistics_of([[Slot(True, EOS, -1.0, 0.5, 0.1)] * 2] * 4), int32(0, 0, 0, 4), state)
    assert state.ended.tolist() == [True, False, False, True]
    assert x.tolist() == [[EOS] * 2 + [EOT] * 4, [EOS] * 2 + [MASK] * 4, [EOS] * 2 + [MASK] * 4, [MASK] * 4 + [EOS] * 2]


def test_too_many_end_tokens_are_refused():
    state = state_of("confidence", "quota")
    state.eos_ids = torch.arange(17, device=DEVICE)[None]
    with pytest.raises(ValueError, match=r"state.eos_ids must hold at most 16 tokens a row, got 17"):
        kernel(torch.zeros(1, 8, dtype=torch.int64, device=DEVICE), statistics_of([by_rest([1.0] * 8)]), int32(0), state)


# --- rows that differ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_different_options_decide_as_they_do_alone(op, score, rule):
    generator = torch.Generator().manual_seed(4)
    rows, block, forwards = 4, 12, 3
    statistics = [
        token_statistics(torch.randn(rows * block, 40, generator=generator).mul(3).to(DEVICE), forbidden=[MASK]).view(rows, block)
        for _ in range(forwards)
    ]
    options = {"value": [0.0, 0.3, 0.7, 1.5], "steps": [1, 3, 5, 12], "seed": [5, 6, 7, 8]}
    shares = torch.rand(rows, 2, generator=generator)
    eos_ids = torch.tensor([[3, 5], [4, -1], [-1, -1], [6, 1]])

    def decode(i: slice) -> dict[str, torch.Tensor]:
        count = len(options["seed"][i])
        state = PolicyState.create(
            score,
            rule,
            value=options["value"][i],
            steps=options["steps"][i],
            shares=shares[i] if rule == "schedule" else None,
            mask_id=MASK,
            kv_start=torch.zeros(count, dtype=torch.int32, device=DEVICE),
            seed=torch.tensor(options["seed"][i], device=DEVICE),
            slots=16,
            eos_ids=eos_ids[i],
        )
        x = torch.full((count, 16), MASK, device=DEVICE)
        for entries in statistics:
            part = TokenStatistics(*(field[i].contiguous() for field in vars(entries).values()))
            op(x, part, int32(*[2] * count), state)
        return {"x": x, **state.by_row}

    together = decode(slice(0, rows))
    # No slot's number reaches a threshold or a factor: one token a forward in every row.
    alike = score == "leftmost" and rule in ("threshold", "factor")
    assert (len({tuple(row) for row in together["step_map"].tolist()}) > 1) != alike
    for row in range(rows):
        for name, tensor in decode(slice(row, row + 1)).items():
            torch.testing.assert_close(together[name][row : row + 1], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(("masked", "counts"), [(10, [0, 3, 4, 3]), (24, [0, 8, 11, 5]), (25, [1, 8, 11, 5])])
def test_a_schedule_commits_what_dream_does_possibly_nothing(op, masked, counts):
    slots = [Slot(True, 1, -1.0, 0.1 * i, 0.1) for i in range(masked)]
    state = state_of("confidence", "schedule", slots=masked)
    x = torch.full((1, masked), MASK, device=DEVICE)
    left, committed_in = masked, []
    for share in SHARES[:4]:
        expected = transfer_count(torch.tensor([left]), share).item()
        op(x, statistics_of([slots]), int32(0), state)
        committed_in.append(left - state.remaining.item())
        assert committed_in[-1] == expected
        left = state.remaining.item()
    assert committed_in == counts
    assert state.step.item() == state.forward.item() == 4


def test_forwards_beyond_the_last_share_take_the_last(op):
    slots = [Slot(True, 1, -1.0, 0.5, 0.1)] * 8
    assert run(op, slots, "confidence", "schedule", step=4) == run(op, slots, "confidence", "schedule", step=99) == [0, 1]


# --- statistics in another order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rule", RULES)
def test_entries_in_any_order_commit_what_those_of_the_block_do(op, score, rule):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((6, 40), generator=generator) * 3
    statistics = token_statistics(logits.to(DEVICE), forbidden=[MASK])
    order = torch.randperm(6, generator=generator).to(DEVICE)
    x = torch.full((2, 8), MASK, device=DEVICE)
    x[:, :2], x[0, 3], x[1, 4] = 1, 2, 2  # three of each block's four slots are masked
    place = torch.full((2, 4), -1, dtype=torch.int32, device=DEVICE)
    masked = x[:, 2:6] == MASK
    place[masked] = order.int()
    entries = TokenStatistics(*(torch.full((2, 4), -7, dtype=f.dtype, device=DEVICE) for f in vars(statistics).values()))
    for name, field in vars(statistics).items():
        getattr(entries, name)[masked] = field[order]
    start = torch.full((2,), 2, dtype=torch.int32, device=DEVICE)
    found, want = ((x.clone(), state_of(score, rule, 0.5, 2, rows=2)) for _ in range(2))
    if rule == "schedule":
        found[1].shares.fill_(0.7), want[1].shares.fill_(0.7)
    op(found[0], statistics, start, found[1], place=place)
    op(want[0], entries, start, want[1])
    assert torch.equal(found[0], want[0])
    assert (found[0] != x).any()
    for name in ("step_map", "remaining", "invalid", "masked", "step"):
        assert torch.equal(getattr(found[1], name), getattr(want[1], name))
    torch.testing.assert_close(found[1].confidence, want[1].confidence, equal_nan=True)


def test_a_masked_slot_without_an_entry_is_invalid_and_stays_masked(op):
    statistics = token_statistics(torch.randn(2, 40, device=DEVICE), forbidden=[MASK])
    x, state = torch.full((1, 4), MASK, device=DEVICE), state_of("confidence", "threshold", 0.0, slots=4)
    place = torch.tensor([[1, -1, 0, -1]], dtype=torch.int32, device=DEVICE)
    op(x, statistics, torch.zeros(1, dtype=torch.int32, device=DEVICE), state, place=place)
    assert x[0, [0, 2]].tolist() == statistics.token[[1, 0]].tolist()
    assert x[0, [1, 3]].tolist() == [MASK, MASK]
    assert state.invalid.tolist() == [True]

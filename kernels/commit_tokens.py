"""Decides which masked tokens of each row's block to commit and writes them: one launch, one program a sequence.

Every rule commits a prefix of the slots ordered by (cost, position), cost being small where the score is good. No slot is
sorted: a slot's rank is the number of slots before it, and a prefix that ends at the first slot that does not fit is as
long as the smallest rank among those that do not. Comparing all pairs of a block of 32 is cheaper than a sort and needs
no other order of the data; longer blocks go through it in chunks.

Costs are float64, as the reference's decisions are: odds of 1e-9 and 2e-9 must not meet in rounding. They are compared as
integers of the same order, since GPUs without fast float64 compare those at full rate.

The rules and their sources are in ``reference/commit_tokens.py``.

| pointer                        | shape          | dtype       | owned by                                         |
|--------------------------------|----------------|-------------|--------------------------------------------------|
| x_ptr                          | [B, L]         | int64       | caller, read and written; stride_x between rows  |
| place_ptr                      | [B, N]         | int32       | caller, read: a slot's entry of the statistics   |
| token_ptr                      | [P]            | int64       | statistics, read, as are the five below in fp32  |
| logit_ptr … entropy_ptr        | [P]            | fp32        | what the score does not need is not read         |
| window_start_ptr, kv_start_ptr | [B]            | int32       | caller, read                                     |
| seed_ptr                       | [B]            | int64       | state, read                                      |
| value_ptr, steps_ptr           | [B]            | fp64, int32 | state, read                                      |
| shares_ptr                     | [B, S]         | fp32        | state, read by the schedule                      |
| eos_ptr, prompt_end_ptr        | [B, EOS], [B]  | int64, int32 | state, read; -1 is none                         |
| step_ptr … remaining_ptr       | [B]            | int32       | state, read and written                          |
| invalid_ptr, ended_ptr         | [B]            | bool        | state, read and written                          |
| forward_ptr                    | [B]            | int32       | state, counted up                                |
| step_map_ptr, confidence_ptr   | [B, L]         | int32, fp32 | state, written where a token is committed        |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import SHARED_FIELDS, EndName, PolicyState, RuleName, ScoreName, TokenStatistics
from ._arch import Arch, arch_of
from ._check import check_device, once
from ._limits import MAX_BLOCK, MAX_EOS, MAX_ROWS
from ._statistics import outputs

#: Fourth word of the random counter: numbers that rank slots (reference/_random.py).
STREAM_SCORE = tl.constexpr(1)


@triton.jit
def _entry(place_ptr, row, block, o, mask):
    """Where the statistics of the slots ``o`` of a row's block are, below ``MAX_ROWS * MAX_BLOCK``; -1 is nowhere."""
    at = row.to(tl.int32) * block + o
    return tl.load(place_ptr + at, mask=mask, other=-1)


@triton.jit
def _candidates(
    x_ptr,
    place_ptr,
    token_ptr,
    logit_ptr,
    second_ptr,
    lse_ptr,
    rest_ptr,
    entropy_ptr,
    o,
    row,
    start,
    slots,
    block,
    mask_id,
    position,
    seed,
    step,
    SCORE: tl.constexpr,
):
    """Of the slots ``o [N]`` of a row's block: whether each is masked, whether it may be committed, and its cost."""
    inside = (o < block) & (start + o >= 0) & (start + o < slots)
    masked = inside & (tl.load(x_ptr + start + o, mask=inside, other=0) == mask_id)
    at = _entry(place_ptr, row, block, o, masked)
    known = masked & (at >= 0)
    eligible = known & (tl.load(token_ptr + at, mask=known, other=-1) >= 0)
    if SCORE == "confidence":
        cost = tl.load(rest_ptr + at, mask=eligible, other=0.0).to(tl.float64)
    elif SCORE == "margin":
        logit = tl.load(logit_ptr + at, mask=eligible, other=0.0).to(tl.float64)
        second = tl.load(second_ptr + at, mask=eligible, other=0.0).to(tl.float64)
        lse = tl.load(lse_ptr + at, mask=eligible, other=0.0).to(tl.float64)
        p = 1 / (1 + tl.load(rest_ptr + at, mask=eligible, other=0.0).to(tl.float64))
        sampled = second > logit  # a sample need not be the best token
        gap = (1 - tl.exp(-tl.abs(second - logit))) * tl.where(sampled, tl.exp(second - lse), p)
        cost = tl.where(sampled, gap, -gap)
    elif SCORE == "neg_entropy":
        cost = tl.load(entropy_ptr + at, mask=eligible, other=0.0).to(tl.float64)
    elif SCORE == "leftmost":
        cost = o.to(tl.float64)
    else:
        zero = (o * 0).to(tl.uint32)
        word, _, _, _ = tl.philox(seed, zero, (position + o).to(tl.uint32), step.to(tl.uint32), STREAM_SCORE)
        cost = -tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24).to(tl.float64)
    return masked, eligible, tl.where(cost == 0, 0.0, cost)  # one zero


@triton.jit
def _ordered(cost):
    """Integers in the order of the float64 costs."""
    bits = cost.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


#: Pointers into the tensors of a batch: a launch for some of its rows hands in slices, aligned or not, for one kernel.
_SLICED = [
    "window_start_ptr", "kv_start_ptr", "seed_ptr", "value_ptr", "steps_ptr", "shares_ptr", "eos_ptr", "prompt_end_ptr",
    "step_ptr", "masked_ptr", "remaining_ptr", "invalid_ptr", "ended_ptr", "forward_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_SLICED)
def _commit_tokens_kernel(
    x_ptr,
    place_ptr,
    token_ptr,
    logit_ptr,
    second_ptr,
    lse_ptr,
    rest_ptr,
    entropy_ptr,
    window_start_ptr,
    kv_start_ptr,
    seed_ptr,
    value_ptr,
    steps_ptr,
    shares_ptr,
    eos_ptr,
    prompt_end_ptr,
    step_ptr,
    masked_ptr,
    remaining_ptr,
    invalid_ptr,
    ended_ptr,
    forward_ptr,
    step_map_ptr,
    confidence_ptr,
    slots,
    block,
    shares,
    mask_id,
    stride_x,
    SCORE: tl.constexpr,
    RULE: tl.constexpr,
    EOS: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    start = tl.load(window_start_ptr + row)
    position = start - tl.load(kv_start_ptr + row)
    seed = tl.load(seed_ptr + row)
    step = tl.load(step_ptr + row)
    value = tl.load(value_ptr + row)

    o = tl.arange(0, BLOCK)
    masked, eligible, cost = _candidates(
        x_ptr, place_ptr, token_ptr, logit_ptr, second_ptr, lse_ptr, rest_ptr, entropy_ptr,
        o, row, start, slots, block, mask_id, position, seed, step, SCORE,
    )  # fmt: skip
    key = _ordered(cost)  # [BLOCK]
    masked_now = tl.sum(masked.to(tl.int32), 0)
    total = tl.sum(eligible.to(tl.int32), 0)
    masked_first = tl.where(step == 0, masked_now, tl.load(masked_ptr + row))

    if RULE == "quota":
        steps = tl.load(steps_ptr + row)
        count = masked_first // steps + (step < masked_first % steps).to(tl.int32)
    elif RULE == "threshold" or RULE == "capped_threshold" or RULE == "floored_threshold":
        fails = cost > -value
        if SCORE == "confidence":
            fails = (1 + cost) * value > 1  # false for inf * 0: a threshold of 0 lets everything pass
        count = tl.sum((eligible & (fails == 0)).to(tl.int32), 0)
        if RULE == "capped_threshold":
            steps = tl.load(steps_ptr + row)
            forwards = tl.minimum(step + 1, steps)
            cap = masked_first // steps * forwards + tl.minimum(forwards, masked_first % steps)
            count = tl.minimum(count, cap - (masked_first - masked_now))
        elif RULE == "floored_threshold":
            steps = tl.load(steps_ptr + row)
            count = tl.maximum(count, block // steps + (step < block % steps).to(tl.int32))
    elif RULE == "schedule":
        share = tl.load(shares_ptr + row * shares + tl.minimum(step, shares - 1))
        count = (masked_now.to(tl.float32) * share).to(tl.int32)

    rank = tl.zeros((BLOCK,), tl.int32)
    entropies = tl.zeros((BLOCK,), tl.float64)  # of the slots before, their sum and their largest
    largest = tl.full((BLOCK,), float("-inf"), tl.float64)
    for begin in range(0, block, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        _, eligible_j, cost_j = _candidates(
            x_ptr, place_ptr, token_ptr, logit_ptr, second_ptr, lse_ptr, rest_ptr, entropy_ptr,
            j, row, start, slots, block, mask_id, position, seed, step, SCORE,
        )  # fmt: skip
        key_j = _ordered(cost_j)[:, None]  # the chunk along the first axis, which a thread holds whole
        before = (key_j < key[None, :]) | ((key_j == key[None, :]) & (j[:, None] < o[None, :]))  # [CHUNK, BLOCK]
        before = before & eligible_j[:, None]
        rank += tl.sum(before.to(tl.int32), 0)
        if RULE == "entropy_budget":
            at_j = _entry(place_ptr, row, block, j, eligible_j)
            entropy_j = tl.load(entropy_ptr + at_j, mask=eligible_j, other=0.0).to(tl.float64)[:, None]
            entropies += tl.sum(tl.where(before, entropy_j, 0.0), 0)
            largest = tl.maximum(largest, tl.max(tl.where(before, entropy_j, float("-inf")), 0))

    if RULE == "factor" or RULE == "entropy_budget":
        if RULE == "factor":
            # (n + 1) (1 - score) <= factor, times 1 + cost where cost is the odds.
            bound = (rank + 2).to(tl.float64)
            if SCORE == "confidence":
                fits = tl.where(cost == float("inf"), bound <= value, bound * cost <= value * (1 + cost))
            else:
                fits = bound * (1 + cost) <= value
            fits = fits | (rank == 0)
        else:
            at = _entry(place_ptr, row, block, o, eligible)
            entropy = tl.load(entropy_ptr + at, mask=eligible, other=0.0).to(tl.float64)
            fits = entropies + entropy - tl.maximum(largest, entropy) <= value
        count = tl.min(tl.where(eligible & (fits == 0), rank, total), 0)
        if RULE == "factor":
            count = tl.where(count == total - 1, total, count)  # the official code's last rank
    count = tl.minimum(tl.maximum(count, 0 if RULE == "schedule" else 1), total)
    chosen = eligible & (rank < count)
    remaining = masked_now - tl.sum(chosen.to(tl.int32), 0)
    broken = (tl.load(invalid_ptr + row) != 0) | (total < masked_now)
    forward = tl.load(forward_ptr + row)

    at = _entry(place_ptr, row, block, o, chosen)
    token = tl.load(token_ptr + at, mask=chosen, other=0)
    tl.debug_barrier()  # no warp writes before all have read
    odds = tl.load(rest_ptr + at, mask=chosen, other=0.0)
    tl.store(x_ptr + start + o, token, mask=chosen)
    tl.store(step_map_ptr + row * slots + start + o, tl.zeros((BLOCK,), tl.int32) + forward, mask=chosen)
    tl.store(confidence_ptr + row * slots + start + o, 1 / (1 + odds), mask=chosen)
    unfinished = (masked_now > 0).to(tl.int32)
    tl.store(masked_ptr + row, masked_first)
    tl.store(invalid_ptr + row, broken)
    tl.store(step_ptr + row, step + unfinished)
    tl.store(forward_ptr + row, forward + unfinished)

    if EOS > 0:
        ended_before = tl.load(ended_ptr + row) != 0
        tl.debug_barrier()  # the block is read as it now stands
        start = tl.load(window_start_ptr + row)  # read again rather than kept
        inside = (o < block) & (start + o >= 0) & (start + o < slots)
        text = tl.load(x_ptr + start + o, mask=inside, other=mask_id)
        eos_ptr += row * EOS
        ends = text == tl.load(eos_ptr)
        for i in tl.static_range(1, EOS):
            ends = ends | (text == tl.load(eos_ptr + i))
        ends = ends & (text >= 0) & inside & (start + o >= tl.load(prompt_end_ptr + row))
        if ENDS == "token":
            first_masked = tl.min(tl.where(text == mask_id, o, BLOCK), 0)
            ended = (masked_now > 0) & (tl.min(tl.where(ends, o, BLOCK), 0) < first_masked)
            behind_end = start
        else:
            ended = (masked_now > 0) & (remaining == 0) & (tl.max(ends.to(tl.int32), 0) > 0)
            behind_end = start + block
        remaining = tl.where(ended, 0, remaining)
        tl.store(ended_ptr + row, ended | ended_before)
        # What is masked of a row that has ended; of any other row, nothing.
        for begin in range(tl.where(ended, behind_end, slots), slots, BLOCK):
            behind = begin + o
            masked = (behind < slots) & (tl.load(x_ptr + behind, mask=behind < slots, other=0) == mask_id)
            tl.store(x_ptr + behind, tl.zeros((BLOCK,), tl.int64) + tl.load(eos_ptr), mask=masked)
    tl.store(remaining_ptr + row, remaining)


@dataclass(frozen=True)
class Config:
    """How a program holds its block.

    Attributes:
        block: slots, rounded up to a power of two.
        chunk: slots that all others are compared with at a time.
        num_warps: warps of a program.
    """

    block: int
    chunk: int
    num_warps: int


def select_config(arch: Arch, rule: str, block: int) -> Config:
    """Bounds a tile of comparisons to few a thread, and half of them where float64 sums are taken: more would spill.

    The compile report chose the numbers.
    """
    padded = triton.next_power_of_2(block)
    num_warps, a_thread = (1, 2 if arch.name == "sm_120" else 4) if padded <= 32 else (4, 2) if padded <= 128 else (8, 4)
    if arch.backend == "hip":  # which keeps the outcome of every comparison in scalar registers
        a_thread = 2
    tile = 32 * num_warps * (a_thread // 2 if rule == "entropy_budget" else a_thread)
    return Config(padded, min(padded, max(tile // padded, 1), 32), num_warps)


@once
def _check(x: Tensor, window_start: Tensor, place: Tensor | None, score: str, rule: str, ends: str, *tensors: Tensor) -> int:
    """Checks the arguments of :func:`commit_tokens`, ``tensors`` being its statistics and those of its state; a block's slots."""
    statistics = dict(zip(_ENTRIES, tensors, strict=False))
    state = dict(zip(_STATE, tensors[len(_ENTRIES) :], strict=True))
    if x.dim() != 2 or x.dtype != torch.int64 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [B, L] torch.int64 of last stride 1, got {x.dtype} {list(x.shape)} of strides {x.stride()}")
    (rows, slots), device = x.shape, x.device
    check_device("x", x)
    name, listed = ("statistics", statistics["token"]) if place is None else ("place", place)
    block = listed.shape[-1] if listed.dim() else 0
    if not 1 <= block <= min(MAX_BLOCK, slots):
        raise ValueError(f"{name} must hold 1 to {min(MAX_BLOCK, slots)} slots a row, got {list(listed.shape)}")
    if rows > MAX_ROWS:
        raise ValueError(f"x must have at most {MAX_ROWS} rows, got {rows}")
    for name, value, kind in (("score", score, ScoreName), ("rule", rule, RuleName), ("ends", ends, EndName)):
        if value not in get_args(kind):
            raise ValueError(f"state.{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    _check_tensor("window_start", window_start, torch.int32, (rows,), device)
    ids, shares = (state[name].shape[-1] if state[name].dim() else 0 for name in ("eos_ids", "shares"))
    shape: tuple[int, ...] = (rows, block)
    if place is not None:
        _check_tensor("place", place, torch.int32, shape, device)
        shape = (statistics["token"].numel(),)
    for name, field in statistics.items():
        _check_tensor(f"statistics.{name}", field, torch.int64 if name == "token" else torch.float32, shape, device)
    for names, dtype, shape in (
        (("kv_start", "prompt_end", "steps", "step", "masked", "remaining", "forward"), torch.int32, (rows,)),
        (("invalid", "ended"), torch.bool, (rows,)),
        (("seed",), torch.int64, (rows,)),
        (("value",), torch.float64, (rows,)),
        (("eos_ids",), torch.int64, (rows, ids)),
        (("shares",), torch.float32, (rows, shares)),
        (("step_map",), torch.int32, (rows, slots)),
        (("confidence",), torch.float32, (rows, slots)),
    ):
        for name in names:
            _check_tensor(f"state.{name}", state[name], dtype, shape, device)
    if ids > MAX_EOS:
        raise ValueError(f"state.eos_ids must hold at most {MAX_EOS} tokens a row, got {ids}")
    if rule == "schedule" and shares == 0:
        raise ValueError("state.shares must hold at least one share a row for the rule 'schedule', got none")
    return block


#: Names of the statistics, and of the tensors of a state.
_ENTRIES = tuple(field.name for field in fields(TokenStatistics))
_STATE = tuple(field.name for field in fields(PolicyState) if field.name not in SHARED_FIELDS)


@lru_cache(maxsize=64)
def _in_order(rows: int, block: int, device: torch.device) -> Tensor:
    """The places of statistics that are in order, ``[B, N]``: one kernel serves, and only the first call of a size makes them."""
    return torch.arange(rows * block, dtype=torch.int32, device=device).view(rows, block)


def commit_tokens(
    x: Tensor,
    statistics: TokenStatistics,
    window_start: Tensor,
    state: PolicyState,
    *,
    place: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Scores, chooses and writes in place: :func:`fastdllm_triton.reference.commit_tokens`, which states the contract.

    Unlike there, slots outside ``[0, L)`` are left alone instead of an error: where a block lies is known on the device only.

    Args:
        x: ``[B, L]`` int64, last stride 1.
        statistics: entries ``[B, N]``, contiguous, N up to 1,024; with ``place`` ``[P]``.
        window_start: ``[B]`` int32.
        state: updated in place.
        place: ``[B, N]`` int32, contiguous.
        config: launch parameters; :func:`select_config` chooses if not given.

    Raises:
        ValueError: an argument's rank, dtype, shape, device or range.
    """
    entries = outputs(statistics)
    fields_of_state = (getattr(state, name) for name in _STATE)
    block = _check(x, window_start, place, state.score, state.rule, state.ends, *entries, *fields_of_state)
    (rows, slots), device = x.shape, x.device
    if rows == 0:
        return

    config = config or select_config(arch_of(device), state.rule, block)
    with torch.cuda.device_of(x):
        _commit_tokens_kernel[(rows,)](
            x,
            _in_order(rows, block, device) if place is None else place,
            *entries,
            window_start,
            state.kv_start,
            state.seed,
            state.value,
            state.steps,
            state.shares,
            state.eos_ids,
            state.prompt_end,
            state.step,
            state.masked,
            state.remaining,
            state.invalid.view(torch.uint8),
            state.ended.view(torch.uint8),
            state.forward,
            state.step_map,
            state.confidence,
            slots,
            block,
            state.shares.shape[1],
            state.mask_id,
            x.stride(0),
            SCORE=state.score,
            RULE=state.rule,
            EOS=state.eos_ids.shape[1],
            ENDS=state.ends,
            BLOCK=config.block,
            CHUNK=config.chunk,
            num_warps=config.num_warps,
        )


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless a tensor is contiguous and what it must be."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device or not tensor.is_contiguous():
        actual = f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name} must be a contiguous {dtype} {list(shape)} on {device}, got {actual}")

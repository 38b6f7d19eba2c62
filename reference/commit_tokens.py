"""Decides which masked tokens of each row's block to commit, and writes them: the selection of a decoding step."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from ..types import PolicyState, TokenStatistics
from ._random import slot_uniform


def commit_tokens(
    x: Tensor, statistics: TokenStatistics, window_start: Tensor, state: PolicyState, *, place: Tensor | None = None
) -> None:
    """Scores the masked slots of each row's block, applies the rule, and writes the chosen tokens into ``x``.

    Masked slots are ranked by the score, ties by position. Of those, in that order, are committed (at least one but by
    ``schedule``, at most all, nothing in a row without masked slots):

    * ``quota``: with ``m`` masked slots at the block's first forward and ``S`` forwards, ``m // S``, and one more in each of
      the first ``m % S`` forwards (LLaDA, arXiv 2502.09992: ``get_num_transfer_tokens``).
    * ``threshold``: all whose score is at least the threshold (Fast-dLLM, arXiv 2505.22618, section 3.3). For the
      confidence that is ``(1 + rest) * threshold <= 1`` in float64, which stays sharp where a float32 confidence has become 1.
    * ``capped_threshold``: the same, but no more than ``quota`` would have committed by then in this block (Fast-dLLM's
      ``confidence_threshold`` for Dream without a cache). What a forward leaves of its share is for later ones.
    * ``floored_threshold``: the same as ``threshold``, but no fewer than the forward's part of an even spread of the block over
      ``S`` forwards: of ``N`` slots, masked or not, ``N // S``, and one more in each of the first ``N % S`` (SDAR, arXiv
      2510.06303: ``low_confidence_dynamic``; with an infinite threshold ``low_confidence_static``, by position ``sequential``).
    * ``factor``: the longest prefix with ``1 - score_n <= factor / (n + 1)`` for every n from 2 on. As in the official
      code, a failure at the very last rank is ignored and that token is committed too.
    * ``entropy_budget``: the longest prefix in which the entropies, less the largest, sum to at most the budget
      (EB-Sampler, arXiv 2505.24857).
    * ``schedule``: of ``m`` masked slots ``int(m * share)``, possibly none, with the forward's share of the block (Dream, arXiv
      2508.15487). The product is taken in float32 as in the official code, which decides where it falls just short of an integer.

    A row whose block this completes, and whose block then holds one of its ``state.eos_ids``, has ended: its masked slots after
    the block are filled with the first of them and no longer decoded. What is before the end token stays as it is. With
    ``state.ends = "token"`` the row has ended as soon as nothing of the block is masked before such a token (Fast-dLLM v2, arXiv
    2509.26328), and what is masked after it is filled in the block too. End tokens before ``state.prompt_end`` do not count.

    A block of one slot is committed whatever its score: the token that the last row of a forward predicts behind its window.

    The statistics of slots that are not masked are not read. A row whose masked slot has no token (``-1``) is flagged in
    ``state.invalid``; the slot is left masked.

    Args:
        x: ``[B, L]`` int64, written in place.
        statistics: entries ``[B, N]`` for the ``N`` slots of each row's block; with ``place`` in any order, ``[P]``.
        window_start: ``[B]`` int32, first slot of each row's block; the block lies inside ``[0, L)``.
        state: what to decide with; its counters and records are updated in place.
        place: ``[B, N]`` int32, which of the ``P`` entries is a slot's; a masked slot with -1 has no token.
    """
    if place is not None:
        statistics = _spread(statistics, place)
    block = statistics.token.shape[1]
    slot = window_start[:, None].long() + torch.arange(block, device=x.device)  # [B, N]
    current = x.gather(1, slot)
    masked = current == state.mask_id
    unfinished = masked.any(1)
    eligible = masked & (statistics.token >= 0)
    total = eligible.sum(1)
    state.masked.copy_(torch.where(state.step == 0, masked.sum(1), state.masked))

    # Smaller cost is better. The second, stable sort puts what may not be committed last.
    cost = _cost(statistics, slot, state)
    order = cost.argsort(dim=1, stable=True)
    order = order.gather(1, (~eligible).gather(1, order).int().argsort(dim=1, stable=True))
    count = _count(statistics, cost, order, masked.sum(1), total, state)
    count = torch.minimum(count.clamp(min=0 if state.rule == "schedule" else 1), total)

    rank = order.argsort(dim=1)
    chosen = rank < count[:, None]
    x.scatter_(1, slot, torch.where(chosen, statistics.token, current))

    state.invalid |= (masked & ~eligible).any(1)
    state.step_map.scatter_(1, slot, torch.where(chosen, state.forward[:, None], state.step_map.gather(1, slot)))
    confidence = torch.where(chosen, statistics.confidence.float(), state.confidence.gather(1, slot))
    state.confidence.scatter_(1, slot, confidence)
    state.remaining.copy_(masked.sum(1) - chosen.sum(1))

    if state.eos_ids.shape[1]:
        ids = state.eos_ids[:, None]  # [B, 1, E]
        text = x.gather(1, slot)
        ends = ((text[:, :, None] == ids) & (ids >= 0)).any(2) & (slot >= state.prompt_end[:, None])  # [B, N]
        if state.ends == "block":
            ends &= state.done[:, None]
        else:
            ends &= (text == state.mask_id).cumsum(1) == 0
        ended = unfinished & ends.any(1)
        after = torch.arange(x.shape[1], device=x.device) >= window_start[:, None]
        x.copy_(torch.where(ended[:, None] & after & (x == state.mask_id), state.eos_ids[:, :1], x))
        state.ended |= ended
        state.remaining.masked_fill_(ended, 0)

    state.step += unfinished
    state.forward += unfinished


def _spread(statistics: TokenStatistics, place: Tensor) -> TokenStatistics:
    """Entries ``[B, N]`` out of ``[P]``."""
    entries = TokenStatistics(*(getattr(statistics, field.name)[place.clamp(min=0).long()] for field in fields(statistics)))
    return replace(entries, token=torch.where(place < 0, -1, entries.token))


def _cost(statistics: TokenStatistics, slot: Tensor, state: PolicyState) -> Tensor:
    """``[B, N]``, ascending from the best slot to the worst."""
    if state.score == "confidence":
        return statistics.rest
    if state.score == "margin":  # float64: rounding must not make ties that the statistics do not have
        return -TokenStatistics(*(getattr(statistics, field.name).double() for field in fields(statistics))).margin
    if state.score == "neg_entropy":
        return statistics.entropy
    if state.score == "leftmost":
        return slot - slot[:, :1]
    return -slot_uniform(state.seed, slot - state.kv_start[:, None], state.step[:, None])


def _count(statistics: TokenStatistics, cost: Tensor, order: Tensor, masked: Tensor, total: Tensor, state: PolicyState) -> Tensor:
    """``[B]``: how many of the ranked slots the rule commits, before the bounds of one and all."""
    if state.rule == "quota":
        return state.masked // state.steps + (state.step < state.masked % state.steps)
    if state.rule == "schedule":
        step = state.step.clamp(max=state.shares.shape[1] - 1).long()
        return (masked.to(torch.float32) * state.shares.gather(1, step[:, None])[:, 0]).int()

    n = torch.arange(1, cost.shape[1] + 1, device=cost.device)  # ranks, from 1
    within, value = n <= total[:, None], state.value[:, None]
    if state.rule == "entropy_budget":
        entropy = statistics.entropy.double().gather(1, order)
        others = entropy.cumsum(1) - entropy.cummax(1).values
        fits = within & (others <= value)
        return fits.int().cumprod(1).sum(1)

    cost = cost.double().gather(1, order)
    if state.rule in (
        "threshold",
        "capped_threshold",
        "floored_threshold",
    ):  # inf * 0 is no failure: a threshold of 0 lets everything pass
        fails = (1 + cost) * value > 1 if state.score == "confidence" else cost > -value
        count = (within & ~fails).sum(1)
        if state.rule == "threshold":
            return count
        if state.rule == "floored_threshold":
            block = cost.shape[1]
            return torch.maximum(count, block // state.steps + (state.step < block % state.steps))
        committed, forwards = state.masked - masked, torch.minimum(state.step + 1, state.steps)
        cap = state.masked // state.steps * forwards + torch.minimum(forwards, state.masked % state.steps)
        return torch.minimum(count, cap - committed)

    # (n + 1) (1 - score) <= factor. The odds against a token are accurate where its probability has rounded to 1, so for the
    # confidence, where cost is the odds, both sides are multiplied by 1 + cost.
    if state.score == "confidence":
        fits = torch.where(cost == torch.inf, n + 1 <= value, (n + 1) * cost <= value * (1 + cost))
    else:
        fits = (n + 1) * (1 + cost) <= value
    fits = within & (fits | (n == 1))
    prefix = fits.int().cumprod(1).sum(1)
    return torch.where(prefix == total - 1, total, prefix)  # the official code's last rank

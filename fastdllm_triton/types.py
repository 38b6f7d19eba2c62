"""Result types shared by the kernels and their PyTorch twins. Nothing here imports either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .utils.checks import is_int, is_number, require, to_int, to_ints

#: What ranks the masked tokens of a block, best first.
ScoreName = Literal["confidence", "margin", "neg_entropy", "random"]
#: What decides how many of them are committed.
RuleName = Literal["quota", "threshold", "factor", "entropy_budget"]
#: Whose rounding points a rotation keeps, see :func:`fastdllm_triton.reference.rope_kv_write.rotate`.
RopeRounding = Literal["llada", "dream"]
#: What :func:`fastdllm_triton.reference.linear` applies to its product.
Activation = Literal["swiglu"]


@dataclass
class TokenStatistics:
    """Facts about rows of logits, one entry a row; float32 (float64 for float64 logits), natural logarithms.

    Attributes:
        token: int64. The chosen token: the largest logit (ties go to the lowest id), or the Gumbel-max sample. ``-1`` marks
            a row without a choice: it was not asked for, holds a NaN, or has no finite logit that is allowed.
        logit: the chosen token's logit.
        second_logit: the largest logit among the other allowed tokens.
        logsumexp: ``log(sum(exp(logits)))``.
        rest: ``sum(exp(logits - logit))`` over the other tokens: the odds against the chosen token. Rank by this and not
            by :attr:`confidence`, which in float32 saturates at 1 and makes ties that the logits do not have.
        entropy: of the softmax, in nats.
    """

    token: Tensor
    logit: Tensor
    second_logit: Tensor
    logsumexp: Tensor
    rest: Tensor
    entropy: Tensor

    @property
    def confidence(self) -> Tensor:
        """Probability of the chosen token, ``1 / (1 + rest)``."""
        return 1 / (1 + self.rest)

    @property
    def margin(self) -> Tensor:
        """Probability of the chosen token less that of the best other one (negative if a sample was not the best)."""
        found = self.token >= 0
        gap = torch.where(found, self.second_logit - self.logit, 0)
        # The probability of the better of the two times one minus their ratio: neither overflows.
        larger = torch.where(gap > 0, torch.exp(self.second_logit - self.logsumexp), self.confidence)
        return torch.where(found, torch.copysign(torch.expm1(-gap.abs()) * larger, -gap), 0)

    @property
    def neg_entropy(self) -> Tensor:
        """Minus the entropy: larger is surer."""
        return -self.entropy

    def view(self, *shape: int) -> TokenStatistics:
        """The same entries in another shape, sharing memory."""
        return TokenStatistics(*(getattr(self, field.name).view(*shape) for field in fields(self)))

    def copy_(self, other: TokenStatistics) -> TokenStatistics:
        """Overwrites every entry, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))
        return self


@dataclass(frozen=True)
class WindowInputs:
    """What :func:`window_inputs` tells a forward. ``B`` rows, windows of ``W`` slots, blocks of ``N``, ``P`` predictions.

    Attributes:
        ids: ``[B, W]`` int64, the window's tokens.
        start: ``[B]`` int32, its first slot in each row.
        rows: ``[P]`` int64, the hidden state behind each prediction, a row of ``[B W, E]``; -1 is none.
        place: ``[B, N]`` int32, which prediction is that of a slot; -1 is none.
        keys: ``[3, P]`` int64, seed, position and step of each prediction's noise; ``[3, 0]`` where none was asked for.
    """

    ids: Tensor
    start: Tensor
    rows: Tensor
    place: Tensor
    keys: Tensor


@dataclass
class PolicyState:
    """What :func:`commit_tokens` decides with and what it records; lives on the device for a whole generation.

    Slots are columns of ``x``; ``B`` rows, ``L`` slots.

    Attributes:
        score: what ranks the masked tokens of a block.
        rule: how many of them are committed.
        value: 0-d float64: the threshold, the factor, or the entropy budget in nats (not read by ``quota``).
        steps: 0-d int32: forwards a block is spread over (``quota`` only).
        mask_id: the token that marks a masked slot.
        eos_ids: ``[E]`` int64, tokens that end a row; none to decode every block whatever is in it.
        kv_start: ``[B]`` int32, the slot of position 0.
        seed: ``[B]`` int64, key of every random number of a row.
        step: ``[B]`` int32, forwards in which the row's block had something masked. The engine sets it to 0 when a block
            begins; a commit counts it up.
        masked: ``[B]`` int32, masked slots of the block before its first forward; set by the commit at ``step == 0``.
        remaining: ``[B]`` int32, masked slots left in the block after the commit.
        invalid: ``[B]`` bool, set and kept once a masked slot had no token to commit (NaN logits).
        ended: ``[B]`` bool, set and kept once a finished block of the row holds one of ``eos_ids``.
        forward: 0-d int32, index of the current forward. Every commit counts it up.
        step_map: ``[B, L]`` int32, index of the forward that committed each slot; ``-1`` where none did.
        confidence: ``[B, L]`` float32, probability of the committed token at that forward; NaN where none was.
    """

    score: ScoreName
    rule: RuleName
    value: Tensor
    steps: Tensor
    mask_id: int
    eos_ids: Tensor
    kv_start: Tensor
    seed: Tensor
    step: Tensor
    masked: Tensor
    remaining: Tensor
    invalid: Tensor
    ended: Tensor
    forward: Tensor
    step_map: Tensor
    confidence: Tensor

    @property
    def done(self) -> Tensor:
        """``[B]`` bool: whether nothing is left in the row's block."""
        return self.remaining == 0

    @property
    def by_row(self) -> dict[str, Tensor]:
        """The fields with one entry (or line) a row."""
        names = ("kv_start", "seed", "step", "masked", "remaining", "invalid", "ended", "step_map", "confidence")
        return {name: getattr(self, name) for name in names}

    def rows(self, first: int, last: int) -> PolicyState:
        """The state of the rows ``[first, last)``, sharing memory."""
        changes: dict[str, Any] = {name: tensor[first:last] for name, tensor in self.by_row.items()}
        return replace(self, **changes)

    @classmethod
    def create(
        cls,
        score: ScoreName,
        rule: RuleName,
        *,
        value: float = 0.0,
        steps: int = 1,
        mask_id: int,
        kv_start: Tensor,
        seed: Tensor,
        slots: int,
        eos_ids: Sequence[int] = (),
    ) -> PolicyState:
        """The state before the first forward, on the device of ``kv_start``.

        Args:
            score, rule, value, steps, mask_id, eos_ids: as the attributes.
            kv_start: ``[B]`` int32.
            seed: ``[B]`` int64.
            slots: ``L``.

        Raises:
            ValueError: an argument is not valid.
        """
        for name, choice, kind in (("score", score, ScoreName), ("rule", rule, RuleName)):
            require(name, choice, f"one of {', '.join(get_args(kind))}", choice in get_args(kind))
        require("value", value, "a number or inf", is_number(value) or value == float("inf"))
        for name, number, least in (("steps", steps, 1), ("slots", slots, 1), ("mask_id", mask_id, 0)):
            require(name, number, f"an integer of {least} or more", is_int(number) and number >= least)
        eos_ids = to_ints("eos_ids", eos_ids, "a sequence of token ids")
        if kv_start.dim() != 1 or seed.shape != kv_start.shape:
            raise ValueError(f"kv_start and seed must be of shape [B], got {list(kv_start.shape)} and {list(seed.shape)}")
        rows, device = len(kv_start), kv_start.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            score=score,
            rule=rule,
            value=torch.tensor(value, dtype=torch.float64, device=device),
            steps=torch.tensor(steps, dtype=torch.int32, device=device),
            mask_id=to_int(mask_id),
            eos_ids=torch.tensor(eos_ids, dtype=torch.int64, device=device),
            kv_start=kv_start,
            seed=seed,
            step=zeros(rows),
            masked=zeros(rows),
            remaining=zeros(rows),
            invalid=zeros(rows, dtype=torch.bool),
            ended=zeros(rows, dtype=torch.bool),
            forward=zeros(),
            step_map=zeros(rows, to_int(slots)) - 1,
            confidence=torch.full((rows, to_int(slots)), torch.nan, device=device),
        )

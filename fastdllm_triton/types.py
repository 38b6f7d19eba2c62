"""Result types shared by the kernels and their PyTorch twins. Nothing here imports either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .utils.checks import is_int, is_number, require, to_int, to_ints

#: What ranks the masked tokens of a block, best first.
ScoreName = Literal["confidence", "margin", "neg_entropy", "random", "leftmost"]
#: What decides how many of them are committed.
RuleName = Literal["quota", "threshold", "capped_threshold", "floored_threshold", "factor", "entropy_budget", "schedule"]
#: When a row ends: with the first block that is complete and holds an end token, or as soon as nothing is masked before one.
EndName = Literal["block", "token"]
#: Whose rounding points a rotation keeps, see :func:`fastdllm_triton.reference.rope_kv_write.rotate`.
RopeRounding = Literal["llada", "dream"]
#: Whose rounding points the norms of q and k keep, see :func:`fastdllm_triton.reference.rope_kv_write.head_norm`.
NormRounding = Literal["qwen3", "flash_attn"]
#: What :func:`fastdllm_triton.reference.linear` applies to its product.
Activation = Literal["swiglu"]


@dataclass(frozen=True)
class LaunchOptions:
    """How kernels are launched. Results differ in their last bits at most.

    Attributes:
        pdl: a kernel may be launched before its predecessor has ended (programmatic dependent launch), where the GPU can do that.
        batch_invariant: launch parameters follow the shape of the model alone, so that the bits of a row's result do not depend
            on what it is batched with. Fast parameters follow the batch: more rows, other tiles, another order of summation.
            These read weights more often and fill a GPU less well.
        fuse_linear: ``linear`` is one kernel with what stands around it for every product of few rows, measured to be faster
            than the library or not.
    """

    pdl: bool = True
    batch_invariant: bool = False
    fuse_linear: bool = False


#: What launchers do if not told otherwise.
DEFAULT_LAUNCH = LaunchOptions()


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
        has_token = self.token >= 0
        gap = torch.where(has_token, self.second_logit - self.logit, 0)
        # The probability of the better of the two times one minus their ratio: neither overflows.
        larger = torch.where(gap > 0, torch.exp(self.second_logit - self.logsumexp), self.confidence)
        return torch.where(has_token, torch.copysign(torch.expm1(-gap.abs()) * larger, -gap), 0)

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
        batch_row: ``[P]`` int64, the row of the batch that each prediction is for, to gather what differs between rows; 0 where
            there is none.
    """

    ids: Tensor
    start: Tensor
    rows: Tensor
    place: Tensor
    keys: Tensor
    batch_row: Tensor


#: Fields of a :class:`PolicyState` that all rows share, and that a program has fixed.
SHARED_FIELDS = ("score", "rule", "mask_id", "ends")


@dataclass
class PolicyState:
    """What :func:`commit_tokens` decides with and what it records; lives on the device for a whole generation.

    Slots are columns of ``x``; ``B`` rows, ``L`` slots.

    Attributes:
        score: what ranks the masked tokens of a block.
        rule: how many of them are committed.
        value: ``[B]`` float64: the threshold, the factor, or the entropy budget in nats (not read by ``quota`` and ``schedule``).
        steps: ``[B]`` int32: forwards a block is spread over (``quota``, ``capped_threshold`` and ``floored_threshold`` only).
        shares: ``[B, S]`` float32: the share of the masked slots that each forward of a block commits; forwards beyond the last
            take the last one (``schedule`` only, ``S = 0`` for other rules).
        mask_id: the token that marks a masked slot.
        eos_ids: ``[B, E]`` int64, tokens that end the row, padded with -1; the first of them fills what is masked after an end. A
            row of nothing but -1 is decoded to its last block whatever is in it.
        ends: when an end token ends a row.
        prompt_end: ``[B]`` int32, the slot from which on end tokens count: those of a prompt that reaches into a block do not.
        kv_start: ``[B]`` int32, the slot of position 0.
        seed: ``[B]`` int64, key of every random number of a row.
        step: ``[B]`` int32, forwards in which the row's block had something masked. The engine sets it to 0 when a block
            begins; a commit counts it up.
        masked: ``[B]`` int32, masked slots of the block before its first forward; set by the commit at ``step == 0``.
        remaining: ``[B]`` int32, masked slots left in the block after the commit.
        invalid: ``[B]`` bool, set and kept once a masked slot had no token to commit (NaN logits).
        ended: ``[B]`` bool, set and kept once the row has ended.
        forward: ``[B]`` int32, forwards in which the row's block had something masked, over all blocks. A commit counts it up.
        step_map: ``[B, L]`` int32, which of these forwards committed each slot, from 0; ``-1`` where none did.
        confidence: ``[B, L]`` float32, probability of the committed token at that forward; NaN where none was.
    """

    score: ScoreName
    rule: RuleName
    value: Tensor
    steps: Tensor
    shares: Tensor
    mask_id: int
    eos_ids: Tensor
    ends: EndName
    prompt_end: Tensor
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
        """The tensors: all have one entry (or line) a row."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in SHARED_FIELDS}

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
        value: float | Sequence[float] | Tensor = 0.0,
        steps: int | Sequence[int] | Tensor = 1,
        shares: Sequence[float] | Tensor | None = None,
        mask_id: int,
        kv_start: Tensor,
        seed: Tensor,
        slots: int,
        eos_ids: Sequence[int] | Tensor = (),
        ends: EndName = "block",
        prompt_end: int | Sequence[int] | Tensor = 0,
    ) -> PolicyState:
        """The state before the first forward, on the device of ``kv_start``.

        Args:
            score, rule, mask_id, ends: as the attributes.
            value, steps, prompt_end: one for all rows, or one a row.
            shares: ``[S]`` for all rows, or ``[B, S]``; needed for ``schedule``, and for no other rule.
            kv_start: ``[B]`` int32.
            seed: ``[B]`` int64.
            slots: ``L``.
            eos_ids: ``[E]`` for all rows, or a tensor ``[B, E]``.

        Raises:
            ValueError: an argument is not valid.
        """
        for name, choice, kind in (("score", score, ScoreName), ("rule", rule, RuleName), ("ends", ends, EndName)):
            require(name, choice, f"one of {', '.join(get_args(kind))}", choice in get_args(kind))
        for name, number, least in (("slots", slots, 1), ("mask_id", mask_id, 0)):
            require(name, number, f"an integer of {least} or more", is_int(number) and number >= least)
        if kv_start.dim() != 1 or seed.shape != kv_start.shape:
            raise ValueError(f"kv_start and seed must be of shape [B], got {list(kv_start.shape)} and {list(seed.shape)}")
        rows, device = len(kv_start), kv_start.device
        if not (isinstance(eos_ids, Tensor) and eos_ids.dim() == 2):
            ids = to_ints("eos_ids", eos_ids, "a sequence of token ids, or a tensor [B, E]")
            eos_ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        require("shares", shares, "there for the rule 'schedule', and for no other", (shares is not None) == (rule == "schedule"))
        shares = shares if isinstance(shares, Tensor) else torch.tensor(shares or (), dtype=torch.float32, device="cpu")
        require("shares", list(shares.shape), "of shape [S] or [B, S], S of 1 or more", rule != "schedule" or shares.numel() > 0)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            score=score,
            rule=rule,
            value=_by_row("value", _numbers("value", value), torch.float64, rows, device),
            steps=_by_row("steps", _counts("steps", steps), torch.int32, rows, device),
            shares=_by_row("shares", shares, torch.float32, rows, device, dim=2),
            mask_id=to_int(mask_id),
            eos_ids=_by_row("eos_ids", eos_ids, torch.int64, rows, device, dim=2),
            ends=ends,
            prompt_end=_by_row("prompt_end", _slots("prompt_end", prompt_end), torch.int32, rows, device),
            kv_start=kv_start,
            seed=seed,
            step=zeros(rows),
            masked=zeros(rows),
            remaining=zeros(rows),
            invalid=zeros(rows, dtype=torch.bool),
            ended=zeros(rows, dtype=torch.bool),
            forward=zeros(rows),
            step_map=zeros(rows, to_int(slots)) - 1,
            confidence=torch.full((rows, to_int(slots)), torch.nan, device=device),
        )


def _entries(value: Any) -> list[Any]:
    """One value for all rows, or one a row, as a list; the numbers of a tensor with a dimension are not read."""
    if isinstance(value, Tensor) and value.dim():
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _numbers(name: str, value: Any) -> Any:
    """The value, checked."""
    ok = all(is_number(entry) or entry == float("inf") for entry in _entries(value))
    require(name, value, "a number or inf, or one a row", ok)
    return value


def _counts(name: str, value: Any) -> Any:
    """The value, checked."""
    require(name, value, "an integer of 1 or more, or one a row", all(is_int(entry) and entry >= 1 for entry in _entries(value)))
    return value


def _slots(name: str, value: Any) -> Any:
    """The value, checked."""
    require(name, value, "an integer, or one a row", all(map(is_int, _entries(value))))
    return value


def _by_row(name: str, value: Any, dtype: torch.dtype, rows: int, device: torch.device, dim: int = 1) -> Tensor:
    """A tensor of its own, with an entry (or line) a row, from one that may be the same for all rows."""
    tensor = torch.as_tensor(value, dtype=dtype, device=device)
    fits = tensor.dim() == dim - 1 or (tensor.dim() == dim and len(tensor) == rows)
    require(name, list(tensor.shape), f"one for all rows, or one for each of the {rows}", fits)
    return tensor.expand(rows, *tensor.shape[tensor.dim() - dim + 1 :]).clone(memory_format=torch.contiguous_format)

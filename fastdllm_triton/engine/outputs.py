"""What a generation made, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class Committed(NamedTuple):
    """A token that a forward committed.

    Attributes:
        row: of the batch.
        position: within the generation, from 0.
        token: its id.
        confidence: the model's probability of it at that forward.
    """

    row: int
    position: int
    token: int
    confidence: float


@dataclass(frozen=True)
class StepOutput:
    """What a step of the engine did for a request. A value: it stays as it is.

    Attributes:
        request_id: the request.
        block: the block that it stood at, from 0; None if it had nothing to decode.
        forwards: of the request in this step: a refresh, a step, or one behind the other.
        committed: tokens that these forwards committed, from left to right; ``row`` is 0.
        finished: whether the request is over.
        error: what stopped it, if something did.
    """

    request_id: int | str
    block: int | None
    forwards: int
    committed: tuple[Committed, ...]
    finished: bool
    error: Exception | None = None


class RowRecord(NamedTuple):
    """A row of the batch at the end of its request; ``L`` tokens of prompt and generation.

    Attributes:
        tokens: ``[L]`` int64.
        step_map: ``[L]`` int32, the row's own forward that committed each token, from 0; ``-1`` where none did.
        confidence: ``[L]`` float32, NaN where no forward committed.
    """

    tokens: Tensor
    step_map: Tensor
    confidence: Tensor


@dataclass
class GenerationOutput:
    """What a generation made, and how. ``B`` rows, ``G = gen_length``, ``L`` slots.

    Attributes:
        sequences: ``[B, L]`` int64: left padding, prompt, and in the last ``G`` columns the generation.
        gen_length: ``G``.
        refreshes: forwards over the whole sequence that rebuilt the cache, one a block at least.
        steps: the other forwards.
        row_forwards: ``[B]`` int32: forwards in which the row still had something to decode.
        step_map: ``[B, G]`` int32: index of the forward that committed each token; ``-1`` for what was fixed from the start,
            and for what was filled in after EOS.
        confidence: ``[B, G]`` float32: the model's probability of each token at that forward; NaN where there was none.
        seconds: wall time, from the first forward to the last.
        eos_ids: the end tokens that were in force.
        tokenizer: what :attr:`texts` decodes with, or None.
        starts: of an infilling, the column at which each row begins: its ids and its text are those of the whole row.
    """

    sequences: Tensor
    gen_length: int
    refreshes: int
    steps: int
    row_forwards: Tensor
    step_map: Tensor
    confidence: Tensor
    seconds: float
    eos_ids: tuple[int, ...]
    tokenizer: object | None = None
    starts: tuple[int, ...] | None = None

    @property
    def nfe(self) -> int:
        """Forwards of the batch."""
        return self.refreshes + self.steps

    @property
    def generated(self) -> Tensor:
        """``[B, G]``: the last ``G`` columns of :attr:`sequences`."""
        return self.sequences[:, -self.gen_length :]

    @property
    def committed(self) -> int:
        """Tokens that forwards decided, over all rows: not those that were fixed, nor those filled in after EOS."""
        return int((self.step_map >= 0).sum())

    @property
    def tokens_per_forward(self) -> float:
        """Tokens committed in a row by a forward that the row took part in, on average."""
        return self.committed / max(int(self.row_forwards.sum()), 1)

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens of all rows over the wall time."""
        return self.committed / self.seconds if self.seconds else math.inf

    def ids(self, row: int) -> list[int]:
        """The generated ids of a row, cut before the first end token; of an infilling, the whole row."""
        if self.starts is not None:
            whole: list[int] = self.sequences[row, self.starts[row] :].tolist()
            return whole
        ids: list[int] = self.generated[row].tolist()
        return ids[: next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))]

    @cached_property
    def texts(self) -> list[str]:
        """The generated text of each row, up to its first end token; of an infilling, the text of the whole row.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; use ids(row)")
        return [self.tokenizer.decode(self.ids(row), skip_special_tokens=True) for row in range(len(self.sequences))]  # type: ignore[attr-defined]

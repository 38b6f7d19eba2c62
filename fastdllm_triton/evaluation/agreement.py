"""What a cache changes in the text: a generation against the same one without a cache, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

import numpy as np

from ..decoding.config import GenerationConfig
from ..engine.outputs import GenerationOutput
from ..model import MaskedDiffusionLM
from .statistics import ratio_interval, wilson
from .summary import Record, rounded


def decode(
    model: MaskedDiffusionLM, prompts: Sequence[Sequence[int]], config: GenerationConfig, batch_size: int
) -> list[GenerationOutput]:
    """Outputs of batches of prompts, in order."""
    return [model.generate(prompts[i : i + batch_size], config) for i in range(0, len(prompts), batch_size)]


def answers(outputs: Sequence[GenerationOutput]) -> list[list[int]]:
    """The ids of each row up to its end token, that one included."""
    return [
        output.generated[row, : len(output.ids(row)) + 1].tolist() for output in outputs for row in range(len(output.sequences))
    ]


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first slot in which two answers differ, from 0; None if they are the same."""
    for slot, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return slot
    return None if len(one) == len(other) else min(len(one), len(other))


def agreement(exact: Sequence[Sequence[int]], outputs: Sequence[GenerationOutput]) -> Record:
    """How far answers agree with those of ``exact`` decoding, the end token included.

    ``same`` is the share of answers that are the same, with its Wilson interval; ``token_agreement`` the share of slots, up to
    the end of the longer answer, that hold the same token, with a bootstrap interval over prompts; ``first_divergence`` the
    slot of each prompt, or None; ``same_up_to[i]`` the share of prompts whose first ``i`` slots are the same.
    """
    rows = answers(outputs)
    n = len(rows)
    pairs = list(zip(exact, rows, strict=True))
    first = [first_divergence(one, other) for one, other in pairs]
    longest = np.array([max(len(one), len(other)) for one, other in pairs], dtype=np.float64)
    alike = np.array([sum(map(eq, one, other)) for one, other in pairs], dtype=np.float64)
    forwards = sum(int(output.row_forwards.sum()) for output in outputs)
    same = sum(slot is None for slot in first)
    length = outputs[0].gen_length
    return {
        "n": n,
        "same": rounded(same / n),
        "same_ci": rounded(wilson(same, n)),
        "token_agreement": rounded(float(alike.sum() / longest.sum())),
        "token_agreement_ci": rounded(ratio_interval(alike, longest)),
        "first_divergence": first,
        "same_up_to": rounded([sum(slot is None or slot >= i for slot in first) / n for i in range(length + 1)]),
        "tokens_per_forward": rounded(sum(output.committed for output in outputs) / forwards),
        "nfe": rounded(forwards / n),
    }

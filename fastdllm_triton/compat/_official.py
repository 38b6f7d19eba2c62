"""What the official functions of several projects have in common."""

from __future__ import annotations

import torch

from ..types import ScoreName

#: The official names of what ranks tokens.
_SCORES: dict[str, ScoreName] = {"low_confidence": "confidence", "random": "random"}


def score_of(remasking: str) -> ScoreName:
    """Our name for a way of ``remasking``.

    Raises:
        ValueError: there is no such way.
    """
    if remasking not in _SCORES:
        raise ValueError(f"remasking must be one of {', '.join(_SCORES)}, got {remasking!r}")
    return _SCORES[remasking]


def seed_of(temperature: float, score: ScoreName) -> int:
    """A seed from torch's global generator, which is left alone where nothing is drawn."""
    return int(torch.randint(2**62, ())) if temperature > 0 or score == "random" else 0

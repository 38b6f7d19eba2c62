"""The rounding of logits that official code does before it decides anything."""

from __future__ import annotations

import torch

from ..model import MaskedDiffusionLM


def logits_dtype(model: MaskedDiffusionLM) -> torch.dtype | None:
    """The dtype that logits are rounded to: the official code decides on logits in the model's."""
    return None if model.dtype in (torch.float32, torch.float64) else model.dtype

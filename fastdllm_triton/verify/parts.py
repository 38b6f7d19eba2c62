"""What a verification consists of: an op in a dtype, or a check of whole models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .cases import OPS
from .models import DTYPE, MODEL_CHECKS, verify_model
from .ops import dtypes_of, verify_op
from .records import Record

#: Besides the ops, what can be verified.
MODELS = "models"


@dataclass(frozen=True)
class Part:
    """What gives one record.

    Attributes:
        name: an op, or ``models``.
        what: a dtype of the op, or a check of models.
    """

    name: str
    what: str

    @property
    def key(self) -> tuple[str, str]:
        return (self.what, DTYPE) if self.name == MODELS else (self.name, self.what)

    def run(self, device: torch.device, *, quick: bool) -> Record:
        if self.name == MODELS:
            return verify_model(self.what, device, quick=quick)
        return verify_op(self.name, self.what, device, quick=quick)


def names() -> list[str]:
    """What can be verified: the ops in the order of a forward, and ``models``."""
    return [*OPS, MODELS]


def parts_of(chosen: Iterable[str]) -> list[Part]:
    return [Part(name, what) for name in chosen for what in (MODEL_CHECKS if name == MODELS else dtypes_of(name))]


def unproven(chosen: Sequence[str], records: Iterable[Record]) -> list[str]:
    """Of names those of which a part did not hold, or was not tried."""
    held = {record.key for record in records if record.ok}
    return list(dict.fromkeys(part.name for part in parts_of(chosen) if part.key not in held))

"""Environment variables that switch off what a new machine may not bear."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Attributes:
        name: of it.
        allowed: its values; the first is the default.
        meaning: what it does.
    """

    name: str
    allowed: tuple[str, ...]
    meaning: str

    @property
    def value(self) -> str:
        """What it is set to, or the default.

        Raises:
            ValueError: it is set to something else than is allowed.
        """
        value = os.environ.get(self.name, self.allowed[0])
        if value not in self.allowed:
            raise ValueError(f"{self.name} must be one of {', '.join(self.allowed)}, got {value!r}")
        return value


BACKEND = Variable("FASTDLLM_BACKEND", ("auto", "triton", "cpu", "reference"), "what the backend auto takes")
GRAPHS = Variable("FASTDLLM_GRAPHS", ("1", "0"), "0 runs every forward without CUDA graphs")
PDL = Variable("FASTDLLM_PDL", ("1", "0"), "0 launches kernels without programmatic dependent launch (sm_90 and newer)")

VARIABLES = (BACKEND, GRAPHS, PDL)


def check() -> None:
    """Reads all of them, so that a typing error is told before any work.

    Raises:
        ValueError: one is set to something that is not allowed.
    """
    for variable in VARIABLES:
        _ = variable.value

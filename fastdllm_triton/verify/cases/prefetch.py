"""The cases of prefetch, which computes nothing: what it is timed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import prefetch as kernels
from ...kernels.linear import linear
from ._base import CASE_MODELS, Function, Inputs, OpCases, Random
from .linear import PROJECTIONS
from .rms_norm import RMS_NORM
from .window_attention import WINDOW_ATTENTION


def _make(random: Random, model: str, slots: int, before: str, n: int, k: int) -> Inputs:
    attention = WINDOW_ATTENTION.make(random, model=model, batch=1, window=32, slots=slots)
    x, weight = random(32, k), random(n, k, scale=k**-0.5)
    return {"attention": attention, "x": x, "norm": torch.ones_like(x[0]), "weight": weight, "before": before}


def ahead_of_a_product(
    attention: Inputs, x: Tensor, norm: Tensor, weight: Tensor, before: str, size: int = 0, **options: Any
) -> Tensor:
    """What stands in front of a product in a layer, and the product, with ``size`` bytes of its weight asked for meanwhile."""
    ahead = kernels.Prefetch(x.device, size)
    ahead(weight)
    before_it = WINDOW_ATTENTION.kernel(**attention).view(32, -1) if before == "attention" else RMS_NORM.kernel(x, norm, 1e-5)
    y = linear(before_it, weight)
    ahead.join()
    return y


class _Prefetch(OpCases):
    """A layer's part in the place of an op."""

    @property
    def kernel(self) -> Function:
        return ahead_of_a_product

    reference = kernel

    @property
    def launched(self) -> Function:
        return lambda weight, **others: kernels.launch(weight, weight.nbytes)


_SMALL: dict[str, Any] = {"model": "dream", "slots": 64, "before": "norm", "n": 1024, "k": 2048}
PREFETCH = _Prefetch(
    "prefetch",
    [],
    _make,
    shapes=[
        {"model": model, "slots": 1024, "before": before, "n": n, "k": k}
        for model in CASE_MODELS
        for before, part in (("attention", "out"), ("norm", "gate_up"), ("norm", "qkv"))
        for n, k in (PROJECTIONS[f"{model} {part}"][:2],)
    ],
    key=[],
    small=_SMALL,
    axis="n",
    bytes=lambda shape: 2 * shape["n"] * shape["k"],
    float64=False,
    # A 16-bit weight, on NVIDIA, whose instruction it is.
    compiled=lambda arch: [(torch.bfloat16, _SMALL, None)] if arch.backend == "cuda" else [],
)

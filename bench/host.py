"""What a forward costs the host: microseconds in the launchers, with every launch replaced by nothing. Needs no GPU.

    fastdllm-triton bench host

A refresh runs op by op, so where its kernels take less time than their launchers, the GPU waits for Python. The tensors are on
the meta device, where they have shapes and no data. Not counted: Triton's own launch (some 10 us), cuBLAS, the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor

from fastdllm_triton.bench._models import config_of, prompt_of
from fastdllm_triton.bench.bench_step import OurStep
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.models.transformer import Transformer, Weights
from fastdllm_triton.tools.recorder import META, launchers, recorded

#: Each op is timed this often, and the best is reported: what it takes when nothing else runs.
REPEATS = 20


class _NoLaunch:
    """A kernel that does nothing, whatever the grid."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def no_launches() -> Iterator[None]:
    """Lets launchers take tensors on the meta device and launch nothing."""
    with recorded(ARCHS["sm_90"], stand_in=lambda kernel: _NoLaunch()), patch("torch.nn.functional.linear", _product_of_nothing):
        yield


_PRODUCTS: dict[tuple[torch.Size, torch.Size], Tensor] = {}


def _product_of_nothing(x: Tensor, weight: Tensor) -> Tensor:
    """Stands for cuBLAS, whose own time is not ours."""
    key = x.shape, weight.shape
    if key not in _PRODUCTS:
        _PRODUCTS[key] = x.new_empty(*x.shape[:-1], len(weight))
    return _PRODUCTS[key]


def microseconds(model: str = "llada-8b", prompt: int = 268, *, refresh: bool = True) -> dict[str, float]:
    """Microseconds that one forward spends in the launchers of each op.

    Args:
        model: a key of :data:`fastdllm_triton.bench._models.MODELS`.
        prompt: tokens, before a block of 32.
        refresh: time a refresh; if not, a step.
    """
    config, length = config_of(model), 32
    seconds: dict[str, float] = {}

    def timed(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[op] = seconds.get(op, 0.0) + time.perf_counter() - begin
            return result

        return call

    best: dict[str, float] = {}
    with no_launches():
        backend = launchers(timed, fuses_residual=lambda x, weight: False)
        network = Transformer(config, Weights.allocate(config, META, torch.bfloat16), backend)
        forwards = OurStep(network, prompt_of(model, 1, prompt + length, torch.device("cpu")), length)
        for _ in range(REPEATS):
            seconds.clear()
            forwards.refresh() if refresh else forwards.step()
            best = {op: min(1e6 * time_, best.get(op, float("inf"))) for op, time_ in seconds.items()}
    return best


def table() -> Table:
    model = "llada-8b"
    table = Table(title=f"Host time of a forward of {model}, launches replaced by nothing")
    for name in ("op", "refresh, us", "step, us"):
        table.add_column(name, justify="left" if name == "op" else "right")
    refresh, step = microseconds(model), microseconds(model, refresh=False)
    for op in refresh:
        table.add_row(op, f"{refresh[op]:,.0f}", f"{step[op]:,.0f}")
    table.add_section()
    table.add_row("all", f"{sum(refresh.values()):,.0f}", f"{sum(step.values()):,.0f}")
    return table

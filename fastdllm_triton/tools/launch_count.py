"""Counts the kernels of a decoding step without a GPU.

The engine's own step runs once with the kernels' launchers on the meta device, where tensors have shapes and no data. What they
launch is counted, and every call of PyTorch that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..decoding.config import GenerationConfig
from ..engine.request import batch_requests
from ..engine.runner import ModelRunner
from ..models.config import ModelConfig
from ..models.transformer import Transformer, Weights
from ..types import LaunchOptions

if TYPE_CHECKING:
    from ..kernels._arch import Arch

#: Calls that return memory or a view of it and launch nothing.
_FREE = frozenset(
    "empty empty_like new_empty view unsafe_view alias detach expand permute slice select split t unbind unsqueeze".split()  # noqa: SIM905
)


def name_of(func: Any) -> str:
    """What an operator of PyTorch is called, such as ``add``."""
    return str(func).removeprefix("aten.").split(".")[0].lstrip("_")


def is_free(func: Any) -> bool:
    """Whether an operator of PyTorch launches nothing."""
    return name_of(func) in _FREE


@dataclass(frozen=True)
class Launches:
    """Kernels by what launches them.

    Attributes:
        layer: of one layer.
        around: of a step outside the layers: its inputs, the last norm, statistics, commit.
        layers: number of layers.
    """

    layer: Counter[str]
    around: Counter[str]
    layers: int

    @property
    def per_layer(self) -> int:
        return self.layer.total()

    @property
    def per_step(self) -> int:
        return self.layers * self.per_layer + self.around.total()


def count_launches(
    model: ModelConfig,
    *,
    arch: str = "sm_90",
    gpu: str | None = None,
    fused: bool = False,
    rows: int = 1,
    block_length: int = 32,
    slots: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
) -> Launches:
    """Launches of a step over the dual cache.

    Args:
        model: its shape.
        arch: what the kernels' configs are chosen for, such as ``"sm_90"``.
        gpu: name of a GPU, as its driver gives it, whose committed measurements decide which products are fused with what
            stands around them; none: the library multiplies.
        fused: count as if all products were fused.
        rows, block_length, slots: of the batch.
        dtype: of the model.

    Raises:
        ValueError: the architecture is unknown.
        RuntimeError: Triton is not installed.
    """
    try:
        from ..kernels._arch import ARCHS
    except ImportError as error:
        raise RuntimeError(f"counting launches needs triton: {error}") from None
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    one, two = (
        _count(replace(model, layers=layers), ARCHS[arch], gpu, fused, (rows, block_length, slots), dtype) for layers in (2, 3)
    )
    layer = two - one
    twice = Counter({name: 2 * times for name, times in layer.items()})
    return Launches(layer, one - twice, model.layers)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what PyTorch computes, for the op that asks for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.op: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        # On a GPU the library's product of the head is float32 without a conversion.
        if name not in _FREE and (self.op, name) != ("head_statistics", "to_copy"):
            self.counts[self.op or f"torch {name}"] += 1
        return func(*args, **(kwargs or {}))


def _count(
    model: ModelConfig, arch: Arch, gpu: str | None, fused: bool, sizes: tuple[int, int, int], dtype: torch.dtype
) -> Counter[str]:
    from ..kernels.linear import fuses_residual
    from .recorder import META, launchers, recorded

    (rows, length, slots), calls, options = sizes, _Calls(), LaunchOptions(fuse_linear=fused)
    with recorded(arch, gpu) as launches, calls:

        def counted(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.op, before = op, len(launches)
                result = function(*args, **kwargs, **({"options": options} if op == "linear" else {}))
                calls.counts[op] += len(launches) - before
                calls.op = None
                return result

            return call

        ops = launchers(counted, partial(fuses_residual, options=options))
        network = Transformer(model, Weights.allocate(model, META, dtype), ops)
        config = GenerationConfig(gen_length=length, block_length=length)
        requests = batch_requests([[1]] * rows, None, config, model)
        runner = ModelRunner(network, rows, slots)
        program = runner.program_of(requests, requests)
        window = len(requests[0].policy.step(requests[0].block_state))
        for _ in range(2):  # the first one also makes what is kept
            calls.counts.clear()
            runner.run(network, runner.step_shape(program, 0, rows, window, rows * length))
    return calls.counts

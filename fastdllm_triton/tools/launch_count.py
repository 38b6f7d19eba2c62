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


class ComputingCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports every call of PyTorch that computes, by the operator's name, such as ``add``."""

    def __init__(self, on_call: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_call = on_call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0].lstrip("_")
        if name not in _FREE:
            self.on_call(name)
        return func(*args, **(kwargs or {}))


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
    block_length: int | None = None,
    slots: int = 1024,
) -> Launches:
    """Launches of a step over the model's default cache: dual, or block-causal.

    Args:
        model: its shape, in bfloat16.
        arch: what the kernels' configs are chosen for, such as ``"sm_90"``.
        gpu: name of a GPU, as its driver gives it, whose committed measurements decide which products are fused with what
            stands around them; none: the library multiplies.
        fused: count as if all products were fused.
        rows, block_length, slots: of the batch; blocks are of the model's default length if none is given.

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
    config = step_config(model, block_length)
    two, three = (_count(replace(model, layers=layers), ARCHS[arch], gpu, fused, rows, slots, config) for layers in (2, 3))
    layer = three - two
    return Launches(layer, two - layer - layer, model.layers)


def step_config(model: ModelConfig, block_length: int | None = None) -> GenerationConfig:
    """The options of the step whose launches are counted: a generation of one block."""
    length = block_length or GenerationConfig.of_model(model).block_length
    return GenerationConfig.of_model(model, gen_length=length, block_length=length)


def _count(
    model: ModelConfig, arch: Arch, gpu: str | None, fused: bool, rows: int, slots: int, config: GenerationConfig
) -> Counter[str]:
    from ..kernels.linear import fuses_residual
    from .recorder import META, launchers, recorded

    options = LaunchOptions(fuse_linear=fused)
    counts: Counter[str] = Counter()
    running: list[str] = []  # the op, if one is

    def on_call(name: str) -> None:
        # On a GPU the library's product of the head is float32 without a conversion.
        if [*running, name] != ["head_statistics", "to_copy"]:
            counts[running[-1] if running else f"torch {name}"] += 1

    with recorded(arch, gpu) as launches, ComputingCalls(on_call):

        def counted(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                running.append(op)
                before = len(launches)
                result = function(*args, **kwargs, **({"options": options} if op == "linear" else {}))
                counts[running.pop()] += len(launches) - before
                return result

            return call

        ops = launchers(counted, partial(fuses_residual, options=options))
        network = Transformer(model, Weights.allocate(model, META, torch.bfloat16), ops)
        requests = batch_requests([[1]] * rows, None, config, model)
        runner = ModelRunner(network, rows, slots)
        program = runner.program_of(requests, requests)
        window = len(requests[0].policy.step(requests[0].block_state))
        for _ in range(2):  # the first one also makes what is kept
            counts.clear()
            runner.run(network, runner.step_shape(program, 0, rows, window, rows * config.decoded_length))
    return counts

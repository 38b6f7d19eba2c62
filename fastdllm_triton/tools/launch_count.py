"""Counts the kernels of a decoding step without a GPU.

The engine's own step runs once on the meta device, where tensors have shapes and no data. Each op answers with the launches
that its config for those shapes makes; every call of PyTorch that computes is one more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..decoding.config import GenerationConfig
from ..engine.request import batch_requests
from ..engine.runner import ModelRunner
from ..models.config import ModelConfig
from ..models.transformer import Transformer, Weights
from ..ops import Ops
from ..types import Activation, PolicyState, TokenStatistics, WindowInputs

#: Calls that return memory or a view of it and launch nothing.
_FREE = frozenset(
    "empty empty_like new_empty view unsafe_view alias expand slice select split unbind unsqueeze".split()  # noqa: SIM905
)


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
        """Launches of one layer."""
        return self.layer.total()

    @property
    def per_step(self) -> int:
        """Launches of a whole step."""
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
        _count(replace(model, layers=layers), _Counting(ARCHS[arch], gpu, fused), rows, block_length, slots, dtype)
        for layers in (2, 3)
    )
    layer = two - one
    twice = Counter({name: 2 * times for name, times in layer.items()})
    return Launches(layer, one - twice, model.layers)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what PyTorch computes."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0].lstrip("_")
        if name not in _FREE:
            self.counts[f"torch {name}"] += 1
        return func(*args, **(kwargs or {}))


def _count(model: ModelConfig, counting: _Counting, rows: int, length: int, slots: int, dtype: torch.dtype) -> Counter[str]:
    network = Transformer(model, Weights.allocate(model, torch.device("meta"), dtype), counting.ops())
    config = GenerationConfig(gen_length=length, block_length=length)
    requests = batch_requests([[1]] * rows, None, config, model)
    runner = ModelRunner(network, rows, slots)
    program = runner.program_of(requests, requests)
    window = len(requests[0].policy.step(requests[0].block_state))
    with _Calls(counting.counts), torch.no_grad():
        runner.step(network, program, 0, rows, window, rows * length)
    return counting.counts


class _Counting:
    """Ops that count what they would launch and return tensors of the right shapes."""

    def __init__(self, arch: Any, gpu: str | None, fused: bool) -> None:
        self.arch, self.gpu, self.fused = arch, gpu, fused
        self.counts: Counter[str] = Counter()

    def ops(self) -> Ops:
        """All of them; a step calls no others."""

        def never(*args: Any, **options: Any) -> Any:
            raise AssertionError("a step does not call this op")

        names = (
            "commit_tokens", "head_statistics", "linear", "rms_norm", "rope_kv_write", "window_attention", "window_inputs",
        )  # fmt: skip
        return Ops(
            name="counting",
            reason="no data",
            required=True,
            fuses_residual=self.fuses_residual,
            swiglu=never,
            token_statistics=never,
            **{name: getattr(self, name) for name in names},
        )

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, rows: Tensor | None = None
    ) -> Any:
        from ..kernels.rms_norm import launches

        self.counts["rms_norm"] += launches(self.arch, x.shape[-1])
        y = x.new_empty(x.shape if rows is None else (*rows.shape, x.shape[-1]))
        return y if residual is None and rows is None else (y, torch.empty_like(y))

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        norm_weight: Tensor | None = None,
        eps: float | None = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor:
        from ..kernels.linear import launches, select_config

        rows, (n, k) = x.shape[:-1].numel(), weight.shape
        if self.fused:
            self.counts["linear"] += select_config(self.arch, rows, n, k, x.element_size(), activation).launches
        else:
            parts = (norm_weight is not None, activation, residual is not None)
            self.counts["linear"] += launches(self.gpu, rows, n, k, _name(x), *parts)
        return x.new_empty((*x.shape[:-1], n // (1 if activation is None else 2)))

    def fuses_residual(self, x: Tensor, weight: Tensor) -> bool:
        from ..kernels.linear import measured_config

        rows, (n, k) = x.shape[:-1].numel(), weight.shape
        return self.fused or measured_config(self.gpu, rows, n, k, _name(x), False, None, True) is not None

    def rope_kv_write(self, qkv: Tensor, k_cache: Tensor, *args: Any, **options: Any) -> Tensor:
        from ..kernels.rope_kv_write import launches

        kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
        self.counts["rope_kv_write"] += launches(self.arch, kv_heads, dim)
        return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // dim - 2 * kv_heads, dim))

    def window_attention(self, q: Tensor, k_cache: Tensor, *args: Any, **options: Any) -> Tensor:
        from ..kernels.window_attention import launches

        (batch, window, heads, dim), (kv_heads, slots) = q.shape, k_cache.shape[1:3]
        sizes = (batch, window, heads, kv_heads, dim, slots)
        self.counts["window_attention"] += launches(self.arch, *sizes, q.element_size(), self.gpu)
        return torch.empty_like(q)

    def window_inputs(self, x: Tensor, *tensors: Tensor, window: int, block: int, predicted: int, **options: Any) -> WindowInputs:
        from ..kernels.window_inputs import launches

        self.counts["window_inputs"] += launches(self.arch)
        ids, rows, keys = x.new_empty((len(x), window)), x.new_empty(predicted), x.new_empty((3, predicted))
        return WindowInputs(ids, x.new_empty(len(x)), rows, x.new_empty((len(x), block)), keys, rows)

    def head_statistics(self, hidden: Tensor, weight: Tensor, **options: Any) -> TokenStatistics:
        from ..kernels.head_statistics import launches

        (rows, (vocabulary, width)), sample = (len(hidden), weight.shape), options["temperature"] > 0
        count = launches(self.arch, rows, vocabulary, width, hidden.element_size(), sample, self.gpu)
        self.counts["head_statistics"] += count
        token, entry = (hidden.new_empty(rows, dtype=dtype) for dtype in (torch.int64, torch.float32))
        return TokenStatistics(token, entry, entry, entry, entry, entry)

    def commit_tokens(
        self, x: Tensor, statistics: TokenStatistics, window_start: Tensor, state: PolicyState, *, place: Tensor
    ) -> None:
        from ..kernels.commit_tokens import launches

        self.counts["commit_tokens"] += launches(self.arch, state.rule, place.shape[1])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

"""Ops whose results do not depend on the batch: fixed tiles and fixed chunks, counted from where a row's own keys begin.

Fast configs follow the shapes: more rows, other tiles, another order of summation, other last bits. In bfloat16 that is enough
for a row to get another token in company than alone. These configs depend on the model alone. They read weights more often
and fill a GPU less well; they are for when a result must be repeated whatever it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..types import TokenStatistics
from . import Ops

#: Keys of a chunk of attention. Results are merged in the order of the chunks, and an empty chunk changes nothing.
CHUNK = 1024
#: Rows times query heads a KV head that the attention's tile is chosen for.
TILE_ROWS = 64

_Op = Callable[..., Any]


def invariant(ops: Ops) -> Ops:
    """The same ops with configs that depend on the model's shape alone.

    Raises:
        ValueError: the ops are not the Triton kernels; the library that multiplies for the others chooses by shape.
    """
    if ops.name != "triton":
        raise ValueError(f"deterministic: needs the Triton kernels, and the backend is {ops.name}: {ops.reason}")
    from ..kernels._arch import arch_of
    from ..kernels.head_statistics import FUSED_ROWS, head_statistics_config
    from ..kernels.linear import invariant_config
    from ..kernels.window_attention import select_config

    return replace(
        ops,
        reason=f"{ops.reason}, batch-invariant",
        fuses_residual=_always,
        linear=partial(_linear, ops.linear, arch_of, invariant_config),
        window_attention=partial(_window_attention, ops.window_attention, arch_of, select_config),
        head_statistics=partial(_head_statistics, ops.head_statistics, arch_of, head_statistics_config, FUSED_ROWS),
    )


def _always(x: Tensor, weight: Tensor) -> bool:
    return True


# Functions of this module and not of `invariant`, so that a model with them can be pickled.


def _linear(op: _Op, arch_of: _Op, invariant_config: _Op, /, x: Tensor, weight: Tensor, **around: Any) -> Tensor:
    (n, k), activation = weight.shape, around.get("activation")
    config = invariant_config(arch_of(x.device), n, k, x.element_size(), activation)
    y: Tensor = op(x, weight, config=config, **around)
    return y


def _window_attention(
    op: _Op, arch_of: _Op, select_config: _Op, /, q: Tensor, k_cache: Tensor, *args: Any, **options: Any
) -> Any:
    heads, (kv_heads, slots, dim) = q.shape[2], k_cache.shape[1:]
    window = max(TILE_ROWS * kv_heads // heads, 1)
    tile = select_config(arch_of(q.device), 1, window, heads, kv_heads, dim, CHUNK, q.element_size())
    config = replace(tile, splits=-(-slots // CHUNK), chunk=CHUNK)
    return op(q, k_cache, *args, config=config, **options)


def _head_statistics(
    op: _Op,
    arch_of: _Op,
    select_config: _Op,
    fused_rows: Mapping[str, tuple[int, ...]],
    /,
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    **options: Any,
) -> TokenStatistics:
    arch = arch_of(hidden.device)
    temperature, forbidden = options.get("temperature", 0.0), options.get("forbidden")
    most, sample = min(fused_rows[arch.name]), isinstance(temperature, Tensor) or temperature > 0
    config = select_config(arch, most, len(weight), weight.shape[1], hidden.element_size(), sample)
    rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
    count = len(rows)
    # Always as many rows as the fused kernel takes, for a config of its own; those made up ask for nothing.
    surplus = -count % most
    names = ("seed", "position", "step", "temperature")
    keys = {name: key for name in names if isinstance(key := options.get(name), Tensor) and key.dim()}
    padded = {name: torch.nn.functional.pad(key, (0, surplus)) for name, key in keys.items()}
    if isinstance(forbidden, Tensor) and forbidden.dim() == 2:
        padded["forbidden"] = torch.nn.functional.pad(forbidden, (0, 0, 0, surplus), value=-1)
    options = {name: option for name, option in options.items() if name not in padded}
    rows = torch.nn.functional.pad(rows, (0, surplus), value=-1)
    found = [
        op(
            hidden,
            weight,
            rows=rows[i : i + most],
            config=config,
            **{name: key[i : i + most] for name, key in padded.items()},
            **options,
        )
        for i in range(0, len(rows), most)
    ]
    entries = zip(*(vars(part).values() for part in found), strict=True)
    return TokenStatistics(*(torch.cat(entry)[:count] for entry in entries))

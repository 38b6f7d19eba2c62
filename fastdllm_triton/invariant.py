"""Ops whose results do not depend on the batch: fixed tiles and fixed chunks, counted from where a row's own keys begin.

Fast configs follow the shapes: more rows, other tiles, another order of summation, other last bits. In bfloat16 that is enough
for a row to get another token in company than alone. These configs depend on the model alone. They read weights more often
and fill a GPU less well; they are for when a result must be repeated whatever it is batched with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .ops import Ops
from .types import TokenStatistics

#: Keys of a chunk of attention. Results are merged in the order of the chunks, and an empty chunk changes nothing.
CHUNK = 1024
#: Rows times query heads a KV head that the attention's tile is chosen for.
TILE_ROWS = 64


def invariant(ops: Ops) -> Ops:
    """The same ops with configs that depend on the model's shape alone.

    Raises:
        ValueError: the ops are not the Triton kernels; the library that multiplies for the others chooses by shape.
    """
    if ops.name != "triton":
        raise ValueError(f"deterministic: needs the Triton kernels, and the backend is {ops.name}: {ops.reason}")
    from .kernels._arch import arch_of
    from .kernels.head_statistics import FUSED_ROWS, head_statistics_config
    from .kernels.linear import invariant_config
    from .kernels.window_attention import select_config

    def linear(x: Tensor, weight: Tensor, **around: Any) -> Tensor:
        (n, k), activation = weight.shape, around.get("activation")
        config = invariant_config(arch_of(x.device), n, k, x.element_size(), activation)
        y: Tensor = ops.linear(x, weight, config=config, **around)
        return y

    def window_attention(q: Tensor, k_cache: Tensor, *args: Any, **options: Any) -> Any:
        heads, (kv_heads, slots, dim) = q.shape[2], k_cache.shape[1:]
        window = max(TILE_ROWS * kv_heads // heads, 1)
        tile = select_config(arch_of(q.device), 1, window, heads, kv_heads, dim, CHUNK, q.element_size())
        config = replace(tile, splits=-(-slots // CHUNK), chunk=CHUNK)
        return ops.window_attention(q, k_cache, *args, config=config, **options)

    def head_statistics(hidden: Tensor, weight: Tensor, *, rows: Tensor | None = None, **options: Any) -> TokenStatistics:
        arch = arch_of(hidden.device)
        most, sample = min(FUSED_ROWS[arch.name]), options.get("temperature", 0) > 0
        config = head_statistics_config(arch, most, len(weight), weight.shape[1], hidden.element_size(), sample)
        rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
        count = len(rows)
        # Always as many rows as the fused kernel takes, for a config of its own; those made up ask for nothing.
        surplus = -count % most
        keys = {name: key for name in ("seed", "position", "step") if isinstance(key := options.pop(name, None), Tensor)}
        padded = {name: torch.nn.functional.pad(key, (0, surplus)) for name, key in keys.items()}
        rows = torch.nn.functional.pad(rows, (0, surplus), value=-1)
        found = [
            ops.head_statistics(
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

    return replace(
        ops,
        reason=f"{ops.reason}, batch-invariant",
        fuses_residual=lambda x, weight: True,
        linear=linear,
        window_attention=window_attention,
        head_statistics=head_statistics,
    )

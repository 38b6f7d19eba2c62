"""The cases of rope_kv_write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...kernels._arch import Arch
from ._base import CASE_MODELS, Case, Compiled, Inputs, OpCases, Outputs, Random, Sizes

#: Query heads, KV heads and their size of SDAR 8B (arXiv 2510.06303), which norms q and k.
SDAR_HEADS = (32, 8, 128)


def _make(
    random: Random,
    window: int,
    slots: int = 12,
    batch: int = 1,
    model: str | None = None,
    window_start: Sequence[int] = (),
    kv_start: Sequence[int] = (),
    heads: tuple[int, int, int] = (2, 2, 16),
    rounding: str = "llada",
    bias: bool = False,
    theta: float = 10_000.0,
    norms: str | None = None,
) -> Inputs:
    """The window is at the end of the cache if it is nowhere else; ``heads`` are query heads, KV heads and their size; with
    ``norms`` of that rounding.
    """
    if model == "sdar":
        heads, rounding, theta, norms = SDAR_HEADS, "dream", 1e6, norms or "flash_attn"
    elif model is not None:
        config = CASE_MODELS[model]
        heads = (config.heads, config.kv_heads, config.head_dim)
        rounding, bias, theta = config.rope_rounding, config.qkv_bias, config.rope_theta
    batch = len(window_start) or batch
    q_heads, kv_heads, dim = heads
    columns = (q_heads + 2 * kv_heads) * dim
    return {
        "qkv": random(batch, window, columns),
        "k_cache": random(batch, kv_heads, slots, dim),
        "v_cache": random(batch, kv_heads, slots, dim),
        "window_start": random.slots(window_start or [slots - window] * batch),
        "kv_start": random.slots(kv_start or [0] * batch),
        "theta": theta,
        "bias": random(columns) if bias else None,
        **({"q_norm": random(dim), "k_norm": random(dim), "eps": 1e-6, "norm_rounding": norms} if norms else {}),
        "rounding": rounding,
    }


def _named(q: Tensor, inputs: Inputs) -> Outputs:
    return {"q": q, "k_cache": inputs["k_cache"], "v_cache": inputs["v_cache"]}


def _case(why: str, where: Any, window: int, window_start: Sequence[int], kv_start: Sequence[int], **sizes: Any) -> Case:
    return Case(why, {"window": window, "window_start": window_start, "kv_start": kv_start, **sizes}, where)


def _bytes(shape: Sizes) -> int:
    """The projection in; q, k and v out."""
    if shape["model"] == "sdar":
        q_heads, kv_heads, dim = SDAR_HEADS
    else:
        config = CASE_MODELS[shape["model"]]
        q_heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    return 2 * 2 * shape["batch"] * shape["window"] * (q_heads + 2 * kv_heads) * dim


_SHAPES = [
    {"model": model, "batch": batch, "window": window, "slots": 4096}
    for model in CASE_MODELS
    for batch, window in ((1, 32), (4, 32), (16, 32), (16, 64), (1, 4096), (4, 4096))
] + [
    # With norms: SDAR's step of one and of many rows, and a prefill.
    {"model": "sdar", "batch": batch, "window": window, "slots": 4096}
    for batch, window in ((1, 4), (16, 4), (1, 4096))
]
_DREAM: dict[str, Any] = {"rounding": "dream", "bias": True, "theta": 1e6}
_QWEN3: dict[str, Any] = {"rounding": "dream", "theta": 1e6}


def _compiled(arch: Arch) -> list[Compiled]:
    """Dream's in both 16-bit dtypes, since roundings are at stake, and so the norms in both and in either order of roundings."""
    kinds: list[tuple[torch.dtype, Inputs]] = [
        (torch.bfloat16, {"model": "llada"}),
        *((dtype, {"model": "dream"}) for dtype in (torch.bfloat16, torch.float16)),
        *product((torch.bfloat16, torch.float16), ({"model": "sdar", "norms": norms} for norms in ("qwen3", "flash_attn"))),
    ]
    return [(dtype, {**kind, "window": 32, "slots": 1024}, None) for dtype, kind in kinds]


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    norms = "" if "q_norm_ptr" in c else f" norms {'rounded once' if c['ROUND_ONCE'] else 'rounded twice'}"
    return f"{dtype} {'dream' if c['DREAM'] else 'llada'} D={c['D']}{norms}"


ROPE_KV_WRITE = OpCases(
    "rope_kv_write",
    [
        _case("a refresh", "quick", 12, (0,), (0,)),
        _case("ragged left padding", "quick", 12, (0, 0, 0), (0, 5, 11), bias=True),
        _case("past the end", "quick", 8, (8, 12, 18), (0, 0, 0)),
        _case("before the start", "quick", 8, (-3, -8, -9), (0, 0, 0), bias=True),
        _case("Dream's rounding, bias and ratio of heads", "quick", 3, (5, 3), (2, 0), heads=(7, 1, 16), **_DREAM),
        _case("one token at the end", "full", 1, (11,), (0,)),
        _case("a ratio of 7 with LLaDA's rounding", "full", 7, (5, 3), (2, 0), heads=(7, 1, 16), bias=True),
        _case("Dream's heads", "full", 3, (4,), (1,), heads=(28, 4, 16), bias=True),
        _case("a sequence from before the cache", "full", 8, (-3,), (-5,), bias=True),
        _case("a window of padding", "full", 8, (0, 2), (8, 9)),
        _case("head dim 80", "full", 5, (4, 8), (0, 1), heads=(2, 2, 80), bias=True),
        _case("head dim 128", "full", 5, (4,), (3,), heads=(2, 2, 128), bias=True),
        _case("norms of q and k", "quick", 12, (0,), (0,), norms="qwen3"),
        _case("norms rounded once, ratio of heads", "quick", 5, (4, 3), (1, 0), heads=(4, 1, 16), norms="flash_attn", **_QWEN3),
        _case("norms behind a bias", "full", 5, (4, 3), (1, 0), heads=(4, 2, 16), norms="qwen3", bias=True),
        _case("norms of heads of 80", "full", 5, (4, 8), (0, 1), heads=(2, 2, 80), norms="flash_attn"),
        _case("norms and padding", "full", 8, (0, -3), (8, 2), norms="flash_attn", **_QWEN3),
        _case("SDAR's heads", "full", 4, (4,), (1,), heads=(32, 8, 16), norms="flash_attn", **_QWEN3),
        _case("a step of SDAR", "key", 4, (960, 960), (0, 70), model="sdar", slots=1024),
        _case("a prefill of SDAR", "gpu", 4096, (0,), (9,), model="sdar", slots=4096),
        _case("a step of LLaDA", "key", 32, (960, 960), (0, 70), model="llada", slots=1024),
        _case("a refresh of Dream", "key", 4096, (0,), (9,), model="dream", slots=4096),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["batch"] == 1 and shape["model"] != "sdar"],
    small={"model": "dream", "batch": 1, "window": 2, "slots": 4},
    axis="window",
    bytes=_bytes,
    named=_named,
    writes=["k_cache", "v_cache"],
    outs=["out"],
    compiled=_compiled,
    label=_label,
    forward=lambda c: [{"model": c.model, "batch": c.batch, "window": c.window, "slots": c.slots}],
)

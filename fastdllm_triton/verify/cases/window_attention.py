"""The cases of window_attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels import window_attention as kernels
from ...kernels._arch import Arch
from ._base import CASE_MODELS, Case, Compiled, Inputs, OpCases, Outputs, Random, Sizes, Where

#: Query heads, KV heads and their size.
HEADS = {name: (config.heads, config.kv_heads, config.head_dim) for name, config in CASE_MODELS.items()}


def _make(
    random: Random,
    window: int,
    slots: int = 80,
    batch: int = 1,
    model: str | None = None,
    start: Sequence[int] = (),
    end: Sequence[int] = (),
    skip: Sequence[tuple[int, int]] | None = None,
    heads: tuple[int, int, int] = (1, 1, 16),
) -> Inputs:
    """Every slot is attended if no range is given. The others hold NaN: nobody may read them."""
    q_heads, kv_heads, dim = heads if model is None else HEADS[model]
    batch = len(start) or batch
    inputs: Inputs = {
        "q": random(batch, window, q_heads, dim),
        "k_cache": random(batch, kv_heads, slots, dim),
        "v_cache": random(batch, kv_heads, slots, dim),
        "kv_start": random.slots(start or [0] * batch),
        "kv_end": random.slots(end or [slots] * batch),
    }
    if skip is not None:
        inputs["skip_start"] = random.slots([first for first, _ in skip])
        inputs["skip_end"] = random.slots([last for _, last in skip])
    unattended = ~attended(inputs)[:, None, :, None]
    if not unattended.is_meta and unattended.any():
        inputs["k_cache"].masked_fill_(unattended, torch.nan)
        inputs["v_cache"].masked_fill_(unattended, torch.nan)
    return inputs


def attended(inputs: Inputs) -> Tensor:
    """``[B, L]``: the slots of each sequence that its queries attend."""
    slot = torch.arange(inputs["k_cache"].shape[2], device=inputs["k_cache"].device)
    within = (slot >= inputs["kv_start"][:, None]) & (slot < inputs["kv_end"][:, None])
    if "skip_start" in inputs:
        within &= (slot < inputs["skip_start"][:, None]) | (slot >= inputs["skip_end"][:, None])
    return within


def _named(result: Any, inputs: Inputs) -> Outputs:
    return {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}


def by_torch(inputs: Inputs, scale: float | None = None) -> Outputs:
    """PyTorch's attention in the dtype of the inputs, a sequence at a time, over its attended slots alone."""
    q_heads, dim = inputs["q"].shape[2:]
    group, scale = q_heads // inputs["k_cache"].shape[1], dim**-0.5 if scale is None else scale
    out = torch.zeros_like(inputs["q"])
    wide = torch.promote_types(out.dtype, torch.float32)
    lse = torch.full((len(out), q_heads, out.shape[1]), -torch.inf, device=out.device, dtype=wide)
    for b, slots in enumerate(attended(inputs)):
        if slots.any():
            q = inputs["q"][b].transpose(0, 1)  # [Hq, W, D]
            k, v = (inputs[name][b][:, slots].repeat_interleave(group, dim=0) for name in ("k_cache", "v_cache"))
            out[b] = scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1)
            lse[b] = (q.to(wide) @ k.to(wide).mT * scale).logsumexp(-1) * math.log2(math.e)
    return {"out": out, "lse": lse}


def _case(why: str, where: Where, window: int, start: Sequence[int], end: Sequence[int], **sizes: Any) -> Case:
    return Case(why, {"window": window, "start": start, "end": end, **sizes}, where)


def _model_case(model: str, where: Where, batch: int, window: int, slots: int) -> Case:
    start = [0, 7, 100, 31][: batch % 5] + [0] * (batch - batch % 5)
    why = f"{model}, batch {batch}, window {window}, context {slots}"
    return _case(why, where, window, start, [slots] * batch, slots=slots, model=model)


def _bytes(shape: Sizes) -> int:
    """K and V once, q in, the output out."""
    q_heads, kv_heads, dim = HEADS[shape["model"]]
    return 2 * 2 * shape["batch"] * dim * (kv_heads * shape["slots"] + q_heads * shape["window"])


def _flops(shape: Sizes) -> int:
    """Two products of W x L x D a query head, a multiplication and an addition each."""
    q_heads, _, dim = HEADS[shape["model"]]
    return 2 * 2 * shape["batch"] * q_heads * shape["window"] * shape["slots"] * dim


def _compiled(arch: Arch) -> Iterator[Compiled]:
    """Every configuration of the shape grid, sm_90's small windows in both operand orders, and one of each other head dimension
    and of float32.
    """
    for model, heads in HEADS.items():
        for batch, slots in product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192, 16_384, 32_768)):
            for window in (16, 32, 64, 128, slots):
                sizes = {"model": model, "batch": batch, "window": window, "slots": slots}
                yield torch.bfloat16, sizes, None
                config = kernels.select_config(arch, batch, window, *heads, slots, 2)
                if config.swap_ab:
                    yield torch.bfloat16, sizes, {"config": replace(config, swap_ab=False)}
    for dim, dtype in (*((dim, torch.bfloat16) for dim in (16, 32, 64, 80, 96)), (128, torch.float32)):
        yield dtype, {"heads": (32, 32, dim), "window": 32, "slots": 4096}, None


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    name = f"{dtype} {'llada' if c['G'] == 1 else 'dream'} D={c['D']}"
    if kernel == "_merge_kernel":
        return f"{name} merge"
    return f"{name} {c['BLOCK_M']}x{c['BLOCK_N']}{' swapped' if c['SWAP_AB'] else ''}{' split' if c['SPLIT'] else ''}"


WINDOW_ATTENTION = OpCases(
    "window_attention",
    [
        _case("a step over everything", "quick", 8, (0,), (80,), heads=(2, 2, 16)),
        _case("an odd window, ragged rows", "quick", 7, (0, 5, 79), (80, 77, 80)),
        _case("an empty row between others", "quick", 4, (0, 40, 80, 0), (80, 40, 80, 0)),
        _case("ratio 7 of heads", "quick", 5, (0, 2), (80, 60), heads=(14, 2, 16)),
        _case("a skip inside a tile", "quick", 4, (0, 3), (80, 80), skip=((5, 9), (40, 41))),
        _case("head dim 128", "quick", 4, (1,), (79,), heads=(1, 1, 128)),
        _case("one query", "full", 1, (0,), (80,)),
        _case("a refresh", "full", 80, (0,), (80,)),
        _case("a window of 31", "full", 31, (0,), (80,)),
        _case("a window of 33", "full", 33, (3,), (80,)),
        _case("a window of 64", "full", 64, (3,), (71,)),
        _case("a window of 128", "full", 128, (0,), (80,)),
        _case("around a tile of 32", "full", 4, (0, 0, 0, 0), (31, 32, 33, 1)),
        _case("around a tile of 64", "full", 4, (0, 0, 0, 7), (63, 64, 65, 71)),
        _case("a start behind the end", "full", 4, (50,), (20,)),
        _case("ratio 4 of heads", "full", 5, (0, 2), (80, 60), heads=(8, 2, 16)),
        _case("ratio 8 in one head", "full", 3, (1,), (79,), heads=(8, 1, 16)),
        *(_case(f"head dim {dim}", "full", 4, (1,), (79,), heads=(1, 1, dim)) for dim in (32, 64, 80, 96)),
        _case("a skip of whole tiles", "full", 4, (0, 0), (80, 80), skip=((32, 64), (16, 80))),
        _case("a skip that begins inside a tile", "full", 4, (0,), (80,), skip=((50, 80),)),
        _case("a skip that ends inside a tile", "full", 4, (0,), (80,), skip=((0, 50),)),
        _case("a skip of everything", "full", 4, (0, 4), (80, 60), skip=((0, 80), (4, 60))),
        _case("a skip wider than the range", "full", 4, (10, 10), (20, 20), skip=((0, 15), (15, 80))),
        _case("a skip outside the range", "full", 4, (10, 10), (20, 20), skip=((0, 5), (30, 60))),
        _case("an empty skip", "full", 4, (0, 0), (80, 80), skip=((40, 40), (60, 20))),
        _case("a skip with ratio 7 of heads", "full", 9, (0, 7), (80, 80), skip=((30, 47), (48, 80)), heads=(7, 1, 16)),
        _case("several chunks", "full", 4, (3,), (600,), slots=600),
        *(
            case
            for model in CASE_MODELS
            for case in (
                _model_case(model, "key", 1, 32, 1024),
                _model_case(model, "gpu", 1, 16, 1029),
                _model_case(model, "gpu", 3, 32, 2048),
                _model_case(model, "gpu", 4, 64, 1024),
                _model_case(model, "gpu", 2, 128, 4096),
                _model_case(model, "gpu", 1, 32, 16_384),
                _model_case(model, "key", 1, 1024, 1024),
            )
        ),
    ],
    _make,
    shapes=[
        {"model": model, "batch": batch, "window": window, "slots": slots}
        for model in CASE_MODELS
        for slots in (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
        for batch in (1, 4, 16)
        for window in (32, 16, 64, 128)  # the paper's first
        if batch * slots <= 131_072
    ]
    + [
        {"model": model, "batch": 1, "window": slots, "slots": slots}
        for model in CASE_MODELS
        for slots in (1024, 2048, 4096, 8192)
    ],
    key=[{"model": model, "batch": 1, "window": window, "slots": 1024} for window in (32, 1024) for model in CASE_MODELS],
    small={"model": "dream", "batch": 1, "window": 2, "slots": 40},
    axis="slots",
    bytes=_bytes,
    flops=_flops,
    named=_named,
    outs=["out"],
    common={"return_lse": True},
    twin=by_torch,
    compiled=_compiled,
    label=_label,
    forward=lambda c: [{"model": c.model, "batch": c.batch, "window": c.window, "slots": c.slots}],
)

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
#: Those of block-causal models: Fast-dLLM v2 7B (arXiv 2509.26328; blocks of 32), which are Dream's, and SDAR 8B (arXiv
#: 2510.06303; blocks of 4, and in some checkpoints of up to 64).
BLOCK_CAUSAL_HEADS = {"fast-dllm-v2": HEADS["dream"], "sdar": (32, 8, 128)}


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
    block: int | None = None,
    first: Sequence[int] = (),
) -> Inputs:
    """Every slot is attended if no range is given, or with a ``block`` what lies before the end of each query's; windows begin
    there at ``first``, or end with the cache. The other slots hold NaN: nobody may read them.
    """
    q_heads, kv_heads, dim = heads if model is None else _heads(model)
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
    if block is not None:
        inputs["block_causal"] = random.slots(first or [slots - window] * batch), block
    unattended = ~attended(inputs).any(1)[:, None, :, None]
    if not unattended.is_meta and unattended.any():
        inputs["k_cache"].masked_fill_(unattended, torch.nan)
        inputs["v_cache"].masked_fill_(unattended, torch.nan)
    return inputs


def _heads(model: str) -> tuple[int, int, int]:
    return (HEADS | BLOCK_CAUSAL_HEADS)[model]


def attended(inputs: Inputs) -> Tensor:
    """``[B, W, L]``: the slots of each sequence that its queries attend; ``[B, 1, L]`` where all attend the same."""
    slot = torch.arange(inputs["k_cache"].shape[2], device=inputs["k_cache"].device)
    start, end = (inputs[name][:, None, None] for name in ("kv_start", "kv_end"))
    within = (slot >= start) & (slot < end)
    if "skip_start" in inputs:
        within &= (slot < inputs["skip_start"][:, None, None]) | (slot >= inputs["skip_end"][:, None, None])
    if "block_causal" in inputs:
        window_start, length = inputs["block_causal"]
        query = window_start[:, None, None] + torch.arange(inputs["q"].shape[1], device=slot.device)[:, None]  # [B, W, 1]
        # A block is a number, and a query sees those up to its own.
        within = within & (query >= start) & ((slot - start) // length <= (query - start) // length)
    return within


def _named(result: Any, inputs: Inputs) -> Outputs:
    return {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}


def by_torch(inputs: Inputs, scale: float | None = None) -> Outputs:
    """PyTorch's attention in the dtype of the inputs, over attended slots alone, queries that attend the same at a time."""
    q_heads, dim = inputs["q"].shape[2:]
    group, scale = q_heads // inputs["k_cache"].shape[1], dim**-0.5 if scale is None else scale
    out = torch.zeros_like(inputs["q"])
    wide = torch.promote_types(out.dtype, torch.float32)
    lse = torch.full((len(out), q_heads, out.shape[1]), -torch.inf, device=out.device, dtype=wide)
    for b, slots_of in enumerate(attended(inputs)):
        counts = slots_of.sum(1).tolist()  # equal where neighbours attend the same
        for first, last in _runs(counts * (1 if len(counts) > 1 else out.shape[1])):
            slots = slots_of[min(first, len(slots_of) - 1)]
            if not slots.any():
                continue
            q = inputs["q"][b, first:last].transpose(0, 1)  # [Hq, W, D]
            k, v = (inputs[name][b][:, slots].repeat_interleave(group, dim=0) for name in ("k_cache", "v_cache"))
            out[b, first:last] = scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1)
            lse[b, :, first:last] = (q.to(wide) @ k.to(wide).mT * scale).logsumexp(-1) * math.log2(math.e)
    return {"out": out, "lse": lse}


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of equal neighbours."""
    ends = [i for i in range(1, len(values) + 1) if i == len(values) or values[i] != values[i - 1]]
    return zip([0, *ends], ends, strict=False)


def _case(why: str, where: Where, window: int, start: Sequence[int], end: Sequence[int], **sizes: Any) -> Case:
    return Case(why, {"window": window, "start": start, "end": end, **sizes}, where)


def _model_case(model: str, where: Where, batch: int, window: int, slots: int) -> Case:
    start = [0, 7, 100, 31][: batch % 5] + [0] * (batch - batch % 5)
    why = f"{model}, batch {batch}, window {window}, context {slots}"
    return _case(why, where, window, start, [slots] * batch, slots=slots, model=model)


def _prefill_case(model: str, where: Where, batch: int, slots: int, block: int) -> Case:
    start = [0, 7, 100, 31][: batch % 5]
    why = f"{model}, prefill of {slots} in blocks of {block}, batch {batch}"
    return _case(why, where, slots, start, [slots] * batch, slots=slots, model=model, block=block, first=[0] * batch)


def _bytes(shape: Sizes) -> int:
    """K and V once, q in, the output out."""
    q_heads, kv_heads, dim = _heads(shape["model"])
    return 2 * 2 * shape["batch"] * dim * (kv_heads * shape["slots"] + q_heads * shape["window"])


def _flops(shape: Sizes) -> int:
    """Two products of W x L x D a query head, a multiplication and an addition each; L of each query where it is block-causal."""
    q_heads, _, dim = _heads(shape["model"])
    window, slots, block = shape["window"], shape["slots"], shape.get("block")
    pairs = window * slots
    if block is not None:
        pairs = sum(min((position // block + 1) * block, slots) for position in range(slots - window, slots))
    return 2 * 2 * shape["batch"] * q_heads * pairs * dim


def _compiled(arch: Arch) -> Iterator[Compiled]:
    """Every configuration of the shape grid, sm_90's small windows in both operand orders, one of each other head dimension and
    of float32, and of block-causal models a prefill, a store with the next block's first step, and float32.
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
    for model, block in (("fast-dllm-v2", 32), ("sdar", 4)):
        for batch, window, slots in ((1, 4096, 4096), (16, 2 * block, 4096), (1, 2 * block, 4096)):
            yield torch.bfloat16, {"model": model, "batch": batch, "window": window, "slots": slots, "block": block}, None
    yield torch.float32, {"model": "sdar", "window": 64, "slots": 512, "block": 4}, None


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    name = f"{dtype} { {1: 'llada', 4: 'sdar', 7: 'dream'}[c['G']] } D={c['D']}"
    if kernel == "_merge_kernel":
        return f"{name} merge"
    forms = {"SWAP_AB": "swapped", "SPLIT": "split", "BLOCK_CAUSAL": "block-causal"}
    return " ".join((name, f"{c['BLOCK_M']}x{c['BLOCK_N']}", *(word for form, word in forms.items() if c[form])))


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
        _case("block-causal", "quick", 12, (0,), (12,), slots=16, block=4, first=(0,)),
        _case("block-causal, ragged rows", "quick", 20, (0, 3, 11), (20, 20, 20), slots=24, block=8, first=(0, 0, 0)),
        _case("block-causal behind a prefix, ratio 7 of heads", "quick", 16, (2,), (80,), heads=(7, 1, 16), block=8, first=(58,)),
        _case("blocks that end inside a tile of 32", "full", 80, (0,), (80,), block=20, first=(0,)),
        _case("blocks that begin inside a tile of queries", "full", 80, (5, 17), (80, 71), block=32, first=(0, 0)),
        _case("blocks of one: causal", "full", 33, (0, 40), (33, 73), block=1, first=(0, 40)),
        _case("a block longer than the window", "full", 8, (0,), (80,), block=1000, first=(40,)),
        _case("a store and the next block's step", "full", 8, (4, 3), (80, 79), block=4, first=(72, 71), heads=(8, 2, 16)),
        _case("keys that end before the blocks do", "full", 32, (0,), (21,), block=8, first=(0,)),
        _case("queries in front of the sequence", "full", 9, (30, 80), (80, 80), block=4, first=(25, 60)),
        _case("block-causal, many rows", "full", 80, (2, 0), (80, 77), heads=(7, 1, 16), block=8, first=(0, 0)),
        _case("block-causal in several chunks", "full", 64, (3,), (600,), slots=600, block=32, first=(536,)),
        _case("block-causal, head dim 80", "full", 40, (1,), (40,), heads=(2, 2, 80), block=8, first=(0,)),
        _prefill_case("fast-dllm-v2", "key", 1, 1024, 32),
        _prefill_case("sdar", "key", 1, 1024, 4),
        _prefill_case("fast-dllm-v2", "gpu", 3, 517, 32),
        _prefill_case("sdar", "gpu", 2, 2050, 4),
        _prefill_case("sdar", "gpu", 1, 3000, 32),
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
    ]
    # Prefills of block-causal models, and what their steps attend with: a few rows a KV head.
    + [
        {"model": model, "batch": 1, "window": slots, "slots": slots, "block": block}
        for model, block in (("fast-dllm-v2", 32), ("sdar", 4))
        for slots in (1024, 4096)
    ]
    + [{"model": "sdar", "batch": batch, "window": 8, "slots": 1024, "block": 4} for batch in (1, 16)],
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

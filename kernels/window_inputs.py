"""What a forward needs to know before its first layer, in one launch: its tokens, and which rows of them predict what.

A program takes some slots of a row's window. The first of each row also packs the masked slots of the row's block: its places in
the list begin where those of the rows before it end, which their counters tell, so that no program waits for another. The
contract is that of ``reference/window_inputs.py``.

| pointer                        | shape  | dtype        | owned by                            |
|--------------------------------|--------|--------------|-------------------------------------|
| x_ptr                          | [B, L] | int64        | caller, read; stride_x between rows |
| base_ptr                       | [B]    | int32        | caller, read; stride_base 0 or 1    |
| block_start_ptr, remaining_ptr | [B]    | int32        | caller, read                        |
| kv_start_ptr                   | [B]    | int32        | caller, read                        |
| seed_ptr, step_ptr             | [B]    | int64, int32 | caller, read with SAMPLE            |
| ids_ptr                        | [B, W] | int64        | result, written, as are all below   |
| start_ptr                      | [B]    | int32        |                                     |
| rows_ptr                       | [P]    | int64        |                                     |
| place_ptr                      | [B, N] | int32        |                                     |
| keys_ptr                       | [3, P] | int64        | written with SAMPLE                 |
| batch_row_ptr                  | [P]    | int64        |                                     |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import WindowInputs
from ._check import check_device, check_shape, check_slots, once, require
from ._limits import MAX_BLOCK, MAX_ROWS

_SLICED = ["base_ptr", "block_start_ptr", "remaining_ptr", "kv_start_ptr", "seed_ptr", "step_ptr"]


@triton.jit(do_not_specialize=["slots", "window", "predicted", "rows"], do_not_specialize_on_alignment=_SLICED)
def _window_inputs_kernel(
    x_ptr,
    base_ptr,
    block_start_ptr,
    remaining_ptr,
    kv_start_ptr,
    seed_ptr,
    step_ptr,
    ids_ptr,
    start_ptr,
    rows_ptr,
    place_ptr,
    keys_ptr,
    batch_row_ptr,
    stride_x,
    stride_base,
    rows,
    slots,
    window,
    block,
    predicted,
    back,
    mask_id,
    SHIFT: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride_x
    left = tl.load(remaining_ptr + row)
    start = tl.where(left == 0, slots, tl.maximum(tl.load(base_ptr + row * stride_base) - back, 0))
    o = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    ids = tl.load(x_ptr + tl.minimum(start + o, slots - 1), mask=o < window, other=0)
    tl.store(ids_ptr + row.to(tl.int64) * window + o, ids, mask=o < window)

    if tl.program_id(1) == 0:
        tl.store(start_ptr + row, start)
        # The places of this row: from those of the rows before it on, the last row's up to the end of the list.
        r = tl.arange(0, BLOCK_R)
        others = tl.minimum(tl.load(remaining_ptr + r, mask=r < row, other=0), block)
        first = tl.sum(others, 0)
        count = tl.minimum(left, block)
        end = tl.where(row == rows - 1, predicted, tl.minimum(first + count, predicted))

        n = tl.arange(0, BLOCK_N)
        slot = tl.load(block_start_ptr + row) + n  # [BLOCK_N]
        token = tl.load(x_ptr + tl.minimum(slot, slots - 1), mask=n < block, other=0)
        masked = (n < block) & (token == mask_id)
        rank = tl.cumsum(masked.to(tl.int32), 0) - 1
        taken = masked & (rank < count) & (first + rank < predicted)
        place = first + rank
        tl.store(place_ptr + row * block + n, tl.where(taken, place, -1), mask=n < block)
        tl.store(batch_row_ptr + place, row + tl.zeros((BLOCK_N,), tl.int64), mask=taken)

        origin = tl.load(kv_start_ptr + row)
        # Position 0 has no slot before it, and predicts itself.
        source = tl.maximum(slot - 1, origin) if SHIFT else slot
        at = tl.minimum(tl.maximum(source - start, 0), window - 1)
        tl.store(rows_ptr + place, row.to(tl.int64) * window + at, mask=taken)
        if SAMPLE:
            position = (slot - origin).to(tl.int64)
            tl.store(keys_ptr + place, tl.load(seed_ptr + row) + tl.zeros_like(position), mask=taken)
            tl.store(keys_ptr + predicted + place, position, mask=taken)
            tl.store(keys_ptr + 2 * predicted + place, tl.load(step_ptr + row) + tl.zeros_like(position), mask=taken)
        # Places that no slot has taken.
        for empty in range(first + tl.sum(taken.to(tl.int32), 0), end, BLOCK_N):
            hole = empty + n < end
            none = tl.zeros((BLOCK_N,), tl.int64)
            tl.store(rows_ptr + empty + n, none - 1, mask=hole)
            tl.store(batch_row_ptr + empty + n, none, mask=hole)
            if SAMPLE:
                tl.store(keys_ptr + empty + n, none, mask=hole)
                tl.store(keys_ptr + predicted + empty + n, none, mask=hole)
                tl.store(keys_ptr + 2 * predicted + empty + n, none, mask=hole)


@dataclass(frozen=True)
class Config:
    """Launch parameters: slots of the window, rows and slots of a block that a program takes at a time."""

    block_w: int
    block_r: int
    block_n: int
    num_warps: int


def select_config(rows: int, block: int) -> Config:
    """The rows in one of two sizes, so that a batch that shrinks compiles nothing again."""
    return Config(256, MAX_ROWS if rows > 128 else 128, triton.next_power_of_2(block), 4)


@once
def _check(
    x: Tensor, base: Tensor, block_start: Tensor, remaining: Tensor, window: int, block: int, predicted: int,
    kv_start: Tensor, seed: Tensor | None, step: Tensor | None,
) -> None:  # fmt: skip
    """Checks the arguments of :func:`window_inputs`."""
    is_text = x.ndim == 2 and x.dtype == torch.int64 and (x.shape[1] <= 1 or x.stride(1) == 1)
    require("x", f"{x.dtype} {list(x.shape)} of strides {x.stride()}", "[B, L] torch.int64 of last stride 1", is_text)
    check_device("x", x)
    rows, slots = x.shape
    require("x", f"{rows} rows", f"of 1 to {MAX_ROWS} rows", 0 < rows <= MAX_ROWS)
    require("block", block, f"1 to {min(MAX_BLOCK, window)}, the window's slots", 0 < block <= min(MAX_BLOCK, window))
    require("predicted", predicted, "at least 1", predicted > 0)
    require("x", "none", "of at least one slot", slots > 0)
    check_slots(rows, x.device, block_start=block_start, remaining=remaining, kv_start=kv_start, step=step)
    wanted = base.shape in ((), (1,), (rows,)) and base.dtype == torch.int32 and base.device == x.device
    require("base", f"{base.dtype} {list(base.shape)} on {base.device}", f"int32 on {x.device}, one or [{rows}]", wanted)
    require("seed", "one of them", "given with step, or neither", (seed is None) == (step is None))
    if seed is not None:
        check_shape("seed", seed, rows)
        is_key = seed.dtype == torch.int64 and seed.device == x.device and (rows == 1 or seed.stride(0) == 1)
        require("seed", f"{seed.dtype} on {seed.device}", f"contiguous torch.int64 on {x.device}", is_key)


def window_inputs(
    x: Tensor,
    base: Tensor,
    block_start: Tensor,
    remaining: Tensor,
    kv_start: Tensor,
    *,
    back: int = 0,
    window: int,
    block: int,
    predicted: int,
    shift: bool = False,
    mask_id: int,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    config: Config | None = None,
) -> WindowInputs:
    """Tokens of each row's window, and where the masked slots of its block are predicted:
    :func:`fastdllm_triton.reference.window_inputs`, which states the contract.

    ``config`` holds the launch parameters; :func:`select_config` chooses if not given.

    Raises:
        ValueError: an argument's rank, dtype, shape, device or range.
    """
    _check(x, base, block_start, remaining, window, block, predicted, kv_start, seed, step)
    (rows, slots), device, sample = x.shape, x.device, seed is not None

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    result = WindowInputs(
        ids=empty(rows, window),
        start=empty(rows, dtype=torch.int32),
        rows=empty(predicted),
        place=empty(rows, block, dtype=torch.int32),
        keys=empty(3, predicted if sample else 0),
        batch_row=empty(predicted),
    )
    config = config or select_config(rows, block)
    with torch.cuda.device_of(x):
        _window_inputs_kernel[(rows, triton.cdiv(window, config.block_w))](
            x,
            base,
            block_start,
            remaining,
            kv_start,
            seed,
            step,
            result.ids,
            result.start,
            result.rows,
            result.place,
            result.keys if sample else None,
            result.batch_row,
            x.stride(0),
            base.stride(0) if base.numel() > 1 else 0,
            rows,
            slots,
            window,
            block,
            predicted,
            back,
            mask_id,
            SHIFT=int(shift),
            SAMPLE=sample,
            BLOCK_R=config.block_r,
            BLOCK_N=config.block_n,
            BLOCK_W=config.block_w,
            num_warps=config.num_warps,
        )
    return result

"""What a masked-diffusion decoder needs to know about each row of logits, in one pass over them.

The states and their merge are those of ``_statistics``. A program takes a row, or a chunk of it where rows are few; each of
its lanes sums up ``WIDTH`` neighbouring tokens a step, the lanes merge at the end, and the chunks in a second, small kernel.
Tiles are in flight ahead of the one that is summed up, since a program waits for nothing else. Work per token is what limits
this pass beside memory: inside a lane's tokens the maximum is found first, so that a token
costs one exponential and the running sums are rescaled once a step.

Sampling is Gumbel-max in the same pass: ``argmax(logits + temperature * noise)`` follows softmax(logits / temperature). The
noise is keyed on (seed, position, step, token id), so a draw depends neither on the tiling nor on the batch.

| pointer                 | shape              | dtype          | owned by                                                 |
|-------------------------|--------------------|----------------|----------------------------------------------------------|
| logits_ptr              | [R, V]             | fp32/fp16/bf16 | caller, read; any strides                                |
| rows_ptr                | [R] or None        | int64          | caller, read; negative asks for nothing                  |
| forbidden_ptr           | [F] or [R, F]      | int64          | launcher, read; -1 forbids nothing                       |
| seed_ptr, step_ptr      | [R], stride 0 or 1 | int64          | launcher, read with SAMPLE                               |
| position_ptr            | [R] or None        | int64          | launcher, read with SAMPLE; None: the row's index        |
| temperature_ptr         | [R] or None        | fp32           | caller, read with SAMPLE; None: one for all, an argument |
| token_ptr               | [R]                | int64          | result, written without SPLIT                            |
| logit_ptr … entropy_ptr | [R]                | fp32           | result, written without SPLIT                            |
| partial_ptr             | [6, R, splits]     | fp32           | workspace, written with SPLIT                            |
| partial_id_ptr          | [R, splits]        | int32          | workspace, written with SPLIT                            |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import TokenStatistics
from ._arch import Arch, arch_of
from ._check import check_device, once
from ._statistics import (
    NO_ID,
    PARTIAL_FIELDS,
    check_sampling,
    forbid,
    forbidden_ids,
    gumbel_noise,
    launch_merge,
    merge_distribution,
    noise_keys,
    output_of,
    outputs,
    reduce_choice,
    reduce_distribution,
    store_partial,
    store_statistics,
    temperature_arguments,
    tile_choice,
    tile_distribution,
)
from ._tuned import gpu_name, nearest


@triton.jit
def _token_statistics_kernel(
    logits_ptr,
    rows_ptr,
    forbidden_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    temperature_ptr,
    token_ptr,
    logit_ptr,
    second_ptr,
    lse_ptr,
    rest_ptr,
    entropy_ptr,
    partial_ptr,
    partial_id_ptr,
    vocabulary,
    chunk,
    stride_row,
    stride_token,
    stride_seed,
    stride_position,
    stride_step,
    stride_field,
    temperature,
    FORBIDDEN: tl.constexpr,
    FORBIDDEN_BY_ROW: tl.constexpr,
    SAMPLE: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * chunk
    end = tl.minimum(begin + chunk, vocabulary)
    asked = row >= 0
    if rows_ptr is not None:
        asked = tl.load(rows_ptr + row) >= 0
        end = tl.where(asked, end, begin)
    logits_ptr += row * stride_row
    if FORBIDDEN_BY_ROW:
        forbidden_ptr += row * FORBIDDEN
    temperature = tl.full((), temperature, tl.float32)  # whatever type the caller gave the number
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    if SAMPLE:
        seed = tl.load(seed_ptr + row * stride_seed)
        step = tl.load(step_ptr + row * stride_step)
        position = row
        if position_ptr is not None:
            position = tl.load(position_ptr + row * stride_position)

    TILE: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)
    o = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH], tokens in memory order
    m = tl.full((LANES,), float("-inf"), tl.float32)
    t = tl.full((LANES,), float("-inf"), tl.float32)
    g = tl.full((LANES,), float("-inf"), tl.float32)
    c = tl.full((LANES,), float("-inf"), tl.float32)
    r = tl.zeros((LANES,), tl.float32)
    u = tl.zeros((LANES,), tl.float32)
    i = tl.full((LANES,), NO_ID, tl.int32)

    # A chunk is whole tiles, so only the end of the vocabulary needs a mask.
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        ids = start + o
        p = logits_ptr + tl.cast(start, tl.int64) * stride_token + o * stride_token
        x = tl.load(p, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
        x = forbid(x, ids, start, start + TILE, forbidden_ptr, FORBIDDEN)  # [LANES, WIDTH]

        m_x, t_x, r_x, u_x, first = tile_distribution(x, ids)
        if SAMPLE:
            counter = start // 4 + lane[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
            noisy = x + temperature * gumbel_noise(seed, counter, position, step)
            g_x, i_x, c_x = tile_choice(noisy, x, ids)
            better = g_x > g  # ids only rise, so the first of equals is kept
            g = tl.where(better, g_x, g)
            c = tl.where(better, c_x, c)
            i = tl.where(better, i_x, i)
        else:
            i = tl.where(m_x > m, first, i)
        m, t, r, u = merge_distribution(m, t, r, u, m_x, t_x, r_x, u_x)

    if not SAMPLE:
        g = m
        c = m
    m, t, r, u = reduce_distribution(m, t, r, u)
    g, i, c = reduce_choice(g, i, c)
    if SPLIT:
        offset = row * tl.num_programs(1) + part
        store_partial(partial_ptr, partial_id_ptr, offset, stride_field, None, m, t, r, u, g, i, c)
    else:
        store_statistics(token_ptr, logit_ptr, second_ptr, lse_ptr, rest_ptr, entropy_ptr, row, asked, m, t, r, u, i, c, SAMPLE)


@dataclass(frozen=True)
class Config:
    """How a launch tiles ``[R, V]``.

    Attributes:
        lanes: independent running states of a program, two a thread.
        width: neighbouring tokens a lane takes a step: one 16-byte load.
        chunk: tokens of a program, a multiple of ``lanes * width``.
        splits: programs a row.
        num_warps: warps of a program.
        num_stages: tiles in flight, and the one at work.
    """

    lanes: int
    width: int
    chunk: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4


def tiling(
    arch: Arch, rows: int, vocabulary: int, element_size: int, *, num_warps: int = 4, num_stages: int | None = None,
    splits: int | None = None,
) -> Config:  # fmt: skip
    """Splits rows until there are about four programs an SM, or as often as asked for, in chunks of at least four steps.

    On NVIDIA each has three tiles of 4 KB in flight: 48 KB an SM, where some 30 KB keep the memory of an H200 busy.
    """
    lanes, width = 2 * num_warps * arch.warp_size, 16 // element_size
    tile = lanes * width
    splits = max(1, min(splits or triton.cdiv(4 * arch.sms, rows), vocabulary // (4 * tile)))
    chunk = triton.cdiv(triton.cdiv(vocabulary, splits), tile) * tile
    num_stages = num_stages or (1 if arch.backend == "hip" else 4)
    return Config(lanes, width, chunk, triton.cdiv(vocabulary, chunk), num_warps, num_stages)


def select_config(
    arch: Arch, rows: int, vocabulary: int, element_size: int, sample: bool = False, gpu: str | None = None
) -> Config:
    """The tiling that was measured for about so many rows, or that of :func:`tiling`."""
    shape = {"vocabulary": vocabulary, "element_size": element_size, "sample": sample}
    measured = nearest(gpu, "token_statistics", {"rows": rows}, **shape) or {}
    return tiling(arch, rows, vocabulary, element_size, **measured)


def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    out: TokenStatistics | None = None,
    rows: Tensor | None = None,
    config: Config | None = None,
) -> TokenStatistics:
    """Statistics of each row of logits: :func:`fastdllm_triton.reference.token_statistics`, which states the contract.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16, any strides.
        temperature, seed, position, step, forbidden, out: as there.
        rows: ``[R]`` int64 on the device: a row with a negative entry asks for nothing, its logits are not read and its
            statistics are those of a row that was not asked for.
        config: launch parameters; :func:`select_config` chooses if not given.

    Raises:
        ValueError: an argument's rank, dtype, shape, device or range.
    """
    _check(logits, rows)
    (count, vocabulary), device = logits.shape, logits.device
    sample = check_sampling(temperature, seed, count, device)
    temperatures, temperature = temperature_arguments(temperature)
    ids = forbidden_ids(forbidden, count, vocabulary, device)
    out = output_of(out, count, device)
    if count == 0:
        return out
    seeds, positions, steps = noise_keys(seed if sample else None, position, step, count, device)

    if config is None:
        config = select_config(arch_of(device), count, vocabulary, logits.element_size(), sample, gpu_name(device))
    split = config.splits > 1
    partial, partial_id = None, None
    if split:
        partial = torch.empty(PARTIAL_FIELDS, count, config.splits, device=device)
        partial_id = torch.empty(count, config.splits, dtype=torch.int32, device=device)
    with torch.cuda.device_of(logits):
        _token_statistics_kernel[(count, config.splits)](
            logits,
            rows,
            ids,
            seeds,
            positions,
            steps,
            temperatures,
            *outputs(out),
            partial,
            partial_id,
            vocabulary,
            config.chunk,
            *logits.stride(),
            0 if seeds is None else seeds.stride(0),
            0 if positions is None else positions.stride(0),
            0 if steps is None else steps.stride(0),
            count * config.splits,
            temperature,
            FORBIDDEN=0 if ids is None else ids.shape[-1],
            FORBIDDEN_BY_ROW=ids is not None and ids.dim() == 2,
            SAMPLE=sample,
            SPLIT=split,
            LANES=config.lanes,
            WIDTH=config.width,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if partial is not None and partial_id is not None:
            launch_merge(partial, partial_id, rows, out, sample)
    return out


@once
def _check(logits: Tensor, rows: Tensor | None) -> None:
    """Checks the layouts of :func:`token_statistics`."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be [R, V], got shape {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if not 0 < logits.shape[1] <= 2**30:
        raise ValueError(f"logits must have 1 to 2^30 tokens, got {logits.shape[1]}")
    check_device("logits", logits)
    if rows is not None:
        wanted = rows.shape == logits.shape[:1] and rows.dtype == torch.int64 and rows.device == logits.device
        if not (wanted and rows.is_contiguous()):
            actual = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
            raise ValueError(f"rows must be contiguous int64 [{logits.shape[0]}] on {logits.device}, got {actual}")

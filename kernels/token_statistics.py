"""What a masked-diffusion decoder needs to know about each row of logits, in one pass over them.

The states and their merge are those of ``_statistics``. A program takes a row, or a chunk of it where rows are few; each of
its lanes sums up ``WIDTH`` neighbouring tokens a step, the lanes merge at the end, and the chunks in a second, small kernel.
Tiles are in flight ahead of the one that is summed up, since a program waits for nothing else. Work per token is what limits
this pass beside memory: inside a lane's tokens the maximum is found first, so that a token
costs one exponential and the running sums are rescaled once a step.

Sampling is Gumbel-max in the same pass: ``argmax(logits + temperature * noise)`` follows softmax(logits / temperature). The
noise is keyed on (seed, position, step, token id), so a draw depends neither on the tiling nor on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import TokenStatistics
from ._arch import Arch, arch_of
from ._check import check_device, once
from ._compile import CompileCase
from ._statistics import (
    NO_ID,
    PARTIAL_FIELDS,
    check_sampling,
    forbid,
    forbidden_ids,
    gumbel_noise,
    launch_merge,
    merge_block,
    merge_distribution,
    merge_statistics_kernel,
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

# Pointers                shape                  dtype             owned by
# logits_ptr              [R, V]                 fp32/fp16/bf16    caller, read; any strides
# rows_ptr                [R] or None            int64             caller, read; negative asks for nothing
# forbidden_ptr           [F] or [R, F]          int64             launcher, read; -1 forbids nothing
# seed_ptr, step_ptr      [R], stride 0 or 1     int64             launcher, read with SAMPLE
# position_ptr            [R] or None            int64             launcher, read with SAMPLE; None: the row's index
# temperature_ptr         [R] or None            fp32              caller, read with SAMPLE; None: one for all, an argument
# token_ptr               [R]                    int64             result, written without SPLIT
# logit_ptr … entropy_ptr [R]                    fp32              result, written without SPLIT
# partial_ptr             [6, R, splits]         fp32              workspace, written with SPLIT
# partial_id_ptr          [R, splits]            int32             workspace, written with SPLIT


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
class TokenStatisticsConfig:
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


def token_statistics_config(
    arch: Arch, rows: int, vocabulary: int, element_size: int, sample: bool = False, gpu: str | None = None
) -> TokenStatisticsConfig:
    """Splits rows until there are about four programs an SM, in chunks of at least four steps.

    On NVIDIA each has three tiles of 4 KB in flight: 48 KB an SM, where some 30 KB keep the memory of an H200 busy.
    """
    shape = {"vocabulary": vocabulary, "element_size": element_size, "sample": sample}
    found = nearest(gpu, "token_statistics", {"rows": rows}, **shape) or {}
    num_warps, num_stages = found.get("num_warps", 4), found.get("num_stages", 1 if arch.backend == "hip" else 4)
    lanes, width = 2 * num_warps * arch.warp_size, 16 // element_size
    tile = lanes * width
    wanted = found.get("splits") or triton.cdiv(4 * arch.sms, rows)
    splits = max(1, min(wanted, vocabulary // (4 * tile)))
    chunk = triton.cdiv(triton.cdiv(vocabulary, splits), tile) * tile
    return TokenStatisticsConfig(lanes, width, chunk, triton.cdiv(vocabulary, chunk), num_warps, num_stages)


def launches(arch: Arch, rows: int, vocabulary: int, element_size: int, sample: bool = False, gpu: str | None = None) -> int:
    """Launches of a call with keys on the device: the kernel, and the merge where rows are split."""
    return 1 if token_statistics_config(arch, rows, vocabulary, element_size, sample, gpu).splits == 1 else 2


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
) -> TokenStatistics:
    """Statistics of each row of logits: :func:`fastdllm_triton.reference.token_statistics`, which states the contract.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16, any strides.
        temperature, seed, position, step, forbidden, out: as there.
        rows: ``[R]`` int64 on the device: a row with a negative entry asks for nothing, its logits are not read and its
            statistics are those of a row that was not asked for.

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

    config = token_statistics_config(arch_of(device), count, vocabulary, logits.element_size(), sample, gpu_name(device))
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
            given = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
            raise ValueError(f"rows must be contiguous int64 [{logits.shape[0]}] on {logits.device}, got {given}")


def compile_cases(arch: Arch) -> list[CompileCase]:
    """The vocabularies of LLaDA and Dream, from one row to 512; one case for all that launch the same code."""
    outs = ("token_ptr", "logit_ptr", "second_ptr", "lse_ptr", "rest_ptr", "entropy_ptr")
    partials = ("partial_ptr", "partial_id_ptr")
    ids_and_keys = dict.fromkeys(("forbidden_ptr", "seed_ptr", "position_ptr", "step_ptr"), "*i64") | {"temperature_ptr": "*fp32"}
    numbers = ("vocabulary", "chunk", "stride_row", "stride_field")
    cases: dict[str, CompileCase] = {}
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for vocabulary in (126_464, 152_064):
            for rows in (1, 16, 32, 64, 128, 512, 1024):
                for sample, by_row in ((False, False), (True, False), (True, True)):
                    config = token_statistics_config(arch, rows, vocabulary, size, sample)
                    split = config.splits > 1
                    label = f"{dtype}{' split' if split else ''}{' sample' if sample else ''}{' by row' if by_row else ''}"
                    signature = {
                        "logits_ptr": f"*{dtype}",
                        **ids_and_keys,
                        "token_ptr": "*i64",
                        **dict.fromkeys(outs[1:], "*fp32"),
                    }
                    signature |= {"partial_ptr": "*fp32", "partial_id_ptr": "*i32"} | dict.fromkeys(numbers, "i32")
                    signature |= {"stride_position": "i32", "stride_seed": "i32", "stride_step": "i32", "temperature": "fp32"}
                    absent = [] if sample else ["seed_ptr", "position_ptr", "step_ptr"]
                    absent += [] if by_row else ["temperature_ptr"]
                    absent += [] if split else partials
                    constexprs: dict[str, Any] = dict.fromkeys(["rows_ptr", *absent])
                    constexprs |= {
                        "stride_token": 1,
                        "FORBIDDEN": 1,
                        "FORBIDDEN_BY_ROW": by_row,
                        "SAMPLE": sample,
                        "SPLIT": split,
                    }
                    constexprs |= {"LANES": config.lanes, "WIDTH": config.width, "STAGES": config.num_stages}
                    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
                    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
                    cases[label] = CompileCase(
                        op="token_statistics",
                        kernel=_token_statistics_kernel,
                        config=label,
                        signature=signature,
                        constexprs=constexprs,
                        divisible=pointers + numbers[:3],
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                    )
    for block in (16, 512):
        for sample in (False, True):
            pointers = (*partials, "rows_ptr", *outs)
            cases[f"merge {block} {sample}"] = CompileCase(
                op="token_statistics",
                kernel=merge_statistics_kernel,
                config=f"BLOCK={merge_block(block)}{' sample' if sample else ''}",
                signature={"partial_ptr": "*fp32", "partial_id_ptr": "*i32", "rows_ptr": "*i64", "token_ptr": "*i64"}
                | dict.fromkeys(outs[1:], "*fp32")
                | {"parts": "i32", "stride_field": "i32"},
                constexprs={"SAMPLE": sample, "BLOCK": merge_block(block)},
                divisible=pointers,
            )
    return list(cases.values())

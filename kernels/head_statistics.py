"""Token statistics straight from hidden states: the product with the head's weight never reaches memory as logits.

For few rows the head is a stream of its weight. Each program owns a range of the vocabulary, equally long for all, and
walks it in tiles; a tile's logits stay in registers, are summed up by the states of ``_statistics`` and merged into one
running state a row, so that a program leaves 28 bytes a row for the merge kernel. The weight is the first operand of the
product: on Hopper only an M of 64 or more reaches wgmma, and the vocabulary is the long side.

For more rows than :data:`FUSED_ROWS` the product is left to cuBLAS and ``token_statistics`` reads its logits.

| pointer            | shape              | dtype          | owned by                                                 |
|--------------------|--------------------|----------------|----------------------------------------------------------|
| hidden_ptr         | [N, E]             | fp32/fp16/bf16 | caller, read; last stride 1                              |
| weight_ptr         | [V, E]             | same           | caller, read; last stride 1                              |
| bias_ptr           | [V] or None        | any float      | caller, read                                             |
| rows_ptr           | [R] or None        | int64          | caller, read; -1 asks for nothing, None: rows in order   |
| forbidden_ptr      | [F] or [R, F]      | int64          | launcher, read; -1 forbids nothing                       |
| seed_ptr, step_ptr | [R], stride 0 or 1 | int64          | launcher, read with SAMPLE                               |
| position_ptr       | [R] or None        | int64          | launcher, read with SAMPLE; None: the row's index        |
| temperature_ptr    | [R] or None        | fp32           | caller, read with SAMPLE; None: one for all, an argument |
| partial_ptr        | [6, R, parts]      | fp32           | workspace, written                                       |
| partial_id_ptr     | [R, parts]         | int32          | workspace, written                                       |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import DEFAULT_LAUNCH, LaunchOptions, TokenStatistics
from ._arch import Arch, arch_of
from ._check import INTERPRETED, check_device, once
from ._statistics import (
    NO_ID,
    PARTIAL_FIELDS,
    check_sampling,
    forbid,
    forbid_by_row,
    forbidden_ids,
    gumbel_noise,
    launch_merge,
    merge_distribution,
    noise_keys,
    output_of,
    outputs,
    store_partial,
    temperature_arguments,
    tile_choice,
    tile_distribution,
)
from ._tuned import gpu_name, tuned
from .token_statistics import token_statistics

#: Most rows of the fused kernel, without and with noise. Published figures of a like kernel (FlashSampling, arXiv 2603.15854,
#: against cuBLAS and a separate sampler at V = 151,936, E = 4,096) put the crossover on Hopper between 64 and 128 rows.
#: Elsewhere the limit is the largest tile of rows whose statistics stay in registers: the compile report shows spills beyond
#: it on sm_100, where a thread reads whole rows of tensor memory, and on gfx942 with noise. A second tile of rows would
#: stream the weight twice.
FUSED_ROWS = {
    "sm_80": (64, 64),
    "sm_89": (64, 64),
    "sm_90": (64, 64),
    "sm_100": (32, 32),
    "sm_120": (64, 64),
    "gfx942": (64, 16),
}


#: What a measurement says where cuBLAS and a separate pass were faster than the fused kernel.
BY_LIBRARY = {"library": True}


@triton.jit
def _head_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    forbidden_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    temperature_ptr,
    partial_ptr,
    partial_id_ptr,
    rows,
    vocabulary,
    part,
    stride_hidden,
    stride_weight,
    stride_seed,
    stride_position,
    stride_step,
    stride_field,
    temperature,
    E: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    FORBIDDEN_BY_ROW: tl.constexpr,
    SAMPLE: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, vocabulary)
    temperature = tl.full((), temperature, tl.float32)
    o_r = tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_V)
    o_e = tl.arange(0, BLOCK_E)
    in_r = o_r < rows
    row = tl.where(in_r, o_r, -1).to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + o_r, mask=in_r, other=-1)
    asked = row >= 0  # [BLOCK_R]
    if tl.max(row, 0) < 0:
        return  # the merge reads no partials of rows that ask for nothing
    if SAMPLE:
        seed = tl.load(seed_ptr + o_r * stride_seed, mask=in_r, other=0)[:, None]
        step = tl.load(step_ptr + o_r * stride_step, mask=in_r, other=0)[:, None]
        position = o_r.to(tl.int64)[:, None]
        if position_ptr is not None:
            position = tl.load(position_ptr + o_r * stride_position, mask=in_r, other=0)[:, None]

    p_hidden = hidden_ptr + row[:, None] * stride_hidden + o_e[None, :]  # [BLOCK_R, BLOCK_E]
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    t = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    g = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    c = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    r = tl.zeros((BLOCK_R,), tl.float32)
    u = tl.zeros((BLOCK_R,), tl.float32)
    i = tl.full((BLOCK_R,), NO_ID, tl.int32)

    for start in range(begin, end, BLOCK_V):
        in_v = start + o_v < end
        p_weight = weight_ptr + (start + o_v).to(tl.int64)[:, None] * stride_weight + o_e[None, :]  # [BLOCK_V, BLOCK_E]
        logits = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
        for e in range(0, E, BLOCK_E):
            mask_w, mask_h = in_v[:, None], asked[:, None]
            if E % BLOCK_E != 0:
                mask_w, mask_h = mask_w & (e + o_e < E)[None, :], mask_h & (e + o_e < E)[None, :]
            w = tl.load(p_weight + e, mask=mask_w, other=0.0)
            h = tl.load(p_hidden + e, mask=mask_h, other=0.0)
            logits = tl.dot(w, tl.trans(h), logits, input_precision="ieee")
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + start + o_v, mask=in_v, other=0.0).to(tl.float32)[:, None]
        if LOGITS is not None:
            logits = logits.to(LOGITS).to(tl.float32)

        ids = (start + o_v)[None, :]
        x = tl.where(in_v[None, :], tl.trans(logits), float("-inf"))  # [BLOCK_R, BLOCK_V]
        if FORBIDDEN_BY_ROW:
            x = forbid_by_row(x, ids, o_r, in_r, forbidden_ptr, FORBIDDEN)
        else:
            x = forbid(x, ids, start, start + BLOCK_V, forbidden_ptr, FORBIDDEN)
        m_x, t_x, r_x, u_x, first = tile_distribution(x, ids)
        if SAMPLE:
            counter = tl.zeros((BLOCK_R, BLOCK_V // 4), tl.int32) + (start // 4 + tl.arange(0, BLOCK_V // 4))[None, :]
            scale = temperature
            if temperature_ptr is not None:  # read again in each tile rather than kept
                scale = tl.load(temperature_ptr + o_r, mask=in_r, other=0.0)[:, None]
            noisy = x + scale * gumbel_noise(seed, counter, position, step)
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
    offset = o_r.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_partial(partial_ptr, partial_id_ptr, offset, stride_field, asked, m, t, r, u, g, i, c)


@dataclass(frozen=True)
class Config:
    """How the fused kernel tiles ``[R, V, E]``.

    Attributes:
        block_rows: rows of a tile; one tile takes them all.
        block_vocabulary, block_width: tokens and columns of a tile of the weight.
        part: tokens of a program, a multiple of 16.
        parts: programs.
        num_warps, num_stages: launch options.
    """

    block_rows: int
    block_vocabulary: int
    block_width: int
    part: int
    parts: int
    num_warps: int
    num_stages: int


def _tile(arch: Arch, block_rows: int, element_size: int, sample: bool) -> tuple[int, int, int]:
    """Tokens of a tile, warps, and programs that share an SM: two where there is room, since the statistics of one then overlap
    the other's stream.

    The statistics hold several tiles of logits in registers at once, the noise and float32 products a few more, and on sm_100
    a thread has whole rows of tensor memory. The compile report shows that these choices spill nowhere.
    """
    room = arch.shared_bytes > 2**17
    load = block_rows * (2 if sample else 1) * (element_size // 2) * (2 if arch.name == "sm_100" and element_size == 2 else 1)
    block = 128 if load <= 32 else 64
    if arch.backend == "hip":
        return block, 4, 1
    # Rows that sample and forbid ids of their own hold the most.
    if element_size == 4 and sample and block_rows == 64 and (arch.name == "sm_90" or not room):
        return 16 if room else 32, 8, 1
    if arch.name == "sm_90" and sample and block_rows == 32 and element_size == 2:
        return 32, 4, 2
    if element_size == 4 or not room:
        return block, 4 if block_rows == 64 and not sample else 8, 2 if room and (not sample or block_rows == 16) else 1
    if arch.name == "sm_90" and load == 64 and not sample:
        return 128, 8, 1  # 64 rows beside tiles of 64 tokens: as much to read from the L2 cache as from memory, again
    if load > 64:
        return block, 8, 1
    return block, 8 if load <= 32 and not sample and arch.name != "sm_100" else 4, 2


def select_config(
    arch: Arch, rows: int, vocabulary: int, width: int, element_size: int, sample: bool, gpu: str | None = None
) -> Config | None:
    """The fused kernel's tiling, or None where cuBLAS and a separate pass are the better choice.

    As many programs as are resident at once share the vocabulary equally: a whole number of tiles each would leave a
    quarter of the last wave idle.
    """
    block_rows = max(16, triton.next_power_of_2(rows))
    shape = {"block_rows": block_rows, "vocabulary": vocabulary, "width": width, "element_size": element_size, "sample": sample}
    measured = tuned(gpu, "head_statistics", **shape)
    if measured == BY_LIBRARY if measured else rows > FUSED_ROWS[arch.name][sample]:
        return None
    block_vocabulary, num_warps, resident = _tile(arch, block_rows, element_size, sample)
    block_width = 128 // element_size
    stage = (block_vocabulary + block_rows) * block_width * element_size
    num_stages = 2 if arch.backend == "hip" else min(6, (arch.shared_bytes_per_sm // resident - 1024) // stage)
    parts = resident * arch.sms
    if measured:
        block_vocabulary, block_width, parts = measured["block_vocabulary"], measured["block_width"], measured["parts"]
        num_warps, num_stages = measured["num_warps"], measured["num_stages"]
    part = triton.cdiv(triton.cdiv(vocabulary, parts), 16) * 16
    return Config(block_rows, block_vocabulary, block_width, part, triton.cdiv(vocabulary, part), num_warps, num_stages)


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    logits_dtype: torch.dtype | None = None,
    out: TokenStatistics | None = None,
    config: Config | None = None,
    options: LaunchOptions = DEFAULT_LAUNCH,
) -> TokenStatistics:
    """Statistics of ``hidden[rows] @ weight.T``: :func:`fastdllm_triton.reference.head_statistics`, which states the contract.

    Args:
        hidden: ``[N, E]`` float32, float16 or bfloat16, last stride 1.
        weight: ``[V, E]``, same dtype, last stride 1.
        rows: ``[R]`` int64 on the device; indices are not checked, they are not known on the host.
        bias, temperature, seed, position, step, forbidden, logits_dtype, out: as there.
        config: run the fused kernel so; :func:`select_config` chooses if not given.
        options: how to launch.

    Raises:
        ValueError: an argument's rank, dtype, shape, device or range.
    """
    _check(hidden, weight, rows, bias, logits_dtype)
    device, (vocabulary, width) = hidden.device, weight.shape
    rows = None if rows is None else rows.contiguous()
    count = hidden.shape[0] if rows is None else len(rows)
    sample = check_sampling(temperature, seed, count, device)
    ids = forbidden_ids(forbidden, count, vocabulary, device)
    out = output_of(out, count, device)
    if count == 0:
        return out
    choice: dict[str, Any] = {"temperature": temperature, "seed": seed, "position": position, "step": step, "forbidden": ids}
    if config is None and options.batch_invariant:
        return _batch_invariant(hidden, weight, rows, count, sample, out, choice, bias=bias, logits_dtype=logits_dtype)
    sizes = (count, vocabulary, width, hidden.element_size(), sample)
    if config is None:
        config = select_config(arch_of(device), *sizes, gpu_name(device))
    if config is None:
        return by_library(hidden, weight, rows=rows, bias=bias, logits_dtype=logits_dtype, out=out, **choice)

    temperatures, temperature = temperature_arguments(temperature)
    seeds, positions, steps = noise_keys(seed if sample else None, position, step, count, device)
    partial = torch.empty(PARTIAL_FIELDS, count, config.parts, device=device)
    partial_id = torch.empty(count, config.parts, dtype=torch.int32, device=device)
    with torch.cuda.device_of(hidden):
        _head_statistics_kernel[(config.parts,)](
            hidden,
            weight,
            bias,
            rows,
            ids,
            seeds,
            positions,
            steps,
            temperatures,
            partial,
            partial_id,
            count,
            vocabulary,
            config.part,
            hidden.stride(0),
            weight.stride(0),
            0 if seeds is None else seeds.stride(0),
            0 if positions is None else positions.stride(0),
            0 if steps is None else steps.stride(0),
            count * config.parts,
            temperature,
            E=width,
            FORBIDDEN=0 if ids is None else ids.shape[-1],
            FORBIDDEN_BY_ROW=ids is not None and ids.dim() == 2,
            SAMPLE=sample,
            LOGITS=_ROUNDED.get(logits_dtype),
            BLOCK_R=config.block_rows,
            BLOCK_V=config.block_vocabulary,
            BLOCK_E=config.block_width,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        launch_merge(partial, partial_id, rows, out, sample)
    return out


def by_library(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    **choice: Any,
) -> TokenStatistics:
    """The same by cuBLAS, whose logits ``token_statistics`` reads."""
    return token_statistics(_logits(hidden, weight, rows, bias, logits_dtype), rows=rows, **choice)


def _batch_invariant(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, count: int, sample: bool, out: TokenStatistics, choice: dict[str, Any],
    **logits: Any,
) -> TokenStatistics:  # fmt: skip
    """One tiling for any number of rows: always as many at a time, those made up ask for nothing."""
    arch = arch_of(hidden.device)
    tile = min(FUSED_ROWS[arch.name])
    config = select_config(arch, tile, weight.shape[0], weight.shape[1], hidden.element_size(), sample)
    rows = torch.arange(count, device=hidden.device) if rows is None else rows
    surplus = -count % tile
    rows = torch.nn.functional.pad(rows, (0, surplus), value=-1)
    if choice["position"] is None:
        choice["position"] = torch.arange(count, device=hidden.device)
    by_row = {
        name: value for name, value in choice.items() if isinstance(value, Tensor) and value.dim() == 1 + (name == "forbidden")
    }
    padded = {name: torch.cat((value, value.new_zeros(surplus, *value.shape[1:]))) for name, value in by_row.items()}
    parts = [
        head_statistics(
            hidden,
            weight,
            rows=rows[i : i + tile],
            config=config,
            **logits,
            **choice | {name: value[i : i + tile] for name, value in padded.items()},
        )
        for i in range(0, len(rows), tile)
    ]
    entries = zip(*map(outputs, parts), strict=True)
    return out.copy_(TokenStatistics(*(torch.cat(entry)[:count] for entry in entries)))


#: Triton's name of a dtype that logits are rounded to.
_ROUNDED: dict[torch.dtype | None, tl.dtype] = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@once
def _check(hidden: Tensor, weight: Tensor, rows: Tensor | None, bias: Tensor | None, logits_dtype: torch.dtype | None) -> None:
    """Checks the layouts of :func:`head_statistics`."""
    if hidden.dim() != 2 or hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hidden must be [N, E] float32, float16 or bfloat16, got {hidden.dtype} {list(hidden.shape)}")
    device, (vocabulary, width) = hidden.device, (weight.shape[0], hidden.shape[1])
    check_device("hidden", hidden)
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        raise ValueError("hidden must be float32 or float16 in Triton's interpreter, which multiplies the bits of bfloat16")
    _check_tensor("weight", weight, (weight.shape[0], width), hidden.dtype, device)
    if not 0 < vocabulary <= 2**30:
        raise ValueError(f"weight must have 1 to 2^30 tokens, got {vocabulary}")
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if width > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} must have last stride 1, got strides {matrix.stride()}")
    if bias is not None:
        _check_tensor("bias", bias, (vocabulary,), bias.dtype, device)
        if not bias.is_floating_point() or not bias.is_contiguous():
            raise ValueError(f"bias must be contiguous and floating point, got {bias.dtype} of strides {bias.stride()}")
    if rows is not None:
        _check_tensor("rows", rows, (rows.numel(),), torch.int64, device)
    if logits_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits_dtype must be float32, float16, bfloat16 or None, got {logits_dtype}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises unless a tensor is what it must be."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, got {actual}")


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor | None, bias: Tensor | None, logits_dtype: torch.dtype | None) -> Tensor:
    """``[R, V]`` logits by matmul, rounded once; rows that ask for nothing get those of row 0."""
    if rows is not None:
        hidden = hidden.index_select(0, rows.clamp(min=0))
    wanted = logits_dtype or torch.float32
    if hidden.dtype == wanted and bias is None:
        return hidden @ weight.T
    if hidden.dtype == torch.float32:
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    if bias is not None:
        logits += bias
    return logits.to(wanted)

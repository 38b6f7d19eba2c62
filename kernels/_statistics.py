"""The algebra of token statistics, shared by ``token_statistics`` and ``head_statistics``.

A set of logits is summed up by the distribution part ``(m, t, r, u)`` and the choice part ``(g, i, c)``:

    m   its largest logit                       t   its second largest (m again in a tie)
    r   sum of exp(x - m) over all logits but one of value m
    u   sum of exp(x - m) (x - m) over the same
    g   what the choice maximises: the logit, or with Gumbel noise (Maddison et al., arXiv 1411.0030) the noisy logit
    i   the lowest token id of a maximal g      c   that token's logit

Two disjoint sets merge by rescaling the sums of the one with the smaller maximum, as in online softmax (Milakov &
Gimelshein, arXiv 1805.02867). Leaving the maximum out of r keeps the odds against a nearly certain token accurate where
float32 probabilities have become 1. Sums are float32; the last few operations of a row are float64.

-inf is the empty set's maximum and its sums are 0. A NaN logit makes r NaN, and r keeps it through every merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import TokenStatistics
from ._limits import MAX_FORBIDDEN

#: Larger than any token id.
NO_ID = tl.constexpr(2**31 - 1)
#: exp of less is 0 in float32. Differences are kept above it where 0 would meet -inf in a product.
FLOOR = tl.constexpr(-200.0)
#: Fourth word of the random counter: numbers that choose tokens (reference/_random.py).
STREAM_TOKEN = tl.constexpr(0)
#: Partial states are float32 ``[PARTIAL_FIELDS, rows, parts]`` in the order m, t, r, u, g, c, and int32 ids ``[rows, parts]``.
PARTIAL_FIELDS = 6


@triton.jit
def merge_distribution(m_a, t_a, r_a, u_a, m_b, t_b, r_b, u_b):
    """(m, t, r, u) of the union of two disjoint sets."""
    a_first = m_a >= m_b
    m = tl.where(a_first, m_a, m_b)
    lower = tl.where(a_first, m_b, m_a)
    t = tl.maximum(lower, tl.where(a_first, t_a, t_b))
    empty = lower == float("-inf")
    below = tl.where(empty, 0.0, lower - m)
    scale = tl.exp(below)
    mass = tl.where(a_first, r_b, r_a) + tl.where(empty, 0.0, 1.0)  # in units of exp(lower)
    r = tl.where(a_first, r_a, r_b) + scale * mass
    u = tl.where(a_first, u_a, u_b) + scale * (tl.where(a_first, u_b, u_a) + tl.maximum(below, FLOOR) * mass)
    return m, t, r, u


@triton.jit
def merge_choice(g_a, i_a, c_a, g_b, i_b, c_b):
    """(g, i, c) of the union of two disjoint sets; ties go to the lowest id."""
    a_first = (g_a > g_b) | ((g_a == g_b) & (i_a < i_b))
    return tl.where(a_first, g_a, g_b), tl.where(a_first, i_a, i_b), tl.where(a_first, c_a, c_b)


@triton.jit
def reduce_distribution(m, t, r, u):
    """(m, t, r, u) of the union of the disjoint sets in the lanes ``[N]``."""
    top = tl.max(m, 0)
    lane = tl.arange(0, m.shape[0])
    first = lane == tl.min(tl.where(m == top, lane, NO_ID), 0)  # the lane whose maximum stays left out
    empty = m == float("-inf")
    below = tl.where(empty, 0.0, m - top)
    scale = tl.exp(below)
    mass = r + tl.where(first | empty, 0.0, 1.0)
    second = tl.max(tl.where(first, t, m), 0)
    return top, second, tl.sum(scale * mass, 0), tl.sum(scale * (u + tl.maximum(below, FLOOR) * mass), 0)


@triton.jit
def reduce_choice(g, i, c):
    """(g, i, c) of the union of the disjoint sets in the lanes ``[N]``."""
    top = tl.max(g, 0)
    first = tl.min(tl.where(g == top, i, NO_ID), 0)
    return top, first, tl.max(tl.where(i == first, c, float("-inf")), 0)


@triton.jit
def tile_distribution(logits, ids):
    """(m, t, r, u) of each row of ``logits [M, K]`` and the lowest id of its maximum; ids broadcast against the logits."""
    m = tl.max(logits, 1)  # [M]
    first = tl.min(tl.where(logits == m[:, None], ids, NO_ID), 1)
    others = tl.where(ids == first[:, None], float("-inf"), logits)  # [M, K]
    t = tl.max(others, 1)
    below = others - tl.where(m == float("-inf"), 0.0, m)[:, None]
    e = tl.exp(below)
    return m, t, tl.sum(e, 1), tl.sum(e * tl.maximum(below, FLOOR), 1), first


@triton.jit
def tile_choice(noisy, logits, ids):
    """(g, i, c) of each row of ``noisy [M, K]``."""
    g = tl.max(noisy, 1)  # [M]
    i = tl.min(tl.where(noisy == g[:, None], ids, NO_ID), 1)
    return g, i, tl.max(tl.where(ids == i[:, None], logits, float("-inf")), 1)


@triton.jit
def forbid(logits, ids, start, end, forbidden_ptr, FORBIDDEN: tl.constexpr):
    """-inf for the forbidden ids of a tile that holds the tokens from ``start`` to ``end``; an id of -1 is in no tile."""
    for j in tl.static_range(FORBIDDEN):
        token = tl.load(forbidden_ptr + j)
        if (token >= start) & (token < end):  # one scalar test spares all other tiles
            logits = tl.where(ids == token, float("-inf"), logits)
    return logits


@triton.jit
def forbid_by_row(logits, ids, row, in_row, forbidden_ptr, FORBIDDEN: tl.constexpr):
    """-inf for the ids that each row ``[M]`` of ``logits [M, K]`` forbids, from ``[R, FORBIDDEN]``; -1 is none."""
    for j in range(FORBIDDEN):  # a loop: unrolled, a few ids would spill
        token = tl.load(forbidden_ptr + (row * FORBIDDEN + j), mask=in_row, other=-1)
        token = tl.minimum(token, NO_ID).to(tl.int32)  # half the registers
        logits = tl.where(ids == token[:, None], float("-inf"), logits)
    return logits


@triton.jit
def gumbel_noise(seed, counter, position, step):
    """Gumbel noise ``[M, 4 Q]`` for ``counter [M, Q]``: token t uses word t % 4 of counter t // 4."""
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), position.to(tl.uint32), step.to(tl.uint32), STREAM_TOKEN)
    bits = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, Q, 2, 2], the words in order
    bits = tl.reshape(bits, (counter.shape[0], 4 * counter.shape[1]))
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # log1p(-v): the quotient corrects log for what the rounding of 1 - v has lost.
    w = 1 - v
    log1p = tl.where(w == 1, -v, tl.log(w) * (v / (1 - w)))
    return -tl.log(-log1p)


@triton.jit
def store_partial(partial_ptr, partial_id_ptr, offset, stride_field, mask, m, t, r, u, g, i, c):
    """Writes states to the workspace."""
    tl.store(partial_ptr + offset, m, mask=mask)
    tl.store(partial_ptr + stride_field + offset, t, mask=mask)
    tl.store(partial_ptr + 2 * stride_field + offset, r, mask=mask)
    tl.store(partial_ptr + 3 * stride_field + offset, u, mask=mask)
    tl.store(partial_ptr + 4 * stride_field + offset, g, mask=mask)
    tl.store(partial_ptr + 5 * stride_field + offset, c, mask=mask)
    tl.store(partial_id_ptr + offset, i, mask=mask)


@triton.jit
def store_statistics(
    token_ptr, logit_ptr, second_ptr, lse_ptr, rest_ptr, entropy_ptr, row, asked, m, t, r, u, i, c, SAMPLE: tl.constexpr
):
    """Turns a row's state into its statistics and writes them."""
    broken = (r != r) | (m == float("inf"))
    choice = (m > float("-inf")) & (broken == 0) & asked
    mass = 1 + r.to(tl.float64)
    log_mass = tl.log(mass)
    if SAMPLE:
        best = c == m
        second = tl.where(best, t, m)
        rest = tl.where(best, r, (tl.exp(m.to(tl.float64) - c.to(tl.float64)) * mass - 1).to(tl.float32))
    else:
        second = t
        rest = r
    nan = float("nan")
    unknown = broken | (asked == 0)
    tl.store(token_ptr + row, tl.where(choice, i, -1).to(tl.int64))
    tl.store(logit_ptr + row, tl.where(unknown, nan, c))
    tl.store(second_ptr + row, tl.where(unknown, nan, second))
    tl.store(lse_ptr + row, tl.where(unknown, nan, (m.to(tl.float64) + log_mass).to(tl.float32)))
    tl.store(rest_ptr + row, tl.where(choice, rest, float("inf")))
    tl.store(entropy_ptr + row, tl.where(choice, (log_mass - u.to(tl.float64) / mass).to(tl.float32), nan))


@triton.jit
def merge_statistics_kernel(
    partial_ptr,  # [6, R, parts] fp32, read
    partial_id_ptr,  # [R, parts] int32, read
    rows_ptr,  # [R] int64 or None: -1 asks for nothing, and nothing was written to its partials
    token_ptr,  # [R] int64, written, as are the five below in fp32
    logit_ptr,
    second_ptr,
    lse_ptr,
    rest_ptr,
    entropy_ptr,
    parts,
    stride_field,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: merges the row's parts and writes its statistics."""
    row = tl.program_id(0).to(tl.int64)
    asked = row >= 0
    if rows_ptr is not None:
        asked = tl.load(rows_ptr + row) >= 0
    o = tl.arange(0, BLOCK)
    empty = tl.full((BLOCK,), float("-inf"), tl.float32)
    m, t, g, c = empty, empty, empty, empty
    r = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    i = tl.full((BLOCK,), NO_ID, tl.int32)
    for start in range(0, parts, BLOCK):
        mask = start + o < tl.where(asked, parts, 0)  # [BLOCK]
        p = partial_ptr + row * parts + start + o
        m_p = tl.load(p, mask=mask, other=float("-inf"))
        t_p = tl.load(p + stride_field, mask=mask, other=float("-inf"))
        r_p = tl.load(p + 2 * stride_field, mask=mask, other=0.0)
        u_p = tl.load(p + 3 * stride_field, mask=mask, other=0.0)
        g_p = tl.load(p + 4 * stride_field, mask=mask, other=float("-inf"))
        c_p = tl.load(p + 5 * stride_field, mask=mask, other=float("-inf"))
        i_p = tl.load(partial_id_ptr + row * parts + start + o, mask=mask, other=NO_ID)
        m, t, r, u = merge_distribution(m, t, r, u, m_p, t_p, r_p, u_p)
        g, i, c = merge_choice(g, i, c, g_p, i_p, c_p)
    m, t, r, u = reduce_distribution(m, t, r, u)
    g, i, c = reduce_choice(g, i, c)
    store_statistics(token_ptr, logit_ptr, second_ptr, lse_ptr, rest_ptr, entropy_ptr, row, asked, m, t, r, u, i, c, SAMPLE)


def outputs(statistics: TokenStatistics) -> tuple[Tensor, ...]:
    """The six tensors, in the order kernels take them."""
    s = statistics
    return s.token, s.logit, s.second_logit, s.logsumexp, s.rest, s.entropy


def merge_block(parts: int) -> int:
    """Parts that one program of the merge holds at a time."""
    return int(min(triton.next_power_of_2(parts), 512))


def launch_merge(partial: Tensor, partial_id: Tensor, rows: Tensor | None, out: TokenStatistics, sample: bool) -> None:
    """Merges partial states ``[6, R, parts]`` into ``out``."""
    count, parts = partial_id.shape
    block = merge_block(parts)
    merge_statistics_kernel[(count,)](
        partial, partial_id, rows, *outputs(out), parts, partial.stride(0), SAMPLE=sample, BLOCK=block, num_warps=4
    )


# --- what both launchers validate -----------------------------------------------------------------------------------------


def check_sampling(temperature: float | Tensor, seed: Any, rows: int, device: torch.device) -> bool:
    """Whether tokens are drawn with noise; raises unless the temperature is one, and has a seed where it draws."""
    if isinstance(temperature, Tensor):
        fits = temperature.dtype == torch.float32 and temperature.shape == (rows,) and temperature.device == device
        if not (fits and temperature.is_contiguous()):
            actual = f"{temperature.dtype} {list(temperature.shape)} on {temperature.device}"
            raise ValueError(f"temperature must be a number or contiguous torch.float32 [{rows}] on {device}, got {actual}")
    elif not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    sample = isinstance(temperature, Tensor) or temperature > 0
    if sample and seed is None:
        raise ValueError("temperature > 0 needs a seed")
    return sample


def temperature_arguments(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """What kernels take: the temperatures of the rows or None, and the one of all rows."""
    return (temperature, 0.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def row_keys(name: str, key: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """A per-row int64 key ``[rows]``, of stride 0 if it is one for all."""
    if not isinstance(key, Tensor):
        return torch.full((1,), key, dtype=torch.int64, device=device).expand(rows)
    if key.is_floating_point() or key.device != device or key.numel() not in (1, rows) or key.dim() > 1:
        raise ValueError(
            f"{name} must be one integer or [{rows}] integers on {device}, got {key.dtype} {list(key.shape)} on {key.device}"
        )
    return key.to(torch.int64).expand(rows)


def noise_keys(
    seed: int | Tensor | None, position: Tensor | None, step: int | Tensor, rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[None, None, None]:
    """Seeds, positions (None: a row's index) and steps of the noise, ``[rows]`` each; nothing where there is no seed."""
    if seed is None:
        return None, None, None
    positions = None if position is None else row_keys("position", position, rows, device)
    return row_keys("seed", seed, rows, device), positions, row_keys("step", step, rows, device)


def forbidden_ids(forbidden: Tensor | Sequence[int] | None, rows: int, vocabulary: int, device: torch.device) -> Tensor | None:
    """The forbidden ids ``[F]`` or ``[R, F]`` on the device, or None.

    Ids in a tensor are not read on the host; those out of range match nothing.
    """
    if forbidden is None:
        return None
    if isinstance(forbidden, Tensor):
        fits = forbidden.dim() == 1 or (forbidden.dim() == 2 and len(forbidden) == rows)
        if not fits or forbidden.is_floating_point() or forbidden.device != device:
            actual = f"{forbidden.dtype} {list(forbidden.shape)} on {forbidden.device}"
            raise ValueError(f"forbidden must be [F] or [{rows}, F] integers on {device}, got {actual}")
    count = forbidden.shape[-1] if isinstance(forbidden, Tensor) else len(forbidden)
    if count == 0:
        return None
    if count > MAX_FORBIDDEN:
        raise ValueError(f"forbidden has {count} ids; at most {MAX_FORBIDDEN} are allowed")
    if isinstance(forbidden, Tensor):
        return forbidden.to(torch.int64).contiguous()
    ids = tuple(int(token) for token in forbidden)
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"forbidden must hold ids in [0, {vocabulary}), got {list(ids)}")
    return _ids_on(ids, device)


@cache
def _ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, so that only the first call copies to the device: a graph capture could not."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def output_of(out: TokenStatistics | None, rows: int, device: torch.device) -> TokenStatistics:
    """``out``, validated, or a new one with entries ``[rows]``."""
    if out is None:
        token = torch.empty(rows, dtype=torch.int64, device=device)
        return TokenStatistics(token, *(torch.empty(rows, device=device) for _ in range(5)))
    for name, field in vars(out).items():
        dtype = torch.int64 if name == "token" else torch.float32
        if field.shape != (rows,) or field.dtype != dtype or field.device != device or not field.is_contiguous():
            actual = f"{field.dtype} {list(field.shape)} on {field.device}"
            raise ValueError(f"out.{name} must be a contiguous {dtype} [{rows}] on {device}, got {actual}")
    return out

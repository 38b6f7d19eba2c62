"""The ops as a CPU runs them fast: those of :mod:`fastdllm_triton.reference`, without copies of what is large.

Signatures, rounding points and results are the reference's, up to the order of sums. Where lengths differ between rows, slots are
read on the host, which costs no wait on a CPU. Ops that gain nothing are the reference's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._common import accumulate, write
from ..reference._random import gumbel
from ..reference.commit_tokens import commit_tokens
from ..reference.head_statistics import spread
from ..reference.rms_norm import gather_rows
from ..reference.rope_kv_write import angles
from ..reference.swiglu import swiglu
from ..reference.token_statistics import draws, row_keys
from ..reference.window_inputs import window_inputs
from ..types import NormRounding, RopeRounding, TokenStatistics
from .cpu_attention import runs_of, window_attention
from .cpu_linear import linear, norm

__all__ = [
    "commit_tokens",
    "head_statistics",
    "linear",
    "rms_norm",
    "rope_kv_write",
    "swiglu",
    "token_statistics",
    "window_attention",
    "window_inputs",
]

#: Bytes of logits, and of a weight in float32, that are worked on at a time in a thread: they stay in its second cache.
_CACHED_BYTES = 2**19
#: Tokens of a chunk of logits, at least: with fewer the calls would cost more than the numbers.
_LEAST_CHUNK = 512

#: Rows whose logits are computed as their transpose, in 16 bits.
_MOST_TURNED = 64

#: Logits ``[R, C]`` in memory of their own, and the id of the first of their tokens.
_Chunks = Iterator[tuple[int, Tensor]]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastdllm_triton.reference.rms_norm.rms_norm`."""
    if rows is not None:
        x = gather_rows(x, rows)
        residual = None if residual is None else gather_rows(residual, rows)
    s = x if residual is None else torch.add(residual, x)
    y = write(out, norm(s, weight, eps))
    return y if residual is None and rows is None else (y, write(residual_out, s))


def rope_kv_write(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    kv_start: Tensor,
    theta: float,
    *,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    norm_rounding: NormRounding = "qwen3",
    rounding: RopeRounding = "llada",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fastdllm_triton.reference.rope_kv_write.rope_kv_write`, with angles that are computed once for all layers."""
    kv_heads, slots, dim = k_cache.shape[1:]
    # Laid out by rows again, see :func:`.cpu_linear.linear`.
    qkv = qkv.contiguous() if bias is None else torch.add(qkv, bias, out=qkv.new_empty(qkv.shape))
    heads = qkv.view(*qkv.shape[:2], qkv.shape[2] // dim, dim)  # [B, W, Hq + 2 Hkv, D]
    rotated, v = heads[:, :, :-kv_heads], heads[:, :, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        weight = torch.cat((q_norm.expand(heads.shape[2] - 2 * kv_heads, dim), k_norm.expand(kv_heads, dim)))
        h = rotated if norm_rounding == "qwen3" else accumulate(rotated)
        rotated = (F.rms_norm(h, (dim,), None, eps) * weight).to(qkv.dtype)
    window = qkv.shape[1]
    starts, origins = window_start.tolist(), kv_start.tolist()

    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    rounded = qkv.dtype if rounding == "dream" else dtype
    offsets = [start - origin for start, origin in zip(starts, origins, strict=True)]
    cos, sin = _rotation(offsets, window, slots, dim, theta, rounded)
    h = rotated.to(rounded)
    rotated = _rotated(h, cos, sin).to(qkv.dtype)
    q, k = rotated[:, :, :-kv_heads], rotated[:, :, -kv_heads:]

    bounds = zip(starts, (max(start, origin, 0) for start, origin in zip(starts, origins, strict=True)), strict=True)
    for (start, low), rows in runs_of(bounds):
        high = min(start + window, slots)
        if low < high:
            written = slice(low - start, high - start)
            k_cache[rows, :, low:high] = k[rows, written].transpose(1, 2)
            v_cache[rows, :, low:high] = v[rows, written].transpose(1, 2)
    return write(out, q)


def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    out: TokenStatistics | None = None,
) -> TokenStatistics:
    """:func:`fastdllm_triton.reference.token_statistics.token_statistics`, a part of the vocabulary at a time."""
    rows, vocabulary = logits.shape
    dtype = accumulate(logits[:0]).dtype
    width = _width(rows, vocabulary, dtype)
    chunks = ((first, logits[:, first : first + width].to(dtype, copy=True)) for first in range(0, vocabulary, width))
    noise = _noise(rows, logits.device, temperature, seed, position, step)
    result = _statistics(chunks, rows, vocabulary, noise, forbidden)
    return result if out is None else out.copy_(result)


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
) -> TokenStatistics:
    """:func:`fastdllm_triton.reference.head_statistics.head_statistics`, a part of the vocabulary at a time: neither the logits
    nor a float32 copy of the weight are ever in memory as a whole.
    """
    count = len(hidden if rows is None else rows)
    asked = None
    if rows is not None:
        asked = (rows >= 0).nonzero()[:, 0]
        hidden, asked = hidden[rows[asked]], None if len(asked) == count else asked

    def of_asked(values: Tensor) -> Tensor:
        return values if asked is None else values[asked]

    device, vocabulary = hidden.device, len(weight)
    position = torch.arange(count, device=device) if position is None else position
    noise = _noise(
        len(hidden),
        device,
        of_asked(temperature) if isinstance(temperature, Tensor) else temperature,
        None if seed is None else of_asked(row_keys(seed, count, device)),
        of_asked(position),
        of_asked(row_keys(step, count, device)),
    )
    forbidden = of_asked(forbidden) if isinstance(forbidden, Tensor) and forbidden.dim() == 2 else forbidden
    result = _statistics(_logits(hidden, weight, bias, logits_dtype), len(hidden), vocabulary, noise, forbidden)
    if asked is not None:
        result = spread(result, asked, count)
    return result if out is None else out.copy_(result)


def _rotated(h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``[..., D]``, turned by their angles."""
    result = h * cos
    for half, other, signed in zip(result.chunk(2, dim=-1), reversed(h.chunk(2, dim=-1)), sin.chunk(2, dim=-1), strict=True):
        half.add_(other * signed)  # Not addcmul, which may round once where this rounds twice.
    return result


def _rotation(offsets: list[int], window: int, slots: int, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[B, W, 1, D]`` (``[1, W, 1, D]`` where rows agree): cos and signed sin of the positions from each row's offset on."""
    if min(offsets, default=-1) >= 0 and max(offsets) + window <= slots:
        table = _table(slots, dim, theta, dtype)
        if len(set(offsets)) == 1:
            cos, sin = (values[None, offsets[0] : offsets[0] + window] for values in table)
            return cos, sin
        cos, sin = (values[_positions(offsets, window)] for values in table)
        return cos, sin
    # Slots outside of the sequence: what they get is not used, and is the reference's.
    return _cos_sin(_positions(offsets, window), dim, theta, dtype)


def _positions(offsets: list[int], window: int) -> Tensor:
    """``[B, W]``: on the CPU, whatever the default device is."""
    return torch.tensor(offsets, dtype=torch.int64, device="cpu")[:, None] + torch.arange(window, device="cpu")


@lru_cache(maxsize=4)
def _table(slots: int, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[L, 1, D]``: cos and signed sin of all positions of a cache; the same for every layer and forward."""
    with torch.inference_mode(False):
        return _cos_sin(torch.arange(slots, device="cpu"), dim, theta, dtype)


def _cos_sin(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[..., 1, D]`` of positions ``[...]``; the sines of the first half negated, as the halves' exchange needs them."""
    angle = angles(position, dim, theta, dtype)[..., None, :]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _width(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk of logits: a multiple of 4, as the noise comes in fours."""
    cached = _CACHED_BYTES * torch.get_num_threads() // (dtype.itemsize * max(rows, 1))
    return min(max(cached // 4 * 4, _LEAST_CHUNK), vocabulary)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None) -> _Chunks:
    """The logits of hidden states ``[R, E]``, in the dtype that sums are taken in."""
    vocabulary, width = weight.shape
    x = accumulate(hidden)
    step = _width(len(x), vocabulary, x.dtype)
    # A product in the weight's dtype sums in float32 and rounds once, as is asked for.
    rounds = logits_dtype == weight.dtype and bias is None
    # A product of few rows is bound by memory, which converted rows should not reach; one of more by arithmetic, and wants more.
    count = max(_CACHED_BYTES * torch.get_num_threads() // (x.itemsize * width), 8 * len(x))
    converted = x.new_empty((count, width))
    for first in range(0, vocabulary, step):
        part = weight[first : first + step]
        if rounds and weight.dtype != x.dtype and len(x) <= _MOST_TURNED:
            # As of :mod:`.cpu_linear`; the conversion turns it back.
            logits = x.new_empty((len(x), len(part))).copy_(torch.mm(part, hidden.t()).t())
        elif rounds or x.dtype == weight.dtype:
            logits = accumulate(F.linear(hidden, part))
        else:
            logits = x.new_empty((len(x), len(part)))
            for at in range(0, len(part), count):
                rows = part[at : at + count]
                logits[:, at : at + count] = F.linear(x, converted[: len(rows)].copy_(rows))
        if bias is not None:
            logits = logits + accumulate(bias[first : first + step])
        if logits_dtype is not None and not rounds:
            logits = logits.to(logits_dtype).to(x.dtype)
        yield first, logits


def _noise(
    rows: int,
    device: torch.device,
    temperature: float | Tensor,
    seed: int | Tensor | None,
    position: Tensor | None,
    step: int | Tensor,
) -> Callable[[int, int], Tensor] | None:
    """The noise ``[R, C]`` of ``C`` tokens from an id on, scaled by the temperature; None where nothing is drawn."""
    if not draws(temperature):
        return None
    if seed is None:
        raise ValueError("temperature > 0 needs a seed")
    seeds, steps = row_keys(seed, rows, device), row_keys(step, rows, device)
    positions = torch.arange(rows, device=device) if position is None else position
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return lambda first, count: scale * gumbel(seeds, positions, steps, count, first)


def _statistics(
    chunks: _Chunks,
    rows: int,
    vocabulary: int,
    noise: Callable[[int, int], Tensor] | None,
    forbidden: Tensor | Sequence[int] | None,
) -> TokenStatistics:
    """Statistics ``[R]`` of logits that come in chunks, each of which is overwritten."""
    hide = _hider(forbidden, rows)
    parts, drawn = [], []
    for first, values in chunks:
        hide(values, first)
        if noise is not None:
            best, token = (values + noise(first, values.shape[1])).max(dim=1, keepdim=True)
            drawn.append((best[:, 0], token[:, 0] + first, values.gather(1, token)[:, 0]))
        parts.append(_facts(values, first))
    top, token, second, odds, weighted = parts[0] if len(parts) == 1 else _merged(*map(torch.stack, zip(*parts, strict=True)))

    broken = top.isnan() | (top == torch.inf)
    entropy = torch.log1p(odds) - weighted / (1 + odds)
    logit, rest = top, odds
    if drawn:
        best, tokens, logits = map(torch.stack, zip(*drawn, strict=True))
        part = best.max(dim=0, keepdim=True).indices
        likeliest, token, logit = token, tokens.gather(0, part)[0], logits.gather(0, part)[0]
        same = token == likeliest
        second = torch.where(same, second, top)
        # All mass in units of the token's own, less that: the likeliest token is in the rest, so that nothing cancels.
        rest = torch.where(same, odds, (1 + odds) * torch.exp(top - logit) - 1)
    choice = (logit > -torch.inf) & ~broken
    return TokenStatistics(
        token=torch.where(choice, token, -1),
        logit=torch.where(broken, torch.nan, logit),
        second_logit=torch.where(broken, torch.nan, second),
        logsumexp=torch.where(broken, torch.nan, top + torch.log1p(odds)),
        rest=torch.where(choice, rest, torch.inf),
        entropy=torch.where(choice, entropy, torch.nan),
    )


def _facts(values: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each row of a chunk, which is overwritten: the largest logit and its id, and of the others the largest and the sums of
    ``exp(d)`` and ``exp(d) d``, with ``d`` the distance from the largest of all.
    """
    top, index = values.max(dim=1, keepdim=True)  # of a tie the first; NaN if there is one
    values.scatter_(1, index, -torch.inf)
    second = values.amax(1)
    below = _distance_(values, top)
    mass = _exp(below)
    return top[:, 0], index[:, 0] + first, second, mass.sum(1), mass.mul_(below).sum(1)


def _merged(top: Tensor, token: Tensor, second: Tensor, odds: Tensor, weighted: Tensor) -> tuple[Tensor, ...]:
    """The facts of rows from those of all chunks, ``[chunks, R]``."""
    largest, chunk = top.max(dim=0, keepdim=True)
    others = top.scatter(0, chunk, -torch.inf)
    d = _distance_(top.clone(), largest)
    mass, total = _exp(d), 1 + odds
    total = total.scatter(0, chunk, odds.gather(0, chunk))  # without the term of the largest logit itself, which is 1
    return (
        largest[0],
        token.gather(0, chunk)[0],
        torch.maximum(second.gather(0, chunk)[0], others.amax(0)),
        (mass * total).sum(0),
        (mass * (weighted + d * total)).sum(0),
    )


def _distance_(values: Tensor, top: Tensor) -> Tensor:
    """``values - top`` in place, and where the exponential of that is no normal number, the lowest of which it is one."""
    return values.sub_(top.clamp(min=torch.finfo(values.dtype).min)).clamp_(min=_lowest(values.dtype))


def _exp(distance: Tensor) -> Tensor:
    """The exponential of what :func:`_distance_` gives, 0 for the lowest: below normal numbers a CPU takes far longer."""
    return F.threshold(distance.exp(), 1.0001 * math.exp(_lowest(distance.dtype)), 0.0, inplace=True)


def _lowest(dtype: torch.dtype) -> float:
    return -87.0 if dtype == torch.float32 else -708.0


def _hider(forbidden: Tensor | Sequence[int] | None, rows: int) -> Callable[[Tensor, int], None]:
    """What removes forbidden tokens from a chunk of logits, given the id of its first token."""
    if forbidden is None:
        return lambda values, first: None
    ids = torch.as_tensor(forbidden, dtype=torch.int64, device="cpu")
    if ids.dim() == 1:
        listed = sorted(ids.tolist())

        def hide(values: Tensor, first: int) -> None:
            for token in listed:
                if first <= token < first + values.shape[1]:
                    values[:, token - first] = -torch.inf

        return hide
    ids = ids.expand(rows, -1)

    def hide_by_row(values: Tensor, first: int) -> None:
        row, place = ((ids >= max(first, 0)) & (ids < first + values.shape[1])).nonzero(as_tuple=True)
        values[row, ids[row, place] - first] = -torch.inf

    return hide_by_row

"""What :mod:`fastdllm_triton.ops` checks of a caller's arguments, the same for the kernels and for plain PyTorch.

One function an op, with its signature; each returns the device that the op runs on. Shapes, dtypes and devices are always
checked, and numbers where the host has them: ids and slots in a tensor on a GPU are not read, since the host would wait for them.
The engine does not come through here: what it passes is right by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ..types import Activation, EndName, NormRounding, PolicyState, RopeRounding, RuleName, ScoreName, TokenStatistics
from ..utils.checks import MAX_TEMPERATURE, check_temperature, is_int, is_number, require, short_repr, to_ints


def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    out: TokenStatistics | None = None,
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.token_statistics`."""
    shapes = _Shapes()
    rows, vocabulary = shapes.floats("logits", logits, "R", "V")
    _at_least_one("logits", "V", vocabulary)
    _check_choice(shapes, rows, vocabulary, temperature, seed, position, step, forbidden, out)
    return logits.device


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
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.head_statistics`."""
    shapes = _Shapes()
    count, width = shapes.floats("hidden", hidden, "N", "E")
    vocabulary, _ = shapes.floats("weight", weight, "V", width, dtype=hidden.dtype)
    _at_least_one("weight", "V", vocabulary)
    if rows is not None:
        (asked,) = shapes.integers("rows", rows, "R")
        _check_values("rows", rows, -1, count - 1)
        count = asked
    if bias is not None:
        shapes.floats("bias", bias, vocabulary)
    ok = logits_dtype is None or (isinstance(logits_dtype, torch.dtype) and logits_dtype.is_floating_point)
    require("logits_dtype", logits_dtype, "None or a floating-point dtype", ok)
    _check_choice(shapes, count, vocabulary, temperature, seed, position, step, forbidden, out)
    return hidden.device


def commit_tokens(
    x: Tensor, statistics: TokenStatistics, window_start: Tensor, state: PolicyState, *, place: Tensor | None = None
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.commit_tokens`."""
    shapes = _Shapes()
    rows, slots = shapes.integers("x", x, "B", "L")
    require("x", x.dtype, "torch.int64", x.dtype == torch.int64)
    _check_type("statistics", statistics, TokenStatistics)
    if place is None:
        _, block = of_statistics = shapes.integers("statistics.token", statistics.token, rows, "N")
    else:
        _, block = shapes.integers("place", place, rows, "N")
        of_statistics = shapes.integers("statistics.token", statistics.token, "P")
        _check_values("place", place, -1, of_statistics[0] - 1)
    for name, entries in vars(statistics).items():
        shapes(f"statistics.{name}", entries, *of_statistics)
    if not 1 <= block <= slots:
        raise ValueError(f"{'statistics' if place is None else 'place'} must be of 1 to {slots} slots a row, got {block}")
    shapes.integers("window_start", window_start, rows)
    _check_values("window_start", window_start, 0, slots - block)
    _check_type("state", state, PolicyState)
    for field, kind in (("score", ScoreName), ("rule", RuleName), ("ends", EndName)):
        names = get_args(kind)
        require(f"state.{field}", getattr(state, field), f"one of {', '.join(names)}", getattr(state, field) in names)
    columns: dict[str, list[Any]] = {"step_map": [slots], "confidence": [slots], "eos_ids": ["E"], "shares": ["S"]}
    for name, entries in state.by_row.items():
        shapes(f"state.{name}", entries, rows, *columns.get(name, []))
    if state.rule == "schedule":
        _at_least_one("state.shares", "S", state.shares.shape[1])
    return x.device


def statistics_merge(a: TokenStatistics, b: TokenStatistics) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.statistics_merge`."""
    _check_type("a", a, TokenStatistics)
    _check_type("b", b, TokenStatistics)
    shapes = _Shapes()
    for which, statistics in (("a", a), ("b", b)):
        for name, entries in vars(statistics).items():
            shapes(f"{which}.{name}", entries, *getattr(a.token, "shape", ()))
    return a.token.device


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.rms_norm`."""
    shapes = _Shapes()
    *before, width = shapes.floats("x", x, ..., "E")
    shapes.floats("weight", weight, width, dtype=x.dtype)
    require("eps", eps, "a number of 0 or more", is_number(eps) and eps >= 0)
    result = tuple(x.shape)
    if rows is not None:
        result = (*shapes.integers("rows", rows, ...), width)
        _check_values("rows", rows, None, math.prod(before) - 1)
    for name, tensor, shape in (("residual", residual, x.shape), ("out", out, result), ("residual_out", residual_out, result)):
        if tensor is not None:
            shapes.floats(name, tensor, *shape, dtype=x.dtype)
    if residual is None and rows is None and residual_out is not None:
        raise ValueError("residual_out needs a residual that is added, or rows that are gathered")
    return x.device


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.swiglu`."""
    shapes = _Shapes()
    *lead, width = shapes.floats("gate_up", gate_up, ..., "2F")
    require("gate_up", list(gate_up.shape), "of an even last dimension, gate and up", width % 2 == 0)
    if out is not None:
        shapes.floats("out", out, *lead, width // 2, dtype=gate_up.dtype)
    return gate_up.device


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    out: Tensor | None = None,
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.linear`."""
    shapes = _Shapes()
    *lead, inner = shapes.floats("x", x, ..., "K")
    outer, _ = shapes.floats("weight", weight, "N", inner, dtype=x.dtype)
    if norm_weight is not None:
        shapes.floats("norm_weight", norm_weight, inner, dtype=x.dtype)
        require("eps", eps, "a number of 0 or more, since there is a norm_weight", is_number(eps) and float(eps or 0) >= 0)
    else:
        require("eps", eps, "None without a norm_weight", eps is None)
    require("activation", activation, "swiglu or None", activation in (None, *get_args(Activation)))
    if activation is not None:
        require("weight", list(weight.shape), "of an even number of rows, gate and up", outer % 2 == 0)
        outer //= 2
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            shapes.floats(name, tensor, *lead, outer, dtype=x.dtype)
    return x.device


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
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.rope_kv_write`."""
    shapes = _Shapes()
    batch, window, columns = shapes.floats("qkv", qkv, "B", "W", "(Hq + 2 Hkv) D")
    _, kv_heads, slots, dim = shapes.floats("k_cache", k_cache, batch, "Hkv", "L", "D", dtype=qkv.dtype)
    shapes.floats("v_cache", v_cache, batch, kv_heads, slots, dim, dtype=qkv.dtype)
    require("k_cache", list(k_cache.shape), "of an even head dimension D of 2 or more", dim > 0 and dim % 2 == 0)
    heads = columns // dim - 2 * kv_heads
    fits = columns % dim == 0 and kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    allowed = f"[B, W, (Hq + 2 * {kv_heads}) * {dim}] with Hq a multiple of {kv_heads}"
    require("qkv", list(qkv.shape), f"of shape {allowed}", fits)
    shapes.integers("window_start", window_start, batch)
    shapes.integers("kv_start", kv_start, batch)
    require("theta", theta, "a number above 0", is_number(theta) and theta > 0)
    require("rounding", rounding, f"one of {', '.join(get_args(RopeRounding))}", rounding in get_args(RopeRounding))
    if bias is not None:
        shapes.floats("bias", bias, columns, dtype=qkv.dtype)
    if (q_norm is None) != (k_norm is None):
        missing, present = ("q_norm", "k_norm") if q_norm is None else ("k_norm", "q_norm")
        raise ValueError(f"{missing} must be given with {present}")
    if q_norm is not None:
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            shapes.floats(name, norm, dim, dtype=qkv.dtype)
        require("eps", eps, "a number of 0 or more, since there is a q_norm", is_number(eps) and float(eps or 0) >= 0)
    else:
        require("eps", eps, "None without q_norm and k_norm", eps is None)
    roundings = get_args(NormRounding)
    require("norm_rounding", norm_rounding, f"one of {', '.join(roundings)}", norm_rounding in roundings)
    if out is not None:
        shapes.floats("out", out, batch, window, heads, dim, dtype=qkv.dtype)
    return qkv.device


def window_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    *,
    block_causal: tuple[Tensor, int] | None = None,
    skip_start: Tensor | None = None,
    skip_end: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    span: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.window_attention`."""
    shapes = _Shapes()
    batch, _, heads, dim = shapes.floats("q", q, "B", "W", "Hq", "D")
    _, kv_heads, slots, _ = shapes.floats("k_cache", k_cache, batch, "Hkv", "L", dim, dtype=q.dtype)
    shapes.floats("v_cache", v_cache, batch, kv_heads, slots, dim, dtype=q.dtype)
    fits = kv_heads > 0 and heads % kv_heads == 0
    require("q", list(q.shape), f"of a number of heads that is a multiple of the {kv_heads} of k_cache", fits)
    _at_least_one("q", "D", dim)
    if (skip_start is None) != (skip_end is None):
        missing, present = ("skip_start", "skip_end") if skip_start is None else ("skip_end", "skip_start")
        raise ValueError(f"{missing} must be given with {present}")
    ends = {"kv_start": kv_start, "kv_end": kv_end, "skip_start": skip_start, "skip_end": skip_end}
    for name, slot in ends.items():
        if slot is not None:
            shapes.integers(name, slot, batch)
    _check_values("kv_end", kv_end, None, slots)
    if block_causal is not None:
        if not isinstance(block_causal, tuple | list) or len(block_causal) != 2:
            raise TypeError(
                f"block_causal must be None or a pair of window_start and block_length, got {short_repr(block_causal)}"
            )
        window_start, length = block_causal
        shapes.integers("block_causal[0]", window_start, batch)
        require("block_causal[1]", length, "an integer in [1, 2^30]", is_int(length) and 1 <= length <= 2**30)
        if skip_start is not None:
            raise ValueError("block_causal and skip_start exclude each other")
    require("scale", scale, "None or a number", scale is None or is_number(scale))
    if out is not None:
        shapes.floats("out", out, *q.shape, dtype=q.dtype)
    return q.device


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
) -> torch.device:
    """Checks the arguments of :func:`fastdllm_triton.ops.window_inputs`."""
    shapes = _Shapes()
    rows, slots = shapes.integers("x", x, "B", "L")
    require("x", x.dtype, "torch.int64", x.dtype == torch.int64)
    _at_least_one("x", "L", slots)
    shapes.integers("base", base, *([] if getattr(base, "ndim", None) == 0 else [rows]))
    for name, tensor in (("block_start", block_start), ("remaining", remaining), ("kv_start", kv_start)):
        shapes.integers(name, tensor, rows)
    if (seed is None) != (step is None):
        raise ValueError("seed and step must be given together")
    for name, key in (("seed", seed), ("step", step)):
        if key is not None:
            shapes.integers(name, key, rows)
    for name, size in (("window", window), ("block", block), ("predicted", predicted)):
        require(name, size, "an integer of 1 or more", is_int(size) and size >= 1)
    require("back", back, "an integer of 0 or more", is_int(back) and back >= 0)
    require("block", block, f"at most the window's {window} slots", block <= window)
    require("mask_id", mask_id, "an integer", is_int(mask_id))
    _check_values("block_start", block_start, 0, slots)
    return x.device


class _Shapes:
    """Checks tensors of one call: those after the first must be on its device."""

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def __call__(self, name: str, tensor: object, *shape: Any, kind: str = "", ok: bool = True) -> tuple[int, ...]:
        """The shape of a tensor. A number in ``shape`` is the size that it must have, a word stands for any, ``...`` for several.

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape, is on another device, or not ``ok``, which ``kind`` tells of in words.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {short_repr(tensor)} of type {type(tensor).__name__}")
        sizes = shape[1:] if shape[:1] == (...,) else shape
        fits = tensor.dim() >= len(sizes) if sizes is not shape else tensor.dim() == len(sizes)
        last = tensor.shape[tensor.dim() - len(sizes) :] if fits else ()
        if not (ok and fits and all(isinstance(size, str) or size == n for size, n in zip(sizes, last, strict=True))):
            wanted = ", ".join("..." if size is ... else str(size) for size in shape)
            raise ValueError(f"{name} must be {kind}of shape [{wanted}], got {tensor.dtype} {list(tensor.shape)}")
        self._device = self._device or tensor.device
        if tensor.device != self._device:
            raise ValueError(f"{name} must be on {self._device}, where the first tensor is, got one on {tensor.device}")
        return tuple(tensor.shape)

    def floats(self, name: str, tensor: object, *shape: Any, dtype: torch.dtype | None = None) -> tuple[int, ...]:
        """The shape of a tensor of a floating-point dtype, or of just this one; checked likewise."""
        actual = getattr(tensor, "dtype", torch.float32)
        ok = actual.is_floating_point if dtype is None else actual == dtype
        return self(name, tensor, *shape, kind="floating point " if dtype is None else f"{dtype} ", ok=ok)

    def integers(self, name: str, tensor: object, *shape: Any) -> tuple[int, ...]:
        """The shape of a tensor of integers; checked likewise."""
        actual = getattr(tensor, "dtype", torch.int64)
        ok = not (actual.is_floating_point or actual.is_complex or actual == torch.bool)
        return self(name, tensor, *shape, kind="integers ", ok=ok)


def _check_choice(
    shapes: _Shapes, rows: int, vocabulary: int, temperature: Any, seed: Any, position: Any, step: Any, forbidden: Any, out: Any
) -> None:
    """Checks what both ops that choose tokens take."""
    if isinstance(temperature, Tensor) and temperature.dim():
        shapes.floats("temperature", temperature, rows, dtype=torch.float32)
        _check_values("temperature", temperature, 0, MAX_TEMPERATURE)
    else:
        check_temperature(temperature)
    if seed is None and (isinstance(temperature, Tensor) or temperature > 0):
        raise ValueError("temperature > 0 needs a seed")
    for name, key in (("seed", seed), ("step", step)):
        if isinstance(key, Tensor):
            shapes.integers(name, key, *([rows] if key.dim() else []))
        elif not (name == "seed" and key is None):
            ok = is_int(key) and -(2**63) <= key < 2**63
            require(name, key, f"an integer in [-2^63, 2^63), or a tensor of {rows} of them", ok)
    if position is not None:
        shapes.integers("position", position, rows)
    if isinstance(forbidden, Tensor):
        by_row = forbidden.dim() == 2
        shapes.integers("forbidden", forbidden, *([rows] if by_row else []), "F")
        _check_values("forbidden", forbidden, -1 if by_row else 0, vocabulary - 1)
    elif forbidden is not None:
        ids = to_ints("forbidden", forbidden, "None, a sequence of token ids, or a tensor of them")
        outside = next((token for token in ids if not 0 <= token < vocabulary), 0)
        require("forbidden", outside, f"in the vocabulary [0, {vocabulary})", 0 <= outside < vocabulary)
    if out is not None:
        _check_type("out", out, TokenStatistics)
        for name, entries in vars(out).items():
            shapes(f"out.{name}", entries, rows)


def _check_values(name: str, tensor: Tensor, low: int | None, high: int) -> None:
    """Checks that the numbers of a tensor are in a range, where reading them costs no wait."""
    if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.numel():
        least, most = (end.item() for end in tensor.aminmax())
        value = least if low is not None and least < low else most
        allowed = f"at most {high}" if low is None else f"in [{low}, {high}]"
        require(name, value, allowed, value <= high and (low is None or value >= low))


def _check_type(name: str, value: object, cls: type) -> None:
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be a {cls.__name__}, got {short_repr(value)} of type {type(value).__name__}")


def _at_least_one(name: str, dimension: str, size: int) -> None:
    if size == 0:
        raise ValueError(f"{name} must have {dimension} = 1 or more, got {dimension} = 0")

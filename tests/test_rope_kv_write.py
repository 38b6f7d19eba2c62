"""rope_kv_write: the reference against rotations of complex numbers in float64, the kernel against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from _support import ints, randn
from torch import Tensor

from fastdllm_triton.reference.rope_kv_write import rope_kv_write as reference

THETA = 10_000.0


@dataclass(frozen=True)
class Case:
    """``window_start`` and ``kv_start`` are per sequence; ``slots`` is L."""

    why: str
    window_start: tuple[int, ...]
    kv_start: tuple[int, ...]
    window: int
    q_heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    slots: int = 24

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    Case("a refresh", (0,), (0,), 24),
    Case("one token at the end", (23,), (0,), 1),
    Case("ragged left padding", (0, 0, 0), (0, 5, 23), 24),
    Case("gqa of ratio 7", (8, 3), (2, 0), 9, q_heads=7, kv_heads=1),
    Case("dream heads", (4,), (1,), 3, q_heads=28, kv_heads=4),
    Case("head dim 80", (4, 8), (0, 1), 5, dim=80),
    Case("head dim 128", (4,), (3,), 5, dim=128),
    Case("a window past the end", (20, 24, 30), (0, 0, 0), 8),
    Case("a window before the start", (-3, -8, -9), (0, 0, 0), 8),
    Case("a window of padding", (0, 2), (8, 9), 8),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """qkv, caches full of other numbers, the starts, and a bias."""
    batch, heads = len(case.window_start), case.q_heads + 2 * case.kv_heads
    cache = (batch, case.kv_heads, case.slots, case.dim)
    return (
        randn(batch, case.window, heads * case.dim, dtype=dtype, device=device),
        randn(*cache, dtype=dtype, seed=1, device=device),
        randn(*cache, dtype=dtype, seed=2, device=device),
        ints(list(case.window_start), device),
        ints(list(case.kv_start), device),
        randn(heads * case.dim, dtype=dtype, seed=3, device=device),
    )


def expected(case: Case, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, theta: float = THETA) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token in float64: pair i of a head is the complex number ``x_i + j x_(i + D/2)``, turned by
    ``position * theta^(-2i / D)``. Returns q and the caches after the write."""
    qkv, k_cache, v_cache = qkv.double(), k_cache.double().clone(), v_cache.double().clone()
    half = case.dim // 2
    frequency = torch.tensor([theta ** (-2 * i / case.dim) for i in range(half)], dtype=torch.float64)
    qs = torch.zeros(len(qkv), case.window, case.q_heads, case.dim, dtype=torch.float64)
    for b in range(len(qkv)):
        for i in range(case.window):
            slot = case.window_start[b] + i
            position = slot - case.kv_start[b]
            heads = qkv[b, i].view(-1, case.dim)
            turn = torch.polar(torch.ones(half, dtype=torch.float64), position * frequency)
            turned = torch.complex(heads[:, :half], heads[:, half:]) * turn
            turned = torch.cat((turned.real, turned.imag), dim=1)
            qs[b, i] = turned[: case.q_heads]
            if position >= 0 and 0 <= slot < case.slots:
                k_cache[b, :, slot] = turned[case.q_heads : case.q_heads + case.kv_heads]
                v_cache[b, :, slot] = heads[case.q_heads + case.kv_heads :]
    return qs, k_cache, v_cache


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_is_a_rotation_of_complex_numbers(case, with_bias):
    qkv, k_cache, v_cache, window_start, kv_start, bias = inputs(case, torch.float64)
    want = expected(case, qkv + bias if with_bias else qkv, k_cache, v_cache)
    q = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA, bias=bias if with_bias else None)
    for got, exact in zip((q, k_cache, v_cache), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_scores_depend_on_the_distance_of_positions_only():
    # The same token everywhere: every q·k of equal distance is equal.
    case = Case("", (0,), (3,), 24, q_heads=1, kv_heads=1)
    token = randn(1, 1, 3 * case.dim)
    _, k_cache, v_cache, window_start, kv_start, _ = inputs(case, torch.float64)
    q = reference(token.expand(1, 24, -1), k_cache, v_cache, window_start, kv_start, THETA)
    scores = (q[0, 3:, 0] @ k_cache[0, 0, 3:].T).numpy()
    for distance in range(-20, 21):
        diagonal = scores.diagonal(distance)
        assert diagonal.max() - diagonal.min() < 1e-12


def test_float32_frequencies_hold_at_far_positions():
    # Position 8000 of a sequence: the angle's own rounding allows some 5e-4, a wrong formula does not.
    case = Case("", (8000,), (0,), 4, slots=8004)
    args = inputs(case, torch.float32)
    want = expected(case, *args[:3])[0]
    torch.testing.assert_close(reference(*args[:5], THETA).double(), want, atol=3e-3, rtol=0)


def test_dream_rounds_cos_sin_products_and_sum():
    case = Case("", (37,), (0,), 6, slots=64)
    qkv, k_cache, v_cache, window_start, kv_start, bias = inputs(case, torch.bfloat16)
    position = torch.arange(37, 43, dtype=torch.float32)
    frequency = 1.0 / THETA ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    angle = position[:, None, None] * frequency
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    heads = (qkv + bias).view(6, -1, 16)[:, :2]
    first, second = heads[..., :8], heads[..., 8:]
    want = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    got = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA, bias=bias, rounding="dream")
    assert torch.equal(got[0], want)
    # LLaDA's single rounding is another number, and nearer to the truth.
    llada = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA, bias=bias)
    exact = expected(case, qkv + bias, k_cache, v_cache)[0]
    assert (llada - exact).abs().mean() < (got - exact).abs().mean()


def test_reference_writes_through_strided_caches_and_into_out():
    case = CASES[3]
    qkv, k_cache, v_cache, window_start, kv_start, _ = inputs(case, torch.float64)
    # As a cache of layout [B, L, Hkv, D] would be passed.
    strided = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    out = torch.empty(2, 9, 7, 16, dtype=torch.float64)
    assert reference(qkv, *strided, window_start, kv_start, THETA, out=out) is out
    q = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA)
    assert torch.equal(out, q) and torch.equal(strided[0], k_cache) and torch.equal(strided[1], v_cache)

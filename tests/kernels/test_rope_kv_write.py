"""rope_kv_write: the reference against rotations of complex numbers in float64, its own claims of the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from _support import CPU, DEVICE, KERNEL_DTYPES, ints, randn, small_cases
from torch import Tensor

from fastdllm_triton.kernels import rope_kv_write as module
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels.rope_kv_write import rope_kv_write as kernel
from fastdllm_triton.reference.rms_norm import rms_norm
from fastdllm_triton.reference.rope_kv_write import head_norm
from fastdllm_triton.reference.rope_kv_write import rope_kv_write as reference
from fastdllm_triton.verify.cases.rope_kv_write import ROPE_KV_WRITE

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
    slots: int = 12


STRIDED = Case("", (5, 3), (2, 0), 7, q_heads=7, kv_heads=1)


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


@pytest.mark.parametrize("of", small_cases("rope_kv_write"), ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_is_a_rotation_of_complex_numbers(of, with_bias):
    sizes = {name: size for name, size in of.sizes.items() if name not in ("rounding", "theta", "norms")}
    args = ROPE_KV_WRITE.inputs({**sizes, "bias": with_bias}, CPU, torch.float64)
    qkv, k_cache, v_cache, bias = (args[name] for name in ("qkv", "k_cache", "v_cache", "bias"))
    (_, kv_heads, slots, dim), columns = k_cache.shape, qkv.shape[2]
    case = Case("", sizes["window_start"], sizes["kv_start"], qkv.shape[1], columns // dim - 2 * kv_heads, kv_heads, dim, slots)
    want = expected(case, qkv if bias is None else qkv + bias, k_cache, v_cache)
    q = reference(**args)
    for got, exact in zip((q, k_cache, v_cache), want, strict=True):
        torch.testing.assert_close(got, exact)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[..., D]`` over its root mean square, element by element in Python's floats."""
    flat = x.double().reshape(-1, x.shape[-1]).tolist()
    rms = [math.sqrt(sum(value * value for value in head) / len(head) + eps) for head in flat]
    rows = [[v / r * w for v, w in zip(head, weight.tolist(), strict=True)] for head, r in zip(flat, rms, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).view_as(x)


@pytest.mark.parametrize("norm_rounding", ["qwen3", "flash_attn"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms_are_of_each_q_and_k_head_behind_the_bias_and_before_the_rotation(norm_rounding, with_bias):
    case = Case("", (2, 0), (1, 3), 5, q_heads=4, kv_heads=2)
    qkv, k_cache, v_cache, window_start, kv_start, bias = inputs(case, torch.float64)
    q_norm, k_norm = randn(16, seed=7), randn(16, seed=8)
    summed = qkv + bias if with_bias else qkv
    heads = summed.view(2, 5, 8, 16)
    plain = torch.cat((normed(heads[:, :, :4], q_norm, 0.3), normed(heads[:, :, 4:6], k_norm, 0.3), heads[:, :, 6:]), dim=2)
    want = expected(case, plain.flatten(2), k_cache, v_cache)
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": 0.3, "norm_rounding": norm_rounding}
    q = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA, bias=bias if with_bias else None, **norms)
    for got, exact in zip((q, k_cache, v_cache), want, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_two_norms_round_where_their_modules_do(dtype):
    x, weight = randn(64, 128, dtype=dtype), randn(128, dtype=dtype, seed=1)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    once, twice = head_norm(x, weight, 1e-6, "flash_attn"), head_norm(x, weight, 1e-6)
    assert torch.equal(once, (unit * weight.float()).to(dtype))
    assert torch.equal(twice, weight * unit.to(dtype))
    assert torch.equal(twice, rms_norm(x, weight, 1e-6))
    assert 0.05 < (once != twice).double().mean() < 0.6  # the rounding before the weight shows


def test_scores_depend_on_the_distance_of_positions_only():
    # The same token everywhere: every q·k of equal distance is equal.
    case = Case("", (0,), (3,), 24, q_heads=1, kv_heads=1, slots=24)
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
    case = STRIDED
    qkv, k_cache, v_cache, window_start, kv_start, _ = inputs(case, torch.float64)
    # As a cache of layout [B, L, Hkv, D] would be passed.
    strided = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    out = torch.empty(2, 7, 7, 16, dtype=torch.float64)
    assert reference(qkv, *strided, window_start, kv_start, THETA, out=out) is out
    q = reference(qkv, k_cache, v_cache, window_start, kv_start, THETA)
    assert torch.equal(out, q) and torch.equal(strided[0], k_cache) and torch.equal(strided[1], v_cache)


@pytest.mark.parametrize("of", small_cases("rope_kv_write"), ids=str)
def test_values_are_copied_and_what_is_not_the_window_s_stays_to_the_bit(of):
    args = ROPE_KV_WRITE.inputs(of.sizes, DEVICE, torch.float16)
    got, want = (ROPE_KV_WRITE.outputs(function, args) for function in (kernel, reference))
    assert torch.equal(got["v_cache"], want["v_cache"])
    assert torch.equal(got["k_cache"] == args["k_cache"], want["k_cache"] == args["k_cache"])


@pytest.mark.parametrize("rounding", ["llada", "dream"])
def test_kernel_keeps_the_rounding_points(rounding):
    # Equal to the bit but for elements whose float32 value falls between two float16: dream has many more roundings.
    case = Case("", (37, 0), (0, 2), 12, slots=80, dim=128, q_heads=4, kv_heads=4)
    qkv, k_cache, v_cache, window_start, kv_start, bias = inputs(case, torch.float16, DEVICE)
    k_torch, v_torch = k_cache.clone(), v_cache.clone()
    q_torch = reference(qkv, k_torch, v_torch, window_start, kv_start, THETA, bias=bias, rounding=rounding)
    q = kernel(qkv, k_cache, v_cache, window_start, kv_start, THETA, bias=bias, rounding=rounding)
    assert (q == q_torch).double().mean() > 0.999
    assert (k_cache == k_torch).double().mean() > 0.999
    other = reference(qkv, k_torch, v_torch, window_start, kv_start, THETA, bias=bias, rounding="dream")
    if rounding == "llada":
        assert (q == other).double().mean() < 0.9


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
@pytest.mark.parametrize("norm_rounding", ["qwen3", "flash_attn"])
def test_kernel_keeps_the_rounding_points_of_the_norms(norm_rounding, dtype):
    # Values as they are before the rotation: at position 0 it turns by nothing. A sum in another order moves few of them.
    case = Case("", (0,), (0,), 1, slots=2, dim=128, q_heads=32, kv_heads=8)
    qkv, k_cache, v_cache, window_start, kv_start, _ = inputs(case, dtype, DEVICE)
    norms = {"q_norm": randn(128, dtype=dtype, seed=5, device=DEVICE), "k_norm": randn(128, dtype=dtype, seed=6, device=DEVICE)}
    cache, heads = k_cache.clone(), qkv.view(1, 1, 48, 128)
    options = {"eps": 1e-6, "norm_rounding": norm_rounding, "rounding": "dream"}
    q = kernel(qkv, k_cache, v_cache, window_start, kv_start, THETA, **norms, **options)
    for got, x, weight in ((q, heads[:, :, :32], norms["q_norm"]), (k_cache[:, :, 0], heads[:, 0, 32:40], norms["k_norm"])):
        want, other = (
            head_norm(x, weight, 1e-6, r) for r in (norm_rounding, "qwen3" if norm_rounding != "qwen3" else "flash_attn")
        )
        assert (got == want).double().mean() > 0.99
        assert (got == other).double().mean() < 0.95
    assert torch.equal(v_cache[:, :, 0], heads[:, 0, 40:]) and torch.equal(k_cache[:, :, 1], cache[:, :, 1])


@pytest.mark.parametrize("first", [0, 4_000, 130_000])
def test_kernel_turns_as_torch_does_at_far_positions(first):
    # Same frequencies, same rounded angle: what differs is cosine and sine alone.
    case = Case("", (first,), (0,), 8, slots=first + 8, q_heads=1, kv_heads=1, dim=128)
    qkv = randn(1, 8, 3 * 128, dtype=torch.float32, device=DEVICE)
    cache = torch.zeros(1, 1, case.slots, 128, device=DEVICE)
    start, zero = ints([first], DEVICE), ints([0], DEVICE)
    want = reference(qkv, cache.clone(), cache.clone(), start, zero, 500_000.0)
    torch.testing.assert_close(kernel(qkv, cache, cache.clone(), start, zero, 500_000.0), want, atol=1e-6, rtol=0)


def test_kernel_writes_through_strided_tensors_and_nowhere_else():
    case = STRIDED
    qkv, k_cache, v_cache, window_start, kv_start, _ = inputs(case, torch.float32, DEVICE)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want = reference(qkv, want_k, want_v, window_start, kv_start, THETA)
    # Layers interleaved by slot, layout [B, L, layers, 2, Hkv, D]: layer 1 is written, all else stays.
    stacked = torch.full((2, case.slots, 3, 2, case.kv_heads, case.dim), 7.0, device=DEVICE)
    k_view, v_view = stacked[:, :, 1, 0].transpose(1, 2), stacked[:, :, 1, 1].transpose(1, 2)
    k_view.copy_(k_cache)
    v_view.copy_(v_cache)
    wide_qkv = torch.full((2, 7, qkv.shape[-1] + 5), torch.nan, device=DEVICE)
    wide_qkv[..., :-5] = qkv
    wide_out = torch.full((2, 7, 10, 16), 8.0, device=DEVICE)
    q = kernel(wide_qkv[..., :-5], k_view, v_view, window_start, kv_start, THETA, out=wide_out[:, :, :7])
    torch.testing.assert_close(q, want)
    torch.testing.assert_close(k_view, want_k)
    assert torch.equal(v_view, want_v)
    assert (stacked[:, :, [0, 2]] == 7).all() and (wide_out[:, :, 7:] == 8).all()


def test_kernel_reaches_caches_of_more_than_2_to_the_31_elements():
    # Sequences 2^30 elements apart, in memory that is reserved and, but for the window, never touched.
    case = Case("", (1, 1, 1), (0, 0, 0), 2, q_heads=1, kv_heads=1, slots=3)
    qkv, k_cache, v_cache, window_start, kv_start, _ = inputs(case, torch.float16, DEVICE)
    storage = torch.UntypedStorage(2 * (2**31 + 48), device=DEVICE)
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (3, 1, 3, 16), (2**30, 48, 16, 1))
    far.copy_(k_cache)
    kernel(qkv, far, v_cache.clone(), window_start, kv_start, THETA)
    reference(qkv, k_cache, v_cache, window_start, kv_start, THETA)
    torch.testing.assert_close(far, k_cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(4, 128)}, "qkv must be .*, got shape"),
        ({"qkv": torch.ones(2, 4, 120)}, "qkv must be .*, got 120 columns"),
        ({"qkv": torch.ones(2, 4, 64)}, "qkv must be .*, got 64 columns"),
        ({"qkv": torch.ones(2, 4, 112)}, "qkv must be .*, got 3 q heads"),
        ({"qkv": torch.ones(2, 4, 128, dtype=torch.float16)}, "k_cache must be .*, got torch.float32"),
        ({"k_cache": torch.ones(2, 2, 8, 32)[..., ::2]}, "k_cache must be .*, got strides"),
        ({"k_cache": torch.ones(2, 8, 16)}, "k_cache must be .*, got shape"),
        ({"k_cache": torch.ones(3, 2, 8, 16)}, "k_cache must be .*, got shape"),
        ({"v_cache": torch.ones(2, 2, 9, 16)}, "v_cache must be .*, got shape"),
        ({"bias": torch.ones(127)}, "bias must be .*, got shape"),
        ({"window_start": torch.zeros(2, dtype=torch.int64)}, "window_start must be .*, got torch.int64"),
        ({"kv_start": torch.zeros(3, dtype=torch.int32)}, "kv_start must be .*, got shape"),
        ({"out": torch.ones(2, 4, 4, 8)}, "out must be .*, got shape"),
        ({"rounding": "none"}, "^rounding must be .*, got 'none'"),
        ({"q_norm": torch.ones(16), "eps": 1e-6}, "k_norm must be .*, got nothing"),
        ({"k_norm": torch.ones(16)}, "q_norm must be .*, got nothing"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(16), "eps": 1e-6}, "q_norm must be .*, got shape"),
        ({"q_norm": torch.ones(16), "k_norm": torch.ones(16).half(), "eps": 1e-6}, "k_norm must be .*, got torch.float16"),
        ({"q_norm": torch.ones(16), "k_norm": torch.ones(16)}, "eps must be a number with q_norm and k_norm, .*, got None"),
        ({"eps": 1e-6}, "eps must be .* None without, got 1e-06"),
        ({"norm_rounding": "none"}, "norm_rounding must be .*, got 'none'"),
    ],
)
def test_kernel_names_what_is_wrong_and_writes_nothing(change, message):
    zeros = torch.zeros(2, dtype=torch.int32)
    args = {"qkv": torch.ones(2, 4, 128), "k_cache": torch.zeros(2, 2, 8, 16), "v_cache": torch.zeros(2, 2, 8, 16)}
    args |= {"window_start": zeros, "kv_start": zeros} | change
    args = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in args.items()}
    with pytest.raises(ValueError, match=message):
        kernel(**args, theta=THETA)
    assert "v_cache" in change or not args["v_cache"].any()


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_cover_every_head(arch):
    for q_heads, kv_heads, dim in ((32, 32, 128), (28, 4, 128), (2, 2, 16), (7, 1, 80)):
        config = module.select_config(arch, kv_heads, dim)
        assert config.programs_per_token(q_heads, kv_heads) * config.block_h >= q_heads + 2 * kv_heads
        assert config.block_h * dim <= 2048 and config.num_warps <= 16

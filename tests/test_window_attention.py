"""window_attention: the reference against PyTorch's attention in float64, the kernel against both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from _support import assert_as_close_as_torch, ints, randn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastdllm_triton.reference.window_attention import window_attention as reference


@dataclass(frozen=True)
class Case:
    """Ranges are per sequence: attended slots are ``start <= j < end`` without ``skip[0] <= j < skip[1]``."""

    why: str
    window: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    skip: tuple[tuple[int, int], ...] | None = None
    q_heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    slots: int = 80

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def attended(self) -> Tensor:
        """``[B, L]``, written out slot by slot."""
        mask = torch.zeros(len(self.start), self.slots, dtype=torch.bool)
        for b, (start, end) in enumerate(zip(self.start, self.end, strict=True)):
            for j in range(start, end):
                mask[b, j] = self.skip is None or not self.skip[b][0] <= j < self.skip[b][1]
        return mask


CASES = [
    Case("a step over everything", 8, (0,), (80,)),
    Case("one query", 1, (0,), (80,)),
    Case("a refresh", 80, (0,), (80,)),
    Case("odd window", 7, (0, 0), (80, 77)),
    Case("window of 31", 31, (0,), (80,)),
    Case("window of 33", 33, (3,), (80,)),
    Case("window of 64", 64, (3,), (71,)),
    Case("window of 128", 128, (0,), (80,)),
    Case("ragged left padding", 8, (0, 5, 79), (80, 80, 80)),
    Case("around a tile of 32", 4, (0, 0, 0, 0), (31, 32, 33, 1)),
    Case("around a tile of 64", 4, (0, 0, 0, 7), (63, 64, 65, 71)),
    Case("an empty row between others", 4, (0, 40, 80, 0), (80, 40, 80, 0)),
    Case("start behind the end", 4, (50,), (20,)),
    Case("gqa of ratio 4", 5, (0, 2), (80, 60), q_heads=8),
    Case("gqa of ratio 7", 5, (0, 2), (80, 60), q_heads=14),
    Case("gqa of ratio 8 in one head", 3, (1,), (79,), q_heads=8, kv_heads=1),
    Case("head dim 32", 4, (1,), (79,), dim=32),
    Case("head dim 64", 4, (1,), (79,), dim=64),
    Case("head dim 80", 4, (1,), (79,), dim=80),
    Case("head dim 96", 4, (1,), (79,), dim=96),
    Case("head dim 128", 4, (1,), (79,), dim=128),
    Case("a skip inside a tile", 4, (0, 3), (80, 80), ((5, 9), (40, 41))),
    Case("a skip of whole tiles", 4, (0, 0), (80, 80), ((32, 64), (16, 80))),
    Case("a skip that begins inside a tile", 4, (0,), (80,), ((50, 80),)),
    Case("a skip that ends inside a tile", 4, (0,), (80,), ((0, 50),)),
    Case("a skip of everything", 4, (0, 4), (80, 60), ((0, 80), (4, 60))),
    Case("a skip wider than the range", 4, (10, 10), (20, 20), ((0, 15), (15, 80))),
    Case("a skip outside the range", 4, (10, 10), (20, 20), ((0, 5), (30, 60))),
    Case("an empty skip", 4, (0, 0), (80, 80), ((40, 40), (60, 20))),
    Case("a skip with gqa of ratio 7", 9, (0, 7), (80, 80), ((30, 47), (48, 80)), q_heads=7, kv_heads=1),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", poison: bool = True) -> dict[str, Tensor]:
    """The arguments. Unattended slots of the caches hold NaN: nobody may read them."""
    batch = len(case.start)
    shape = (batch, case.kv_heads, case.slots, case.dim)
    k, v = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    if poison:
        unattended = ~case.attended()[:, None, :, None]
        k, v = k.masked_fill(unattended, torch.nan), v.masked_fill(unattended, torch.nan)
    found = {
        "q": randn(batch, case.window, case.q_heads, case.dim, dtype=dtype),
        "k_cache": k,
        "v_cache": v,
        "kv_start": ints(list(case.start)),
        "kv_end": ints(list(case.end)),
    }
    if case.skip is not None:
        found["skip_start"] = ints([first for first, _ in case.skip])
        found["skip_end"] = ints([last for _, last in case.skip])
    return {name: tensor.to(device) for name, tensor in found.items()}


def sdpa(case: Case, args: dict[str, Tensor], dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """PyTorch's attention, one sequence at a time over its attended slots alone; nothing attended gives 0."""
    out = torch.zeros(args["q"].shape, dtype=dtype)
    for b, slots in enumerate(case.attended()):
        if slots.any():
            q, k, v = (args[name][b].cpu().to(dtype) for name in ("q", "k_cache", "v_cache"))
            y = scaled_dot_product_attention(q.transpose(0, 1), k[:, slots], v[:, slots], scale=scale, enable_gqa=True)
            out[b] = y.transpose(0, 1)
    return out


def base2_lse(case: Case, args: dict[str, Tensor]) -> Tensor:
    """``log2(sum(2^(s log2 e)))`` by head in float64; -inf without keys. ``[B, Hq, W]``."""
    lse = torch.full((len(case.start), case.q_heads, case.window), -torch.inf, dtype=torch.float64)
    for b, slots in enumerate(case.attended()):
        for h in range(case.q_heads if slots.any() else 0):
            k = args["k_cache"][b, h * case.kv_heads // case.q_heads].cpu().double()[slots]
            scores = args["q"][b, :, h].cpu().double() @ k.T / math.sqrt(case.dim)
            lse[b, h] = torch.logsumexp(scores, dim=1) * math.log2(math.e)
    return lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_attention_over_the_attended_slots(case):
    args = inputs(case, torch.float64)
    out, lse = reference(**args, return_lse=True)
    torch.testing.assert_close(out, sdpa(case, args, torch.float64))
    torch.testing.assert_close(lse, base2_lse(case, args))
    assert torch.equal(reference(**args), out)


def test_reference_scales_as_asked_and_writes_into_out():
    case = CASES[0]
    args = inputs(case, torch.float64)
    out = torch.empty_like(args["q"])
    assert reference(**args, scale=0.7, out=out) is out
    torch.testing.assert_close(out, sdpa(case, args, torch.float64, scale=0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_in_low_precision_is_as_close_as_torch(dtype):
    case = Case("", 8, (0, 7), (80, 80), dim=64, q_heads=14)
    args = inputs(case, dtype)
    assert_as_close_as_torch(reference(**args), sdpa(case, args, torch.float64), sdpa(case, args, dtype))


def test_reference_survives_scores_that_overflow_exp():
    case = Case("", 4, (0,), (80,))
    args = inputs(case, torch.float32)
    args["q"] *= 1e3
    torch.testing.assert_close(reference(**args).double(), sdpa(case, args, torch.float64), rtol=0, atol=1e-3)

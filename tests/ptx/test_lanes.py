"""What instructions read and write registers with."""

from __future__ import annotations

import numpy as np
import pytest

from fastdllm_triton.ptx.lanes import UNSIGNED, choose


@pytest.mark.parametrize("bits", UNSIGNED)
def test_choose_is_where(bits):
    random, dtype = np.random.default_rng(0), UNSIGNED[bits]
    yes, no = random.integers(0, 2**bits, (2, 50), np.uint64).astype(dtype)
    mask = random.random(50) < 0.5
    for a, b in ((yes, no), (yes[:1], no), (yes, no[:1]), (yes[:1], no[:1])):
        got = choose(mask, a, b)
        assert got.dtype == dtype
        assert np.array_equal(got, np.where(mask, a, b))
        for one in (True, False):
            assert np.array_equal(np.broadcast_to(choose(np.array([one]), a, b), 50), np.broadcast_to(a if one else b, 50))

"""The emulated GPU: Triton kernels on CPU tensors, the faults that it must find, and the errors that it must give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from _kernels import add_kernel, chained_kernel, sum_kernel, turned_kernel

from fastdllm_triton.ptx import driver
from fastdllm_triton.ptx.emulator import Accepted, Emulator, FindingsError
from fastdllm_triton.ptx.findings import Kind

ARCHS = ("sm_80", "sm_90")
pytestmark = pytest.mark.ptx


@pytest.fixture(params=ARCHS)
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """Runs kernels; what it finds is for the test to judge."""
    made = Emulator(request.param)
    with made.running(strict=False):
        yield made


def _kinds(emulator: Emulator) -> set[Kind]:
    return {finding.kind for finding in emulator.findings}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_computes_what_torch_does(emulator: Emulator, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 1000).to(dtype)
    out = torch.full_like(x, torch.nan)
    add_kernel[(8,)](x, y, out, 1000, END=0, BLOCK=128)
    assert torch.equal(out, x + y)
    assert not emulator.findings
    assert emulator.launches == {"add_kernel": 1}
    emulator.check()


def test_a_store_one_element_too_far_is_found_and_dropped(emulator: Emulator) -> None:
    memory = torch.zeros(1001)
    add_kernel[(8,)](torch.ones(1000), torch.ones(1000), memory[:1000], 1000, END=1, BLOCK=128)
    (finding,) = emulator.findings
    assert finding.kind == Kind.OUTSIDE
    assert "_kernels.py:14" in finding.location
    assert "st.global" in finding.text
    assert memory[1000] == 0
    with pytest.raises(FindingsError, match=r"outside of every tensor.*in add_kernel, _kernels.py:14, PTX line \d+: .*st.global"):
        emulator.check()


def test_a_store_into_the_gap_between_rows_is_found(emulator: Emulator) -> None:
    rows = torch.zeros(4, 40)[:, :32]
    add_kernel[(1,)](torch.ones(128), torch.ones(128), rows, 128, END=0, BLOCK=128)
    assert _kinds(emulator) == {Kind.OUTSIDE}


def test_an_accepted_finding_is_no_error() -> None:
    known = Accepted("add_kernel", Kind.OUTSIDE, "_kernels.py:14", "the test wants it")
    emulator = Emulator("sm_80", accepted=[known])
    with emulator.running():
        add_kernel[(1,)](torch.ones(99), torch.ones(99), torch.zeros(99), 99, END=1, BLOCK=128)
    assert len(emulator.findings) == 1
    assert not emulator.unaccepted


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_between_warps_is_found(emulator: Emulator, barrier: bool) -> None:
    x = torch.arange(256.0)
    turned_kernel[(1,)](x, torch.empty(256), BARRIER=barrier, BLOCK=256)
    assert _kinds(emulator) == (set() if barrier else {Kind.GLOBAL_RACE})
    if barrier:
        assert x.tolist() == [256 - i for i in range(256)]


@pytest.mark.parametrize("atomic", [True, False])
def test_programs_that_add_to_one_number_without_atomics_are_found(emulator: Emulator, atomic: bool) -> None:
    out = torch.zeros(1)
    sum_kernel[(16,)](torch.ones(16 * 128), out, ATOMIC=atomic, BLOCK=128)
    assert _kinds(emulator) == (set() if atomic else {Kind.GLOBAL_RACE})
    if atomic:
        assert out.item() == 16 * 128


@pytest.mark.parametrize("early", [False, True])
def test_a_dependent_launch_that_reads_before_its_wait_is_found(early: bool) -> None:
    emulator = Emulator("sm_90")
    a, b, c, d = torch.zeros(4, 128)
    with emulator.running(strict=False), emulator.overlapping():
        chained_kernel[(1,)](a, b, EARLY=False, BLOCK=128, launch_pdl=True)
        chained_kernel[(1,)](b, c, EARLY=early, BLOCK=128, launch_pdl=True)
        chained_kernel[(1,)](c, d, EARLY=False, BLOCK=128, launch_pdl=True)
        assert not d.any(), "nothing runs inside the context"
    assert _kinds(emulator) == ({Kind.EARLY_ACCESS} if early else set())
    assert torch.equal(d, torch.full((128,), 2.0 if early else 3.0)), "the early one has read what was there before"


def test_launches_that_are_not_dependent_wait_for_each_other() -> None:
    emulator = Emulator("sm_90")
    a, b, c = torch.zeros(3, 128)
    with emulator.running(), emulator.overlapping():
        chained_kernel[(1,)](a, b, EARLY=True, BLOCK=128)
        chained_kernel[(1,)](b, c, EARLY=True, BLOCK=128)
    assert (c == 2).all()


def test_programs_run_in_any_order() -> None:
    orders = []
    for seed in (None, 0, 1):
        emulator = Emulator("sm_80", seed=seed)
        out = torch.zeros(1)
        with emulator.running(strict=False):
            x = torch.randn(32, generator=torch.Generator().manual_seed(0)).repeat_interleave(128)
            sum_kernel[(32,)](x, out, ATOMIC=True, BLOCK=128)
        assert not emulator.findings
        orders.append(out.item())
    assert len(set(orders)) > 1, "sums of one order are the same as those of another"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="arch must be one of sm_80, sm_90, got 'sm_70'"), Emulator("sm_70").running():
        pass
    x = torch.ones(128, device="meta")
    with Emulator("sm_80").running(), pytest.raises(ValueError, match="takes CPU tensors, got one on meta"):
        add_kernel[(1,)](x, x, x, 128, END=0, BLOCK=128)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"), Emulator("sm_80").running():
            pass
    with monkeypatch.context() as patch:
        patch.setattr(driver.CUDABackend, "hash", _no_ptxas)
        with Emulator("sm_80").running(), pytest.raises(RuntimeError, match=r"Triton finds no ptxas.*TRITON_PTXAS_PATH"):
            add_kernel[(1,)](torch.ones(64), torch.ones(64), torch.ones(64), 64, END=0, BLOCK=64)


def _no_ptxas(self: object) -> str:
    raise FileNotFoundError("ptxas")


def test_a_launch_of_no_programs_does_nothing(emulator: Emulator) -> None:
    add_kernel[(0,)](torch.ones(1), torch.ones(1), torch.ones(1), 1, END=0, BLOCK=32)
    assert not emulator.launches


def test_the_driver_of_before_is_back_afterwards() -> None:
    before, backend = triton.runtime.driver._active, triton.backends.backends["nvidia"]
    with pytest.raises(KeyError), Emulator("sm_80").running():
        raise KeyError
    assert triton.runtime.driver._active is before
    assert triton.backends.backends["nvidia"] is backend

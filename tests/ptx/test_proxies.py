import numpy as np
import pytest
from _programs import kernel

from fastdllm_triton.ptx.findings import Findings
from fastdllm_triton.ptx.lanes import Lanes
from fastdllm_triton.ptx.shared import SharedMemory

#: Warps 0 and 1 of program 0, and warp 0 of program 1.
FIRST, SECOND, OTHER = np.arange(32), np.arange(32, 64), np.arange(64, 96)


class Bench:
    """Shared memory of two programs, and what warps do with it."""

    def __init__(self, **options):
        ends = kernel("ret;", threads=64)
        self.shared = SharedMemory(2, 512, granule=4, **{"checks": True, "has_wgmma": True} | options)
        self.lanes = Lanes(ends, np.arange(2), {}, {}, None, self.shared, Findings())
        self.lanes.here = ends.instructions[-1]
        self.shared.start(self.lanes)

    def write(self, warp):
        """Each thread writes the 4 bytes of its place in the warp."""
        self.shared.store(self.lanes, warp, np.arange(32) * 4, np.zeros((32, 4), np.uint8))

    def copy(self, warp):
        begun = self.shared.begin_copy(self.lanes, warp, np.arange(32) * 4, np.zeros((32, 4), np.uint8))
        self.shared.end_copy(self.lanes, *begun, 4)

    def fence(self, warp):
        self.shared.fence(self.lanes, warp)

    def barrier(self):
        self.lanes.intervals = self.lanes.intervals + 1

    def unfenced(self, warp, **options):
        """Whether a warp that reads 16 bytes finds one unfenced, of those at 0 and of those at 256, where nobody wrote."""
        found = self.shared.unfenced(self.lanes, warp[:2], np.array([0, 256]), 16, **options)
        assert not found[1]
        return bool(found[0])


@pytest.mark.parametrize(
    ("steps", "unfenced"),
    [
        ("", False),
        ("write0", True),
        ("write0 fence0", False),
        ("fence0 write0", True),
        ("write0 fence0 barrier", False),
        ("write0 barrier", True),
        ("write0 barrier fence0", False),
        ("write1 fence1 barrier", False),  # the one that wrote fences
        ("write1 barrier fence0", False),  # the one that reads fences, behind a barrier
        ("write1 fence0 barrier", True),  # that fence may have come before the write
        ("write1 barrier fence1", False),
        ("write0 fence0 barrier write1 barrier", True),
        ("write0 write1 fence0 barrier", True),  # both wrote, one fenced
        ("write0 write1 fence0 fence1 barrier", False),
        ("write0 fence0 write1 fence1 barrier", False),  # each fences its own
        ("write0 fence0 write1 barrier", True),
    ],
)
def test_writes_that_a_fence_has_made_visible(steps, unfenced):
    bench = Bench()
    for step in steps.split():
        if step == "barrier":
            bench.barrier()
        else:
            getattr(bench, step[:-1])((FIRST, SECOND)[int(step[-1])])
    assert bench.unfenced(FIRST) == unfenced


def test_programs_have_fences_of_their_own():
    bench = Bench()
    bench.write(FIRST)
    bench.write(OTHER)
    bench.fence(OTHER)
    assert bench.unfenced(FIRST) and not bench.unfenced(OTHER)


def test_copies_need_a_fence_only_if_asked():
    bench = Bench()
    bench.copy(FIRST)
    assert not bench.unfenced(FIRST)
    assert bench.unfenced(FIRST, copies=True)
    bench.fence(FIRST)
    assert not bench.unfenced(FIRST, copies=True)


def test_a_new_batch_has_nothing_to_fence():
    bench = Bench()
    bench.write(FIRST)
    bench.shared.start(bench.lanes)
    assert not bench.unfenced(FIRST)


def test_without_checks_or_wgmma_nothing_is_unfenced():
    for options in ({"checks": False}, {"has_wgmma": False}):
        bench = Bench(**options)
        bench.write(FIRST)
        assert not bench.unfenced(FIRST)


def test_addresses_outside_are_not_unfenced():
    bench = Bench()
    bench.write(FIRST)
    found = bench.shared.unfenced(bench.lanes, FIRST[:4], np.array([0, 8, 512, -16]), 16)
    assert found.tolist() == [True, False, False, False]

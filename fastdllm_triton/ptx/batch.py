"""A batch of programs on its way through a kernel: where each thread is, and which run next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .findings import Kind
from .lanes import UNSIGNED, WARP, Array, Lanes, Mask
from .parser import Instruction
from .program import Program, Sequence

#: How often threads run before others that are ready, until those have a turn: they may wait for what those do.
_PATIENCE = 2_048
_TURN = 64
#: Blocks for which warps keep their pace, where it is random.
_STRETCH = 128
#: Blocks that a batch may run: more is taken for a wait that never ends.
_MOST = 20_000_000

Chosen = NDArray[np.bool_]


class DeadlockError(RuntimeError):
    """Threads wait for what does not happen; the message names the kernel, a program, a thread and a line."""


class Batch:
    """The state of a batch between blocks.

    Attributes:
        lanes: registers and memories.
        ended: whether all threads have left.
    """

    def __init__(self, program: Program, lanes: Lanes) -> None:
        self.lanes = lanes
        self.ended = False
        self._sequences = program.sequences
        self._whole: Chosen = np.array([sequence.whole for sequence in program.sequences])
        count = lanes.count
        self._programs, self._threads = len(lanes.programs), lanes.kernel.threads
        self._at: NDArray[np.int32] = np.zeros(count, np.int32)
        self._alive: Chosen = np.ones(count, np.bool_)
        #: At a barrier, of which block, and at griddepcontrol.wait.
        self._stopped: Chosen = np.zeros(count, np.bool_)
        self._barrier: NDArray[np.int32] = np.zeros(count, np.int32)
        self._parked: Chosen = np.zeros(count, np.bool_)
        #: The block at which all living threads are, and whether they all live, or all of each warp or none.
        self._together: int | None = 0 if lanes.random is None else None
        self._all_alive = self._whole_warps = True
        self._skipped = self._run = 0
        self._groups: list[tuple[Chosen, float]] = []
        self._nothing = {bits: np.zeros(1, dtype) for bits, dtype in UNSIGNED.items()}

    def run(self, *, early: bool) -> Iterator[None]:
        """Runs until all threads have left, or, where it is too early, wait for the launch before; yields after each block."""
        if not early:
            self._parked[:] = False
        while not self.ended:
            mask: Mask
            if self._together is not None:
                at, mask = self._together, None
            else:
                chosen = self._choose(early)
                if chosen is None:
                    return
                at, mask = chosen
                if mask.all():
                    mask = None
            self._execute(self._sequences[at], mask)
            self._follow(at, mask, early)
            self._run += 1
            if self._run > _MOST:
                raise DeadlockError(f"{self._where(at, mask)}: still running after {_MOST} blocks")
            yield

    # What runs ----------------------------------------------------------------------------------------------------------------

    def _choose(self, early: bool) -> tuple[int, Chosen] | None:
        """A block, and the threads that run it; None if there are none."""
        ready = self._alive & ~self._stopped & ~self._parked
        if not ready.any():
            if not self._alive.any():
                self.ended = True
            elif not (early and self._parked.any()):
                self._stuck()
            return None
        held = ready & self._whole[self._at]
        if held.any():
            free = ready & ~(held & np.repeat(self._scattered(), WARP))
            if free.any():
                ready = free
            elif early and self._parked.any():
                return None  # the others of their warps may come later
        if self.lanes.random is not None:
            return self._draw(ready)
        waiting = self._at[ready]
        at = int(waiting.min())
        if self._skipped >= _PATIENCE:
            at = int(waiting.max())
        mask = ready & (self._at == at)
        if len(waiting) == np.count_nonzero(mask):
            self._skipped = 0
        else:
            self._skipped = (self._skipped + 1) % (_PATIENCE + _TURN)
        return at, mask

    def _scattered(self) -> Chosen:
        """``[warps]``: whether the living threads of a warp are not all at one block and ready."""
        at = np.where(self._alive, self._at, -1).reshape(-1, WARP)
        elsewhere = (self._alive & (self._stopped | self._parked)).reshape(-1, WARP).any(1)
        highest = at.max(1, keepdims=True)
        scattered: Chosen = ((at != highest) & (at != -1)).any(1) | elsewhere
        return scattered

    def _draw(self, ready: Chosen) -> tuple[int, Chosen]:
        """Of a random one of the groups that warps are divided into for a while, some fast and some slow, the slowest."""
        random = self.lanes.random
        assert random is not None
        if self._run % _STRETCH == 0 or not self._groups:
            number = int(random.integers(2, 5))
            # Programs are of two kinds: if all differed, their barriers would tear the groups apart, and all would take long.
            kinds = random.integers(0, number, (2, self._threads // WARP))
            group = np.repeat(kinds[random.integers(0, 2, self._programs)].reshape(-1), WARP)
            self._groups = [(group == n, float(pace)) for n, pace in enumerate(random.uniform(0.02, 1, number))]
        groups = [(ready & members, pace) for members, pace in self._groups]
        groups = [(members, pace) for members, pace in groups if members.any()]
        paces = np.array([pace for _, pace in groups])
        members, _ = groups[int(random.choice(len(groups), p=paces / paces.sum()))]
        waiting = self._at[members]
        at = int(waiting.min() if random.random() < 0.9 else random.choice(waiting))
        return at, members & (self._at == at)

    def _execute(self, sequence: Sequence, mask: Mask) -> None:
        """Runs a block's instructions."""
        lanes, registers = self.lanes, self.lanes.registers
        wide = mask  # of what does no harm in threads that have left
        if self._together is not None and not self._all_alive:
            mask = self._alive
            wide = None if self._whole_warps else mask
        for instruction, step, guard, negated, harmless, last in sequence.actions:
            lanes.here = instruction
            chosen = wide if harmless else mask
            if guard is None:
                step(lanes, chosen)
            else:
                where = registers[guard]
                if negated:
                    where = ~where
                if len(where) == 1:
                    if where[0]:
                        step(lanes, chosen)
                elif where.all():
                    step(lanes, chosen)
                else:
                    if chosen is not None:
                        where = where & chosen
                    if where.any():
                        step(lanes, where)
            if last and self._together is not None:
                for slot in last:
                    registers[slot] = self._nothing[lanes.kernel.registers[slot]]

    # Where they go ------------------------------------------------------------------------------------------------------------

    def _follow(self, at: int, mask: Mask, early: bool) -> None:
        """Moves threads that ran a block on."""
        sequence = self._sequences[at]
        end = sequence.end
        if end is None:
            self._move(mask, at + 1)
            return
        guard: Array | None = None
        if end.guard is not None:
            guard = self.lanes.registers[end.guard.slot]
            if end.negated:
                guard = ~guard
            if (self._living(guard, mask)).all():
                guard = None
            elif not self._living(guard, mask).any():
                self._move(mask, at + 1)
                return
        if end.name == "bra":
            assert sequence.target is not None
            self._move(mask, sequence.target if guard is None else np.where(guard, sequence.target, at + 1))
        elif end.name == "griddepcontrol":
            if early:
                self._part(mask)
                self._parked |= self._those(mask, guard)
            self._move(mask, at + 1)
        elif end.name in ("ret", "exit"):
            self._leave(at, mask, guard)
        elif guard is None and mask is None and self._together is not None and self._all_alive:
            self.lanes.intervals = self.lanes.intervals + 1
            self._together = at + 1
        else:
            self._part(mask)
            those = self._those(mask, guard)
            self._stopped |= those
            self._barrier[those] = at
            self._move(mask, at + 1)
            self._release()

    def _living(self, guard: Array, mask: Mask) -> Array:
        """A guard's values in the threads that ran."""
        if len(guard) == 1:
            return guard
        if mask is None:
            return guard if self._all_alive else guard[self._alive]
        return guard[mask]

    def _those(self, mask: Mask, guard: Array | None) -> Chosen:
        """The threads of a mask where a guard holds."""
        those: Chosen = self._alive.copy() if mask is None else mask & self._alive
        return those if guard is None else those & guard

    def _part(self, mask: Mask) -> None:
        """Begins to follow each thread by itself."""
        if self._together is not None:
            assert mask is None
            self._at[:] = self._together
            self._together = None

    def _move(self, mask: Mask, to: int | Array) -> None:
        if self._together is not None and isinstance(to, int):
            self._together = to
            return
        self._part(mask)
        if mask is None:
            self._at = np.broadcast_to(np.asarray(to, np.int32), (self.lanes.count,)).copy()
        else:
            self._at = np.where(mask, to, self._at).astype(np.int32)
        self._meet()

    def _meet(self) -> None:
        """Sees whether all living threads are at one block."""
        if self.lanes.random is not None or self._parked.any() or self._stopped.any():
            return
        if self._all_alive:
            if (self._at == self._at[0]).all():
                self._together = int(self._at[0])
            return
        where = self._at[self._alive]
        if len(where) and (where == where[0]).all():
            self._together = int(where[0])

    def _leave(self, at: int, mask: Mask, guard: Array | None) -> None:
        """Threads end."""
        self._part(mask)
        self._alive &= ~self._those(mask, guard)
        if not self._alive.any():
            self.ended = True
            return
        warps = self._alive.reshape(-1, WARP)
        self._all_alive, self._whole_warps = False, bool((warps.all(1) | ~warps.any(1)).all())
        if guard is not None:
            self._move(mask, at + 1)
        self._release()
        self._meet()

    # Barriers -----------------------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Lets programs pass a barrier that all their living threads have reached."""
        shape = (self._programs, self._threads)
        stopped, alive = self._stopped.reshape(shape), self._alive.reshape(shape)
        free = stopped.any(1) & ~(alive & ~stopped).any(1)
        if not free.any():
            return
        self._check_even(np.flatnonzero(free))
        # The counts of programs that have ended go along, so that they hold nothing up.
        intervals = self.lanes.intervals + free
        over = ~alive.any(1)
        intervals[over] = intervals.max()
        self.lanes.intervals = intervals
        stopped[free] = False
        self._meet()

    def _check_even(self, places: NDArray[np.int64]) -> None:
        """Notes barriers that only some threads reached."""
        shape = (self._programs, self._threads)
        barrier, alive = self._barrier.reshape(shape)[places], self._alive.reshape(shape)[places]
        most = np.where(alive, barrier, -1).max(1, keepdims=True)
        for uneven, why in ((alive & (barrier != most), "others are at another one"), (~alive, "others have ended")):
            some = places[uneven.any(1)]
            for at in np.unique(self._barrier.reshape(shape)[some][alive[uneven.any(1)]]):
                end = self._sequences[at].end
                assert end is not None
                self.lanes.here = end
                here = (self._barrier.reshape(shape)[some] == at) & self._alive.reshape(shape)[some]
                rows, threads = np.nonzero(here)
                self.lanes.note(Kind.UNEVEN_BARRIER, some[rows] * self._threads + threads, why)

    def _stuck(self) -> None:
        """All living threads wait."""
        thread = int(np.flatnonzero(self._alive)[0])
        raise DeadlockError(f"{self._where(int(self._at[thread]), self._alive)}: no thread can go on")

    def _where(self, at: int, mask: Mask) -> str:
        lanes = self.lanes
        first = int(lanes.active(self._alive if mask is None else mask)[0])
        sequence = self._sequences[at]
        here: Instruction | None = sequence.actions[0].instruction if sequence.actions else sequence.end
        line = f", {here.location}, PTX line {here.line}" if here else ""
        program, thread = int(lanes.programs[lanes.place[first]]), int(lanes.thread[first])
        return f"{lanes.kernel.name}{line} [program {program}, thread {thread}]"

"""An emulated GPU: runs launches of Triton kernels on CPU tensors, in order or as badly as a GPU may, and says what it found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .driver import Launch, driving
from .findings import Finding, Findings, Kind
from .machine import Machine
from .memory import GlobalMemory


class FindingsError(AssertionError):
    """What launches did is wrong, whatever they computed."""


@dataclass(frozen=True)
class Accepted:
    """A finding that is known to be harmless.

    Attributes:
        kernel: its name.
        kind: of the finding.
        location: part of the finding's location, such as ``commit_tokens.py:232``.
        why: it is harmless.
    """

    kernel: str
    kind: Kind
    location: str
    why: str

    def covers(self, finding: Finding) -> bool:
        """Whether a finding is this one."""
        return (self.kernel, self.kind) == (finding.kernel, finding.kind) and self.location in finding.location


def machine_of(launch: Launch, findings: Findings, **options: Any) -> Machine:
    """The machine that runs a launch; ``options`` are those of :class:`~fastdllm_triton.ptx.machine.Machine`."""
    memory = GlobalMemory(launch.tensors)
    return Machine(launch.kernel, memory, launch.parameters, launch.grid, launch.shared_bytes, findings, **options)


@dataclass
class Emulator:
    """The GPU.

    Attributes:
        arch: a name of :data:`~fastdllm_triton.ptx.driver.TARGETS`.
        checks: whether to look for races; addresses are checked anyway.
        seed: of the order in which warps and programs run; None runs them in order.
        accepted: findings that are no error.
        findings: all that were made.
        launches: how many were made of each kernel.
    """

    arch: str
    checks: bool = True
    seed: int | None = None
    accepted: Sequence[Accepted] = ()
    findings: Findings = field(default_factory=Findings)
    launches: dict[str, int] = field(default_factory=dict)
    _queue: list[Launch] | None = field(default=None, repr=False)

    @property
    def unaccepted(self) -> list[Finding]:
        return [finding for finding in self.findings if not any(known.covers(finding) for known in self.accepted)]

    def check(self) -> None:
        """Raises :class:`FindingsError` if there are findings that are not accepted."""
        if found := self.unaccepted:
            raise FindingsError("\n".join(map(str, found)))

    @contextmanager
    def running(self, *, strict: bool = True) -> Iterator[Emulator]:
        """Launches of Triton kernels in this context are executed; at its end, if it is strict, :meth:`check`."""
        with driving(self.arch, self._launch):
            yield self
        if strict:
            self.check()

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Launches in this context run at its end, overlapping as far as programmatic dependent launch lets them.

        Of a chain of dependent launches, each begins before the one before it has done anything, runs up to its
        ``griddepcontrol.wait``, and goes on when that one has ended (CUDA programming guide, "Programmatic Dependent Launch and
        Synchronization"). Nothing may look at results inside the context.
        """
        if self._queue is not None:
            raise RuntimeError("overlapping() is not nested")
        queue = self._queue = []
        try:
            yield
        finally:
            self._queue = None
        self._run_overlapping(queue)

    def _run_overlapping(self, queue: Sequence[Launch]) -> None:
        running: Machine | None = None
        for launch in queue:
            following = self._machine(launch, dependent=launch.is_dependent and running is not None)
            if launch.is_dependent and running is not None:
                following.advance()  # up to its wait, before the launch before it has stored anything
            if running is not None:
                running.run()
            running = following
        if running is not None:
            running.run()

    def _launch(self, launch: Launch) -> None:
        self.launches[launch.kernel.name] = self.launches.get(launch.kernel.name, 0) + 1
        if self._queue is not None:
            self._queue.append(launch)
        else:
            self._machine(launch).run()

    def _machine(self, launch: Launch, *, dependent: bool = False) -> Machine:
        return machine_of(launch, self.findings, checks=self.checks, seed=self.seed, dependent=dependent)

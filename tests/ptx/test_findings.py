"""What the checks find, counted."""

from __future__ import annotations

from _programs import kernel

from fastdllm_triton.ptx.findings import Findings, Kind


def test_findings_of_an_instruction_and_kind_count_as_the_first_of_them():
    load, store = kernel("ld.global.b32 %r10, [%rd0];\nst.global.b32 [%rd0], %r10;\nret;").instructions[-3:-1]
    findings = Findings()
    findings.add(Kind.OUTSIDE, "kernel", load, program=3, thread=5, count=2, detail="4 bytes behind the end of x")
    findings.add(Kind.OUTSIDE, "kernel", load, program=0, thread=1, count=7, detail="in a gap of x")
    findings.add(Kind.MISALIGNED, "kernel", load, program=0, thread=1, count=1, detail="")
    findings.add(Kind.OUTSIDE, "kernel", store, program=0, thread=1, count=1, detail="")
    findings.add(Kind.OUTSIDE, "other", load, program=0, thread=1, count=1, detail="")
    first, *others = findings
    assert (first.program, first.thread, first.detail) == (3, 5, "4 bytes behind the end of x")
    assert [findings.counts[finding] for finding in (first, *others)] == [9, 1, 1, 1]
    findings.clear()
    assert not findings

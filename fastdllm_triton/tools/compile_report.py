"""What the compilers make of every kernel, without a GPU: registers, spills, shared memory, instructions.

Each ``verify/cases/<op>.py`` lists calls in which the op's config function returns all that it can. What these would launch is
compiled ahead of time in processes of their own, where Triton's interpreter is off whatever it is here. A record is a dict:

| key           | meaning                                                                                  |
|---------------|------------------------------------------------------------------------------------------|
| op, kernel    | the op, and its ``@triton.jit`` function                                                 |
| arch          | ``sm_80`` ... ``gfx942``                                                                 |
| config        | label of the configuration                                                               |
| registers     | a thread (AMD: vector registers, accumulation registers included)                        |
| spill_bytes   | a thread: stack on NVIDIA, scratch memory on AMD; the kernels have no other use for either |
| shared_bytes  | a program                                                                                |
| ctas_per_sm   | programs that fit an SM at once                                                          |
| mma           | tensor-core instruction: ``mma.sync``, ``wgmma``, ``tcgen05``, ``mfma`` or ``none``      |
| widest_load   | bits of the widest load from global memory                                               |
| async_loads   | whether tiles travel to shared memory without passing through registers                  |
| waits_first   | whether programs wait for the launch before theirs ahead of any access to memory         |
| serialised    | whether each ``wgmma`` waits for the one before                                          |
| contractions  | 16-bit multiply-adds that leave out a rounding                                           |
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.table import Table
from rich.text import Text

from ..kernels._arch import ARCHS, Arch
from ..utils.checks import known_names
from ..verify.cases import LAUNCHED, OpCases, Sizes
from .assembly import contractions, cuobjdump, serialised, waits_first
from .recorder import META, Launch, recorded

CompileRecord = dict[str, Any]

#: The Triton that made ``bench/compile_report.json``. Another one may well use other registers.
COMMITTED_WITH = "3.6.0"
#: Most resident warps and programs of an SM, CUDA C++ programming guide, table of compute capabilities.
RESIDENT = {"sm_80": (64, 32), "sm_89": (48, 24), "sm_90": (64, 32), "sm_100": (64, 32), "sm_120": (48, 24)}
REGISTERS_PER_SM = 65_536
#: Shared memory that CUDA keeps for itself in every program.
RESERVED_SHARED = 1024
#: Columns of tensor memory of an SM (sm_100).
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as a launcher would launch it.

    Attributes:
        op: what launches it.
        launch: one of its launches.
        config: short unique label of the configuration within the kernel.
    """

    op: str
    launch: Launch
    config: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.launch.kernel.__name__, self.config

    @property
    def launch_options(self) -> dict[str, Any]:
        """Warps, stages, and whether products and sums may be fused."""
        return {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, **self.launch.options}


def reported_ops() -> list[str]:
    return sorted(LAUNCHED)


@cache
def compile_cases(op: str, arch: str) -> list[CompileCase]:
    """The configurations of an op, the first launch of each label."""
    cases, by_key = LAUNCHED[op], dict[tuple[str, str, str], CompileCase]()
    for dtype, sizes, options in cases.compiled(ARCHS[arch]):
        for case in launched(cases, sizes, dtype, ARCHS[arch], options):
            by_key.setdefault(case.key, case)
    return list(by_key.values())


def launched(
    cases: OpCases, sizes: Sizes, dtype: torch.dtype, arch: Arch, options: Mapping[str, Any] | None = None
) -> list[CompileCase]:
    """What a call launches of the op's own kernels, on a GPU of the architecture that nothing was measured on."""
    inputs = cases.inputs(sizes, META, dtype)
    with recorded(arch) as launches:
        for variant in cases.variants(inputs).values() if options is None else [options]:
            cases.launched(**inputs, **variant)
    # What ops share counts for the one that calls it, but not where that leaves a shape to another op.
    has_part = any(launch.file == cases.op for launch in launches)
    return [
        CompileCase(cases.op, launch, cases.label(launch.kernel.__name__, launch.dtype, launch.constants))
        for launch in launches
        if has_part and (launch.file == cases.op or launch.file.startswith("_"))
    ]


def compile_report(
    archs: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CompileRecord]:
    """Compiles the cases of the ops for the architectures.

    Args:
        archs: names in :data:`ARCHS`; all if not given.
        ops: names in :func:`reported_ops`; all if not given.
        processes: compilers that run at once.
        on_progress: told how many cases are done, and of how many, after each.

    Returns:
        A record a case, in order of op, architecture and case.

    Raises:
        ValueError: an unknown architecture or op.
    """
    archs, ops = known_names("archs", archs, ARCHS), known_names("ops", ops, reported_ops())
    wanted = [(arch, case.key) for op in ops for arch in archs for case in compile_cases(op, arch)]
    return in_processes(compile_named, wanted, processes, on_progress)


def in_processes(
    function: Callable[[Any], CompileRecord],
    wanted: Sequence[Any],
    processes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CompileRecord]:
    """Calls a function of a module in new processes, in which the interpreter is off."""
    # A compiler ends at an interrupt at once and without a word: the process that waits tells of it.
    initializer = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    # They read the variable when they import the kernels.
    with (
        patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer) as pool,
    ):
        records = []
        for record in pool.map(function, wanted):
            records.append(record)
            if on_progress is not None:
                on_progress(len(records), len(wanted))
        return records


def problems(records: Iterable[CompileRecord]) -> list[str]:
    """What no configuration may do, a line each: spill, take more shared memory than there is, serialise, lose a rounding."""
    lines = []
    for record in records:
        spilled, shared, lost = record["spill_bytes"], record["shared_bytes"], record["contractions"]
        limit = ARCHS[record["arch"]].shared_bytes
        faults = {
            f"spills {spilled} bytes": spilled > 0,
            f"{shared} bytes of shared memory, {limit} allowed": shared > limit,
            "does not fit an SM": record["ctas_per_sm"] < 1,
            "ptxas lets every wgmma wait for the one before": record["serialised"],
            f"{lost} fused multiply-adds leave out a rounding": lost > 0,
        }
        lines += [f"{_name(record)}: {fault}" for fault, occurs in faults.items() if occurs]
    return lines


def differences(records: Iterable[CompileRecord], expected: Iterable[CompileRecord]) -> list[str]:
    """What changed against an earlier report, a line each. Cases that were not compiled now are not judged."""
    earlier = {_name(record): record for record in expected}
    lines = []
    for record in records:
        before = earlier.get(_name(record))
        if before is None:
            lines.append(f"{_name(record)}: not in the earlier report")
        elif changed := [f"{key} {before.get(key)} -> {value}" for key, value in record.items() if before.get(key) != value]:
            lines.append(f"{_name(record)}: {', '.join(changed)}")
    return lines


def read_json(path: str | Path) -> list[CompileRecord]:
    """A report as :func:`fastdllm_triton.utils.files.write_records` wrote it."""
    records: list[CompileRecord] = json.loads(Path(path).read_text())
    return records


def full_table(records: Sequence[CompileRecord]) -> Table:
    """The report as a table; what spills or does not fit is red."""
    table = Table(title=f"Compiled with Triton {triton.__version__}")
    for key in records[0] if records else ():
        table.add_column(key.replace("_", " "), justify="left" if isinstance(records[0][key], str) else "right")
    for record in records:
        table.add_row(*(str(value) for value in record.values()), style="red" if problems([record]) else None)
    return table


def summary_table(records: Sequence[CompileRecord]) -> Table:
    """The report in a line an op; what spills or does not fit is red."""

    def cell(group: Sequence[CompileRecord]) -> Text:
        registers, shared = (max((record[key] for record in group), default=0) for key in ("registers", "shared_bytes"))
        return Text(f"{registers} / {shared / 1024:.0f}", style="red" if problems(group) else "")

    at_fault = sum(bool(problems([record])) for record in records)
    return by_arch(
        records,
        cell,
        lambda record: record["op"],
        title=f"Compiled with Triton {triton.__version__}: most registers a thread / most KiB of shared memory a program",
        caption=f"{len(records)} configurations, {at_fault or 'none'} of them spills or does not fit",
    )


def by_arch(
    records: Sequence[CompileRecord],
    cell: Callable[[Sequence[CompileRecord]], Text | str],
    name: Callable[[CompileRecord], str],
    **options: str,
) -> Table:
    """A table with a line a name and a column an architecture; a cell sums up the records of both."""
    archs = list(dict.fromkeys(record["arch"] for record in records))
    table = Table(**options)  # type: ignore[arg-type]
    table.add_column("op", no_wrap=True)
    for arch in archs:
        table.add_column(arch, justify="right")
    for row in dict.fromkeys(map(name, records)):
        groups = ([record for record in records if (name(record), record["arch"]) == (row, arch)] for arch in archs)
        table.add_row(row, *map(cell, groups))
    return table


def _name(record: CompileRecord) -> str:
    return f"{record['op']} {record['kernel']} {record['arch']} [{record['config']}]"


def compile_named(wanted: tuple[str, tuple[str, str, str]]) -> CompileRecord:
    """Compiles a case by its architecture and key, since a process cannot be sent a kernel; runs in the pool."""
    arch, key = wanted
    return compile_case(next(case for case in compile_cases(key[0], arch) if case.key == key), ARCHS[arch])


def compile_case(case: CompileCase, arch: Arch) -> CompileRecord:
    """Compiles one case and reads the result. Works where the interpreter is off.

    Raises:
        RuntimeError: the case does not compile.
    """
    op, kernel, config = case.key
    record = {"op": op, "kernel": kernel, "arch": arch.name, "config": config}
    try:
        result = compiled(case, arch)
    except Exception as error:
        raise RuntimeError(f"{_name(record)} does not compile: {error}") from error
    facts = (_cuda_facts if arch.backend == "cuda" else _hip_facts)(result, arch, case.launch_options["num_warps"])
    return record | facts


def compiled(case: CompileCase, arch: Arch) -> Any:
    """What Triton makes of a case; from its cache the second time."""
    launch, names = case.launch, case.launch.kernel.arg_names
    source = triton.compiler.ASTSource(
        launch.kernel,
        {**launch.signature, **dict.fromkeys(launch.constants, "constexpr")},
        {(names.index(name),): value for name, value in launch.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = triton.backends.compiler.GPUTarget(arch.backend, arch.capability, arch.warp_size)
    options = {name: case.launch_options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=target, options=options)


def _cuda_facts(compiled: Any, arch: Arch, num_warps: int) -> CompileRecord:
    """Registers and stack from the binary, instructions from the PTX."""
    usage = cuobjdump(compiled.asm["cubin"], "-res-usage")
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    shared = compiled.metadata.shared
    ptx = compiled.asm["ptx"]

    max_warps, max_ctas = RESIDENT[arch.name]
    warp_registers = -(-registers * 32 // 256) * 256  # allotted in pieces of 256, to four warps at a time
    ctas = min(
        REGISTERS_PER_SM // warp_registers // 4 * 4 // num_warps,
        arch.shared_bytes_per_sm // (shared + RESERVED_SHARED),
        max_warps // num_warps,
        max_ctas,
    )
    columns = getattr(compiled.metadata, "tmem_size", 0)
    if columns:
        ctas = min(ctas, TENSOR_MEMORY // columns)
    vectors = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
    loads = [int(count or 1) * int(bits) for count, bits in vectors] + [8 * int(size, 0) for size in copies]
    instructions = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    return {
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": shared,
        "ctas_per_sm": ctas,
        "mma": next((name for name, text in instructions.items() if text in ptx), "none"),
        "widest_load": max(loads, default=0),
        "async_loads": "cp.async" in ptx,
        "waits_first": waits_first(ptx),
        "serialised": serialised(ptx, arch),
        "contractions": contractions(ptx, "cuda"),
    }


def _hip_facts(compiled: Any, arch: Arch, num_warps: int) -> CompileRecord:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    registers, shared = count("vgpr_count"), compiled.metadata.shared
    # A SIMD has 512 registers a lane, given out by eights, for at most 8 waves; a compute unit has four SIMDs.
    waves = 4 * min(512 // (-(-registers // 8) * 8), 8)
    ctas = min(waves // num_warps, arch.shared_bytes_per_sm // shared if shared else waves)
    words = re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)
    return {
        "registers": registers,
        # Scalar registers that spill into lanes of vector registers take no memory, and do not count.
        "spill_bytes": count("private_segment_fixed_size"),
        "shared_bytes": shared,
        "ctas_per_sm": ctas,
        "mma": "mfma" if "v_mfma" in text else "none",
        "widest_load": max((32 * int(number or 1) for number in words), default=0),
        "async_loads": re.search(r"(?:global|buffer)_load_.*\blds\b", text) is not None,
        "waits_first": False,
        "serialised": False,
        "contractions": contractions(text, "hip"),
    }

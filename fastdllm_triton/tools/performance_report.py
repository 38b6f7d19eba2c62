"""What can be known of a kernel's speed without a GPU: how full an SM is, how many bytes are under way, what the loop does.

Memory is busy only while enough of it is asked for: bandwidth times latency, a share of it for each SM (Little's law). What a
program has under way is what its main loop loads an iteration, times the iterations that its pipeline is ahead; an SM has
that times the programs resident on it, which are those that fit or, in small grids, those that there are. The main loop is
the innermost loop of the SASS that multiplies matrices or else loads most from global memory, or all of a kernel without one.
Its instructions are counted by what they occupy. A record is a dict:

| key               | meaning                                                                                            |
|-------------------|----------------------------------------------------------------------------------------------------|
| op, kernel, arch  | as in the compile report                                                                           |
| config            | the shape class, and the configuration that it runs                                                |
| programs, waves   | of a launch; how often the GPU is filled with them                                                 |
| fit, resident     | programs that fit an SM; that are there on the busiest one                                         |
| loop_bytes        | that a program loads from global memory an iteration                                               |
| ahead             | iterations under way                                                                               |
| in_flight         | bytes an SM, the L2 cache's hits among them                                                        |
| needed            | bytes an SM for the full bandwidth, at the latency :data:`LATENCY`                                 |
| mix               | instructions of the main loop by class                                                             |

Nothing here is a time: a change of these numbers in review is a question, not an answer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from rich.table import Table

from ..kernels._arch import ARCHS, Arch
from ..utils.checks import known_names
from ..verify.cases import OPS as CASES
from ..verify.cases import ShapeClass
from .assembly import cuobjdump
from .compile_report import CompileCase, CompileRecord, by_arch, compile_case, compiled, in_processes, launched
from .roofline import GPUS

#: Seconds from a load to its data when memory is busy: an assumption, above the some 0.3 us of an idle Hopper (Luo et al.,
#: arXiv 2402.13499). It scales ``needed`` and nothing else.
LATENCY = 0.8e-6
#: The part that stands for an architecture; its SMs are those of ``ARCHS``.
PARTS = {"sm_80": "a100", "sm_89": "rtx4090", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}

#: Classes of instructions by the beginning of their names, the first that fits.
CLASSES = {
    "mma": ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "IMMA", "OMMA", "QMMA"),
    "sync": (
        "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "NANOSLEEP", "ARRIVES",
        "UTCBAR", "ACQBULK", "PREEXIT", "CCTL", "UCGABAR",
    ),
    "global load": ("LDGSTS", "LDG", "UTMALDG"),
    "store": ("STG", "UTMASTG", "REDG", "ATOM"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM", "UTCCP"),
    "shuffle": ("SHFL", "REDUX", "CREDUX", "VOTE", "MOVM"),
    "special": ("MUFU",),
    "float": (
        "FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FSET", "HADD", "HMUL", "HFMA", "HSET", "HMNMX", "F2F", "FCHK", "FRND",
        "DADD", "DMUL", "DFMA", "DSETP", "I2F", "F2I", "UFMUL", "UFADD", "UFFMA",
    ),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK", "YIELD", "BMOV", "JMP", "BRX"),
}  # fmt: skip
#: Whatever else: addresses, indices, masks, moves.
OTHER = "integer"


SHAPE_CLASSES = (
    ShapeClass("LLaDA step", "llada", 1, 32, 1024),
    ShapeClass("LLaDA step, batch 8", "llada", 8, 32, 1024),
    ShapeClass("LLaDA refresh", "llada", 1, 1024, 1024),
    ShapeClass("Dream step", "dream", 1, 32, 1024),
)
LOOP_OPS = [op for op in CASES if op != "window_inputs"]


def launches(op: str, shape_class: ShapeClass, arch: Arch) -> list[CompileCase]:
    cases = CASES[op]
    calls = (launched(cases, sizes, torch.bfloat16, arch) for sizes in cases.forward(shape_class))
    return [case for call in calls for case in call]


# --- SASS -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its address, its name with modifiers, and its operands."""

    address: int
    name: str
    operands: str

    @property
    def kind(self) -> str:
        return next((kind for kind, names in CLASSES.items() if self.name.split(".")[0].startswith(names)), OTHER)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that a thread loads from global memory."""
        if not self.name.startswith(("LDG.", "LDGSTS.")):
            return 0
        width = re.search(r"\.(?:[USB]?)(8|16|64|128|256)\b", self.name)
        return int(width.group(1)) // 8 if width else 4


def instructions(sass: str) -> list[Instruction]:
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", sass, flags=re.M)
    return [Instruction(int(address, 16), name, operands.strip()) for address, name, operands in lines if name != "NOP"]


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop that loads most from global memory, one that multiplies matrices before any other; the whole code if
    it has no loop that loads.
    """
    ends = [
        (int(target.group(1), 16), one.address)
        for one in code
        if one.name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)$", one.operands))
    ]
    loops = [(begin, end) for begin, end in ends if begin < end]
    inner = [(b, e) for b, e in loops if not any((b, e) != (x, y) and b <= x and y <= e for x, y in loops)]
    bodies = [[one for one in code if begin <= one.address <= end] for begin, end in inner]
    loaded = [(any(one.kind == "mma" for one in body), sum(one.loaded_bytes for one in body), body) for body in bodies]
    loading = [entry for entry in loaded if entry[1]]
    return max(loading, key=lambda entry: entry[:2])[2] if loading else list(code)


# --- the report -----------------------------------------------------------------------------------------------------------


def performance_report(
    archs: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CompileRecord]:
    """Compiles what the shape classes launch and reads it.

    Args:
        archs: names in :data:`PARTS`; all if not given.
        ops: names in :data:`LOOP_OPS`; all if not given.
        processes: compilers that run at once.
        on_progress: told how many launches are done, and of how many, after each.

    Raises:
        ValueError: an unknown architecture or op.
    """
    archs, ops = known_names("archs", archs, PARTS), known_names("ops", ops, LOOP_OPS)
    wanted = [
        (op, arch, number, case.config)
        for op in ops
        for arch in archs
        for number, shape_class in enumerate(SHAPE_CLASSES)
        for case in launches(op, shape_class, ARCHS[arch])
    ]
    return in_processes(_record, list(dict.fromkeys(wanted)), processes, on_progress)


def _record(wanted: tuple[str, str, int, str]) -> CompileRecord:
    """The record of a launch, by names, since a process cannot be sent a kernel."""
    op, name, number, label = wanted
    shape_class, arch = SHAPE_CLASSES[number], ARCHS[name]
    case = next(case for case in launches(op, shape_class, arch) if case.config == label)
    fit = int(compile_case(case, arch)["ctas_per_sm"])
    code = instructions(cuobjdump(compiled(case, arch).asm["cubin"], "-sass"))
    return loop_record(shape_class, case, arch, fit, code)


def loop_record(shape_class: ShapeClass, case: CompileCase, arch: Arch, fit: int, code: Sequence[Instruction]) -> CompileRecord:
    """The record of a launch from its code and from how many of its programs fit an SM."""
    body, options, programs = main_loop(code), case.launch_options, case.launch.programs
    threads = 32 * options["num_warps"]
    resident = min(fit, math.ceil(programs / arch.sms))
    is_async = any(one.name.startswith("LDGSTS") for one in body)
    ahead = max(options["num_stages"] - 1, 1) if is_async and len(body) < len(code) else 1
    loop_bytes = threads * sum(one.loaded_bytes for one in body)
    mix = Counter(one.kind for one in body)
    return {
        "op": case.op,
        "kernel": case.launch.kernel.__name__,
        "arch": arch.name,
        "config": f"{shape_class.name}: {case.config}",
        "programs": programs,
        "waves": round(programs / (fit * arch.sms), 2),
        "fit": fit,
        "resident": resident,
        "loop_bytes": loop_bytes,
        "ahead": ahead,
        "in_flight": resident * ahead * loop_bytes,
        "needed": round(GPUS[PARTS[arch.name]].bandwidth * LATENCY / arch.sms),
        "mix": {kind: mix[kind] for kind in (*CLASSES, OTHER) if mix[kind]},
    }


def _name(record: CompileRecord) -> str:
    return record["op"] if record["kernel"] == f"_{record['op']}_kernel" else f"{record['op']}, {record['kernel'].strip('_')}"


def _cells(record: CompileRecord) -> list[str]:
    total = sum(record["mix"].values())
    largest = sorted(record["mix"].items(), key=lambda item: -item[1])
    mix = ", ".join(f"{kind} {count}" for kind, count in largest)
    return [
        _name(record),
        record["config"],
        f"{record['programs']:,}",
        f"{record['resident']} of {record['fit']}",
        f"{record['in_flight'] / 1024:.0f} of {record['needed'] / 1024:.0f}",
        f"{total}: {mix}",
    ]


_COLUMNS = ("op", "shape: configuration", "programs", "resident of those that fit", "KiB in flight an SM, of needed", "main loop")


def summary_table(records: Sequence[CompileRecord]) -> Table:
    """The report in a line a kernel: bytes in flight over bytes needed, in the shape where that is least."""

    def cell(group: Sequence[CompileRecord]) -> str:
        return f"{min(record['in_flight'] / record['needed'] for record in group):.2f}" if group else ""

    caption = "Below 1, too few bytes are under way to keep memory busy: of small grids, for the most part."
    title = "KiB in flight an SM over those needed, the least of all shapes"
    return by_arch(records, cell, _name, title=title, caption=caption)


def full_tables(records: Sequence[CompileRecord]) -> list[Table]:
    tables = {arch: Table(*_COLUMNS, title=f"{arch}, {GPUS[PARTS[arch]].name}") for arch in PARTS}
    for record in records:
        tables[record["arch"]].add_row(*_cells(record))
    return [table for table in tables.values() if table.rows]


def markdown(records: Sequence[CompileRecord]) -> str:
    lines = [
        "# Static performance report",
        "",
        f"Made by `fastdllm-triton performance-report` with Triton {triton.__version__}, without a GPU. Nothing here is a time.",
        "",
        "What an SM has under way is set against bandwidth times latency over the SMs, at an assumed latency of "
        f"{LATENCY * 1e9:.0f} ns and the data sheet's bandwidth. Loads that hit the L2 cache are counted too. The main loop is "
        "the innermost loop that multiplies matrices or else loads most, or a whole kernel without one; its instructions are "
        "counted by class.",
    ]
    for arch in dict.fromkeys(record["arch"] for record in records):
        lines += ["", f"## {arch}, {GPUS[PARTS[arch]].name}", "", f"| {' | '.join(_COLUMNS)} |", "|---|---|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(_cells(record))} |" for record in records if record["arch"] == arch]
    return "\n".join(lines) + "\n"

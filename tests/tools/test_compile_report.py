"""The compile gate: kernels compile for every architecture without spills, within shared memory, and as they did before."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from rich.console import Console

from fastdllm_triton.kernels import window_attention as module
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.tools.compile_report import (
    COMMITTED_WITH,
    compile_cases,
    compile_named,
    compile_report,
    differences,
    full_table,
    in_processes,
    problems,
    read_json,
    reported_ops,
    summary_table,
)
from fastdllm_triton.utils.files import write_records

COMMITTED = Path(__file__).parents[2] / "bench" / "compile_report.json"
RECORD = {
    "op": "swiglu",
    "kernel": "_swiglu_kernel",
    "arch": "sm_90",
    "config": "bf16 block=1024",
    "registers": 28,
    "spill_bytes": 0,
    "shared_bytes": 0,
    "ctas_per_sm": 16,
    "mma": "none",
    "widest_load": 128,
    "async_loads": False,
    "waits_first": True,
    "serialised": False,
    "contractions": 0,
}


def cases(op: str, arch: str) -> list[tuple[str, str, str, str]]:
    return [(op, kernel, arch, config) for _, kernel, config in (case.key for case in compile_cases(op, arch))]


def name(record: dict) -> tuple[str, str, str, str]:
    return record["op"], record["kernel"], record["arch"], record["config"]


def sample() -> set[tuple[str, str, str, str]]:
    """A part that compiles in half a minute: of each op some cases on every architecture, most on sm_90. ``compile-report
    --json`` and a look at the difference judge all."""
    return {case for op in reported_ops() for arch in ARCHS for case in cases(op, arch)[:: 4 if arch == "sm_90" else 9]}


def test_a_sample_compiles_without_problems_and_as_committed():
    chosen, told = sample(), []
    wanted = [(arch, (op, kernel, config)) for op, kernel, arch, config in sorted(chosen)]
    records = in_processes(compile_named, wanted, 2, lambda *done: told.append(done))
    assert told == [(done, len(chosen)) for done in range(1, len(chosen) + 1)]
    assert {name(record) for record in records} == chosen
    assert problems(records) == []
    if triton.__version__ == COMMITTED_WITH:  # another compiler may well use other registers
        assert differences(records, read_json(COMMITTED)) == []


def test_the_committed_report_lists_every_configuration_and_no_other():
    listed = [name(record) for record in read_json(COMMITTED)]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {case for op in reported_ops() for arch in ARCHS for case in cases(op, arch)}


def test_the_committed_report_has_no_problems_and_uses_tensor_cores():
    committed = read_json(COMMITTED)
    assert problems(committed) == []
    assert all(list(record) == list(RECORD) for record in committed)
    attention = [record for record in committed if record["kernel"] == "_window_attention_kernel"]
    assert all(record["mma"] != "none" for record in attention)
    # The swapped order exists to reach wgmma with few rows, and the plain one does not.
    small = [record for record in attention if record["arch"] == "sm_90" and "bf16 llada D=128 32x64" in record["config"]]
    assert {("swapped" in record["config"], record["mma"]) for record in small} == {(True, "wgmma"), (False, "mma.sync")}
    assert all(record["async_loads"] for record in attention if record["arch"].startswith("sm_"))


def test_the_committed_report_says_that_no_product_waits_and_no_rounding_is_lost():
    for record in read_json(COMMITTED):
        assert not record["serialised"] and record["contractions"] == 0, record


#: The ops of a layer, one behind the other.
CHAIN = ("linear", "rms_norm", "rope_kv_write", "swiglu", "window_attention")


def test_the_kernels_of_a_layer_wait_for_the_one_before_where_launches_may_overlap_and_nowhere_else():
    for record in read_json(COMMITTED):
        overlaps = record["op"] in CHAIN and record["arch"] in ("sm_90", "sm_100", "sm_120")
        assert record["waits_first"] == overlaps, record


def test_the_bound_of_window_attention_on_shared_memory_is_one():
    for record in read_json(COMMITTED):
        if record["kernel"] != "_window_attention_kernel":
            continue
        arch = ARCHS[record["arch"]]
        case = next(case for case in compile_cases("window_attention", arch.name) if case.config == record["config"])
        constant, options = case.launch.constants, case.launch_options
        config = module.Config(
            constant["BLOCK_M"],
            constant["BLOCK_N"],
            options["num_warps"],
            options["num_stages"],
            constant["SWAP_AB"],
            1,
            module.MIN_CHUNK,
        )
        itemsize = 4 if case.launch.signature["q_ptr"] == "*fp32" else 2
        assert record["shared_bytes"] <= module.shared_bytes(arch, config, constant["D"], itemsize), record


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory, 232448 allowed"),
        ({"ctas_per_sm": 0}, "does not fit an SM"),
        ({"serialised": True}, "ptxas lets every wgmma wait for the one before"),
        ({"contractions": 8}, "8 fused multiply-adds leave out a rounding"),
    ],
)
def test_a_problem_is_found_and_named(change, problem):
    assert problems([RECORD]) == []
    assert problems([RECORD | change]) == [f"swiglu _swiglu_kernel sm_90 [bf16 block=1024]: {problem}"]


def test_a_change_is_found_and_named():
    assert differences([RECORD], [RECORD]) == []
    where = "swiglu _swiglu_kernel sm_90 [bf16 block=1024]"
    assert differences([RECORD | {"registers": 40, "mma": "wgmma"}], [RECORD]) == [
        f"{where}: registers 28 -> 40, mma none -> wgmma"
    ]
    assert differences([RECORD], []) == [f"{where}: not in the earlier report"]


def test_a_report_survives_its_file_and_is_shown(tmp_path):
    write_records(tmp_path / "report.json", [RECORD, RECORD])
    assert read_json(tmp_path / "report.json") == [RECORD, RECORD]
    assert (tmp_path / "report.json").read_text().count("\n") == 4
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(full_table([RECORD]))
    assert "bf16 block=1024" in console.export_text()


def test_a_summary_has_a_line_an_op_and_the_most_of_it():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(
        summary_table([RECORD, RECORD | {"registers": 20, "shared_bytes": 2048}, RECORD | {"arch": "sm_80", "spill_bytes": 8}])
    )
    text = console.export_text()
    (line,) = (line for line in text.splitlines() if "swiglu" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["swiglu", "28 / 2", "28 / 0"]
    assert "3 configurations, 1 of them spills or does not fit" in " ".join(text.split())


SPILLING = """
from dataclasses import replace
from fastdllm_triton.tools.compile_report import compile_case, compile_cases
from fastdllm_triton.kernels._arch import ARCHS
for name in ("sm_80", "gfx942"):
    case = next(case for case in compile_cases("window_attention", name) if case.launch.constants.get("BLOCK_M") == 128)
    launch = replace(case.launch, options=case.launch.options | {"num_warps": 1})
    print(compile_case(replace(case, launch=launch), ARCHS[name])["spill_bytes"])
"""


def test_a_kernel_that_spills_is_found_out():
    # 128 rows on a single warp: what the gate is there to find.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", SPILLING], env=environment, capture_output=True, text=True, check=True)
    assert [int(spilled) > 0 for spilled in found.stdout.split()] == [True, True], found.stdout


@pytest.mark.parametrize(
    ("archs", "ops", "message"), [(["sm_70"], None, "archs: got sm_70"), (None, ["matmul"], "ops: got matmul")]
)
def test_unknown_names_are_named(archs, ops, message):
    with pytest.raises(ValueError, match=message):
        compile_report(archs, ops)

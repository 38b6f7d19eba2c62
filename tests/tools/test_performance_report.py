"""The static performance report: what it reads from SASS, what it makes of it, and the committed one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from typer.testing import CliRunner

from fastdllm_triton.cli.app import app
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.tools import performance_report as module
from fastdllm_triton.tools.compile_report import COMMITTED_WITH, differences, read_json
from fastdllm_triton.tools.performance_report import SHAPE_CLASSES, instructions, launches, loop_record, main_loop

BENCH = Path(__file__).parents[2] / "bench"
#: A prologue that loads much, a loop in which another turns that loads nothing, a loop that loads, and an end in itself.
SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402047981 */
                                                                         /* 0x000fe2000c1e1900 */
        /*0010*/                   LDG.E.128.CONSTANT R8, [R2.64+0x10] ; /* 0x0000000402047981 */
        /*0020*/                   FADD R1, R2, R3 ;                     /* 0x0000000402047981 */
        /*0030*/                   FFMA R1, R2, R3, R4 ;                 /* 0x0000000402047981 */
        /*0040*/              @!P1 BRA 0x30 ;                            /* 0x0000000402047981 */
        /*0050*/               @P0 BRA 0x20 ;                            /* 0x0000000402047981 */
        /*0060*/               @P2 LDGSTS.E.BYPASS.128 [R45], desc[UR6][R14.64], P2 ; /* 0x000000000e2d7fae */
        /*0070*/                   LDGSTS.E [R45+0x400], desc[UR6][R8.64] ; /* 0x0000 */
        /*0080*/                   LDGDEPBAR ;                           /* 0x0000000402047981 */
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT ; /* 0x00 */
        /*00a0*/                   MUFU.EX2 R1, R2 ;                     /* 0x00 */
        /*00b0*/             @!UP0 IMAD.WIDE R1, R2, R3, R4 ;            /* 0x00 */
        /*00c0*/               @P0 BRA 0x60 ;                            /* 0x00 */
        /*00d0*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;      /* 0x00 */
        /*00e0*/                   EXIT ;                                /* 0x00 */
        /*00f0*/                   BRA 0xf0 ;                            /* 0x00 */
        /*0100*/                   NOP ;                                 /* 0x00 */
"""


def test_sass_is_read_line_by_line() -> None:
    code = instructions(SASS)
    assert [one.address for one in code] == list(range(0, 0x100, 0x10))
    assert [one.loaded_bytes for one in code] == [16, 16, 0, 0, 0, 0, 16, 4, 0, 0, 0, 0, 0, 2, 0, 0]
    kinds = {one.name.split(".")[0]: one.kind for one in code}
    assert kinds == {
        "LDG": "global load", "FADD": "float", "FFMA": "float", "BRA": "branch", "LDGSTS": "global load", "LDGDEPBAR": "sync",
        "HGMMA": "mma", "MUFU": "special", "IMAD": "integer", "EXIT": "branch",
    }  # fmt: skip


def test_the_main_loop_is_the_innermost_that_loads_and_all_of_a_kernel_without_one() -> None:
    code = instructions(SASS)
    assert [one.address for one in main_loop(code)] == list(range(0x60, 0xD0, 0x10))
    assert main_loop(code[:6]) == code[:6]
    assert main_loop(code[:2]) == code[:2]


def test_bytes_in_flight_are_those_of_the_programs_that_are_there() -> None:
    launch, merge = launches("head_statistics", SHAPE_CLASSES[0], ARCHS["sm_90"])
    assert merge.launch.kernel.__name__ == "merge_statistics_kernel"
    threads = 32 * launch.launch_options["num_warps"]
    found = loop_record(SHAPE_CLASSES[0], launch, ARCHS["sm_90"], 2, instructions(SASS))
    assert found["loop_bytes"] == threads * 20
    assert found["ahead"] == launch.launch_options["num_stages"] - 1
    assert (found["programs"], found["fit"], found["resident"], found["waves"]) == (264, 2, 2, 1.0)
    assert found["in_flight"] == 2 * found["ahead"] * found["loop_bytes"]
    assert found["mix"] == {"mma": 1, "sync": 1, "global load": 2, "special": 1, "branch": 1, "integer": 1}
    # 4.8 TB/s for 0.8 us over 132 SMs.
    assert found["needed"] == round(4.8e12 * 0.8e-6 / 132)
    few = loop_record(
        SHAPE_CLASSES[0], replace(launch, launch=replace(launch.launch, grid=(100,))), ARCHS["sm_90"], 2, instructions(SASS)[:2]
    )
    assert (few["resident"], few["ahead"], few["in_flight"]) == (1, 1, threads * 32)


@pytest.mark.parametrize("arch", module.PARTS)
def test_every_op_of_a_step_is_looked_at(arch: str) -> None:
    for op in module.LOOP_OPS:
        assert launches(op, SHAPE_CLASSES[0], ARCHS[arch]), op
    assert launches("head_statistics", SHAPE_CLASSES[1], ARCHS[arch]) == []  # 256 rows are cuBLAS's


def test_programs_are_those_of_the_launchers() -> None:
    def programs(op: str, number: int) -> list[int]:
        return [case.launch.programs for case in launches(op, SHAPE_CLASSES[number], ARCHS["sm_90"])]

    assert programs("rms_norm", 1) == [256]
    assert programs("swiglu", 0) == [32 * 12]  # 12288 columns by 1024
    assert programs("commit_tokens", 1) == [8]
    assert programs("rope_kv_write", 0) == [32 * (2 + 2 * 2)]  # 32 heads by 16
    assert programs("window_attention", 1) == [8 * 32]  # a head of a sequence each


def test_the_committed_report_lists_every_launch_and_no_other() -> None:
    listed = [(record["op"], record["arch"], record["config"]) for record in read_json(BENCH / "performance_report.json")]
    expected = {
        (op, arch, f"{shape_class.name}: {case.config}")
        for op in module.LOOP_OPS
        for arch in module.PARTS
        for shape_class in SHAPE_CLASSES
        for case in launches(op, shape_class, ARCHS[arch])
    }
    assert len(listed) == len(set(listed)) and set(listed) == expected


def test_the_committed_page_is_that_of_the_records() -> None:
    written = (BENCH / "performance_report.md").read_text()
    made = module.markdown(read_json(BENCH / "performance_report.json"))
    assert written.replace(COMMITTED_WITH, "") == made.replace(triton.__version__, "")


def test_a_sample_is_as_committed(tmp_path: Path) -> None:
    committed = read_json(BENCH / "performance_report.json")
    sample = [record for record in committed if (record["op"], record["arch"]) == ("swiglu", "sm_90")]
    # One that changed: more of it fits than did.
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps([sample[0] | {"fit": sample[0]["fit"] + 1}, *sample[1:]]))
    out = tmp_path / "out.json"
    arguments = ["performance-report", "--arch", "sm_90", "--op", "swiglu", "--out", str(out), "--compare", str(changed)]
    found = CliRunner().invoke(app, arguments)
    least = min(record["in_flight"] / record["needed"] for record in sample)
    assert f"{least:.2f}" in found.stdout
    assert "LLaDA step" not in found.stdout  # That is for --full.
    records = read_json(out)
    assert [record["config"] for record in records] == [record["config"] for record in sample]
    if triton.__version__ == COMMITTED_WITH:  # another compiler may well use other instructions
        assert differences(records, sample) == []
        assert found.exit_code == 1
        assert f"fit {sample[0]['fit'] + 1} -> {sample[0]['fit']}" in " ".join(found.stderr.split())
    assert "LLaDA step" in CliRunner().invoke(app, ["performance-report", "--arch", "sm_90", "--op", "swiglu", "--full"]).stdout


def test_progress_is_told_after_each_launch() -> None:
    told: list[tuple[int, int]] = []
    records = module.performance_report(["sm_90"], ["swiglu"], on_progress=lambda *done: told.append(done))
    assert told == [(done, len(records)) for done in range(1, len(records) + 1)]


@pytest.mark.parametrize(("option", "message"), [("--arch", "--arch: got sm_75"), ("--op", "--op: got sm_75")])
def test_bad_arguments_are_named(option: str, message: str) -> None:
    found = CliRunner().invoke(app, ["performance-report", option, "sm_75"])
    assert found.exit_code == 2 and message in " ".join(found.stderr.split())

"""``bench``: the gate before it, what it writes and when, how it goes on, and what it compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _bench import CEILINGS, DEVICE, bench_of, made_up_report, run_once, small
from typer.testing import CliRunner

import fastdllm_triton.kernels.swiglu
from fastdllm_triton.bench._report import Report, changes
from fastdllm_triton.bench._session import label
from fastdllm_triton.cli import bench as command
from fastdllm_triton.cli.app import app
from fastdllm_triton.tools import environment as machine
from fastdllm_triton.verify.ledger import Ledger
from fastdllm_triton.verify.parts import Part, parts_of
from fastdllm_triton.verify.records import CaseRecord, Record

ROOT = Path(__file__).parents[2]
#: The two ops that the interpreter runs in no time.
FAST = ["--op", "swiglu", "--op", "rms_norm", "--quick"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_a_wrong_kernel_is_refused_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, kernel = fastdllm_triton.kernels.swiglu, fastdllm_triton.kernels.swiglu.swiglu
    monkeypatch.setattr(module, "swiglu", lambda *args, **kwargs: 1.01 * kernel(*args, **kwargs))
    found = run("ops", *FAST, "--out", str(tmp_path / "out"))
    assert found.exit_code == 1
    assert "refused, as they do not verify here: swiglu" in plain(found.stderr)
    (row,) = json.loads((tmp_path / "out" / "swiglu.json").read_text())
    assert row["missing"] == "refused: verification failed: swiglu" and "median_ms" not in row
    assert not json.loads((tmp_path / "out" / "verify.json").read_text())["ok"]
    rows = json.loads((tmp_path / "out" / "rms_norm.json").read_text())
    assert [row["provider"] for row in rows] == ["triton", "torch", "torch.compile"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_no_speed_is_claimed(tmp_path: Path) -> None:
    found = run("ops", *FAST, "--out", str(tmp_path / "out"), "--html", str(tmp_path / "page.html"))
    assert found.exit_code == 0, found.stderr
    assert plain(command.NO_GPU) in plain(found.stdout)
    report = Report.load(tmp_path / "out")
    assert report.ceilings is None and report.machine["gpu"] is None
    assert {row["missing"] for row in report.rows} == {"ran, untimed", "needs a GPU"}
    assert not any("ms" in key for row in report.rows for key in row if key != "missing")
    page = (tmp_path / "page.html").read_text()
    assert "no speed was measured" in page and "<svg" not in page
    bare = run("ops", "--op", "swiglu")
    assert bare.exit_code == 0 and "nothing is measured" in bare.stdout


@pytest.mark.skipif(DEVICE.type == "cuda", reason="would measure")
def test_a_bench_needs_no_interpreter_around_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "fastdllm_triton", "bench", "--op", "rms_norm", "--quick", "--out", str(tmp_path / "out")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "plumbing only" in plain(found.stdout)
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["machine.json", "rms_norm.json", "verify.json"]


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as on a GPU, on a CPU: a timer that runs each provider once and says a millisecond."""
    from fastdllm_triton.bench import _session, _timing

    monkeypatch.setattr(_timing, "time_in_turns", run_once)
    monkeypatch.setattr(_timing, "measure_ceilings", lambda device, timer: CEILINGS)
    real = _session.Session

    def session(device: torch.device, **options: Any) -> Any:
        return real(torch.device("cpu"), timer=run_once, ceilings=CEILINGS, **options)

    monkeypatch.setattr(_session, "Session", session)
    of_ops = [small(op, {"torch": bench_of(op).baselines["torch"]}) for op in ("swiglu", "rms_norm")]
    small_ones = {bench.op: replace(bench, cases=replace(bench.cases, key=bench.cases.shapes)) for bench in of_ops}
    module = sys.modules["fastdllm_triton.bench.bench_ops"]
    monkeypatch.setattr(module, "BENCHES", [small_ones.get(bench.op, bench) for bench in module.BENCHES])


@pytest.mark.usefixtures("pretend_gpu")
def test_results_are_written_after_every_case_and_a_run_goes_on_where_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "out")
    written: list[str] = []
    write_rows = Report.write_rows

    def spy(self: Report, path: Path, bench: str) -> None:
        write_rows(self, path, bench)
        written.append(bench)

    monkeypatch.setattr(Report, "write_rows", spy)
    assert run("ops", "--op", "swiglu", "--quick", "--out", folder).exit_code == 0
    first = Report.load(tmp_path / "out")
    assert [row["median_ms"] for row in first.rows] == [1.0, 1.0]
    assert written.count("swiglu") >= 1

    again = run("ops", *FAST, "--out", folder)
    assert again.exit_code == 2 and "holds results; give another folder, or --resume" in plain(again.stderr)

    measured: list[str] = []
    monkeypatch.setattr(sys.modules["fastdllm_triton.bench._session"], "check", lambda cases, *call: measured.append(cases.op))
    assert run("ops", *FAST, "--out", folder, "--resume").exit_code == 0
    assert measured == ["rms_norm"]
    assert sorted(row["op"] for row in Report.load(tmp_path / "out").rows) == ["rms_norm"] * 2 + ["swiglu"] * 2


def a_ledger(path: Path, *ops: str, ok: bool = True, **machine_: Any) -> str:
    """What ``verify --out`` would have written of these ops here."""
    ledger = Ledger(machine.describe(torch.device("cpu")) | machine_, quick=True, path=path)
    cases = [] if ok else [CaseRecord("a case", 1.0, 0.5, ok=False)]
    for part in parts_of(ops):
        ledger.add(Record(*part.key, cases))
    return str(path)


@pytest.fixture
def verified_ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is verified from here on: ops in dtypes."""
    seen: list[str] = []

    def run(part: Part, device: torch.device, *, quick: bool) -> Record:
        seen.append(f"{part.name} {part.what}")
        return Record(*part.key)

    monkeypatch.setattr(Part, "run", run)
    return seen


@pytest.mark.usefixtures("pretend_gpu")
def test_what_was_verified_before_is_not_verified_again(tmp_path: Path, verified_ops: list[str]) -> None:
    first, second = a_ledger(tmp_path / "v.json", "swiglu"), a_ledger(tmp_path / "w.json", "rms_norm")
    assert run("ops", *FAST, "--out", str(tmp_path / "out"), "--verified", first).exit_code == 0
    assert verified_ops == ["rms_norm float32", "rms_norm float16"]
    written = json.loads((tmp_path / "out" / "verify.json").read_text())["records"]
    assert {record["check"] for record in written} == {"swiglu", "rms_norm"}
    verified_ops.clear()
    assert run("ops", *FAST, "--verified", first, "--verified", second).exit_code == 0
    assert verified_ops == []
    other = a_ledger(tmp_path / "x.json", "swiglu", commit="another")
    found = run("ops", *FAST, "--verified", other)
    assert found.exit_code == 2 and "--verified" in found.stderr and "commit = another" in plain(found.stderr)


@pytest.mark.usefixtures("pretend_gpu")
def test_unverified_rows_are_timed_marked_and_unmarked_when_they_verify(tmp_path: Path, verified_ops: list[str]) -> None:
    bad, good = a_ledger(tmp_path / "bad.json", "swiglu", ok=False), a_ledger(tmp_path / "good.json", "swiglu", "rms_norm")
    folder = ["--out", str(tmp_path / "out")]
    refused = run("ops", *FAST, "--verified", bad, "--out", str(tmp_path / "refused"))
    assert refused.exit_code == 1 and "refused: verification failed: swiglu" in plain(refused.stdout)
    verified_ops.clear()
    found = run("ops", *FAST, *folder, "--verified", bad, "--unverified")
    assert found.exit_code == 0 and verified_ops == []
    rows = Report.load(tmp_path / "out").rows
    assert [row["median_ms"] for row in rows] == [1.0] * 4 and all(row["unverified"] is True for row in rows)
    assert "unverified: verification failed or is missing" in plain(found.stdout)
    # The same rows, once what they rest on was verified; nothing is timed again.
    assert run("ops", *FAST, *folder, "--verified", good, "--unverified", "--resume", "--minutes", "0").exit_code == 0
    assert not any("unverified" in row for row in Report.load(tmp_path / "out").rows)
    assert run("ops", *FAST, *folder, "--verified", bad, "--unverified", "--resume").exit_code == 0
    assert [row["op"] for row in Report.load(tmp_path / "out").rows if row.get("unverified")] == ["rms_norm"] * 2 + ["swiglu"] * 2


@pytest.mark.usefixtures("pretend_gpu", "verified_ops")
def test_a_run_that_was_cut_says_so_although_an_op_was_refused(tmp_path: Path) -> None:
    bad = a_ledger(tmp_path / "bad.json", "swiglu", ok=False)
    found = run("ops", *FAST, "--out", str(tmp_path / "out"), "--verified", bad, "--minutes", "0")
    assert found.exit_code == 3
    assert "refused, as they do not verify here: swiglu" in plain(found.stderr)
    assert "the time is up and cases are left" in plain(found.stderr).lower()


@pytest.mark.usefixtures("pretend_gpu", "verified_ops")
def test_a_run_that_loses_the_gpu_keeps_its_rows_and_goes_on_behind_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdllm_triton.bench import _timing

    monkeypatch.setattr(_timing, "is_lost", lambda device: True)
    found = run("ops", *FAST, "--out", str(tmp_path / "out"))
    assert found.exit_code == 4 and "left the GPU unusable" in plain(found.stderr)
    assert {row["op"] for row in Report.load(tmp_path / "out").rows} == {"rms_norm"}
    monkeypatch.setattr(_timing, "is_lost", lambda device: False)
    assert run("ops", *FAST, "--out", str(tmp_path / "out"), "--resume").exit_code == 0
    assert {row["op"] for row in Report.load(tmp_path / "out").rows} == {"rms_norm", "swiglu"}


def test_rows_of_a_case_take_the_place_of_its_earlier_ones() -> None:
    report = Report({})
    row = {"bench": "swiglu", "op": "swiglu", "shape": {"rows": 1}, "provider": "triton"}
    report.add([row | {"median_ms": 2.0}, row | {"provider": "torch", "median_ms": 4.0}])
    report.add([row | {"median_ms": 1.0}])
    assert [(row["provider"], row["median_ms"]) for row in report.rows] == [("torch", 4.0), ("triton", 1.0)]


@pytest.mark.usefixtures("pretend_gpu")
def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    report = made_up_report()
    report.write_machine(tmp_path)
    found = run("ops", "--op", "swiglu", "--quick", "--out", str(tmp_path), "--resume")
    assert found.exit_code == 2 and "was measured with device = Made-up GPU" in plain(found.stderr)


@pytest.mark.usefixtures("pretend_gpu")
def test_the_comparison_is_printed(tmp_path: Path) -> None:
    assert run("ops", "--op", "swiglu", "--quick", "--out", str(tmp_path / "old")).exit_code == 0
    file = tmp_path / "old" / "swiglu.json"
    rows = json.loads(file.read_text())
    rows[0] |= {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2}
    file.write_text(json.dumps(rows))
    found = run("ops", "--op", "swiglu", "--quick", "--compare", str(tmp_path / "old"))
    text = plain(found.stdout)
    assert "-50.0%" in text and "±20.0%" in text and "2 cases in both runs; 1 the same within their spread" in text


def test_changes_are_those_beyond_the_spread_largest_first() -> None:
    old, new = made_up_report(), made_up_report()
    for row, factor in zip([row for row in new.rows if "median_ms" in row][:3], (1.02, 0.5, 1.2), strict=True):
        for key in ("median_ms", "p20_ms", "p80_ms"):
            row[key] *= factor
    found = changes(old, new)
    assert [change.verdict for change in found][:3] == ["faster", "slower", "same"]
    assert found[0].after == pytest.approx(0.5 * found[0].before)
    assert found[0].spread == pytest.approx(0.05)
    assert {change.verdict for change in found[2:]} == {"same"}


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = made_up_report()
    report.write_machine(tmp_path)
    verified = Record("swiglu", "float32", [CaseRecord("a case", 0.0, 0.0, ok=True)])
    Ledger(report.machine, True, tmp_path / "verify.json", [verified]).write()
    for bench in {row["bench"] for row in report.rows}:
        report.write_rows(tmp_path, bench)
    found = Report.load(tmp_path)
    assert (found.machine, found.ceilings) == (report.machine, report.ceilings)
    assert [Record.from_json(record) for record in found.verification] == [verified]
    assert sorted(map(json.dumps, found.rows)) == sorted(map(json.dumps, report.rows))
    assert found.done() == {(row["op"], label(row["shape"]), row["provider"]) for row in report.rows}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "suite: 'fast' is not one of 'ops', 'step', 'generate', 'cpu', 'host', 'all'"),
        (["ops", "--op", "gemv"], "--op: got gemv, needs names among"),
        (["ops", "--op", "swiglu", "--only", "cublas"], "--only: got cublas, needs names among torch, torch.compile"),
        (["ops", *FAST, "--out", "/proc/nowhere"], "--out: /proc/nowhere cannot be written"),
        (["ops", *FAST, "--verified", str(ROOT / "setup.py")], "setup.py holds no verification"),
        (["ops", *FAST, "--html", "/nowhere/page.html"], "--html: /nowhere/page.html cannot be written"),
        (["ops", *FAST, "--compare", "/nowhere"], "/nowhere holds no results of a bench"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in plain(found.stderr)


def test_damaged_results_are_named(tmp_path: Path) -> None:
    made_up_report().write_machine(tmp_path)
    (tmp_path / "swiglu.json").write_text("[{")
    with pytest.raises(ValueError, match="holds damaged results"):
        Report.load(tmp_path)


def test_the_machine_is_described_and_names_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDLLM_COMMIT", "feedbeefcafe")
    found = machine.describe(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["commit"] == "feedbeefcafe" and found["gpu"] is None
    assert machine.folder_name(found | {"gpu": "NVIDIA H200 SXM", "date": "2026-11-21T01:02:03+00:00"}) == (
        "nvidia-h200-sxm/2026-11-21-feedbeefca"
    )


def test_clocks_are_those_that_nvidia_smi_tells_of_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def smi(asking: list[str]) -> str:
        asked.append(asking)
        return "580.1.2, 1755, 3201, 1980, 3201, 700.00, 45, 0x0000000000000004"

    monkeypatch.setattr(machine, "_output", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-abcd"))
    found = machine.clocks(torch.device("cuda"))
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-1234-abcd"]
    assert (found["driver"], found["sm_clock"], found["max_sm_clock"], found["power_limit"]) == ("580.1.2", 1755, 1980, 700)
    assert found["throttle_reasons"] == "0x0000000000000004"
    monkeypatch.setattr(machine, "_output", lambda asking: None)
    assert machine.clocks(torch.device("cuda")) == {}


def test_a_field_that_nvidia_smi_does_not_know_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(asking: list[str]) -> str | None:
        fields = next(word for word in asking if word.startswith("--query-gpu=")).removeprefix("--query-gpu=").split(",")
        return None if "clocks_throttle_reasons.active" in fields else ", ".join(str(len(field)) for field in fields)

    monkeypatch.setattr(machine, "_output", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    found = machine.clocks(torch.device("cuda"))
    assert found["sm_clock"] == len("clocks.sm") and found["temperature"] == len("temperature.gpu")
    assert found.keys() == set(machine._SMI.values()) - {"throttle_reasons"}


@pytest.mark.gpu
def test_a_gpu_is_described_with_its_driver_and_clocks() -> None:
    found = machine.describe(torch.device("cuda"))
    assert found["sms"] > 0 and found["driver"] and found["sm_clock"] and found["memory_clock"]

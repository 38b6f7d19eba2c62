"""The script for a GPU machine: its plan on a simulated clock, how its stages end and go on, and its dry path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from _bench import made_up_report

from fastdllm_triton.bench import gpu_all, precompile
from fastdllm_triton.bench._run import benches
from fastdllm_triton.bench.gpu_all import Runner, Stage, plan
from fastdllm_triton.bench.summary import summary

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_all.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


def statuses(out: Path) -> dict[str, str]:
    return {line.split("\t")[0]: line.split("\t")[1] for line in (out / "status.tsv").read_text().splitlines()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry path is for machines without a GPU")
@pytest.mark.slow
def test_the_dry_path_runs_to_its_end_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(str(out), "20", "--dry-run")
    assert found.returncode == 0, found.stdout + found.stderr
    names = [stage.name for stage in plan(out, out, dry=True)]
    assert statuses(out) == dict.fromkeys(names, "ok")
    lines = [line for line in found.stdout.splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in lines] == [f"[{number}/{len(names)}] {name}" for number, name in enumerate(names, 1)]
    folder = out / (out / "folder").read_text().strip()
    assert folder.parent.name == "cpu"
    expected = {"machine.json", "verify.json", "rms_norm.json", "step.json", "generate.json"}
    assert expected <= {path.name for path in folder.iterdir()}
    assert "all held" in found.stdout and "nothing was timed" in found.stdout
    # One stage is to be repeated, and nothing else is.
    status = out / "status.tsv"
    status.write_text(
        "".join(line for line in status.read_text().splitlines(keepends=True) if not line.startswith("environment"))
    )
    again = run(str(out), "20", "--dry-run")
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(names) - 1
    # Results of another commit are not mixed in.
    (out / "folder").write_text("cpu/2026-11-21-feedbeefca\n")
    other = run(str(out), "20", "--dry-run")
    assert other.returncode == 2 and "was begun as cpu/2026-11-21-feedbeefca" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "[--dry-run] OUT [MINUTES]"),
        (["OUT", "soon"], "argument MINUTES: invalid float value: 'soon'"),
        (["OUT", "0"], "MINUTES must be a number above 0, got 0"),
        (["OUT", "--fast"], "unrecognized arguments: --fast"),
        (["/proc/nowhere"], "/proc/nowhere cannot be made"),
        pytest.param(
            ["OUT"], "torch sees no GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = run(*(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments))
    assert found.returncode == 2
    assert message in found.stdout + found.stderr


# --- the plan, on a clock that is simulated ---------------------------------------------------------------------------------

#: Seconds that a stage takes; careful guesses for an H200, half of them starting Python. What is not listed takes ten minutes.
GUESSES = {
    "environment": 8.0, "compile": 65.0, "verify": 100.0, "step": 90.0, "ops window_attention": 44.0, "ops linear": 40.0,
    "ops head_statistics": 35.0, "ops rope_kv_write": 25.0, "ops rms_norm": 25.0,
}  # fmt: skip
MUST = list(GUESSES)


class Simulation:
    """A machine on which stages take so many seconds, go on where they were cut, and end with such statuses."""

    def __init__(self, seconds: Mapping[str, float], statuses: Mapping[str, Sequence[int]] | None = None) -> None:
        self.now = 0.0
        self.needed = dict(seconds)
        self.statuses = {name: list(found) for name, found in (statuses or {}).items()}
        self.begun: list[str] = []
        self.commands: dict[str, list[str]] = {}

    def execute(self, stage: Stage, command: Sequence[str], limit: float, log: Path) -> int:
        self.begun.append(stage.name)
        self.commands[stage.name] = list(command)
        needed = self.needed.setdefault(stage.name, 600.0)
        took = min(needed, limit)
        self.now += took
        self.needed[stage.name] = needed - took
        log.write_text("a line\n")
        if took < needed:
            return 124
        return self.statuses[stage.name].pop(0) if self.statuses.get(stage.name) else 0

    def run(self, out: Path, minutes: float, stages: Sequence[Stage] | None = None) -> int:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.begun.clear()
        with patch.object(gpu_all, "execute", self.execute), patch.object(gpu_all, "monotonic", lambda: self.now):
            return Runner(out, minutes).run(plan(out, out / "results") if stages is None else stages)


def a_stage(name: str, seconds: float | None = None, share: float = 0.5, needs: Sequence[str] = ()) -> Stage:
    return Stage(name, lambda minutes: ["true", f"{minutes:.2f}"], seconds, share, needs)


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all.shutil, "which", lambda name: name)


@pytest.mark.usefixtures("everything_installed")
def test_ten_minutes_reach_the_verification_the_step_and_the_five_main_ops(tmp_path: Path) -> None:
    machine = Simulation(GUESSES)
    assert machine.run(tmp_path, 10) == gpu_all.CUT
    assert machine.begun[: len(MUST)] == MUST
    found = statuses(tmp_path)
    assert [found[name] for name in MUST] == ["ok"] * len(MUST)
    assert machine.now <= 600
    # What comes next: tuning of what a step spends its time in, generations of one row, the rest.
    assert machine.begun[len(MUST) :][:2] == ["tune", "generate"]
    assert {"linear", "window_attention"} <= set(machine.commands["tune"])


@pytest.mark.usefixtures("everything_installed")
def test_nine_minutes_begin_all_of_these_even_where_each_takes_all_it_may(tmp_path: Path) -> None:
    machine = Simulation(dict.fromkeys(MUST, 1e9))
    assert machine.run(tmp_path, 9) == gpu_all.CUT
    assert machine.begun[: len(MUST)] == MUST
    assert machine.now <= 540


@pytest.mark.usefixtures("everything_installed")
def test_three_runs_of_ten_minutes_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    machine = Simulation(GUESSES | {"verify": 200.0, "tune": 240.0, "generate": 150.0})
    for _ in range(3):
        assert machine.run(tmp_path, 10) == gpu_all.CUT
    assert machine.now <= 1800
    found = statuses(tmp_path)
    assert [found[name] for name in [*MUST, "tune", "generate"]] == ["ok"] * (len(MUST) + 2)
    assert not {"environment", "verify", "step"} & set(machine.begun)  # ended before
    taken = {line.split("\t")[0]: int(line.split("\t")[2]) for line in (tmp_path / "status.tsv").read_text().splitlines()}
    assert taken["verify"] >= 200  # of both runs together


@pytest.mark.usefixtures("everything_installed")
def test_a_run_with_time_enough_leaves_nothing(tmp_path: Path) -> None:
    machine = Simulation({})
    assert machine.run(tmp_path, 60 * 24) == 0
    assert set(statuses(tmp_path).values()) == {"ok"}
    assert machine.run(tmp_path, 60) == 0 and machine.begun == []


@pytest.mark.parametrize(
    ("codes", "begun", "states", "status"),
    [
        ([0], 1, ["ok", "ok"], 0),
        ([1], 1, ["failed", "failed"], 1),
        ([2], 1, ["failed", "failed"], 1),
        ([gpu_all.CUT, 0], 1, ["cut", "ok"], gpu_all.CUT),
        ([gpu_all.CUT, 1], 1, ["cut", "failed"], gpu_all.CUT),
        ([gpu_all.LOST, 0], 2, ["ok", "ok"], 0),
        ([gpu_all.LOST] * 4, 4, ["failed", "failed"], 1),
    ],
)
def test_a_stage_goes_on_where_it_was_cut_and_only_there(
    codes: list[int], begun: int, states: list[str], status: int, tmp_path: Path
) -> None:
    machine = Simulation({"one": 1.0}, {"one": codes})
    assert machine.run(tmp_path, 10, [a_stage("one")]) == status
    assert len(machine.begun) == begun
    assert statuses(tmp_path) == {"one": states[0]}
    machine.run(tmp_path, 10, [a_stage("one")])
    assert len(machine.begun) == (states[0] == "cut")
    assert statuses(tmp_path) == {"one": states[1]}


def test_something_left_comes_before_something_failed(tmp_path: Path) -> None:
    machine = Simulation({"one": 1.0, "two": 1.0}, {"one": [1]})
    assert machine.run(tmp_path, 10, [a_stage("one"), a_stage("two")]) == 1
    machine = Simulation({"one": 1.0, "two": 1e9}, {"one": [1]})
    assert machine.run(tmp_path / "other", 10, [a_stage("one"), a_stage("two")]) == gpu_all.CUT


def test_every_stage_has_its_line_and_says_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Simulation({"one": 70.0, "two": 1e9}, {"one": [1]})
    machine.run(tmp_path, 2, [a_stage("one", seconds=90), a_stage("two"), a_stage("three", share=0.1)])
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] one: at most 1:30 of 2:00",
        "    failed after 1:10",
        "    a line",
        "[2/3] two: at most 0:25 of 0:50",
        "    cut after 0:25",
        "    a line",
        "[3/3] three: no time left",
    ]
    assert statuses(tmp_path) == {"one": "failed", "two": "cut", "three": "no time"}


def test_what_a_stage_needs_and_the_machine_lacks_skips_it(tmp_path: Path) -> None:
    machine = Simulation({})
    assert machine.run(tmp_path, 1000, [a_stage("one", needs=["no-such-tool"]), a_stage("two", needs=["pytest"])]) == 0
    assert statuses(tmp_path) == {"one": "skipped", "two": "ok"} and machine.begun == ["two"]
    assert "no-such-tool not installed" in (tmp_path / "logs" / "one.log").read_text()


def test_benches_take_the_verification_that_is_there_and_end_within_their_limit(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(tmp_path, tmp_path / "results")}
    assert "--verified" not in stages["step"].command(1.0)
    (tmp_path / "verify.json").touch()
    command = list(stages["step"].command(1.5))
    assert command[command.index("--verified") + 1] == str(tmp_path / "verify.json")
    assert command[command.index("--minutes") + 1] == "1.50"
    assert {"--resume", "--unverified", "--quick"} <= set(command)
    assert "--quick" not in stages["step all"].command(1.0)
    (tmp_path / "verify-all.json").touch()
    assert list(stages["ops linear"].command(1.0)).count("--verified") == 2


def test_the_plan_has_every_bench_and_every_name_once(tmp_path: Path) -> None:
    assert set(gpu_all.BENCHED_OPS) == {bench.op for bench in benches("ops")}
    names = [stage.name for stage in plan(tmp_path, tmp_path)]
    assert len(set(names)) == len(names)
    assert {stage.name for stage in plan(tmp_path, tmp_path, dry=True)} <= set(names)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def _eventually(condition: object) -> bool:
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def test_a_command_that_takes_too_long_is_ended_with_all_it_has_begun(tmp_path: Path) -> None:
    log, stage = tmp_path / "log", a_stage("one")
    assert gpu_all.execute(stage, ["bash", "-c", "sleep 300 & echo $!; wait"], 2.0, log) == 124
    child = int(log.read_text())
    assert _eventually(lambda: not _runs(child))
    assert gpu_all.execute(stage, ["bash", "-c", "exit 7"], 100.0, log) == 7


def test_a_run_that_is_told_to_end_notes_what_was_cut(tmp_path: Path) -> None:
    program = f"""
import signal, sys
from pathlib import Path
from fastdllm_triton.bench import gpu_all
signal.signal(signal.SIGTERM, signal.default_int_handler)
out = Path({str(tmp_path)!r})
(out / "logs").mkdir()
stage = gpu_all.Stage("one", lambda minutes: ["sleep", "300"])
try:
    gpu_all.Runner(out, 10).run([stage])
except KeyboardInterrupt:
    sys.exit(gpu_all.CUT)
"""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("[1/1] one")
    assert _eventually((tmp_path / "logs" / "one.log").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == gpu_all.CUT
    assert statuses(tmp_path) == {"one": "cut"}


# --- what is compiled beforehand ---------------------------------------------------------------------------------------------


def test_the_key_shapes_of_every_op_and_of_the_step_are_compiled() -> None:
    for bench in benches("ops"):
        assert len(precompile.shapes_of(bench, quick=False)) >= 2
    ((step,),) = (precompile.shapes_of(bench, quick=False) for bench in benches("step"))
    assert (step["model"], step["batch"]) == ("llada-8b", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
@pytest.mark.parametrize("op", ["rms_norm", "step"])
def test_every_provider_is_launched_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench,) = benches("all", [op])
    shape = precompile.shapes_of(bench, quick=True)[0]
    assert precompile.launch(op, shape, "cpu", quick=True) == {}
    if op == "step":
        monkeypatch.setattr(precompile.bench_step.OurStep, "step", lambda self: 1 / 0)
        assert precompile.launch(op, shape, "cpu", quick=True) == {"triton": "ZeroDivisionError: division by zero"}


def test_the_summary_tells_of_steps_and_ceilings(tmp_path: Path) -> None:
    report = made_up_report()
    folder = tmp_path / "made-up-gpu" / "2026-11-21-0123456789"
    folder.mkdir(parents=True)
    report.write_machine(folder)
    next(row for row in report.rows if row["op"] == "swiglu")["unverified"] = True
    for bench in ("swiglu", "window_attention"):
        report.write_rows(folder, bench)
    (tmp_path / "folder").write_text("made-up-gpu/2026-11-21-0123456789\n")
    (tmp_path / "status.tsv").write_text("verify\tok\t12\nbench-ops\tstopped\t600\n")
    text = "\n".join(summary(tmp_path))
    assert "verify           ok          12 s" in text and "bench-ops        stopped    600 s" in text
    assert "**Made-up GPU**: copy 1,000 GB/s, matrix 100 TFLOP/s" in text
    # The baselines of the made-up report take two and three times ours.
    assert "| `swiglu` | 10 (1 UNVERIFIED) | " in text and "| 2.00 (2.00 to 2.00) |" in text

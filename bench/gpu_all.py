"""Everything that a GPU can show, on a bare machine without network, what matters most first and within a time limit.

    bench/gpu_all.sh OUT [MINUTES] [--dry-run]

OUT        where results go, case by case; run again with the same OUT to go on where the last run ended
MINUTES    nothing runs longer, but for the summary (default 120)
--dry-run  the same path on a CPU: the quick part of one op in Triton's interpreter, no speed

Nine minutes are enough for the stages that have a number of seconds in :func:`plan`: a verification of every op at the sizes
that matter, the step of LLaDA-8B of one row, and the five ops that it spends its time in. The status is 0 when everything is
done, 3 when something is left for another run, 1 when nothing is left and something failed, and 2 where nothing can be run.

OUT/<gpu>/<date>-<commit>/ is what belongs into bench/results, OUT/tuned/ into kernels/tuned. A stage that has ended is not run
again, one that was cut goes on; delete its line in OUT/status.tsv to repeat it. OUT may be moved to another machine of the same
kind. FASTDLLM_COMMIT names the commit where the copy has no repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: In the order of the time that a step spends in them.
MAIN_OPS = ("window_attention", "linear", "head_statistics", "rope_kv_write", "rms_norm")
OTHER_OPS = ("swiglu", "token_statistics", "commit_tokens", "window_inputs")
BENCHED_OPS = (*MAIN_OPS, *OTHER_OPS)
#: A run for which the numbers of seconds are meant; in a longer one they grow with it.
SECONDS = 540
#: Not worth beginning anything with.
LEAST_SECONDS = 5
#: Exit statuses of commands: cut by its own time limit; the GPU has to be opened anew.
CUT, LOST = 3, 4
#: Times that a stage is begun again at once after it has lost the GPU.
RETRIES = 3
#: States after which a stage is not run again.
ENDED = ("ok", "failed", "skipped")


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take.

    Attributes:
        name: in the status file.
        command: made when the stage begins, from the minutes that it should take.
        seconds: at most, of a run of :data:`SECONDS`.
        share: at most, of the time that is left; for what has no number of seconds.
        needs: programs and Python modules without which it is skipped.
        environment: variables of its own.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    seconds: float | None = None
    share: float = 0.5
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def plan(out: Path, results: Path, *, dry: bool = False) -> list[Stage]:
    """The stages, what matters most first.

    Args:
        out: the folder of the run.
        results: where in it rows go.
        dry: a small part, on a CPU.
    """
    cli = [sys.executable, "-m", "fastdllm_triton"]
    small = ["--device", "cpu", "--quick"] if dry else []
    key = small or ["--quick"]
    one_op = ["--op", "rms_norm"] if dry else []
    verified = (out / "verify.json", out / "verify-all.json")

    def bench(name: str, *what: str, **limits: Any) -> Stage:
        def command(minutes: float) -> list[str]:
            known = [part for path in verified if path.exists() for part in ("--verified", str(path))]
            return [*cli, "bench", *what, "--out", str(results), *known,
                    "--resume", "--minutes", f"{minutes:.2f}", "--unverified"]  # fmt: skip

        return Stage(name, command, **limits)

    def tune(name: str, *ops: str, share: float = 0.5) -> Stage:
        chosen = [part for op in ops for part in ("--op", op)]
        command = [sys.executable, str(ROOT / "bench/tune.py"), *chosen, "--out", str(out / "tuned")]
        return Stage(name, lambda minutes: [*command, "--minutes", f"{minutes:.2f}"], share=share)

    def verify(name: str, path: Path, *options: str, **limits: Any) -> Stage:
        return Stage(name, lambda _: [*cli, "verify", *options, *one_op, "--out", str(path), "--resume"], **limits)

    def sanitize(tool: str, op: str) -> Stage:
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return Stage(
            f"{tool} {op}",
            lambda _: [*checked, *cli, "verify", "--quick", "--op", op, "--jobs", "1"],
            needs=["compute-sanitizer"],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    show = '''nvidia-smi || echo "no nvidia-smi"; "$0" -m pip list || echo "no pip"'''
    collect = ["--collect-only", "tests/kernels/test_head_statistics.py"] if dry else []
    tests = Stage(
        "tests",
        lambda _: [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *collect],
        needs=["pytest", "hypothesis"],
    )
    stages = [
        Stage("environment", lambda _: ["bash", "-c", show, sys.executable], 10),
        # Each of its processes compiles in its own: torch.compile would begin as many again as there are cores.
        Stage(
            "compile",
            lambda _: [sys.executable, str(ROOT / "bench/precompile.py"), *small, *one_op],
            70,
            environment={"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"},
        ),
        verify("verify", verified[0], *key, seconds=115),
        bench("step", "step", *key, seconds=110),
    ]
    if dry:
        return [
            *stages,
            bench("ops rms_norm", "ops", *key, *one_op, seconds=60),
            tune("tune"),
            bench("generate", "generate", *key),
            tests,
        ]
    return [
        *stages,
        *(bench(f"ops {op}", "ops", "--op", op, *key, seconds=44) for op in MAIN_OPS),
        tune("tune", "linear", "window_attention", share=0.4),
        bench("generate", "generate", *key),
        *(bench(f"ops {op}", "ops", "--op", op, *key, share=0.15) for op in OTHER_OPS),
        verify("verify all", verified[1]),
        bench("step all", "step", share=0.4),
        *(bench(f"ops {op} all", "ops", "--op", op, share=0.25) for op in BENCHED_OPS),
        bench("generate all", "generate"),
        tests,
        tune("tune all", share=0.6),
        *(sanitize(tool, op) for tool in ("memcheck", "racecheck") for op in BENCHED_OPS),
    ]


def execute(stage: Stage, command: Sequence[str], limit: float, log: Path) -> int:
    """Runs a command in its own process group for at most ``limit`` seconds; returns its status, or 124 if it took longer."""
    environment = os.environ | stage.environment
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return 124
        finally:  # ends what the command has started, too, and also when this run is told to end
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


class Runner:
    """Runs stages within a time limit and keeps a record of how each ended.

    Args:
        out: the folder of the run.
        minutes: the limit.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.seconds = out, minutes * 60
        self._end = monotonic() + self.seconds
        self._status = out / "status.tsv"

    @property
    def left(self) -> float:
        return self._end - monotonic()

    def states(self) -> dict[str, tuple[str, int]]:
        """State and seconds of each stage that was begun."""
        lines = self._status.read_text().splitlines() if self._status.exists() else []
        return {name: (state, int(seconds)) for name, state, seconds in (line.split("\t") for line in lines)}

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs what has not ended yet, and returns the exit status."""
        for number, stage in enumerate(stages, start=1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            if (state := self.states().get(stage.name, ("", 0))[0]) in ENDED:
                print(f"{head}: done before, {state}", flush=True)
            elif self.limit(stage) < LEAST_SECONDS:
                print(f"{head}: no time left", flush=True)
                self._note(stage, "no time", 0)
            else:
                print(f"{head}: at most {_time(self.limit(stage))} of {_time(self.left)}", flush=True)
                began = monotonic()
                state = self._run(stage)
                took = monotonic() - began
                self._note(stage, state, took)
                print(f"    {state} after {_time(took)}", flush=True)
                if state not in ("ok", "skipped"):
                    for line in self.log(stage).read_text(errors="replace").splitlines()[-3:]:
                        print(f"    {line[:160]}", flush=True)
        states = [self.states()[stage.name][0] for stage in stages]
        return CUT if any(state not in ENDED for state in states) else int("failed" in states)

    def limit(self, stage: Stage) -> float:
        if stage.seconds is None:
            return self.left * stage.share
        return min(self.left, stage.seconds * max(1.0, self.seconds / SECONDS))

    def log(self, stage: Stage) -> Path:
        return self.out / "logs" / f"{stage.name.replace(' ', '-')}.log"

    def _run(self, stage: Stage) -> str:
        missing = [name for name in stage.needs if not (shutil.which(name) or importlib.util.find_spec(name.replace("-", "_")))]
        if missing:
            self.log(stage).write_text(f"{', '.join(missing)} not installed\n")
            return "skipped"
        self._note(stage, "cut", 0)  # as it is where this run ends meanwhile
        end = monotonic() + self.limit(stage)
        for _ in range(1 + RETRIES):
            left = end - monotonic()
            if left < LEAST_SECONDS:
                return "cut"
            # A case that has begun within its minutes should end within the limit.
            status = execute(stage, stage.command(0.7 * left / 60), left, self.log(stage))
            if status != LOST:
                return {0: "ok", CUT: "cut", 124: "cut"}.get(status, "failed")
        return "failed"

    def _note(self, stage: Stage, state: str, seconds: float) -> None:
        states = self.states()
        states[stage.name] = (state, states.get(stage.name, ("", 0))[1] + math.ceil(seconds))
        part = self._status.with_suffix(".part")
        part.write_text("".join(f"{name}\t{state}\t{total}\n" for name, (state, total) in states.items()))
        part.replace(self._status)


def _time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


#: Says whether there is a GPU and how its results are called; run in another process, since this one must not open the GPU.
PROBE = """
import json, torch
from fastdllm_triton.cli import app  # which imports what commands need
from fastdllm_triton.tools import environment
gpu = torch.cuda.is_available()
print(json.dumps([gpu, environment.folder_name(environment.describe(torch.device("cuda" if gpu else "cpu")))]))
"""


def prepare(out: Path, dry: bool) -> Path:
    """Makes the folders and looks at the machine.

    Returns:
        Where rows go.

    Raises:
        ValueError: nothing can be run here; it says why.
    """
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror}") from None
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise ValueError(f"the package cannot be imported: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
    has_gpu, name = json.loads(probe.stdout.splitlines()[-1])
    if not has_gpu and not dry:
        raise ValueError("torch sees no GPU here; --dry-run tries the path without one")
    folder = out / "folder"
    if not folder.exists():
        folder.write_text(name + "\n")
    earlier = folder.read_text().strip()
    without_date = (re.sub(r"\d{4}-\d\d-\d\d-", "", run) for run in (earlier, name))
    if len(set(without_date)) > 1:
        raise ValueError(f"{out} was begun as {earlier}, and here it would be {name}: give another folder")
    results = out / earlier
    results.mkdir(parents=True, exist_ok=True)
    return results


def main(arguments: Sequence[str]) -> int:
    """Runs what there is time for, and sums up."""
    parser = argparse.ArgumentParser(
        "bench/gpu_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="where results go")
    parser.add_argument("minutes", metavar="MINUTES", type=float, nargs="?", default=120.0, help="default 120")
    parser.add_argument("--dry-run", action="store_true", help="the path on a CPU")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.minutes < math.inf:
        parser.error(f"MINUTES must be a number above 0, got {chosen.minutes}")
    # Told to end by somebody else's time limit: what runs is ended, and its line says that it was cut.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = chosen.out.absolute()
    runner = Runner(out, chosen.minutes)
    try:
        results = prepare(out, chosen.dry_run)
    except ValueError as error:
        print(f"gpu_all: {error}", file=sys.stderr)
        return 2
    try:
        return runner.run(plan(out, results, dry=chosen.dry_run))
    except KeyboardInterrupt:
        print("ended from outside; the next run with this OUT goes on", flush=True)
        return CUT
    finally:
        command = [sys.executable, str(ROOT / "bench/summary.py"), str(out)]
        summary = subprocess.run(command, capture_output=True, text=True, check=False)
        (out / "summary.txt").write_text(summary.stdout)
        print(summary.stdout or summary.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Threads of a CPU: how many there are, and that a generation leaves those of the program alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.loading import read_config
from fastdllm_triton.models.published import LLADA_8B
from fastdllm_triton.utils import threads
from fastdllm_triton.utils.threads import TINY, allowed_threads, available_cores, default_threads, using

PROMPT = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_a_tiny_model_has_one_thread_and_any_other_all_that_are_allowed() -> None:
    assert [default_threads(parameters, 8) for parameters in (1, TINY - 1, TINY, 10**10)] == [1, 1, 8, 8]
    assert default_threads(LLADA_8B.streamed_parameters, 1) == 1
    assert default_threads(read_config("tiny")[0].streamed_parameters, 8) == 1


@pytest.mark.usefixtures("_without_variables")
def test_what_is_allowed_is_what_torch_is_set_to_but_no_more_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    told = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        told.append(allowed_threads())
    assert told == [1, 2, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # Whoever asks for more by name gets more.
    assert allowed_threads() == 3


def _machine(root: Path, siblings: dict[int, str], files: dict[str, str]) -> Path:
    files = files | {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


#: Two threads a core, as Linux numbers them: 0 and 4 share the first one.
SIBLINGS = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
@pytest.mark.parametrize(
    ("cpus", "siblings", "files", "cores"),
    [
        (range(8), SIBLINGS, {}, 4),
        ((0, 4), SIBLINGS, {}, 1),
        ((0, 1, 5), SIBLINGS, {}, 2),
        (range(3), {}, {}, 3),  # the system does not tell which share a core
        (range(8), SIBLINGS, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (range(8), SIBLINGS, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (range(8), SIBLINGS, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        # a group within one of a smaller quota
        (
            range(8),
            SIBLINGS,
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000",
                "sys/fs/cgroup/user/cpu.max": "300000 100000",
            },
            3,
        ),
        # version 1, in a container: the path is that of the host
        (
            range(8),
            SIBLINGS,
            {
                "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            range(8),
            SIBLINGS,
            {
                "proc/self/cgroup": "4:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1",
            },
            4,
        ),
    ],
)
def test_cores_are_physical_ones_within_affinity_and_quota(
    cpus: Any, siblings: dict[int, str], files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus))
    assert available_cores.__wrapped__(_machine(tmp_path, siblings, files)) == cores


def test_a_context_sets_threads_and_sets_them_back() -> None:
    torch.set_num_threads(2)
    with using(3):
        assert torch.get_num_threads() == 3
        with using(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 2


def _fail(number: int) -> None:
    with using(number):
        raise KeyError


def test_an_error_sets_threads_back_too() -> None:
    torch.set_num_threads(2)
    with pytest.raises(KeyError):
        _fail(3)
    assert torch.get_num_threads() == 2


def _threads_of_ops(model: fdt.MaskedDiffusionLM) -> set[int]:
    """With how many threads the products of a generation and of a plain forward run."""
    seen = set()
    linear = model.network.ops.linear

    def observed(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.get_num_threads())
        return linear(*args, **kwargs)

    object.__setattr__(model.network.ops, "linear", observed)
    try:
        between = set()
        for _ in model.stream([[5, 6, 7]], gen_length=8, block_length=8):
            between.add(torch.get_num_threads())
        model.generate([[5, 6, 7]], gen_length=8, block_length=8)
        model.logits([[5, 6, 7]])
    finally:
        object.__setattr__(model.network.ops, "linear", linear)
    assert between == {torch.get_num_threads()}
    return seen


@pytest.mark.usefixtures("_without_variables")
def test_forwards_have_the_models_threads_and_the_program_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    torch.set_num_threads(2)
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    assert model.threads == 1
    assert _threads_of_ops(model) == {1}
    monkeypatch.setattr(threads, "TINY", 0)
    assert model.threads == 2
    assert _threads_of_ops(model) == {2}
    torch.set_num_threads(1)  # After it was loaded, too.
    assert _threads_of_ops(model) == {1}
    asked = fdt.load(GOLDEN / "llada-gqa", device="cpu", threads=3)
    assert asked.threads == 3
    assert _threads_of_ops(asked) == {3}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_threads_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match=r"threads must be an integer of 1 or more, got "):
        fdt.load("tiny", threads=number)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("generate", ("--prompt", PROMPT)),
        ("profile", ("--prompt", PROMPT)),
        ("chat", ()),
        ("demo", ()),
        ("evaluate", ("--out", "OUT")),
        ("inspect", ("--out", "OUT")),
    ],
)
def test_commands_name_the_option(command: str, more: tuple[str, ...], tmp_path: Path) -> None:
    more = tuple(word.replace("OUT", str(tmp_path / "out")) for word in more)
    for number, said in (("0", "must be an integer of 1 or more, got 0"), ("-3", "got -3"), ("two", "")):
        result = _run(command, *more, "--threads", number)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --threads"), result.stderr
        assert said in result.stderr
        assert result.stdout == "" or command == "demo"


def test_the_threads_are_in_the_results() -> None:
    for words, number in (((), 1), (("--threads", "2"), 2)):
        result = _run("generate", "--json", "--device", "cpu", "--prompt", PROMPT, *words)
        assert json.loads(result.stdout)["threads"] == number


@pytest.mark.skipif(torch.cuda.is_available(), reason="says the threads of a CPU")
@pytest.mark.usefixtures("_without_variables")
def test_info_says_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 3)
    torch.set_num_threads(2)
    assert json.loads(_run("info", "--json").stdout)["threads"] == 2
    told = json.loads(_run("info", "--json", "--model", "tiny").stdout)
    assert (told["threads"], told["cores"]) == (1, 3)
    assert told["memory"]["all"] == sum(told["memory"][name] for name in ("weights", "cache", "workspace"))
    assert "2, of 3 cores; 1 for models below 10 million parameters" in _run("info").stdout


@pytest.mark.parametrize(("given", "set_to"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_a_command_sleep_while_they_wait_unless_told_otherwise(given: dict[str, str], set_to: str) -> None:
    program = (
        "import os, sys; sys.argv = ['fastdllm-triton', '--version']\n"
        "from fastdllm_triton.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == set_to

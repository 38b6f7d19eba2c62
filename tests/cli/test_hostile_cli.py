"""Every option of every command with bad values: a valid run, or one line on standard error that names the option.

The options are read from the command line itself, so a new one is attacked without anybody thinking of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastdllm_triton.cli.app import app

#: A command line of each command that would work, and work for long only where :func:`_reached` ends it.
BASES: dict[str, list[str]] = {
    "generate": ["--prompt", "Tom has 5 coins.", "--gen-length", "16", "--block-length", "8"],
    "chat": [],
    "evaluate": ["--out", "OUT/scores", "--problems", "2", "--gen-length", "16", "--block-length", "16"],
    "inspect": ["--out", "OUT/inside", "--problems", "1"],
    "info": ["--model", "tiny"],
    "roofline": ["--model", "llada-8b", "--gpu", "h200", "--prompt-length", "100", "--gen-length", "64"],
    "verify": ["--quick"],
    "bench": ["ops", "--quick"],
    "compile-report": [],
    "performance-report": [],
    "demo": ["--problems", "1"],
}
INTEGERS = ["x", "", "-1", "0", "1.5", "nan", "99999999999999999999", "1e3", "٣", "--"]
NUMBERS = ["x", "", "-1", "nan", "inf", "-inf", "1e999", "0,5"]
TEXTS = ["", "\x1b]0;PWNED\x07\x1b[2J", "[/red]", "\u202eabc", "x" * 5000]
#: Nothing can be made in /proc, whoever runs this.
PATHS = ["", "/proc/nosuch/file.json", "/proc/nosuch", "/proc", "a\x00b", "\x1b[31m/x"]


class Reached(Exception):
    """A command has checked its options and would begin to work."""


def _options() -> Iterator[tuple[str, str, str]]:
    """Command, option and type of every option that takes a value."""
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in BASES:
        parameters = inspect.signature(commands[name].callback, eval_str=True).parameters
        for parameter in commands[name].params:
            if parameter.param_type_name == "option" and not parameter.is_flag and not parameter.hidden:
                yield name, parameter.opts[0], str(parameters[parameter.name].annotation.__origin__)


def _values(kind: str) -> list[str]:
    if "int" in kind:
        return INTEGERS
    if "float" in kind:
        return NUMBERS
    return PATHS if "Path" in kind else [*TEXTS, "nosuch"]


CALLS = [(command, option, value) for command, option, kind in _options() for value in _values(kind)]
#: Whole command lines, each wrong in a way of its own.
LINES = [
    [],
    ["nosuch"],
    ["--nosuch"],
    ["generate", "--nosuch"],
    ["generate", "surplus"],
    ["generate", "--prompt"],
    ["generate", "--prompt", "x", "--prompt-file", "y"],
    ["generate", "--prompt", "x", "--threshold", "0.9", "--steps", "8"],
    ["generate", "--prompt", "x", "--live", "--json"],
    ["generate", "--prompt", "x", "--gen-length", "17"],
    ["generate", "--prompt", "x", "--cache", "none", "--look-back", "4"],
    ["generate", "--prompt", "x", "--trace", "OUT/x.pdf"],
    ["generate", "--prompt", "x", "--chat"],
    ["generate", "--prompt", "a\ud800b"],
    ["generate", "--prompt", "word " * 2000],
    ["evaluate"],
    ["evaluate", "--out", "OUT/s", "--strategies", "fixed:3,threshold:2"],
    ["evaluate", "--out", "OUT/s", "--caches", "dual+nosuch=4"],
    ["bench", "nosuch"],
    ["bench", "ops", "--op", "nosuch"],
    ["verify", "--op", "nosuch"],
    ["compile-report", "--arch", "nope"],
    ["roofline", "--model", "nosuch"],
    ["info", "--launches"],
]


@pytest.fixture(autouse=True)
def _reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes ends where it begins."""

    def reached(*args: Any, **options: Any) -> Any:
        raise Reached

    for name in (
        "fastdllm_triton.verify.verify",
        "fastdllm_triton.verify.rerun_in_interpreter",
        "fastdllm_triton.tools.compile_report.compile_report",
        "fastdllm_triton.tools.performance_report.performance_report",
        "fastdllm_triton.evaluation.runner.Evaluation.run",
        "fastdllm_triton.evaluation.agreement.agreement",
        "fastdllm_triton.tools.demo.demo",
    ):
        monkeypatch.setattr(name, reached)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _judge(arguments: list[str], option: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, [word.replace("OUT", str(folder)) for word in arguments], input="")
    if isinstance(result.exception, Reached):
        return
    assert result.exit_code in (0, 2), (result.exit_code, result.exception, result.output)
    told = result.stdout + result.stderr
    assert "Traceback" not in told
    assert not set(map(chr, (*range(9), *range(11, 13), *range(14, 32), 127))) & set(told), repr(told)
    if result.exit_code == 2:
        said = ("warning: ", "looking on the hub for ")
        lines = [line for line in result.stderr.splitlines() if not line.startswith(said)]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        assert option in lines[0], lines[0]
        assert result.stdout == ""


def _label(call: tuple[str, str, str]) -> str:
    return "-".join(call)[:60].encode("ascii", "backslashreplace").decode().replace("\x00", "NUL").replace("\x1b", "ESC")


@pytest.mark.parametrize("call", CALLS[::17], ids=map(_label, CALLS[::17]))
def test_a_bad_option_is_named_in_one_line(call: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, option, value = call
    _judge([command, *BASES[command], option, value], option, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=map(_label, CALLS))
def test_every_bad_option_is_named_in_one_line(
    call: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, option, value = call
    _judge([command, *BASES[command], option, value], option, tmp_path, monkeypatch)


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line)[:40].encode("ascii", "backslashreplace").decode())
def test_a_wrong_command_line_ends_in_one_line(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _judge(line, "", tmp_path, monkeypatch)


def test_there_are_more_command_lines_than_a_person_would_try() -> None:
    assert len(CALLS) + len(LINES) > 407

"""Names of options and how errors are answered, over all commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton import loading
from fastdllm_triton.cli._shared import as_words
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.names import RENAMED, as_typed, option_names, renamed
from fastdllm_triton.decoding.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PAGE = (ROOT / "docs" / "cli.md").read_text()
FIRST = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"


def _run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "FASTDLLM_DEBUG"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A job in the background of a shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _options(command: str) -> list[Any]:
    shown = [p for p in COMMANDS[command].params if p.param_type_name == "option" and not p.hidden]
    return [p for p in shown if "--help" not in p.opts]


# --- one name for one thing -----------------------------------------------------------------------------------------------


def _documented() -> list[list[str]]:
    table = PAGE.split("<!-- options: begin -->")[1].split("<!-- options: end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_the_documented_options_are_those_of_the_commands() -> None:
    documented = {option.strip("`"): set(commands.split(", ")) for option, commands, *_ in _documented()}
    real: dict[str, set[str]] = {}
    for command in COMMANDS:
        for parameter in _options(command):
            real.setdefault(parameter.opts[0], set()).add(command)
    assert documented == real


def test_the_documented_old_names_are_those_that_work() -> None:
    documented = {
        (command, old, option.strip("`"))
        for option, *_, cell in _documented()
        for commands, old in re.findall(r"([\w, -]+) `(--[\w-]+)`", cell)
        for command in commands.strip(", ").split(", ")
    }
    assert documented == {row for row in RENAMED if row[2] != "--json-copy"}


def test_the_documented_names_of_the_api_are_there_and_are_those_of_the_options() -> None:
    for option, _, cell, *_ in _documented():
        if cell:
            owner, name = re.fullmatch(r"`(\w+)[.(](\w+)\)?`", cell).groups()  # type: ignore[union-attr]
            home: Any = getattr(fdt, owner, None) or getattr(fdt.MaskedDiffusionLM, owner)
            assert hasattr(home, name) or name in signature(home).parameters, cell
            if owner in ("GenerationConfig", "GenerationOutput") and option not in ("`--strategies`", "`--caches`"):
                assert option == f"`--{name.replace('_', '-')}`"


def test_options_of_a_generation_are_fields_of_its_configuration() -> None:
    known = {field.name for field in fields(fdt.GenerationConfig)}
    decoding = {p.name for p in _options("generate") if p.rich_help_panel in ("Decoding", "Cache")}
    assert decoding - known == {"score", *(kind.option for kind in STRATEGIES.values())}
    # chat has all that /set has.
    assert {p.name for p in _options("chat")} >= decoding - {"forbidden", "lockstep"}


def test_json_is_a_flag_wherever_it_is() -> None:
    found = [p for command in COMMANDS for p in _options(command) if "--json" in p.opts]
    assert len(found) == 10 and all(p.is_flag for p in found)


@pytest.mark.parametrize(("command", "old", "new"), RENAMED)
def test_an_old_name_warns_and_works(command: str, old: str, new: str) -> None:
    told: list[str] = []
    parameter = next(p for p in COMMANDS[command].params if new in p.opts)
    assert not parameter.is_flag
    for words, expected in (([old, "7"], [new, "7"]), ([f"{old}=7"], [f"{new}=7"])):
        assert renamed(COMMANDS[command], words, told.append) == expected
    assert told == [f"{command} {old} is called {new} now"] * 2
    assert renamed(COMMANDS[command], ["--", old, "7"], told.append) == ["--", old, "7"]
    assert renamed(COMMANDS[command], [new, old], told.append) == [new, old]  # its value, however odd
    assert len(told) == 2


def test_a_name_that_has_become_a_flag_is_an_old_one_only_before_a_value() -> None:
    told: list[str] = []
    for command, words in (
        ("verify", ["--json"]),
        ("verify", ["--json", "--quick"]),
        ("bench", ["--json", "ops", "--quick"]),
        ("evaluate", ["--json", "--out", "x"]),
    ):
        assert renamed(COMMANDS[command], words, told.append) == words
    assert told == []


def test_old_names_give_what_the_new_ones_give() -> None:
    new = _run("roofline", "--json", "--prompt-length", "500", "--gen-length", "64", "--tokens-per-forward", "2",
               "--batch-size", "2", "--prompt-refresh", "2")  # fmt: skip
    old = _run("roofline", "--json", "--prompt=500", "--gen", "64", "--tpf", "2", "--batch", "2", "--refresh-every-blocks", "2")
    assert new.exit_code == old.exit_code == 0
    assert new.stdout == old.stdout
    assert new.stderr == ""
    assert old.stderr.splitlines()[0] == "warning: roofline --prompt is called --prompt-length now"
    assert len(old.stderr.splitlines()) == 5


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_strategy_is_asked_for_as_in_evaluate(command: str, tiny: fdt.MaskedDiffusionLM) -> None:
    out = tiny.generate(FIRST, strategy=fdt.FixedSteps(12, score="margin"))
    if command == "generate":
        told = json.loads(_run("generate", "--json", "--prompt", FIRST, "--strategy", "fixed:4:margin").stdout)
        assert (told["results"][0]["text"], told["nfe"]) == (out.texts[0], out.nfe)
    else:
        result = _run("chat", "--strategy", "fixed:4:margin", "--no-stop-at-eos", stdin="/set\n/set strategy entropy:0.3\n/set\n")
        shown = [line.split() for line in result.stdout.splitlines()]
        assert ["steps", "12"] in shown and ["score", "margin"] in shown and ["stop_at_eos", "off"] in shown
        assert ["entropy_budget", "0.3"] in shown
    for clash, message in (
        (["--threshold", "0.9"], "--threshold and --strategy exclude each other"),
        (["--score", "margin"], "--strategy and --score exclude each other"),
    ):
        result = _run(command, "--strategy", "fixed:4", *clash, stdin="x")
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt x",
        "evaluate --problems 1 --strategies threshold:0.5,threshold:0.5 --caches dual --out {out}",
        "inspect --problems 1 --drift-prompts 1 --caches dual --out {out}",
        "verify --quick --op swiglu --device cpu",
        "bench ops --quick --op swiglu --device cpu",
        "roofline",
        "compile-report",
        "performance-report",
    ],
)
def test_with_json_standard_output_holds_json_and_nothing_else(arguments: str, tmp_path: Path, monkeypatch: Any) -> None:
    from fastdllm_triton.cli import evaluate, inspect
    from fastdllm_triton.tools import compile_report, performance_report

    record = {"op": "swiglu", "kernel": "k", "arch": "sm_90", "config": "c"}
    monkeypatch.setattr(compile_report, "compile_report", lambda *_, **__: [record])
    monkeypatch.setattr(compile_report, "problems", lambda records: [])
    monkeypatch.setattr(performance_report, "performance_report", lambda *_, **__: [record])
    for command in (evaluate, inspect):
        monkeypatch.setattr(command, "check_matplotlib", lambda: False)
    result = _run(*arguments.format(out=tmp_path / "out").split(), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told
    if arguments.endswith("report"):
        assert told == [record]
    elif arguments.startswith("evaluate"):
        assert told == json.loads((tmp_path / "out" / "summary.json").read_text())
    elif arguments.startswith("inspect"):
        assert told == json.loads((tmp_path / "out" / "inspect.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        "verify --op swiglu --op linear --quick --out x.json --resume --jobs 2 --device cpu --json",
        "verify",
        "bench ops --op swiglu --only torch --quick --minutes 2.5 --verified a.json --verified b.json --unverified "
        "--compare then --out now --resume --html page.html --json",
        "bench",
        "generate --prompt a --prompt -b --no-stop-at-eos --steps 4 --cache prefix --forbidden 3",
    ],
)
def test_a_command_line_is_repeated_for_another_process(words: str) -> None:
    name, *rest = words.split()
    context = COMMANDS[name].make_context(name, rest)
    again, *repeated = as_words(context)
    assert again == name
    assert COMMANDS[name].make_context(name, repeated).params == context.params
    assert set(rest) <= set(repeated)


def test_the_interpreting_process_is_given_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm_triton import verify

    calls: list[list[str]] = []
    monkeypatch.setattr(verify, "needs_interpreter", lambda device: True)
    monkeypatch.setattr(verify, "rerun_in_interpreter", lambda words: calls.append(words) or 3)
    assert _run("bench", "ops", "--quick", "--device", "cpu", "--minutes", "2").exit_code == 3
    assert _run("verify", "--quick", "--device", "cpu", "--op", "swiglu").exit_code == 3
    assert calls[0][calls[0].index("--minutes") + 1] == "2.0"
    assert calls[1] == ["verify", "--op", "swiglu", "--quick", "--device", "cpu"]


# --- quick, and on every way in -------------------------------------------------------------------------------------------


def test_help_of_every_command_and_errors_of_arguments_need_no_torch() -> None:
    program = """
import sys
from typer.testing import CliRunner
from fastdllm_triton.cli.app import app
import typer
commands = typer.main.get_command(app).commands
helps = [[name, "--help"] for name in commands if name != "lm-eval"]
wrong = [["--bogus"], ["--gen-length", "x"], ["--live", "--json"], ["--model", ""], ["--prompt-file", "/no/such/file"]]
for words in ([], ["--help"], ["--version"], *helps, *(["generate", *words] for words in wrong), ["nosuch"], ["roofline"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 2), (words, result.output)
    heavy = {"torch", "transformers", "triton", "numpy", "safetensors", "huggingface_hub", "matplotlib"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    result = _python("-c", program)
    assert result.returncode == 0, result.stderr


def test_the_package_imports_names_and_submodules_when_they_are_used() -> None:
    program = """
import sys
import fastdllm_triton as fdt
assert "torch" not in sys.modules
assert {"load", "GenerationConfig", "__version__"} <= set(dir(fdt))
assert not hasattr(fdt, "nothing") and not hasattr(fdt, "_nothing")
assert fdt.ops.__name__ == "fastdllm_triton.ops"
for name in fdt.__all__:
    assert getattr(fdt, name).__name__ == name
from fastdllm_triton import *
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert accelerate is fdt.swap.accelerate
    import fastdllm_triton.roofline
assert [str(w.message) for w in caught if w.category is DeprecationWarning and "fastdllm" in str(w.message)] == [
    "fastdllm_triton.swap is fastdllm_triton.integrations.transformers now",
    "fastdllm_triton.roofline is fastdllm_triton.tools.roofline now",
], caught
import fastdllm_triton.integrations.transformers as home
assert home.__spec__.name == "fastdllm_triton.integrations.transformers"
"""
    result = _python("-c", program)
    assert result.returncode == 0, result.stderr


def test_the_module_is_the_program_and_tells_its_version() -> None:
    result = _python("-m", "fastdllm_triton", "--version")
    assert (result.returncode, result.stdout) == (0, f"fastdllm-triton {fdt.__version__}\n")
    result = _python("-m", "fastdllm_triton", "generate", "--help")
    assert "Usage: fastdllm-triton generate" in result.stdout


def test_the_installed_script_is_the_same_program() -> None:
    setup = (ROOT / "setup.py").read_text()
    (target,) = re.findall(r'"fastdllm-triton=([\w.:]+)"', setup)
    entry = metadata.EntryPoint("fastdllm-triton", target, "console_scripts")
    from fastdllm_triton.__main__ import main

    assert entry.load() is main


def test_a_shell_completes_commands_and_options() -> None:
    completion = {"_FASTDLLM_TRITON_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    words = _python("-m", "fastdllm_triton", COMP_WORDS="fastdllm-triton eval", **completion).stdout.split()
    assert words == ["evaluate"]
    completion["COMP_CWORD"] = "2"
    words = _python("-m", "fastdllm_triton", COMP_WORDS="fastdllm-triton generate --gen", **completion).stdout.split()
    assert words == ["--gen-length"]


def test_help_is_grouped_and_has_examples() -> None:
    text = _run("--help").stdout
    for group in ("Generate", "Score", "Check and measure", "Know without a GPU", "Examples:"):
        assert group in text
    assert _run().stdout == text
    panels = re.findall(r"─ (\w+) ─", _run("generate", "--help").stdout)
    assert panels == ["Options", "Prompts", "Decoding", "Cache", "Model", "Output"]
    for name in COMMANDS:
        if name != "lm-eval":
            assert f"fastdllm-triton {name}" in COMMANDS[name].epilog
            for example in re.findall(r"fastdllm-triton (.*)", COMMANDS[name].epilog):
                options = set(re.findall(r"--[\w-]+", example))
                assert options <= {opt for p in COMMANDS[name].params for opt in p.opts}, example


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("gamma must be 0 or more, got -1", "--entropy-budget must be 0 or more, got -1"),
        ("path_or_hub_id: there is no folder 'gen_length'", "--model: there is no folder 'gen_length'"),
        ("threshold and factor exclude each other", "--threshold and --factor exclude each other"),
        (
            "refresh_every must be None or an integer of 1 or more, got 0",
            "--refresh-every must be an integer of 1 or more, got 0",
        ),
        ("cache must be one of none, prefix, dual", "--cache must be one of none, prefix, dual"),
        ("row 0 has 9 tokens; with gen_length = 64 it takes 7", "row 0 has 9 tokens; with --gen-length = 64 it takes 7"),
        ("the model has no cache", "the model has no cache"),
        ("steps of gen_length/block_length in my_seed.json", "steps of gen_length/block_length in my_seed.json"),
        ("model.safetensors is damaged", "model.safetensors is damaged"),
        ("prompts: row 0 is empty", "prompts: row 0 is empty"),
    ],
)
def test_messages_name_options_as_they_are_typed(message: str, said: str) -> None:
    assert as_typed(message, option_names(COMMANDS["generate"])) == said
    assert as_typed(message, {}) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --prompt x --entropy-budget -1", "--entropy-budget must be 0 or more, got -1.0"),
        ("generate --prompt x --forbidden 1000000", "--forbidden must be in the vocabulary [0, 137), got 1000000"),
        ("generate --prompt x --model nosuch", "--model: there is no folder 'nosuch'"),
        ("generate --prompt x --strategy greedy", "--strategy must be fixed:K, threshold:T"),
        ("generate --prompt x --trace /no/such/folder/t.html", "--trace: /no/such/folder/t.html cannot be written"),
        ("generate --prompt x --look-ahead 3 --cache prefix", "--look-ahead means something for cache = dual only"),
        ("generate --prompt x --bogus", "No such option: --bogus"),
        ("generate --prompt x --gen-length x", "--gen-length: "),
        ("generate --prompt x --cache full", "--cache: 'full' is not one of 'none', 'prefix', 'dual'"),
        ("evaluate", "Missing option '--out'"),
        ("evaluate --out o --block-length 0", "--block-length must be a list of integers of 1 or more, got '0'"),
        ("evaluate --out o --strategies threshold", "--strategies must be fixed:K, threshold:T"),
        ("evaluate --out o --caches full", "--caches must be one of none, prefix, dual, block_causal, got 'full'"),
        ("evaluate --out o --scorer number", "--scorer needs --data"),
        ("evaluate --out o --data nosuch.jsonl", "--data nosuch.jsonl: No such file or directory"),
        ("inspect --out o --strategy greedy", "--strategy must be fixed:K"),
        ("info --model nosuch", "--model: there is no folder or file 'nosuch'"),
        ("info --batch-size 3", "--batch-size need --model"),
        ("roofline --prompt-length 0", "--prompt-length must be 1 or more, got 0"),
        ("verify --device tpu", "--device must be a device of torch, such as 'cpu' or 'cuda:0', got 'tpu'"),
        ("compile-report --arch nope", "--arch: got nope, needs names among"),
        ("compile-report --op nope", "--op: got nope, needs names among"),
        ("compile-report --compare {page}", "--compare {page}: not a report: Expecting value"),
        ("performance-report --compare nosuch", "--compare nosuch: No such file or directory"),
        ("performance-report --out /no/such/folder/r.json", "--out: /no/such/folder/r.json cannot be written"),
        ("nosuch", "No such command 'nosuch'"),
    ],
)
def test_every_error_is_one_line_of_one_style(arguments: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "cli.md"
    result = _run(*arguments.format(page=page).split())
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message.format(page=page) in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt=",
        "generate --prompt x --model=",
        "generate --prompt x --trace=",
        "generate --prompt-file=",
        "evaluate --out=",
        "evaluate --out o --block-length=",
        "evaluate --out o --caches=",
        "info --model=",
        "bench --html=",
        "compile-report --compare=",
    ],
)
def test_an_empty_value_is_refused_by_name(arguments: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    option = arguments.split()[-1].removesuffix("=")
    for words in (arguments.split(), [*arguments.removesuffix("=").split(), ""]):
        result = _run(*words)
        assert (result.exit_code, result.stderr) == (2, f"error: {option} must not be empty\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_twice_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # So that no work follows.
    out = ("--problems", "1", "--out", str(tmp_path / "file"))
    result = _run("evaluate", "--strategies", "threshold:0.5,threshold:0.5", "--caches", "dual,dual", *out)
    assert "warning: --strategies: threshold:0.5 is given twice and counts once" in result.stderr
    assert "warning: --caches: dual is given twice and counts once" in result.stderr
    result = _run("generate", "--json", "--prompt", FIRST, "--prompt", FIRST, "--forbidden", "5", "--forbidden", "5")
    assert len(json.loads(result.stdout)["results"]) == 2
    assert result.stderr == "warning: --forbidden 5 is given twice and counts once\n"


@pytest.mark.parametrize(
    "error", [ValueError, TypeError, OSError, RuntimeError, MemoryError, FloatingPointError, OverflowError, ZeroDivisionError]
)
def test_what_a_user_can_mend_is_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(loading, "load", fail)
    for command in (["generate", "--prompt", "x"], ["chat"], ["evaluate", "--out", "o"], ["inspect", "--out", "o"]):
        result = _run(*command)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "error: two lines")
    monkeypatch.setenv("FASTDLLM_DEBUG", "1")
    assert isinstance(_run("generate", "--prompt", "x").exception, error)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, fastdllm_triton.tools.roofline as roofline\n"
        "roofline.shape_of = lambda model: {}['bug']\n"
        "sys.argv = ['fastdllm-triton', 'roofline']\n"
        "from fastdllm_triton.__main__ import main; main()\n"
    )
    result = _python("-c", program)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "KeyError: 'bug'" in result.stderr


def test_ctrl_c_is_answered_in_a_word_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupt)
    for command in (["generate", "--prompt", "x"], ["chat"], ["evaluate", "--out", "o"]):
        result = _run(*command)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize("module", ["typer", "numpy"])
@pytest.mark.parametrize("stop", ["raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGINT)"])
def test_ctrl_c_during_an_import_is_answered_in_a_word(module: str, stop: str) -> None:
    # numpy's extension modules would turn it into an error of their own.
    program = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.startswith({module!r}): {stop}\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['fastdllm-triton', 'generate', '--prompt', 'x']\n"
        "from fastdllm_triton.__main__ import main; main()\n"
    )
    result = _python("-c", program)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_is_no_traceback() -> None:
    command = [sys.executable, "-m", "fastdllm_triton", "generate", "--prompt", FIRST, "--steps", "48"]
    for i in range(1, 30):
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_interrupts,
        )
        time.sleep(0.12 * i)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        if i > 3:  # Until then Python itself may not have begun.
            # Python ends by the signal itself if it came inside of an exec; a shell says 130 then, too.
            assert process.returncode in (0, 130, -signal.SIGINT), stderr
            assert process.returncode in (0, -signal.SIGINT) or "interrupted" in stderr
            assert "Traceback" not in stderr

"""What is printed: text from outside cannot steer the terminal, is not markup, and comes out in any locale and at any width."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton import tiny as built_in
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.console import Terminal, console, say, say_list, show, visible
from fastdllm_triton.cli.live import LiveView, TokenRenderer
from fastdllm_triton.engine.runner import ModelRunner

FIRST = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
#: Sets the title of the window, clears the screen and writes what reads like a command.
EVIL = "\x1b]0;PWNED\x07\x1b[2J\x1b[1;1H$ rm -rf / done"
SHOWN = r"\x1b]0;PWNED\x07\x1b[2J\x1b[1;1H$ rm -rf / done"


def _run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with a token, one that every answer has, that holds control characters."""
    folder = tmp_path_factory.mktemp("evil")
    for file in built_in.PATH.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[EVIL] = vocabulary.pop(" ####")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


# --- control characters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("\x00\x08\r\x7f\x9b31m", r"\x00\x08\x0d\x7f\x9b31m"),
        ("line\n\tline", "line\n\tline"),
        ("user\u202etxt.exe\u2066\u200b\ufeff", r"user\u202etxt.exe\u2066\u200b\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        *[(text, text) for text in ("naïve — 日本", "👨\u200d👩\u200d👧", "\u0645\u06cc\u200c\u062e\u0648", "\u05d0\u200f!")],
    ],
)
def test_control_and_invisible_characters_become_visible_and_nothing_else_does(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_nothing_that_is_drawn_on_a_console_holds_a_control_character_of_its_content() -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, width=200, color_system=None)
    table = Table("name\x1b[2J", title="title\x1b[2J")
    table.add_row("cell\x1b[2J")
    for item in ("text\x1b[2J", Text("text\x1b[2J"), table):
        console.print(item)
    with console.status(Text("status\x1b[2J")):
        pass
    assert "\x1b[2J" not in file.getvalue()
    # Where the layout counted it as nothing it is cut, and that is all.
    assert [word for word in ("text", "title", "name", "cell", "status") if rf"{word}\x1" in file.getvalue()] == [
        "text", "title", "name", "cell", "status",
    ]  # fmt: skip


def test_generated_text_and_prompts_cannot_steer_a_terminal(evil: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{FIRST} \x1b[2J\n")
    for arguments in (
        ["--prompt", f"{FIRST} \x1b[2J"],
        ["--prompt-file", str(prompts)],
        ["--prompt", f"{FIRST} \x1b[2J", "--live"],
    ):
        result = _run("generate", "--model", str(evil), *arguments)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output and "\x07" not in result.output
        assert f"{FIRST} \\x1b[2J" in result.stdout
        assert SHOWN in result.stdout.replace("\n", "")


def test_an_interrupted_answer_cannot_steer_a_terminal_either(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync_flags(self: ModelRunner, rows: int, mask_ids: Any = ()) -> Any:
        reads.append(rows)
        if len(reads) == 20:
            raise KeyboardInterrupt
        return original(self, rows, mask_ids)

    reads: list[int] = []
    original = ModelRunner.sync_flags
    monkeypatch.setattr(ModelRunner, "sync_flags", sync_flags)
    result = _run("generate", "--model", str(evil), "--prompt", FIRST, "--steps", "24", "--block-length", "48")
    assert result.exit_code == 130
    assert "\x1b" not in result.output and "\x07" not in result.output
    assert SHOWN in result.stdout and "░" in result.stdout


def test_chat_cannot_steer_a_terminal(evil: Path) -> None:
    result = _run("chat", "--model", str(evil), stdin=f"{FIRST}\n/\x1b[2J\n")
    assert result.exit_code == 2
    assert "\x1b" not in result.output and "\x07" not in result.output
    assert SHOWN in result.stdout
    assert r"\x1b[2J" in result.stderr


def test_a_frame_shows_control_characters_and_counts_them_in_its_layout(evil: Path) -> None:
    lm = fdt.load(evil, device="cpu")
    file = io.StringIO()
    view = LiveView(lm, 48, Terminal(file=file, force_terminal=True, width=120, color_system=None))
    with view:
        lm.generate(FIRST, strategy=fdt.FixedSteps(8), block_length=48, callback=view)
    drawn = file.getvalue()
    assert "\x1b]0;" not in drawn and "\x07" not in drawn and "\x1b[2J" not in drawn
    lines = [line for line in drawn.splitlines() if "PWNED" in line]
    assert lines and all(len(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip("\r")) == 120 for line in lines)


def test_names_from_a_checkpoint_and_paths_cannot_steer_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    shutil.copy(GOLDEN / "llada-gqa" / "config.json", folder)
    tensors = load_file(GOLDEN / "llada-gqa" / "model.safetensors")
    save_file(tensors | {"evil\x1b]0;pwn\x07": tensors["model.transformer.ln_f.weight"].clone()}, folder / "model.safetensors")
    for arguments in (["--prompt", "x"], ["--prompt-file", str(folder / "nothing")]):
        result = _run("generate", "--model", str(folder), *arguments)
        assert result.exit_code == 2
        assert "\x1b" not in result.output and "\x07" not in result.output
        assert r"\x1b" in result.stderr
    assert result.stderr.count("\n") == 1


# --- markup ---------------------------------------------------------------------------------------------------------------


def test_a_path_is_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm_triton.evaluation import plots

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "save", lambda figures, folder: [folder / "accuracy.png"])
    out = "o[/red]x[red]y:smile:"  # A closing tag that was not opened is an error of rich; one that opens would be eaten.
    result = _run("evaluate", "--problems", "1", "--strategies", "threshold:0.5", "--caches", "dual", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}/accuracy.png\n" in result.stdout


def test_advice_names_the_extra_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name in ("matplotlib", "lm_eval") else find(name, *rest))
    result = _run(
        "evaluate", "--problems", "1", "--strategies", "threshold:0.5", "--caches", "dual", "--out", str(tmp_path / "o")
    )
    assert "pip install 'fastdllm-triton[bench]'" in result.stderr
    assert "pip install 'fastdllm-triton[eval]'" in _run("lm-eval").stderr


def test_numbers_are_not_coloured() -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, width=80)
    say(console, "torch 2.13.0+cpu, 4,800 GB/s, 1 threads")
    console.print("torch 2.13.0 'x' True")
    assert "\x1b" not in file.getvalue()


# --- locales and widths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_without_a_sign_gets_another_one_and_no_end(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(charset=encoding)
    result = runner.invoke(app, ["generate", "--prompt", f"{FIRST} 日本", "--live"])
    assert result.exit_code == 0, result.output
    assert f"{FIRST} ??" in result.stdout and "tokens per forward" in result.stdout
    result = runner.invoke(app, ["generate", "--prompt", "x", "--model", "./日本"])
    assert result.exit_code == 2
    assert r"there is no folder './\u65e5\u672c'" in result.stderr


def test_masks_and_ends_have_signs_in_any_encoding(tiny: fdt.MaskedDiffusionLM) -> None:
    mask, end = tiny.config.mask_id, tiny.config.eos_ids[0]
    for encoding, shown in (("utf-8", "░░¶"), ("ascii", "__|"), ("latin-1", "__|"), ("no-such-encoding", "__|")):
        assert TokenRenderer(tiny, mask, encoding).render([mask, mask, end]).plain == shown


def _table() -> Table:
    table = Table("", title="The floor")
    for column in ("forwards", "tokens per second"):
        table.add_column(column, justify="right")
    table.add_row("as given, without anything", "78.8", "674")
    table.add_row("with [red] weights", "39.4", "1,019")
    return table


def test_a_table_is_listed_row_by_row_where_a_terminal_is_too_narrow() -> None:
    wide, narrow, pipe = io.StringIO(), io.StringIO(), io.StringIO()
    show(_table(), Terminal(file=wide, force_terminal=True, width=80, color_system=None))
    show(_table(), Terminal(file=narrow, force_terminal=True, width=40, color_system=None))
    show(_table(), Terminal(file=pipe, width=20))
    for file in (wide, pipe):  # A pipe has no width.
        (line,) = [line for line in file.getvalue().splitlines() if "as given" in line]
        assert line.split("│")[1:-1] == [" as given, without anything ", "     78.8 ", "               674 "]
    assert [line.rstrip() for line in narrow.getvalue().splitlines()] == [
        "The floor",
        "as given, without anything",
        "  forwards           78.8",
        "  tokens per second  674",
        "with [red] weights",
        "  forwards           39.4",
        "  tokens per second  1,019",
    ]


def test_a_summary_is_not_broken_inside_of_a_part() -> None:
    parts = ["9 forwards (2 refreshes, 7 steps)", "3.56 tokens per forward", "193.6 tokens/s", "0.17 s on cpu"]
    file = io.StringIO()
    say_list(Terminal(file=file, force_terminal=True, width=80, color_system=None), parts)
    assert file.getvalue().splitlines() == [", ".join(parts[:3]) + ",", parts[3]]
    say_list(Terminal(file=(pipe := io.StringIO()), width=80), parts)
    assert pipe.getvalue() == ", ".join(parts) + "\n"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["roofline", "--ops"], ["as given", "prompt refresh 2", "twice the tokens", "refresh", "step"]),
        (["info", "--model", "tiny"], ["largest batch that fits", "workspace, at most"]),
    ],
)
def test_rows_of_a_report_keep_their_names_at_80_columns(
    arguments: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    result = _run(*arguments)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).splitlines()
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
    for name in names:
        assert any(line.strip().startswith(name) for line in lines), name

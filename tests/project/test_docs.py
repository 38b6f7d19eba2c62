"""The documentation does as it says: its Python runs as it stands, its commands parse, its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
import typer
from typer.testing import CliRunner

from fastdllm_triton.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page."""
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), flags=re.S | re.M)
    return [code for language, code in fences if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of each command line of ours on a page, without the variables before it and the comment behind it."""
    lines = "".join(blocks(page, "", "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "fastdllm-triton" in line]
    return [line[line.index("fastdllm-triton") + 1 :] for line in words if "fastdllm-triton" in line]


#: Its example is compiled, in a process in which Triton does not interpret.
COMPILED = ROOT / "docs" / "ptx.md"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != COMPILED], ids=lambda page: page.name
)
def test_the_examples_run(page: Path) -> None:
    """Nothing is defined beforehand; a block may go on from those before it on its page."""
    names: dict[str, object] = {}
    for example in blocks(page, "python"):
        exec(compile(example, page.name, "exec"), names)


def test_the_example_that_is_compiled_ends_with_the_error_that_the_page_shows(tmp_path: Path) -> None:
    (example,) = blocks(COMPILED, "python")
    (tmp_path / "example.py").write_text(example)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines()[-1].removeprefix("fastdllm_triton.ptx.emulator.")
    assert said in "".join(blocks(COMPILED, ""))
    assert said.startswith("FindingsError: access outside of every tensor")


@pytest.mark.parametrize(("page", "words"), [(page.name, words) for page in PAGES for words in commands(page)], ids=str)
def test_the_commands_are_ones_that_there_are(page: str, words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


@pytest.mark.parametrize("words", [w for w in commands(PAGES[0]) if w[0] in ("generate", "info", "roofline")], ids=str)
def test_the_commands_of_the_readme_run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "./LLaDA-8B-Instruct" in words:
        pytest.skip("needs a checkpoint")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^()\s#]+)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("url", ["", "https://code.example/fast"])
def test_the_page_of_a_package_index_has_no_relative_links(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setenv("PROJECT_URL", url)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    shown = given["long_description"]
    assert all("://" in target for target in re.findall(r"\]\(([^)]*)\)", shown))
    if url:
        assert f"![The three caches are three choices of the window of a step]({url}/raw/main/docs/windows.svg)" in shown
        assert f"[glossary]({url}/blob/main/docs/glossary.md)" in shown
    else:
        assert "\nThe three caches are three choices of the window of a step\n" in shown
        assert "(https://arxiv.org/abs/2505.22618)" in shown


@pytest.fixture(scope="module")
def pictures() -> dict[str, Any]:
    """The script that draws them."""
    return runpy.run_path(str(ROOT / "docs" / "make_pictures.py"), run_name="make_pictures")


def test_every_picture_is_there_and_drawn_by_the_script(pictures: dict[str, Any], tmp_path: Path) -> None:
    drawn = {path.name for path in pictures["draw_all"](tmp_path)}
    page = "".join((ROOT / "docs" / name).read_text() for name in ("choosing.md", "architecture.md"))
    assert drawn == set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", page))
    for name in drawn:
        # The words and numbers of a picture are comments of the file: those of the committed one are those of this run.
        then, now = (re.findall(r"<!-- (.*?) -->", (folder / name).read_text()) for folder in (ROOT / "docs", tmp_path))
        assert now == then
        assert now


@pytest.mark.parametrize("name", ["batch", "caches", "strategies", "windows"])
def test_the_words_of_a_picture_can_be_read_on_a_page_of_900_pixels(name: str) -> None:
    text = (ROOT / "docs" / f"choosing-{name}.svg").read_text()
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', text)
    # Glyphs have 100 units an em, and points are those of the page.
    scales = re.findall(r"<!-- .*? -->\n *<g[^>]* scale\(([\d.]+) ", text)
    assert len(scales) == text.count("<!-- ") > 20
    assert min(100 * float(scale) for scale in scales) * 900 / float(width) >= 9.8


def test_a_window_that_is_drawn_is_one_that_was_recomputed(pictures: dict[str, Any], tiny: Any) -> None:
    run = pictures["record"](tiny, block_length=16, cache="dual")
    figure = pictures["draw_windows"]({"dual": run, "again": run})
    drawn = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] != (0.0, 0.0, 0.0)]
    assert len(drawn) == 2 * len(run.forwards) + run.output.committed
    assert sum(len(seen.committed) for seen in run.forwards) == run.output.committed == 48
    assert run.slots == 3 * 76 + (len(run.forwards) - 3) * 16
    assert f"{len(run.forwards)} forwards, {run.slots} slots recomputed" in figure.axes[0].get_xlabel()


def test_every_file_and_name_of_the_architecture_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = page.replace("NAME", "swiglu")  # which stands for any op
    for quoted in set(re.findall(r"`([^`]+)`", shown)):
        if re.fullmatch(r"[\w/]+(\.py|/)", quoted):
            assert (ROOT / quoted).exists() or (ROOT / "fastdllm_triton" / quoted).exists(), quoted
        elif re.fullmatch(r"[A-Z]\w+(\.\w+)?", quoted):
            owner, _, name = quoted.partition(".")
            texts = [path.read_text() for path in (ROOT / "fastdllm_triton").rglob("*.py")] + [
                path.read_text() for path in (ROOT / "kernels").glob("*.py")
            ]
            assert any(re.search(rf"^(class |){owner}\b", text, re.MULTILINE) for text in texts), quoted
            assert not name or any(f"def {name}(" in text for text in texts), quoted


def test_what_is_to_be_added_touches_as_few_files_as_the_budget_has() -> None:
    recipes = (ROOT / "docs" / "architecture.md").read_text().split("## To add")[1]
    budgets = {"An op": 6, "A strategy": 3, "A cache policy": 2, "A model family": 2}
    for what, most in budgets.items():
        recipe = recipes.split(f"**{what}**")[1].split("\n\n")[0]
        files = set(re.findall(r"`([\w/]+\.py|models/)`", recipe))
        assert 1 <= len(files - {"models/dream.py"}) <= most, (what, files)


def test_the_floors_of_the_architecture_are_those_that_the_linter_holds() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = [
        {name.strip() for name in floor.split(",")}
        for floor in re.search(r"checks it:\n(.*?)\.\n", page, re.DOTALL)[1].replace("\n", " ").split("→")  # type: ignore[index]
    ]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    held = [set(re.split(r" [:|] ", layer)) for layer in settings["layers"]]
    assert drawn == [layer for layer in held if layer not in ({"__main__"}, {"tiny"}, {"utils"})]


@pytest.mark.parametrize("module", ["fastdllm_triton", "fastdllm_triton.engine.engine"])
def test_examples_in_docstrings_run(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted and not outcome.failed

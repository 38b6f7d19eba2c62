"""The Python examples of the documentation run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from _modules import load_module
from conftest import GOLDEN, GOLDEN_DREAM

from fastdllm_triton import tiny

ROOT = Path(__file__).parent.parent


#: Every page with examples.
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_run(page: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    assert examples
    names: dict[str, object] = {
        # What a reader has at hand.
        "hf_model": load_module(tiny.PATH),
        "dream_module": load_module(GOLDEN / GOLDEN_DREAM),
        "input_ids": torch.tensor([[40, 41, 42, 43]]),
    }
    for example in examples:
        exec(compile(example, page.name, "exec"), names)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Any]:
    """The script that draws them."""
    return runpy.run_path(str(ROOT / "docs" / "make_pictures.py"), run_name="make_pictures")


def test_every_picture_is_there_and_drawn_by_the_script(pictures: dict[str, Any], tmp_path: Path) -> None:
    drawn = {path.name for path in pictures["draw_all"](tmp_path)}
    page = (ROOT / "docs" / "choosing.md").read_text()
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

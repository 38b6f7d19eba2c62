"""What keeps the house in order: its layout, the length of files, names, and the way from ``generate`` to a kernel."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN

import fastdllm_triton as fdt

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastdllm_triton"

#: Names that belong to an interface: of every op, of every model family, of scripts, of the official code.
INTERFACES = {
    "main",
    "generate",
    "statistics_merge",
    "Config",
    "select_config",
    "candidates",
    "CASES",
    "CASE",
    "BENCH",
    "NAMES",
    "config",
}


def _sources() -> Iterator[Path]:
    for folder in (PACKAGE, ROOT / "kernels", ROOT / "reference", ROOT / "bench"):
        for path in sorted(folder.rglob("*.py")):
            linked = any(parent.is_symlink() for parent in path.parents if parent != ROOT)
            if not linked and "results" not in path.parts:
                yield path


def test_the_root_of_the_package_has_few_modules() -> None:
    modules = [path.name for path in PACKAGE.glob("*.py")]
    assert len(modules) <= 6, modules


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): count for path in _sources() if (count := len(path.read_text().splitlines())) > 450}
    assert not long


def test_a_public_name_is_defined_in_two_modules_at_most() -> None:
    """Kernels, references and the public op share names by design; anything else that has one name is one thing."""
    homes: dict[str, set[str]] = defaultdict(set)
    for path in _sources():
        for node in ast.parse(path.read_text()).body:
            targets = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names = [target.name for target in targets]
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_"):
                    homes[name].add(str(path.relative_to(ROOT)))
    from fastdllm_triton.ops import NAMES

    allowed = INTERFACES | set(NAMES)
    crowded = {name: sorted(paths) for name, paths in homes.items() if len(paths) > 2 and name not in allowed}
    assert not crowded


@pytest.mark.parametrize("op", ["linear", "rope_kv_write", "window_attention", "head_statistics", "commit_tokens"])
def test_a_kernel_is_nine_frames_from_generate(op: str) -> None:
    """The launcher is the last of them. Captured forwards replay without any."""
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    launcher = getattr(model.network.ops, op)
    depths: list[list[str]] = []

    def launch(*args: Any, **kwargs: Any) -> Any:
        frames, frame = [], sys._getframe()
        while frame is not None:
            frames.append(frame.f_code.co_name)
            if frame.f_code is fdt.MaskedDiffusionLM.generate.__code__:
                break
            frame = frame.f_back  # type: ignore[assignment]
        depths.append(frames)
        return launcher(*args, **kwargs)

    model.network.ops = replace(model.network.ops, **{op: launch})
    model.generate([[1, 2, 3]], gen_length=8, block_length=8)
    # One more than was counted, where the op has a wrapper for torch.compile in front of the launcher.
    longest = max(depths, key=len)
    assert len(longest) + 1 <= 9, longest

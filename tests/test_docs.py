"""The Python examples of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _modules import load_module
from conftest import GOLDEN, GOLDEN_DREAM

from fastdllm_triton import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/selection.md", "docs/switching.md"])
def test_the_examples_run(page: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    assert examples
    names: dict[str, object] = {
        # What a reader has at hand.
        "hf_model": load_module(tiny.PATH),
        "dream_module": load_module(GOLDEN / GOLDEN_DREAM),
        "input_ids": torch.tensor([[40, 41, 42, 43]]),
    }
    for example in examples:
        exec(compile(example, page, "exec"), names)

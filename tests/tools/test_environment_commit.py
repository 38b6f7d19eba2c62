"""The commit that results are filed under."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastdllm_triton.tools import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDLLM_COMMIT", raising=False)
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert environment.commit() in (head, f"{head}+changes")
    monkeypatch.setenv("FASTDLLM_COMMIT", "stated")
    assert environment.commit() == "stated"

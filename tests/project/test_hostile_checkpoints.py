"""Whatever a checkpoint or a module holds: no code runs, nothing hangs, memory is bounded, and errors are one clear line.

Some of each kind are tried in every run, all of them, which are thousands, by ``make test-slow``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import _hostile
import pytest

import fastdllm_triton as fdt

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="attacks with pipes and devices, and reads the memory as Linux tells it"
)


def _try(groups: dict[str, int]) -> dict[str, str]:
    """What became of every so many cases of each group, by name."""
    paths = [str(Path(fdt.__file__).parents[1]), str(Path(_hostile.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "RUST_BACKTRACE": "0"}
    arguments = [word for group, step in groups.items() for word in (group, str(step))]
    program = [sys.executable, _hostile.__file__, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert "\x1b" not in done.stdout + done.stderr, "a terminal would have acted on text from a file"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1] if lines else 'the beginning'} ended with {done.returncode}: {done.stderr[-3000:]}"
    return {f"{i}: {line['case']}": line["result"] for i, line in enumerate(lines) if "result" in line}


def _check(groups: dict[str, int]) -> set[str]:
    """That nothing went wrong. Gives what there was of ``loaded`` and ``refused``."""
    results = _try(groups)
    assert len(results) == sum(len(_hostile.cases(group)[::step]) for group, step in groups.items())
    assert not {name: result for name, result in results.items() if result.startswith("bad")}
    return {result.partition(":")[0] for result in results.values()}


def test_some_of_each_kind_do_no_harm() -> None:
    assert _check({"mutations": 11, **dict.fromkeys(_hostile.GROUPS, 40)}) == {"loaded", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["safetensors", "code", "tokenizer", "module"])
def test_attacks_made_by_hand_do_no_harm(group: str) -> None:
    assert _check({group: 1}) == {"loaded", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["config", "index"])
def test_every_attack_through_these_files_is_refused(group: str) -> None:
    assert _check({group: 1}) == {"refused"}


@pytest.mark.slow
def test_a_thousand_mutations_do_no_harm() -> None:
    assert sum(_hostile.MUTATIONS.values()) >= 1000
    assert _check({"mutations": 1}) == {"loaded", "refused"}

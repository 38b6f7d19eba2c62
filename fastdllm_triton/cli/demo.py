"""``fastdllm-triton demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as cli
from .console import console


def demo(
    problems: Annotated[int, typer.Option(min=1, help="Problems to decode.", rich_help_panel=cli.PROMPTS)] = 8,
    problem_seed: cli.ProblemSeedOption = 1,
    device: cli.DeviceOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
) -> None:
    """Decode unseen problems with the built-in model in every way, side by side."""
    from ..tools.demo import demo as run

    run(console, problems, problem_seed, device, backend.value, threads)

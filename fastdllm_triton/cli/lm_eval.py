"""``fastdllm-triton lm-eval``: lm-evaluation-harness."""

from __future__ import annotations

import importlib.util

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with --model fastdllm known to it; every argument is the harness's own."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RuntimeError("lm-eval needs lm-evaluation-harness: pip install 'fastdllm-triton[eval]'")
    from ..evaluation.lm_eval import main

    main(context.args)

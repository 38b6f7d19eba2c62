"""The demonstration behind ``make demo``: word problems the built-in model never saw, decoded in every way, side by side."""

from __future__ import annotations

import platform
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .decoding import CacheName, FixedSteps, GenerationConfig, Strategy, Threshold
from .loading import load
from .tiny.problems import MAX_ANSWER_TOKENS, problems, score

_BLOCK = 16
_WAYS: tuple[tuple[CacheName, str, Strategy], ...] = (
    ("none", "1 a forward", FixedSteps(MAX_ANSWER_TOKENS)),
    ("prefix", "1 a forward", FixedSteps(MAX_ANSWER_TOKENS)),
    ("dual", "1 a forward", FixedSteps(MAX_ANSWER_TOKENS)),
    ("none", "threshold 0.9", Threshold(0.9)),
    ("prefix", "threshold 0.9", Threshold(0.9)),
    ("dual", "threshold 0.9", Threshold(0.9)),
)


def demo(console: Console, count: int, seed: int, device: str | None, backend: str) -> None:
    """Decodes ``count`` problems one at a time in each way and prints texts and a table.

    The first way, no cache and one token a forward, is the plain loop that the others are compared with. All ways stop at the
    end token, so the ratios are those of the decoding alone.
    """
    torch.set_num_threads(1)  # The model is so small that threads only get in each other's way.
    model = load("tiny", device=device, backend=backend)
    asked = list(islice(problems(seed, test=True), count))
    prompts = [model.encode(problem.prompt) for problem in asked]
    console.print(Text(f"{model!r}"))
    console.print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads; blocks of {_BLOCK}, batch 1\n"
    )

    table = Table(title=f"{count} unseen problems (seed {seed})")
    for column in ("cache", "strategy"):
        table.add_column(column, no_wrap=True)
    for column in ("right", "forwards", "tok/forward", "tok/s", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    texts: dict[tuple[str, str], list[str]] = {}
    plain = 0.0
    for cache, name, strategy in _WAYS:
        config = GenerationConfig(gen_length=MAX_ANSWER_TOKENS, block_length=_BLOCK, cache=cache, strategy=strategy)
        model.generate([prompts[0]], config)  # The first call of a shape pays for what is allocated once.
        outputs = [model.generate([prompt], config) for prompt in prompts]
        answers = texts[cache, name] = [output.texts[0] for output in outputs]
        forwards = sum(output.nfe for output in outputs)
        committed = sum(output.committed for output in outputs)
        seconds = sum(output.seconds for output in outputs)
        rate = committed / seconds
        plain = plain or rate
        right = sum(score(problem, answer)[0] for problem, answer in zip(asked, answers, strict=True))
        table.add_row(
            cache, name, f"{right}/{count}", str(forwards), f"{committed / forwards:.2f}", f"{rate:.0f}", f"{rate / plain:.2f}x"
        )

    first, last = _WAYS[0], _WAYS[-1]
    for problem, before, after in list(zip(asked, texts[first[0], first[1]], texts[last[0], last[1]], strict=True))[:3]:
        console.print(Text(problem.prompt, style="bold"))
        for way, answer in ((first, before), (last, after)):
            verdict = "right" if score(problem, answer)[0] else "wrong"
            console.print(Text(f"  {way[0]:>6}, {way[1]:<13} ->{answer}  ({verdict})"))
    console.print()
    console.print(table)
    console.print("speed-up: tokens per second against the first line, the plain loop, measured in this run")

"""The demonstration behind ``make demo``: word problems the built-in model never saw, decoded in every way, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..decoding import CacheName, GenerationConfig
from ..decoding.strategies import FixedSteps, Strategy, Threshold
from ..engine.outputs import GenerationOutput
from ..loading import load
from ..tiny.problems import MAX_ANSWER_TOKENS, Problem, problems, score

_BLOCK = 16

_WORDS = (
    ("forward", "one pass through the model"),
    ("block", f"{_BLOCK} tokens decoded together; blocks follow each other from left to right"),
    ("commit", "to write a token for good: the surest one, or all at least 90 % sure"),
    ("cache", "prefix keeps what is before the block, dual all but the block"),
)


@dataclass
class Way:
    """One way to decode, and what it has made of the problems so far."""

    cache: CacheName
    commits: str
    strategy: Strategy
    outputs: list[GenerationOutput] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [output.texts[0] for output in self.outputs]

    @property
    def forwards(self) -> int:
        return sum(output.nfe for output in self.outputs)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a forward committed, on average."""
        return sum(output.committed for output in self.outputs) / self.forwards

    @property
    def rate(self) -> float:
        return sum(output.committed for output in self.outputs) / sum(output.seconds for output in self.outputs)

    def right(self, asked: Sequence[Problem]) -> int:
        return sum(score(problem, text)[0] for problem, text in zip(asked, self.texts, strict=False))


def demo(console: Console, count: int, seed: int, device: str | None, backend: str) -> None:
    """Decodes ``count`` problems one at a time in each way; a table fills in meanwhile, and a line says what came of it.

    The first way, no cache and one token a forward, is the plain loop that the others are compared with. All ways stop at the
    end token, so the ratios are those of the decoding alone.
    """
    console.print(Text(f"{_number(count, 'word problem')} that the built-in model never saw, one at a time\n"))
    torch.set_num_threads(1)  # The model is so small that threads only get in each other's way.
    model = load("tiny", device=device, backend=backend)
    asked = list(islice(problems(seed, test=True), count))
    prompts = [model.encode(problem.prompt) for problem in asked]
    strategies = (("1 a forward", FixedSteps(MAX_ANSWER_TOKENS)), ("threshold 0.9", Threshold(0.9)))
    caches: tuple[CacheName, ...] = ("none", "prefix", "dual")
    ways = [Way(cache, commits, strategy) for commits, strategy in strategies for cache in caches]

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for way in ways:
            config = GenerationConfig(MAX_ANSWER_TOKENS, _BLOCK, way.cache, way.strategy)
            model.generate([prompts[0]], config)  # The first call of a shape pays for what is allocated once.
            for prompt in prompts:
                way.outputs.append(model.generate([prompt], config))
                live.update(_table(ways, asked, console.width), refresh=True)
    print_results(console, ways, asked, str(model.device))


def print_results(console: Console, ways: Sequence[Way], asked: Sequence[Problem], device: str) -> None:
    """The table, what came of it in a sentence, the words that it uses, and an example."""
    console.print(_table(ways, asked, console.width))
    console.print(Text(f"\n{verdict(ways[0], ways[-1], asked)} on {device}.\n", style="bold"))
    words = Table.grid(padding=(0, 2, 0, 0))
    for word, meaning in _WORDS:
        words.add_row(Text(word, style="bold"), meaning)
    console.print(words)
    _print_examples(console, ways[0], ways[-1], asked)
    console.print(Text("\nSee it happen, with a problem of your own:"))
    console.print(Text(f'  fastdllm-triton generate --live --prompt "{asked[0].prompt}"'), soft_wrap=True)


def verdict(plain: Way, fast: Way, asked: Sequence[Problem]) -> str:
    """What the fast way changed, as a sentence without its end; every number is of this run."""
    same, count = sum(a == b for a, b in zip(plain.texts, fast.texts, strict=True)), len(asked)
    if same == count:
        answers = f"The same {_number(count, 'answer')}" if count > 1 else "The same answer"
    else:
        right = f"{fast.right(asked)} right instead of {plain.right(asked)}"
        answers = f"{same} of {_number(count, 'answer')} the same, {right},"
    tokens, before, speed = map(_short, (fast.tokens_per_forward, plain.tokens_per_forward, fast.rate / plain.rate))
    return (
        f"{answers} with {fast.forwards} forwards instead of {plain.forwards}: {tokens} tokens a forward instead of {before}, "
        f"{speed}x as fast"
    )


def _table(ways: Sequence[Way], asked: Sequence[Problem], width: int) -> Table:
    """A row a way; what has not been decoded yet is empty."""
    table = Table(box=None, padding=(0, 2 if width >= 72 else 1, 0, 0))
    for column in ("cache", "commits"):
        table.add_column(column, no_wrap=True)
    for column in ("right", "forwards", "tokens/forward" if width >= 72 else "tok/fwd", "tokens/s", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for way in ways:
        figures = ["", "", "", "", ""]
        if done := len(way.outputs):
            figures = [
                f"{way.right(asked)}/{done}",
                str(way.forwards),
                f"{way.tokens_per_forward:.1f}",
                f"{way.rate:.0f}",
                f"{way.rate / ways[0].rate:.1f}x",
            ]
        table.add_row(way.cache, way.commits, *figures, style="" if done == len(asked) else "dim")
    return table


def _print_examples(console: Console, plain: Way, fast: Way, asked: Sequence[Problem]) -> None:
    """One answer that both ways gave; of those that differ, up to three, with both answers."""
    pairs = list(zip(asked, plain.texts, fast.texts, strict=True))
    for problem, before, after in [pair for pair in pairs if pair[1] != pair[2]][:3] or pairs[:1]:
        console.print(Text(f"\n{problem.prompt}", style="bold"))
        for way, text in ((plain, before), (fast, after)) if before != after else ((None, after),):
            told = "" if way is None else f"{way.cache}, {way.commits}: "
            outcome = "right" if score(problem, text)[0] else "wrong"
            console.print(Padding(Text(f"{told}{text.strip()}  ({outcome})"), (0, 0, 0, 2)))


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

"""The demonstration behind ``make demo``: word problems the built-in model never saw, decoded in every way, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

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
    ("commit", "to write a token for good: the most confident one, or all of at least 90 % confidence"),
    ("cache", "prefix keeps what is before the block, dual all but the block"),
)


@dataclass
class Variant:
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
        return sum(output.committed for output in self.outputs) / self.forwards

    @property
    def rate(self) -> float:
        return sum(output.committed for output in self.outputs) / sum(output.seconds for output in self.outputs)

    def right(self, asked: Sequence[Problem]) -> int:
        return sum(score(problem, text)[0] for problem, text in zip(asked, self.texts, strict=False))


def demo(console: Console, count: int, seed: int, device: str | None, backend: str, threads: int | None = None) -> None:
    """Decodes ``count`` problems one at a time with each variant, fills in a table meanwhile, and sums up in a line at the end.

    The first one, no cache and one token a forward, is the plain loop that the others are compared with. All stop at the end
    token, so the ratios are those of the decoding alone.
    """
    console.print(Text(f"{_number(count, 'word problem')} that the built-in model never saw, one at a time\n"))
    model = load("tiny", device=device, backend=backend, threads=threads)
    asked = list(islice(problems(seed, test=True), count))
    prompts = [model.encode(problem.prompt) for problem in asked]
    strategies = (("1 a forward", FixedSteps(MAX_ANSWER_TOKENS)), ("threshold 0.9", Threshold(0.9)))
    caches: tuple[CacheName, ...] = ("none", "prefix", "dual")
    variants = [Variant(cache, commits, strategy) for commits, strategy in strategies for cache in caches]

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for variant in variants:
            config = GenerationConfig(MAX_ANSWER_TOKENS, _BLOCK, variant.cache, variant.strategy)
            model.generate([prompts[0]], config)  # The first call of a shape pays for what is allocated once.
            for prompt in prompts:
                variant.outputs.append(model.generate([prompt], config))
                live.update(_table(variants, asked, console.width), refresh=True)
    print_results(console, variants, asked, str(model.device))


def print_results(console: Console, variants: Sequence[Variant], asked: Sequence[Problem], device: str) -> None:
    """The table, what came of it in a sentence, the words that it uses, and an example."""
    console.print(_table(variants, asked, console.width))
    console.print(Text(f"\n{verdict(variants[0], variants[-1], asked)} on {device}.\n", style="bold"))
    words = Table.grid(padding=(0, 2, 0, 0))
    for word, meaning in _WORDS:
        words.add_row(Text(word, style="bold"), meaning)
    console.print(words)
    _print_examples(console, variants[0], variants[-1], asked)
    console.print(Text("\nSee it happen, with a problem of your own:"))
    console.print(Text(f'  fastdllm-triton generate --live --prompt "{asked[0].prompt}"'), soft_wrap=True)


def verdict(plain: Variant, fast: Variant, asked: Sequence[Problem]) -> str:
    """What the fast variant changed, as a sentence without its end; every number is of this run."""
    same, count = sum(a == b for a, b in zip(plain.texts, fast.texts, strict=True)), len(asked)
    if same == count:
        answers = f"The same {_number(count, 'answer')}" if count > 1 else "The same answer"
    else:
        right = f"{fast.right(asked)} right instead of {plain.right(asked)}"
        answers = f"{same} of {_number(count, 'answer')} the same, {right},"
    figures = (fast.tokens_per_forward, plain.tokens_per_forward, fast.rate / plain.rate)
    tokens, before, speed = (f"{figure:.1f}".removesuffix(".0") for figure in figures)
    return (
        f"{answers} with {fast.forwards} forwards instead of {plain.forwards}: {tokens} tokens a forward instead of {before}, "
        f"{speed}x as fast"
    )


def _table(variants: Sequence[Variant], asked: Sequence[Problem], width: int) -> Table:
    """One row per variant; what has not been decoded yet is empty."""
    table = Table(box=None, padding=(0, 2 if width >= 72 else 1, 0, 0))
    for column in ("cache", "commits"):
        table.add_column(column, no_wrap=True)
    for column in ("right", "forwards", "tokens/forward" if width >= 72 else "tok/fwd", "tokens/s", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for variant in variants:
        figures: tuple[str, ...] = ()
        if done := len(variant.outputs):
            rates = f"{variant.tokens_per_forward:.1f}", f"{variant.rate:.0f}", f"{variant.rate / variants[0].rate:.1f}x"
            figures = f"{variant.right(asked)}/{done}", str(variant.forwards), *rates
        table.add_row(variant.cache, variant.commits, *figures, style="" if done == len(asked) else "dim")
    return table


def _print_examples(console: Console, plain: Variant, fast: Variant, asked: Sequence[Problem]) -> None:
    """One answer that both variants gave; of those that differ, up to three, with both answers."""
    pairs = list(zip(asked, plain.texts, fast.texts, strict=True))
    for problem, before, after in [pair for pair in pairs if pair[1] != pair[2]][:3] or pairs[:1]:
        console.print(Text(f"\n{problem.prompt}", style="bold"))
        for variant, text in ((plain, before), (fast, after)) if before != after else ((None, after),):
            label = "" if variant is None else f"{variant.cache}, {variant.commits}: "
            outcome = "right" if score(problem, text)[0] else "wrong"
            console.print(Padding(Text(f"{label}{text.strip()}  ({outcome})"), (0, 0, 0, 2)))


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

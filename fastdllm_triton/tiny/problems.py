"""The task of the built-in model: chained two-digit additions and subtractions, told as a story and answered in words.

A prompt such as ``Tom has 51 coins. Tom finds 27. Tom sells 19. How many?`` is answered by
`` Tom now has 51+27=78. That makes it 78-19=59. #### 59``. Each step of the answer is worded in one of two ways of the
same number of tokens, chosen at random, so the words of a step depend on each other, the digits of a number on the carry,
and each step on the one before it. Tokens that depend on each other are what parallel decoding can get wrong, and every
answer can be scored exactly.

Test problems are chosen by a hash of the prompt and are never used in training.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lia", "Sam", "Zoe")
ITEMS = ("coins", "apples", "cards", "books", "shells", "stones")
GAINS = ("finds", "buys", "wins", "gets")
LOSSES = ("sells", "loses", "uses", "drops")

#: Tokens of the longest prompt (three steps) and of the longest answer with its end token.
MAX_PROMPT_TOKENS = 28
MAX_ANSWER_TOKENS = 48

#: One problem in this many is a test problem.
_TEST_SHARE = 16


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        name: who the story is about.
        start: the number it begins with, 10 to 99.
        changes: signed changes, two or three of them; every running total stays within 10 to 99.
        prompt: the question.
        answer: one correct answer (the wording of its steps was drawn at random), without the end token.
    """

    name: str
    start: int
    changes: tuple[int, ...]
    prompt: str
    answer: str

    @property
    def total(self) -> int:
        """The number the answer must end with."""
        return self.start + sum(self.changes)


def is_test_prompt(prompt: str) -> bool:
    """Whether a prompt belongs to the test set (decided by its hash alone, so it never changes)."""
    return hashlib.blake2b(prompt.encode(), digest_size=4).digest()[0] % _TEST_SHARE == 0


def _draw(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    total = start = rng.randint(10, 99)
    story, steps, changes = [f"{name} has {start} {item}."], [], []
    for _ in range(rng.choice((2, 3))):
        # A total within 20 of an end of the range leaves no room for a two-digit change that way.
        ways = [sign for sign, room in ((1, 99 - total), (-1, total - 10)) if room >= 10]
        sign = rng.choice(ways)
        change = sign * rng.randint(10, 99 - total if sign > 0 else total - 10)
        story.append(f"{name} {rng.choice(GAINS if sign > 0 else LOSSES)} {abs(change)}.")
        wording = rng.choice((f" {name} now has", " That makes it"))
        steps.append(f"{wording} {total}{'+' if sign > 0 else '-'}{abs(change)}={total + change}.")
        total += change
        changes.append(change)
    return Problem(name, start, tuple(changes), " ".join((*story, "How many?")), "".join(steps) + f" #### {total}")


def problems(seed: int, *, test: bool) -> Iterator[Problem]:
    """An endless stream of problems.

    Args:
        seed: the stream is a function of it alone.
        test: yield only test problems (never trained on), or only training problems.
    """
    rng = random.Random(seed)
    while True:
        problem = _draw(rng)
        if is_test_prompt(problem.prompt) == test:
            yield problem


_STEP = re.compile(r" (?P<name>[A-Z][a-z]+ now has|That makes it) (\d\d)([+-])(\d\d)=(\d\d)\.")


def score(problem: Problem, text: str) -> tuple[bool, bool]:
    """Scores an answer.

    Args:
        problem: what was asked.
        text: the generated text up to, not including, its end token.

    Returns:
        ``(exact_match, whole)``: whether the number after ``####`` is right, and whether in addition every step is
        worded consistently, names the right person, and states the right equation.
    """
    body, mark, final = text.partition(" #### ")
    exact = bool(mark) and final == str(problem.total)
    steps = list(_STEP.finditer(body))
    total, whole = problem.start, exact and len(steps) == len(problem.changes) and "".join(m.group() for m in steps) == body
    for match, change in zip(steps, problem.changes, strict=False):
        wording, left, sign, right, result = match.groups()
        expected = (str(total), "+" if change > 0 else "-", str(abs(change)), str(total + change))
        whole = whole and wording in (f"{problem.name} now has", "That makes it") and (left, sign, right, result) == expected
        total += change
    return exact, whole

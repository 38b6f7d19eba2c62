"""A conversation with a model: its history, its settings and what it took. Nothing here prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..decoding.config import GenerationConfig
from ..decoding.options import changed, parse
from ..engine.generation import Forward
from ..engine.prefix_store import PrefixStore
from ..model import MaskedDiffusionLM


@dataclass(frozen=True)
class Usage:
    """What one or several answers took; adds up.

    Attributes:
        turns: answers.
        prompt_tokens: of the prompts, history included.
        tokens: that forwards committed.
        forwards: refreshes and steps.
        refreshes: those that rebuilt the cache.
        seconds: in forwards; what is done between them, such as drawing, does not count.
    """

    turns: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    forwards: int = 0
    refreshes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def tokens_per_forward(self) -> float:
        """0 before the first forward."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 before the first forward."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Answer:
    """An answer under way: an iterator of its forwards, which may be left at any time.

    Attributes:
        question: what it answers.
        prompt_tokens: of the whole prompt.
        config: the settings it is decoded with.
        complete: whether nothing is masked any more.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        question: str,
        prompt: list[int],
        config: GenerationConfig,
        reuse: PrefixStore | None = None,
    ) -> None:
        self._model, self._generation = model, model.stream([prompt], config, reuse=reuse)
        self._seconds = 0.0
        self.question, self.prompt_tokens, self.config = question, len(prompt), config
        self.complete = False

    def __iter__(self) -> Iterator[Forward]:
        return self

    def __next__(self) -> Forward:
        started = time.perf_counter()
        try:
            return next(self._generation)
        except StopIteration:
            self.complete = True
            raise
        finally:
            self._seconds += time.perf_counter() - started

    @property
    def text(self) -> str:
        """What has been said: up to the first end token, and of an answer that was left, up to the first masked slot."""
        output, mask_id = self._generation.output(), self.config.mask_id
        ids = output.ids(0)
        mask_id = self._model.config.mask_id if mask_id is None else mask_id
        said = ids[: ids.index(mask_id)] if mask_id in ids else ids
        return str(self._model.tokenizer.decode(said, skip_special_tokens=True)).strip()  # type: ignore[union-attr]

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        output = self._generation.output()
        return Usage(1, self.prompt_tokens, output.committed, output.nfe, output.refreshes, self._seconds)


class Conversation:
    """Questions and answers. The prompt of each turn is the whole history in the checkpoint's chat template.

    Without a template there is no way to tell a model who said what, so that each question is a prompt of its own.

    Attributes:
        messages: what has been said since the last reset, oldest first, each with ``role`` and ``content``.
        last: what the last answer took.
        total: what all answers took, those before a reset included.

    Args:
        model: the model.
        config: options of a generation; the model's defaults if not given.
        system: a message before all others.

    Raises:
        ValueError: the model has no tokenizer, or a system message is given and it has no chat template.
    """

    def __init__(self, model: MaskedDiffusionLM, config: GenerationConfig | None = None, system: str | None = None) -> None:
        self.model, self.config, self.system = model, config or model.defaults, system
        if model.tokenizer is None:
            raise ValueError("model: it has no tokenizer, and a conversation needs one")
        if system is not None and not self.remembers:
            raise ValueError("system: the model's tokenizer has no chat template to put it in")
        # What was said before is computed once, where nothing behind it can change it.
        self._reuse = PrefixStore() if model.config.block_causal else None
        self.messages: list[dict[str, str]] = []
        self.last = self.total = Usage()

    @property
    def remembers(self) -> bool:
        """Whether a turn sees those before it."""
        return bool(self.model.tokenizer and self.model.tokenizer.chat_template)

    def prompt(self, question: str) -> list[int]:
        """Token ids of what the model is asked next."""
        if not self.remembers:
            return self.model.encode(question)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.encode([*system, *self.messages, {"role": "user", "content": question}])

    def ask(self, question: str) -> Answer:
        """Begins an answer. It belongs to the history once it is :meth:`kept <keep>`.

        Raises:
            ValueError: the question is empty, or with it the conversation is longer than the model takes. Nothing changes.
            MemoryError: the cache does not fit.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        ids = self.prompt(question)
        most = self.model.config.max_length - self.config.gen_length
        if len(ids) > most:
            what, advice = ("conversation", "/reset begins anew, ") if self.messages else ("prompt", "")
            raise ValueError(
                f"the {what} has {len(ids)} tokens; with gen_length = {self.config.gen_length} the model takes at most "
                f"{max(most, 0)}: {advice}/set gen_length leaves more room"
            )
        return Answer(self.model, question, ids, self.config, self._reuse)

    def keep(self, answer: Answer) -> str:
        """Takes an answer as it is now into the history, and gives its text. Without any, its question is forgotten too."""
        text = answer.text
        self.last = answer.usage
        self.total += self.last
        if text and self.remembers:
            self.messages += [{"role": "user", "content": answer.question}, {"role": "assistant", "content": text}]
        return text

    def set(self, *words: str) -> None:
        """Changes settings, all of them or none: ``set("threshold", "0.8", "cache", "prefix")``.

        Raises:
            ValueError: a name is unknown, a value is missing or not allowed, or the model cannot do with it.
        """
        if len(words) % 2 or not words:
            raise ValueError("give settings and their values in turn, as in /set threshold 0.8 cache prefix")
        pairs = list(zip(words[::2], words[1::2], strict=True))
        config = changed(self.config, {name: parse(name, text) for name, text in pairs})
        config.resolve(self.model.config, 1)
        if config.gen_length >= self.model.config.max_length:
            raise ValueError(
                f"gen_length must be below the model's {self.model.config.max_length} slots, got {config.gen_length}"
            )
        self.config = config

    def reset(self) -> None:
        """Forgets what has been said; settings and the count of what it took stay."""
        self.messages.clear()

"""The model a user holds: a network, its tokenizer, and ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoding import GenerationConfig, GenerationOutput
from .engine import Forward, Generation, run
from .models.checkpoint import read_json
from .models.config import ModelConfig
from .models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[str] | str


class MaskedDiffusionLM:
    """A masked-diffusion language model.

    Attributes:
        network: the transformer.
        folder: the checkpoint it was read from.
    """

    def __init__(self, network: Transformer, folder: Path) -> None:
        self.network = network
        self.folder = folder

    def __repr__(self) -> str:
        c = self.config
        return (
            f"MaskedDiffusionLM({c.architecture}, {c.layers} layers, width {c.width}, vocabulary {c.vocab_size}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {self.network.ops.name} ops)"
        )

    @property
    def config(self) -> ModelConfig:
        """The model's shape and special tokens."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, activations and caches."""
        return self.network.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, or None if its folder has no ``tokenizer.json``. Remote code is never run."""
        if not (self.folder / "tokenizer.json").exists():
            return None
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    @cached_property
    def defaults(self) -> GenerationConfig:
        """Options where the caller gives none: the library's, with the lengths of the checkpoint's ``generation_config.json``."""
        path = self.folder / "generation_config.json"
        given = read_json(path) if path.exists() else {}
        return GenerationConfig(**{name: given[name] for name in ("gen_length", "block_length") if name in given})

    def options(self, config: GenerationConfig | None = None, **options: Any) -> GenerationConfig:
        """``config``, or :attr:`defaults`, with some fields replaced.

        Raises:
            ValueError: an option is not valid.
            TypeError: an option is unknown.
        """
        return replace(config or self.defaults, **options)

    def encode(self, text: str | Sequence[Mapping[str, str]], *, chat: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: the prompt, or the messages of a conversation, oldest first, a ``role`` and a ``content`` each. Messages go
                through the checkpoint's chat template, and the model's turn is next.
            chat: wrap a string as a user's only message.

        Raises:
            ValueError: the checkpoint has no tokenizer, or no chat template where one is asked for.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(f"prompts: {self.folder} has no tokenizer.json; give token ids")
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(message) for message in text]
        if isinstance(text, str) and not chat:
            return list(tokenizer(text)["input_ids"])
        if not tokenizer.chat_template:
            raise ValueError(f"chat: the tokenizer of {self.folder} has no chat template")
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def logits(self, ids: Tensor) -> Tensor:
        """``[B, T]`` ids to ``[B, T, V]`` logits of a plain forward over whole sequences, nothing cached."""
        with torch.no_grad():
            return self.network.logits(ids.to(self.device))

    def generate(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        callback: Callable[[Forward], None] | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generates a continuation of each prompt.

        Args:
            prompts: a tensor ``[B, T]`` of ids, a list of lists of ids of any lengths, a string, or a list of strings.
            config: the options; :attr:`defaults` if not given.
            callback: called after each forward.
            options: fields of :class:`GenerationConfig` that replace those of ``config``.

        Returns:
            The sequences and how they came about. Row ``i``'s generation is the last ``gen_length`` entries of
            ``sequences[i]``; ``texts[i]`` is its text.

        Raises:
            ValueError: an option or a prompt is not valid; raised before any forward.
            TypeError: ``prompts`` is of another type, or an option is unknown.
            MemoryError: the cache does not fit; says what is needed, what there is and the largest batch that fits.
            FloatingPointError: a forward gave logits that are NaN or nowhere finite.

        An interrupt (Ctrl-C) and an exception of the callback pass through, with the output so far as their attribute
        ``output``; the model stays usable.
        """
        return run(self.stream(prompts, config, **options), callback)

    def stream(self, prompts: Prompts, config: GenerationConfig | None = None, **options: Any) -> Generation:
        """Generates forward by forward.

        Args:
            prompts, config, options: as of :meth:`generate`.

        Returns:
            An iterator: each item tells of one forward, what it committed (:attr:`~fastdllm_triton.engine.Forward.committed`)
            and the sequences so far. Its ``output()`` is the result, at any time. It may be left at any time.

        Raises:
            ValueError, TypeError, MemoryError: as :meth:`generate`, before any forward.
        """
        return Generation(self.network, self._rows(prompts), self.options(config, **options), self.tokenizer)

    def _rows(self, prompts: Prompts) -> list[list[int]]:
        """Prompts of any accepted form as lists of ids."""
        if isinstance(prompts, str):
            return [self.encode(prompts)]
        if isinstance(prompts, Tensor):
            if prompts.dim() != 2 or prompts.is_floating_point() or prompts.dtype == torch.bool:
                raise ValueError(f"prompts must be integers of shape [B, T], got {prompts.dtype} {list(prompts.shape)}")
            ids: list[list[int]] = prompts.tolist()
            return ids
        allowed = "a tensor [B, T], a list of lists of token ids, a string, or a list of strings"
        if not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be {allowed}, got {type(prompts).__name__}")
        rows = []
        for prompt in prompts:
            if isinstance(prompt, str):
                rows.append(self.encode(prompt))
            elif isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt):
                rows.append([int(token) for token in prompt])
            else:
                raise TypeError(f"prompts must be {allowed}, got an entry of type {type(prompt).__name__}")
        return rows

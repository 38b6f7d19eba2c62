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
from .saving import save_checkpoint
from .tokenizer import read_tokenizer
from .trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[str] | str


class MaskedDiffusionLM:
    """A masked-diffusion language model.

    Attributes:
        network: the transformer.
        hub_id: the repository that it was fetched from, if it was.
    """

    def __init__(self, network: Transformer, folder: Path | None, hub_id: str | None = None) -> None:
        self.network = network
        self._folder = folder
        self.hub_id = hub_id

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

    @property
    def folder(self) -> Path:
        """The checkpoint it was read from.

        Raises:
            ValueError: that is not known, as of an accelerated module that was not loaded from a folder or the hub.
        """
        if self._folder is None:
            raise ValueError("this model was not read from a checkpoint folder")
        return self._folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, or None if it has none. Remote code is never run.

        Raises:
            CheckpointError: its files are damaged.
        """
        return None if self._folder is None else read_tokenizer(self._folder)

    @cached_property
    def defaults(self) -> GenerationConfig:
        """Options where the caller gives none: the library's, with the lengths of the checkpoint's ``generation_config.json``."""
        path = None if self._folder is None else self._folder / "generation_config.json"
        given = read_json(path) if path is not None and path.exists() else {}
        return GenerationConfig(**{name: given[name] for name in ("gen_length", "block_length") if name in given})

    def options(self, config: GenerationConfig | None = None, **options: Any) -> GenerationConfig:
        """``config``, or :attr:`defaults`, with some fields replaced.

        Raises:
            ValueError: an option is not valid.
            TypeError: an option is unknown, or ``config`` no config.
        """
        if config is not None and not isinstance(config, GenerationConfig):
            told = "fastdllm_triton.compat has the functions that take steps and lengths by position"
            raise TypeError(f"config must be a GenerationConfig, got {type(config).__name__}; {told}")
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
            raise ValueError(f"prompts: {self._folder or 'the module'} has no tokenizer files; give token ids")
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(message) for message in text]
        if isinstance(text, str) and not chat:
            return list(tokenizer(text)["input_ids"])
        if not tokenizer.chat_template:
            raise ValueError(f"chat: the tokenizer in {self._folder} has no chat template")
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Writes the model as a checkpoint that the original classes load: the same tensor names, config and tokenizer files.

        All of it is written, or nothing. ``load`` then this converts a checkpoint's dtype; weights that were changed in place
        are written as they are.

        Args:
            folder: where to; must not exist yet, or be empty.
            max_shard_size: bytes of a file, or a string such as ``"5GB"``.

        Raises:
            ValueError: an argument is not valid, or the model is that of an accelerated module, which has a
                ``save_pretrained`` of its own.
            OSError: the folder cannot be written.
        """
        from .loading import ARCHITECTURES

        if self._folder is None:
            raise ValueError("this model has no checkpoint folder to take its config from; use the module's own save_pretrained")
        tensors = dict(self.network.weights.named(self.config, ARCHITECTURES[self.config.architecture].NAMES))
        save_checkpoint(tensors, self._folder, self.hub_id, Path(folder), max_shard_size)

    def release(self) -> None:
        """Gives back the memory of the buffers and captured forwards that earlier generations left for later ones, at once.

        The next generation allocates anew. Generations that are under way keep theirs.
        """
        self.network.buffers.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        trace: str | Path | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generates a continuation of each prompt.

        Args:
            prompts: a tensor ``[B, T]`` of ids, a list of lists of ids of any lengths, a string, or a list of strings.
            config: the options; :attr:`defaults` if not given.
            callback: called after each forward.
            trace: a file to record the generation in: ``.html``, a page that replays it, or ``.json``, the data of that page.
            options: fields of :class:`GenerationConfig` that replace those of ``config``.

        Returns:
            The sequences and how they came about. Row ``i``'s generation is the last ``gen_length`` entries of
            ``sequences[i]``; ``texts[i]`` is its text.

        Raises:
            ValueError: an option or a prompt is not valid; raised before any forward.
            TypeError: ``prompts`` is of another type, or an option is unknown.
            MemoryError: the cache does not fit; says what is needed, what there is and the largest batch that fits.
            FloatingPointError: a forward gave logits that are NaN or nowhere finite.
            OSError: ``trace`` cannot be written; where it lies is checked before any forward.

        An interrupt (Ctrl-C) and an exception of the callback pass through, with the output so far as their attribute
        ``output``; the model stays usable.
        """
        config, rows = self.options(config, **options), self._rows(prompts)
        if trace is None:
            return run(self.stream(rows, config), callback)
        recorder = Trace(trace, self, rows, config)

        def both(forward: Forward) -> None:
            recorder(forward)
            if callback is not None:
                callback(forward)

        try:
            return run(self.stream(rows, config), both)
        finally:
            recorder.write()

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

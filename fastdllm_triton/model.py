"""The model a user holds: a network, its tokenizer, and ``generate``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .decoding.config import GenerationConfig
from .decoding.fixed_tokens import PLACEHOLDER, Constraints, constrained_answers, masked_length
from .engine.buffer_pool import BufferPool
from .engine.dream.generate import DreamModel, diffusion_generate
from .engine.generation import Forward, Generation
from .engine.modes import decoding_modes, threads_of
from .engine.outputs import GenerationOutput
from .engine.prefix_store import PrefixStore
from .engine.trace import Trace
from .models.checkpoint import failures_as, read_json
from .models.config import CheckpointError, ModelConfig
from .models.fields import Fields
from .models.saving import save_checkpoint
from .models.token_ids import id_row, id_rows, id_tensor
from .models.tokenizer import apply_template, read_tokenizer, tokenize
from .models.transformer import Transformer
from .utils.checks import is_bool, require, short_repr, to_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .engine.dream.config import DiffusionOutput

#: Token ids: a tensor or array ``[B, T]``, or a row each as a list, tensor or array; or text.
Prompts = Tensor | np.ndarray[Any, Any] | Sequence[Sequence[int] | Tensor | np.ndarray[Any, Any] | str] | str


class MaskedDiffusionLM:
    """A masked-diffusion language model.

    It is copied and pickled by value, weights included: a copy, and a model in a spawned process, generate the same tokens.

    Attributes:
        network: the transformer.
        buffers: on a GPU, the buffers and captured forwards of generations that have ended, for the next ones.
        hub_id: the repository that it was fetched from, if it was.
    """

    def __init__(self, network: Transformer, folder: Path | None, hub_id: str | None = None) -> None:
        self.network = network
        self.buffers = BufferPool.of(network.device)
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
    def threads(self) -> int | None:
        """Threads that its forwards use on a CPU, as things are set now, see :func:`load`; None on a GPU."""
        return threads_of(self.network)

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

        Warns:
            UserWarning: it calls another token its mask than ``config.json``, by which the model was trained and generates.

        Raises:
            CheckpointError: its files are damaged.
        """
        tokenizer = None if self._folder is None else read_tokenizer(self._folder)
        if tokenizer is not None and tokenizer.mask_token_id not in (None, self.config.mask_id):
            warnings.warn(
                f"the tokenizer in {self._folder} calls token {tokenizer.mask_token_id} its mask; "
                f"config.json says {self.config.mask_id}, which is what generation begins with",
                stacklevel=3,
            )
        return tokenizer

    @cached_property
    def defaults(self) -> GenerationConfig:
        """Options where the caller gives none: :meth:`GenerationConfig.of_model`'s, with the lengths of the checkpoint's
        ``generation_config.json``.

        Raises:
            CheckpointError: the file is damaged, or its lengths are none.
        """
        file = "generation_config.json"
        fields = Fields(self._json(file), file)
        lengths: dict[str, Any] = {name: fields.integer(name) for name in ("gen_length", "block_length") if name in fields}
        with failures_as(CheckpointError, str(self._folder and self._folder / file)):
            return GenerationConfig.of_model(self.config, **lengths)

    def options(self, config: GenerationConfig | None = None, **options: Any) -> GenerationConfig:
        """``config``, or :attr:`defaults`, with some fields replaced.

        Raises:
            ValueError: an option is not valid.
            TypeError: an option is unknown, or ``config`` no config.
        """
        if config is not None and not isinstance(config, GenerationConfig):
            advice = "fastdllm_triton.compat has the functions that take steps and lengths by position"
            raise TypeError(f"config must be a GenerationConfig, got {type(config).__name__}; {advice}")
        return replace(config or self.defaults, **options)

    def encode(self, text: str | Sequence[Mapping[str, str]], *, chat: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: the prompt, or the messages of a conversation, oldest first, a ``role`` and a ``content`` each. Messages go
                through the checkpoint's chat template, and the model's turn is next.
            chat: wrap a string as a user's only message.

        Raises:
            TypeError: ``text`` is neither.
            ValueError: the checkpoint has no tokenizer, or no chat template where one is asked for; one of them fails, or takes
                too long, over this text; or there is no message.
        """
        _check_text(text)
        require("chat", chat, "True or False", is_bool(chat))
        tokenizer, folder = self.tokenizer, self._folder
        if tokenizer is None or folder is None:
            raise ValueError(f"prompts: {folder or 'the module'} has no tokenizer files; give token ids")
        vocab_size = self.config.vocab_size
        if isinstance(text, str) and not chat:
            return tokenize(tokenizer, folder, text, vocab_size)
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(message) for message in text]
        rendered = apply_template(tokenizer, folder, messages)
        return tokenize(tokenizer, folder, rendered, vocab_size, add_special_tokens=False)

    def encode_masks(self, text: str, mask_id: int | None = None) -> list[int]:
        """Token ids of a text in which each ``[MASK]`` stands for one token to fill in.

        Args:
            text: for :meth:`infill`.
            mask_id: what stands there; the model's if not given.

        Raises:
            ValueError: the checkpoint has no tokenizer, or it has no text for the mask.
        """
        mask_id = self.config.mask_id if mask_id is None else mask_id
        mask = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(mask_id)
        ids = self.encode(text if mask is None else text.replace(PLACEHOLDER, mask))
        if ids.count(mask_id) < text.count(PLACEHOLDER):
            raise ValueError(f"prompts: the tokenizer has no text for the mask id {mask_id}; give token ids")
        return ids

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
        from .models.registry import ARCHITECTURES

        if self._folder is None:
            raise ValueError("this model has no checkpoint folder to take its config from; use the module's own save_pretrained")
        tensors = dict(self.network.weights.named(self.config, ARCHITECTURES[self.config.architecture].NAMES))
        save_checkpoint(tensors, self._folder, self.hub_id, to_path("folder", folder), max_shard_size)

    def release(self) -> None:
        """Gives back the memory of the buffers and captured forwards that earlier generations left for later ones, at once.

        The next generation allocates anew. Generations that are under way keep theirs.
        """
        self.buffers.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def logits(self, ids: Tensor | np.ndarray[Any, Any] | Sequence[Sequence[int]]) -> Tensor:
        """Logits of a plain forward over whole sequences, nothing cached.

        Args:
            ids: ``[B, T]`` integers in the vocabulary, on any device; lists must be of one length.

        Returns:
            ``[B, T, V]`` in the model's dtype. A Dream's are not shifted: those at position ``i`` predict ``i + 1``.

        Raises:
            TypeError, ValueError: ``ids`` is nothing of the kind, is empty, holds an id outside the vocabulary, or is longer than
                the model takes.
        """
        return self._logits("ids", ids)

    def _logits(self, name: str, ids: Any) -> Tensor:
        """:meth:`logits` of what its caller calls ``name``."""
        with decoding_modes(self.network):
            return self.network.logits(id_tensor(name, ids, self.config).to(self.device))

    def generate(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        constraints: Constraints | None = None,
        callback: Callable[[Forward], None] | None = None,
        trace: str | Path | None = None,
        reuse: PrefixStore | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generates a continuation of each prompt.

        Args:
            prompts: a tensor or array ``[B, T]`` of ids; a list of rows of any lengths, each a list, a tensor ``[T]`` or an array
                ``[T]`` of ids, or a string; or one string.
            config: the options; :attr:`defaults` if not given.
            constraints: tokens of the answer that are fixed: a dict of positions, from 0 within the generation, for every row,
                or a list of dicts, one a row. What a position holds is a text, taken as it stands and perhaps several tokens
                long, a token id, or a list of them. Fixed tokens are in place and attended from the start, by block-causal
                models from their block on; an end token among them ends its row as one that is decoded does.
            callback: called after each forward.
            trace: a file to record the generation in: ``.html``, a page that replays it, or ``.json``, the data of that page.
            reuse: of a block-causal model, where finished blocks of generations before this one are taken over from, as far as a
                prompt begins with the same tokens, and where those of this one are kept. The tokens are the same without.
            options: fields of :class:`GenerationConfig` that replace those of ``config``.

        Returns:
            The sequences and how they came about. Row ``i``'s generation is the last ``gen_length`` entries of
            ``sequences[i]``; ``texts[i]`` is its text.

        Raises:
            ValueError: an option or a prompt is not valid; raised before any forward.
            TypeError: ``prompts`` or ``constraints`` is of another type, or an option is unknown.
            MemoryError: the cache does not fit; says what is needed, what there is and the largest batch that fits.
            FloatingPointError: a forward gave logits that are NaN or nowhere finite.
            OSError: ``trace`` cannot be written. That is tried before any forward; if the writing fails after the last one all
                the same, the output is the error's attribute ``output``.

        An interrupt (Ctrl-C) and an exception of the callback pass through, with the output so far as their attribute
        ``output``, and a note if the trace could not be written; the model stays usable.
        """
        config, rows = self.options(config, **options), self._rows(prompts)
        answers = self._answers(rows, config, constraints)
        if trace is not None:
            return self._recorded(trace, rows, config, answers, callback, reuse=reuse)
        return Generation(self, rows, config, self.tokenizer, answers=answers, reuse=reuse).run(callback)

    def infill(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        callback: Callable[[Forward], None] | None = None,
        trace: str | Path | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Fills in the masks of texts; what stands before, between and after them is seen from the start and stays.

        Masks are decoded in blocks of ``block_length``, counted from the end of a text; ``gen_length`` follows from where the
        first mask is. Blocks without masks take no forward. No text ends before its end: ``stop_at_eos`` is off.

        Args:
            prompts: as of :meth:`generate`, with masks in them: in a string each ``[MASK]`` is one token to fill in, among ids
                it is the model's mask id.
            config, callback, trace, options: as of :meth:`generate`.

        Returns:
            The sequences, left padded, and how they came about; ``ids(i)`` and ``texts[i]`` are those of the whole row ``i``.

        Raises:
            ValueError: as :meth:`generate`; a prompt without a mask; ``gen_length`` or ``stop_at_eos`` among the options; the
                model is block-causal (Fast-dLLM v2, SDAR) and would not see what stands behind a mask.
            TypeError, MemoryError, FloatingPointError, OSError: as :meth:`generate`.
        """
        for name in ("gen_length", "stop_at_eos"):
            if name in options:
                raise ValueError(f"{name}: infill decodes the masks of the prompts, all of them; leave it out")
        if self.config.block_causal:
            kind = f"a model whose positions attend those behind them, and {self.config.architecture} is block-causal"
            raise ValueError(f"prompts: infill needs {kind}: it would not see the text behind a mask's block")
        base = self.options(config)
        length, mask_id = (options.get(name, getattr(base, name)) for name in ("block_length", "mask_id"))
        mask_id = self.config.mask_id if mask_id is None else mask_id

        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Tensor) and isinstance(prompts, Sequence):
            prompts = [self.encode_masks(prompt, mask_id) if isinstance(prompt, str) else prompt for prompt in prompts]
        rows = self._rows(prompts)
        decoded = masked_length(rows, length, mask_id)
        config = self.options(base, **options, gen_length=decoded, stop_at_eos=False)
        before, answers = [ids[:-decoded] for ids in rows], [ids[-decoded:] for ids in rows]
        if trace is not None:
            return self._recorded(trace, before, config, answers, callback, whole=True)
        return Generation(self, before, config, self.tokenizer, answers=answers, whole=True).run(callback)

    def _recorded(
        self,
        trace: str | Path,
        rows: list[list[int]],
        config: GenerationConfig,
        answers: list[list[int]] | None,
        callback: Callable[[Forward], None] | None,
        *,
        whole: bool = False,
        reuse: PrefixStore | None = None,
    ) -> GenerationOutput:
        """Runs a generation to its end, and records it in a file."""
        recorder = Trace(trace, self, rows, config, answers)
        generation = Generation(self, rows, config, self.tokenizer, answers=answers, whole=whole, reuse=reuse)
        return recorder.run(generation, callback)

    def diffusion_generate(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor | DiffusionOutput:
        """Dream's decoding, of a Dream: :func:`fastdllm_triton.compat.diffusion_generate` without its ``model``.

        Raises:
            TypeError: this is no Dream.
        """
        return diffusion_generate(self.dream, inputs, *args, **kwargs)

    def dream(self) -> DreamModel:
        """What :func:`fastdllm_triton.compat.diffusion_generate` decodes with."""
        return DreamModel(self, self._json("config.json"), "none")

    def _json(self, name: str) -> dict[str, Any]:
        """The fields of a file of the checkpoint, while that is there."""
        path = None if self._folder is None else self._folder / name
        return read_json(path) if path is not None and path.exists() else {}

    def stream(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        constraints: Constraints | None = None,
        reuse: PrefixStore | None = None,
        **options: Any,
    ) -> Generation:
        """Generates forward by forward.

        Args:
            prompts, config, constraints, reuse, options: as of :meth:`generate`.

        Returns:
            An iterator: each item tells of one forward, what it committed (:attr:`~fastdllm_triton.engine.Forward.committed`)
            and the sequences so far. Its ``output()`` is the result, at any time. It may be left at any time.

        Raises:
            ValueError, TypeError, MemoryError: as :meth:`generate`, before any forward.
        """
        config, rows = self.options(config, **options), self._rows(prompts)
        answers = self._answers(rows, config, constraints)
        return Generation(self, rows, config, self.tokenizer, answers=answers, reuse=reuse)

    def _answers(
        self, rows: list[list[int]], config: GenerationConfig, constraints: Constraints | None
    ) -> list[list[int]] | None:
        """What the rows' answers are at the start; None where they are all masks."""
        if constraints is None:
            return None
        mask_id = self.config.mask_id if config.mask_id is None else config.mask_id
        return constrained_answers(
            constraints, len(rows), config.gen_length, mask_id, self.config.vocab_size, self._encode_within
        )

    def _encode_within(self, text: str) -> list[int]:
        """Token ids of a text inside another one: no special tokens are added."""
        tokenizer, folder = self.tokenizer, self._folder
        if tokenizer is None or folder is None:
            raise ValueError(f"constraints: {folder or 'the module'} has no tokenizer files; give token ids")
        return tokenize(tokenizer, folder, text, self.config.vocab_size, name="constraints", add_special_tokens=False)

    def _rows(self, prompts: Prompts) -> list[list[int]]:
        """Prompts of any accepted form as lists of ids."""
        if isinstance(prompts, str):
            return [self.encode(prompts)]
        if isinstance(prompts, Tensor | np.ndarray):
            return id_rows("prompts", prompts)
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
            allowed = "a tensor or array [B, T], a list with the token ids of each row, a string, or a list of strings"
            raise TypeError(f"prompts must be {allowed}, got {short_repr(prompts)} of type {type(prompts).__name__}")
        return [
            self.encode(prompt) if isinstance(prompt, str) else id_row(f"prompts: row {i}", prompt)
            for i, prompt in enumerate(prompts)
        ]


def _check_text(text: object) -> None:
    """Raises unless it is a string or the messages of a conversation."""
    if isinstance(text, str):
        return
    if not isinstance(text, Sequence) or isinstance(text, bytes | bytearray | memoryview):
        raise TypeError(f"text must be a string or a list of messages, got {short_repr(text)} of type {type(text).__name__}")
    if not text:
        raise ValueError("text must hold at least one message, got none")
    for i, message in enumerate(text):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"text: message {i} must be a dict with strings as its role and content, got {short_repr(message)}")

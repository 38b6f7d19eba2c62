"""Tokenizers of checkpoints, from their data files alone, with any transformers from 4.46 on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import failures_as, read_json, read_text, require_regular
from .config import CheckpointError, shown
from .templates import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What transformers reads of a folder besides weights.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")

#: The field of a file that holds tokens with their properties; None where all fields do.
_TOKENS = {"tokenizer.json": "added_tokens", "tokenizer_config.json": "added_tokens_decoder", "special_tokens_map.json": None}
_TOKEN_FIELDS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special", "id", "__type"}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint's folder.

    ``tokenizer.json`` is read as it is; ``vocab.json`` with ``merges.txt`` as Qwen2's byte-level BPE, which Dream's remote class
    is. A class that ``tokenizer_config.json`` names is never imported; its special tokens and chat template are used. A template
    in ``chat_template.jinja`` goes before the one in there.

    Args:
        folder: of the checkpoint.

    Returns:
        The tokenizer, or None if there are no such files.

    Raises:
        CheckpointError: a file is damaged, or no file; or the tokenizer fails over any text.
    """
    for name in _FILES:
        for path in folder.glob(name):
            if path.exists() and not path.is_dir():
                require_regular(path)
    from transformers import PreTrainedTokenizerFast

    cls: Any = PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").exists():
        if not all((folder / name).exists() for name in ("vocab.json", "merges.txt")):
            return None
        from transformers import Qwen2TokenizerFast

        cls = Qwen2TokenizerFast
    for name in (*_TOKENS, "added_tokens.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            if name in _TOKENS:
                _require_known_fields(name, raw)
    with _quiet(), failures_as(CheckpointError, f"the tokenizer files in {folder} cannot be read"):
        # Told not to trust, transformers does not ask on the terminal about code that config.json names.
        tokenizer: PreTrainedTokenizerBase = cls.from_pretrained(folder, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # Fields of wrong types are noticed when they are first used.
    if (template := folder / "chat_template.jinja").exists():  # Older versions do not look for it.
        tokenizer.chat_template = read_text(template)
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from logging class names and tokens of a checkpoint, which may hold what a terminal acts on."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _require_known_fields(file: str, raw: dict[str, Any]) -> None:
    """Refuses tokens with fields that tokens do not have: the tokenizers library prints their names to stdout as they are.

    Raises:
        CheckpointError: there is such a token.
    """
    listed = raw if (field := _TOKENS[file]) is None else raw.get(field)
    tokens = list(listed.values()) if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    for token in (*tokens, *(value for value in _objects(raw) if "__type" in value)):
        if isinstance(token, dict) and (unknown := sorted(token.keys() - _TOKEN_FIELDS)):
            raise CheckpointError(f"{file}: a token has the field {shown(unknown[0])}, which tokens do not have")


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects in a value of JSON, itself included."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def tokenize(
    tokenizer: PreTrainedTokenizerBase, folder: Path, text: str, vocab_size: int, *, name: str = "prompts", **options: Any
) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: of :func:`read_tokenizer`.
        folder: where it was read from, for errors.
        text: any.
        vocab_size: of the model; ids are below it.
        name: of the argument that holds the text, for errors.
        options: of the tokenizer.

    Raises:
        ValueError: the tokenizer fails over the text, or gives an id that the model does not have.
    """
    with failures_as(ValueError, f"{name}: the tokenizer in {folder} failed"):
        text.encode()  # Says what is wrong about halves of surrogate pairs, which the tokenizer takes for another type.
        ids = list(tokenizer(text, **options)["input_ids"])
    if ids and max(ids) >= vocab_size:
        raise ValueError(
            f"{name}: the tokenizer in {folder} gives token {max(ids)}, the model's vocabulary ends at {vocab_size - 1}"
        )
    return ids


def apply_template(
    tokenizer: PreTrainedTokenizerBase, folder: Path, messages: Sequence[Mapping[str, Any]], next_turn: bool = True
) -> str:
    """A conversation as the text that the checkpoint was trained on.

    Args:
        tokenizer: of :func:`read_tokenizer`.
        folder: where it was read from, for errors.
        messages: oldest first, a ``role`` and a ``content`` each.
        next_turn: whether the model's turn is next; otherwise it goes on with the last message.

    Raises:
        ValueError: there is no template, or it fails; what it says itself is in the message.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"chat: the tokenizer in {folder} has no chat template")
    with failures_as(ValueError, f"chat: the template of {folder} failed"):
        return render_chat(tokenizer.get_chat_template(), tokenizer.special_tokens_map, messages, next_turn)

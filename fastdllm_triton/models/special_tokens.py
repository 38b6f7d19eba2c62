"""Special tokens that a ``config.json`` leaves out: what other files of the checkpoint, or the published code, say they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import read_json
from .config import CheckpointError, shown
from .fields import Fields

#: Files of tokenizers that list tokens with their ids, the small ones first.
_LISTS = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Where a family has its special tokens, beside ``config.json``.

    Attributes:
        mask: the text of the mask in the tokenizer's files.
        mask_id: the mask in the published code, which needs no file to say it.
        vocab_sizes: of the published checkpoints; ``mask_id`` is believed of these alone.
        ends_by_generation_config: whether the end tokens are those of ``generation_config.json``, where it has some.
    """

    mask: str
    mask_id: int
    vocab_sizes: tuple[int, ...]
    ends_by_generation_config: bool = False

    def complete(self, raw: Mapping[str, Any], source: str, folder: Path | None) -> dict[str, Any]:
        """The fields of a config with ``mask_token_id`` and ``eos_token_id`` as the whole checkpoint has them.

        Args:
            raw: the fields that are there. A mask among them is the one that the model was trained with.
            source: how errors name where they come from.
            folder: of the checkpoint, if there is one.

        Raises:
            CheckpointError: nothing says what the mask is; or what a file says is no token of the vocabulary.
        """
        fields, found = Fields(raw, source), dict(raw)
        vocab_size = fields.integer("vocab_size")
        if "mask_token_id" not in fields:
            found["mask_token_id"] = self._mask(source, folder, vocab_size)
        if self.ends_by_generation_config and folder is not None:
            path = folder / "generation_config.json"
            defaults = Fields(read_json(path) if path.exists() else {}, path.name)
            if "eos_token_id" in defaults and (ends := defaults.tokens("eos_token_id", vocab_size)):
                found["eos_token_id"] = list(ends)
        return found

    def _mask(self, source: str, folder: Path | None, vocab_size: int) -> int:
        """The mask by the tokenizer's files, or else by the published code where that can be meant."""
        namesake = None
        for file, tokens in _listed(folder):
            if self.mask in tokens:
                return Fields(tokens, file).integer(self.mask, low=0, high=vocab_size - 1)
            namesake = namesake or next((text for text, token in tokens.items() if token == self.mask_id), None)
        if vocab_size in self.vocab_sizes and namesake is None:
            return self.mask_id
        where = "there is no folder with a tokenizer" if folder is None else f"none of {', '.join(_LISTS)} has {self.mask!r}"
        taken = "" if namesake is None else f", and {self.mask_id} is {shown(namesake)} there"
        raise CheckpointError(f"{source}: the field 'mask_token_id' is missing, and {where}{taken}; add the field or the token")


def _listed(folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tokens that each file of a tokenizer lists, by their texts. Entries of other forms are left to who reads the tokenizer.

    Raises:
        CheckpointError: a file is damaged.
    """
    for file in _LISTS:
        if folder is None or not (folder / file).exists():
            continue
        raw = read_json(folder / file)
        if file == "added_tokens.json":
            yield file, raw
            continue
        pairs: list[tuple[Any, Any]] = []  # an id and the token's properties
        if isinstance(decoder := raw.get("added_tokens_decoder"), dict):
            pairs += ((int(i), token) for i, token in decoder.items() if i.isdecimal() and len(i) < 12)
        if isinstance(added := raw.get("added_tokens"), list):
            pairs += ((token.get("id"), token) for token in added if isinstance(token, dict))
        texts = ((token.get("content"), i) for i, token in pairs if isinstance(token, dict))
        yield file, {text: i for text, i in texts if isinstance(text, str)}

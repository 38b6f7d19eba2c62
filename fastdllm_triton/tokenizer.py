"""Tokenizers of checkpoints, from their data files alone, with any transformers from 4.46 on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models.checkpoint import read_json
from .models.config import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        CheckpointError: a file is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    cls: Any = PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").exists():
        if not all((folder / name).exists() for name in ("vocab.json", "merges.txt")):
            return None
        from transformers import Qwen2TokenizerFast

        cls = Qwen2TokenizerFast
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json(folder / name)
    try:
        # Told not to trust, transformers does not ask on the terminal about code that config.json names.
        tokenizer: PreTrainedTokenizerBase = cls.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain Exceptions.
        raise CheckpointError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    if (template := folder / "chat_template.jinja").exists():  # Older versions do not look for it.
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer

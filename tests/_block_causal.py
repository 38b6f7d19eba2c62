"""The recorded checkpoints of block-causal models with a tokenizer, for what takes texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import GOLDEN
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

MASK, END, VOCAB = 318, 316, 320


def with_tokenizer(name: str, folder: Path, **files: dict[str, object]) -> Path:
    """A copy of a recorded checkpoint in which every letter is a token.

    Args:
        name: of the checkpoint.
        folder: where to; must not exist.
        files: other JSON files, by name without their ending.
    """
    shutil.copytree(GOLDEN / name, folder)
    letters = [chr(32 + i) for i in range(95)] + [chr(0x400 + i) for i in range(VOCAB - 95)]
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=" "))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": letters[END], "mask_token": letters[MASK]}
    for file, content in ({"tokenizer_config": config} | files).items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder

"""The mask and the end tokens of families whose configs leave them out: which file says them, and what holds without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from tokenizers.pre_tokenizers import ByteLevel

import fastdllm_triton as fdt
from fastdllm_triton.loading import read_config
from fastdllm_triton.models.registry import config_of

V2, SDAR = GOLDEN / "fast-dllm-v2", GOLDEN / "sdar"
PUBLISHED_V2, PUBLISHED_SDAR = {"vocab_size": 151_936}, {"vocab_size": 151_936, "mask_token_id": None}


def _raw(folder: Path, **fields: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text()) | fields
    return raw


def _mask(folder: Path, files: dict[str, Any], raw: dict[str, Any]) -> int:
    """The mask of a config with files beside it."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return config_of(raw, folder=folder).mask_id


def _listed(text: str, token: int) -> list[dict[str, Any]]:
    """A token in each of the files that may list it."""
    entry = {"content": text, "special": True}
    return [
        {"added_tokens.json": {"<x>": 7, text: token}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"7": entry | {"content": "<x>"}, str(token): entry}}},
        {"tokenizer.json": {"added_tokens": [entry | {"content": "<x>", "id": 7}, entry | {"id": token}]}},
    ]


@pytest.mark.parametrize("files", _listed("|<MASK>|", 309), ids=lambda files: next(iter(files)))
def test_every_file_that_lists_tokens_says_the_mask(files: dict[str, Any], tmp_path: Path) -> None:
    assert _mask(tmp_path, files, _raw(V2)) == 309


def test_each_family_has_its_own_text(tmp_path: Path) -> None:
    files = {"added_tokens.json": {"|<MASK>|": 309, "<MASK>": 310}}
    assert _mask(tmp_path, files, _raw(SDAR, mask_token_id=None)) == 310
    assert _mask(tmp_path, files, _raw(V2)) == 309


def test_the_config_goes_before_the_tokenizer(tmp_path: Path) -> None:
    files = {"added_tokens.json": {"|<MASK>|": 309, "<MASK>": 310}}
    assert _mask(tmp_path, files, _raw(SDAR)) == 318
    assert _mask(tmp_path, files, _raw(V2, mask_token_id=300)) == 300


@pytest.mark.parametrize(
    ("raw", "mask"),
    [
        (_raw(V2, **PUBLISHED_V2), 151_665),
        (_raw(V2, vocab_size=152_064), 151_665),
        (_raw(SDAR, **PUBLISHED_SDAR), 151_669),
    ],
    ids=["v2 1.5B", "v2 7B", "sdar"],
)
def test_a_published_vocabulary_has_the_mask_of_the_published_code(raw: dict[str, Any], mask: int, tmp_path: Path) -> None:
    assert config_of(raw).mask_id == mask
    # Qwen's own tokenizer ends before it, which is no contradiction.
    assert _mask(tmp_path, {"added_tokens.json": {"<|im_end|>": 151_645}}, raw) == mask


@pytest.mark.parametrize(
    ("files", "raw", "message"),
    [
        (
            {},
            _raw(V2),
            r"'mask_token_id' is missing, and none of added_tokens.json, tokenizer_config.json, tokenizer.json has '\|",
        ),
        ({"added_tokens.json": {}}, _raw(SDAR, mask_token_id=None), r"'mask_token_id' is missing, and none of .* has '<MASK>'"),
        ({}, _raw(V2, vocab_size=151_937), r"'mask_token_id' is missing"),
        (
            {"added_tokens.json": {"<tool>": 151_665}},
            _raw(V2, **PUBLISHED_V2),
            r"'mask_token_id' is missing, .* and 151665 is '<tool>' there; add the field or the token",
        ),
        ({"added_tokens.json": {"|<MASK>|": 320}}, _raw(V2), r"added_tokens.json: \|<MASK>\| must be an integer from 0 to 319"),
        ({"added_tokens.json": {"|<MASK>|": "318"}}, _raw(V2), r"added_tokens.json: \|<MASK>\| must be an integer of 0 or more"),
        ({"added_tokens.json": []}, _raw(V2), r"added_tokens.json must hold a JSON object"),
        ({"added_tokens.json": {"|<MASK>|": 316}}, _raw(V2), r"the mask token and an end-of-text token are the same, 316"),
        ({}, _raw(SDAR, mask_token_id=-1), r"config.json: mask_token_id must be an integer of 0 or more, got -1"),
        ({"tokenizer.json": {"added_tokens": [5, {}]}}, _raw(V2), r"'mask_token_id' is missing"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": 1, "9" * 5000: {}}}}, _raw(V2), r"'mask_token_id' is missing"),
    ],
)
def test_a_mask_that_nothing_says_is_refused(files: dict[str, Any], raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(fdt.CheckpointError, match=message):
        _mask(tmp_path, files, raw)


def test_a_config_without_a_folder_says_so() -> None:
    with pytest.raises(fdt.CheckpointError, match=r"^a module: the field 'mask_token_id' is missing, and there is no folder"):
        config_of(_raw(V2), "a module")


def test_sdar_ends_at_the_tokens_of_its_generation_config(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    for ends, expected in (([315, 316], (315, 316)), (314, (314,)), (None, (316,)), ([], (316,))):
        file.write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6}))
        assert config_of(_raw(SDAR), folder=tmp_path).eos_ids == expected
    file.write_text('{"eos_token_id": [315, 320]}')
    with pytest.raises(fdt.CheckpointError, match=r"generation_config.json: eos_token_id must be token ids in the vocabulary"):
        config_of(_raw(SDAR), folder=tmp_path)


def test_fast_dllm_v2_ends_at_the_token_of_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [316, 314]}')
    (tmp_path / "added_tokens.json").write_text('{"|<MASK>|": 318}')
    assert config_of(_raw(V2), folder=tmp_path).eos_ids == (316,)


def test_a_config_file_is_read_with_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("config.json", "added_tokens.json"):
        shutil.copy(V2 / name, tmp_path)
    assert read_config(tmp_path)[0] == read_config(tmp_path / "config.json")[0]
    assert read_config(tmp_path)[0].mask_id == 318


def test_the_mask_has_a_text_to_fill_in(tmp_path: Path) -> None:
    """A tokenizer as the hub has it: the vocabulary, its merges, and the added tokens in a file of their own."""
    shutil.copytree(V2, tmp_path, dirs_exist_ok=True)
    texts = [*sorted(ByteLevel.alphabet()), *(f"word {i}" for i in range(318 - 256))]  # Added tokens follow without a gap.
    vocabulary = {text: i for i, text in enumerate(texts)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048}')
    lm = fdt.load(tmp_path, device="cpu")
    assert lm.config.mask_id == 318
    assert lm.encode("12|<MASK>|3") == [*(vocabulary[character] for character in "12"), 318, vocabulary["3"]]
    assert lm.encode_masks("12[MASK][MASK]") == [*(vocabulary[character] for character in "12"), 318, 318]

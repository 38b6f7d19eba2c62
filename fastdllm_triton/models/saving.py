"""``save_pretrained``: a loaded model back into the format that the original classes load."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..utils.files import check_folder, naming
from .checkpoint import read_json

#: Files of a source folder that are written anew, or not at all.
_REPLACED = ("*.safetensors", "*.index.json", "*.bin", "config.json")

#: What else of a source folder belongs to a checkpoint: tokenizer and defaults; and code, if the config names any.
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model")


def save_checkpoint(
    tensors: Mapping[str, Tensor], source: Path, hub_id: str | None, target: Path, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a checkpoint: all of it, or nothing.

    Args:
        tensors: by the names of the checkpoint, of one dtype.
        source: the folder that the model was read from. Its ``config.json`` is kept but for the dtype; tokenizer files
            and ``generation_config.json`` are copied, and Python files if it names classes in its ``auto_map``.
        hub_id: the repository that ``source`` is a copy of, if it is one. Classes that the configs name and whose code is not
            in ``source`` are named as that repository's.
        target: a folder that does not exist yet, or is empty.
        max_shard_size: bytes, or a string such as ``"5GB"``. A tensor above it gets a file of its own.

    Raises:
        ValueError: ``target`` is not empty or no folder; or ``max_shard_size`` is not a size.
        CheckpointError: ``source`` lost its ``config.json``.
        OSError: ``target`` cannot be written. What can be known of that is known before any work.
    """
    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder must be new or an empty folder, got {str(target)!r}, where there is something")
    check_folder("folder", target)
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size must be 1 byte or more, got {max_shard_size}")
    config = read_json(source / "config.json")
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size must be bytes or a string such as '5GB', got {max_shard_size!r}") from error

    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with naming("folder", target):
            partial.mkdir(parents=True)
            for file, names in split.filename_to_tensors.items():
                try:
                    save_file({name: tensors[name].detach().cpu() for name in names}, partial / file, {"format": "pt"})
                except SafetensorError as error:
                    raise OSError(str(error)) from None
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                _write_json(partial / "model.safetensors.index.json", index)
            dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            config |= {field: dtype for field in ("torch_dtype", "dtype") if config.get(field)}
            _write_json(partial / "config.json", _with_code(config, source, hub_id))
            patterns = (*_COPIED, "*.py") if "auto_map" in config else _COPIED
            for path in {path for pattern in patterns for path in source.glob(pattern)}:
                if path.is_file() and not any(path.match(pattern) for pattern in _REPLACED):
                    shutil.copyfile(path, partial / path.name)
            tokenizer = partial / "tokenizer_config.json"
            if hub_id is not None and tokenizer.exists():
                _write_json(tokenizer, _with_code(read_json(tokenizer), source, hub_id))
            if target.exists():
                target.rmdir()
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _with_code(config: dict[str, Any], source: Path, hub_id: str | None) -> dict[str, Any]:
    """A config whose ``auto_map`` names classes that transformers can find from another folder."""

    def find(reference: Any) -> Any:
        if isinstance(reference, list):
            return [find(item) for item in reference]
        here = reference is None or "--" in reference or (source / f"{reference.split('.')[0]}.py").exists()
        return reference if here else f"{hub_id}--{reference}"

    if hub_id is None or not isinstance(config.get("auto_map"), dict):
        return config
    return config | {"auto_map": {auto: find(reference) for auto, reference in config["auto_map"].items()}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

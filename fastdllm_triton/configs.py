"""The shape of a model from its ``config.json`` alone: no weights are looked for, so they need not be there."""

from __future__ import annotations

import os
from pathlib import Path

from . import tiny
from .checks import told
from .loading import architecture_of, is_hub_id, not_fetched
from .models.checkpoint import read_json
from .models.config import CheckpointError, ModelConfig
from .models.fields import Fields


def read_config(model: str | Path) -> tuple[ModelConfig, str | None]:
    """Reads the ``config.json`` of a model.

    Args:
        model: ``"tiny"``, a checkpoint folder, a ``config.json``, or a hub id, of which this one file is fetched.

    Returns:
        The shape, and the name of the dtype that the file says its weights have, if it says so.

    Raises:
        CheckpointError: (a ``ValueError``) there is no such file, or it is not one of a supported model.
    """
    raw = read_json(_find(model))
    fields = Fields(raw)
    field = "dtype" if "dtype" in fields else "torch_dtype"  # What transformers 5 writes, and what those before did.
    dtype = fields.text(field).removeprefix("torch.") if field in fields else None
    return architecture_of(raw).config(raw), dtype


def _find(model: str | Path) -> Path:
    name = str(model)
    path = tiny.PATH if name == "tiny" else Path(name).expanduser()
    if os.path.isdir(path):
        return path / "config.json"
    if os.path.isfile(path):
        return path
    allowed = "a checkpoint folder, a config.json, a hub id such as GSAI-ML/LLaDA-8B-Instruct, or 'tiny'"
    if not is_hub_id(model):
        raise CheckpointError(f"model: there is no folder or file {told(name)}; give {allowed}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # The hub client raises errors of many kinds: network, rights, names.
        raise not_fetched("model", name, error) from error

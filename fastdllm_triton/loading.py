"""``load``: from a folder, a hub id, or the name of the built-in model to a model that generates."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .engine.memory import Memory, available_bytes
from .model import MaskedDiffusionLM
from .models.checkpoint import Checkpoint, read_json
from .models.config import CheckpointError, ModelConfig, shown
from .models.fields import Fields
from .models.registry import architecture_of, config_of
from .models.transformer import Transformer, Weights, expected_shapes
from .ops import Ops, resolve
from .utils.checks import is_bool, is_int, require, short_repr, to_path

#: The model that comes with the package, see :mod:`fastdllm_triton.tiny`.
BUILT_IN = Path(__file__).with_name("tiny")

#: Bytes of a checkpoint from which on a CPU computes with its files.
LEAST_MAPPED = 1 << 30

#: What of a hub repository is fetched: data, never code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    *,
    threads: int | None = None,
    deterministic: bool | None = None,
) -> MaskedDiffusionLM:
    """Loads a masked-diffusion language model.

    Parameters are read through memory mapping straight into the fused layout. On a CPU with ``backend="auto"`` or ``"cpu"``,
    those of a checkpoint of 1 GiB or more whose own dtype is asked for stay in its files instead, mapped: nothing is copied,
    what is written to a parameter is not written to its file, and the files must not be written to or truncated while the
    model lives (:meth:`~fastdllm_triton.models.checkpoint.Checkpoint.map`). Nothing that comes with the checkpoint is executed.

    Args:
        path_or_hub_id: a folder with ``config.json`` and safetensors, a hub id such as ``GSAI-ML/LLaDA-8B-Instruct``, or
            ``"tiny"``, the model that ships with the package.
        device: where to put it; the GPU if there is one.
        dtype: of parameters, activations and caches; the checkpoint's own if not given.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``, see :func:`fastdllm_triton.ops.resolve`.
        batch_invariant: fixed tiles and fixed chunks: the bits of a row's result depend neither on the rows it is batched with
            nor on their lengths. Slower, and with the Triton kernels only.
        threads: of the CPU that its forwards use, and nothing else of the program; as
            :func:`~fastdllm_triton.utils.threads.default_threads` says if not given.
        deterministic: the name that ``batch_invariant`` had; warns.

    Raises:
        CheckpointError: (a ``ValueError``) the checkpoint is incomplete, damaged or of an unknown architecture.
        ValueError: ``device``, ``dtype``, ``backend`` or ``threads`` is not one that can be used here.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
        MemoryError: the weights do not fit; raised before any is read.
    """
    if deterministic is not None:
        require("deterministic", deterministic, "True or False", is_bool(deterministic))
        warnings.warn("deterministic is batch_invariant now", DeprecationWarning, stacklevel=2)
        batch_invariant = deterministic
    require("batch_invariant", batch_invariant, "True or False", is_bool(batch_invariant))
    require("threads", threads, "an integer of 1 or more", threads is None or (is_int(threads) and threads >= 1))
    target = find_device(device)
    wanted = None if dtype is None else supported_dtype(dtype, target)
    resolve(backend, target)  # a backend that cannot run is refused before anything is read
    folder = find(path_or_hub_id)
    raw = read_json(folder / "config.json")
    architecture = architecture_of(raw)
    config = config_of(raw, folder=folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(config, architecture.NAMES), ignored=(architecture.NAMES.head,))
    if wanted is None:
        wanted = supported_dtype(checkpoint.dtype, target)

    ops = ops_for(backend, target, wanted)
    if batch_invariant:
        ops = ops.with_options(batch_invariant=True)
    needed, available = Memory.of(config, 0, 0, wanted.itemsize).weights, available_bytes(target)
    if available is not None and needed > available:
        raise MemoryError(f"path_or_hub_id: the weights take {needed:,} bytes as {wanted}, {target} has {available:,} left")
    if maps(target, ops.name, checkpoint, wanted):
        names = [name for name, _ in expected_shapes(config, architecture.NAMES)]
        weights = Weights.of_parts(config, architecture.NAMES, *checkpoint.map(names, wanted))
    else:
        weights = Weights.allocate(config, target, wanted)
        checkpoint.copy_into(dict(weights.named(config, architecture.NAMES)))
    local = folder == BUILT_IN or Path(path_or_hub_id).expanduser() == folder
    network = Transformer(config, weights, ops, None if threads is None else int(threads))
    return MaskedDiffusionLM(network, folder, hub_id=None if local else str(path_or_hub_id))


def maps(device: torch.device, ops: str, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether weights stay in the checkpoint's files, mapped into memory, instead of being copied out of them.

    Only where they are multiplied on the CPU in the dtype that they are stored in; and only where there are many: smaller ones
    are copied in well under a second, and their steps are up to a third shorter with what shares an input in one matrix.
    """
    return device.type == "cpu" and ops == "cpu" and dtype == checkpoint.dtype and checkpoint.bytes >= LEAST_MAPPED


def find(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the hub if it is not a local one.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be fetched.
        TypeError: it is no string and no path.
    """
    to_path("path_or_hub_id", path_or_hub_id)
    name = str(path_or_hub_id)
    if name == "tiny":
        return BUILT_IN
    if os.path.isdir(path := Path(name).expanduser()):  # Unlike Path's, it says no to what can be no path at all.
        return path
    allowed = "a folder with config.json and safetensors, a hub id such as GSAI-ML/LLaDA-8B-Instruct, or 'tiny'"
    if not is_hub_id(path_or_hub_id):
        raise CheckpointError(f"path_or_hub_id: there is no folder {short_repr(name)}; give {allowed}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # The hub client raises errors of many kinds: network, rights, names.
        raise not_fetched("path_or_hub_id", name, error) from error


def not_fetched(argument: str, name: str, error: Exception) -> CheckpointError:
    """The error for what is neither on this machine nor on the hub. The client's own words, which are many, are its cause."""
    return CheckpointError(
        f"{argument}: there is no folder {shown(name)}, and the hub did not give the repository of that name "
        f"({type(error).__name__})"
    )


def is_hub_id(name: str | Path) -> bool:
    """Whether what is no local path can be the id of a hub repository, ``owner/name``."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None


def read_config(model: str | Path) -> tuple[ModelConfig, str | None]:
    """Reads the ``config.json`` of a model.

    Args:
        model: ``"tiny"``, a checkpoint folder, a ``config.json``, or a hub id, of which this one file is fetched. Special tokens
            that it lacks are looked for in the files beside it.

    Returns:
        The shape, and the name of the dtype that the file says its weights have, if it says so.

    Raises:
        CheckpointError: (a ``ValueError``) there is no such file, or it is not one of a supported model.
    """
    raw = read_json(path := _find_config(model))
    fields = Fields(raw)
    field = "dtype" if "dtype" in fields else "torch_dtype"  # What transformers 5 writes, and what those before did.
    dtype = fields.text(field).removeprefix("torch.") if field in fields else None
    return config_of(raw, folder=path.parent), dtype


def _find_config(model: str | Path) -> Path:
    name = str(model)
    path = BUILT_IN if name == "tiny" else Path(name).expanduser()
    if os.path.isdir(path):
        return path / "config.json"
    if os.path.isfile(path):
        return path
    allowed = "a checkpoint folder, a config.json, a hub id such as GSAI-ML/LLaDA-8B-Instruct, or 'tiny'"
    if not is_hub_id(model):
        raise CheckpointError(f"model: there is no folder or file {short_repr(name)}; give {allowed}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # The hub client raises errors of many kinds: network, rights, names.
        raise not_fetched("model", name, error) from error


def ops_for(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The ops of a model: :func:`fastdllm_triton.ops.resolve`, minding what the kernels cannot compute with.

    Raises:
        ValueError: ``backend`` is unknown, or ``"triton"`` with a dtype that the kernels do not have.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    ops = resolve(backend, device)
    if dtype != torch.float64 or ops.name != "triton":
        return ops
    if backend == "triton":
        raise ValueError("dtype: the Triton kernels have no float64; give float32, bfloat16 or float16, or another backend")
    return replace(resolve("reference", device), reason="the Triton kernels have no float64")


def find_device(device: str | torch.device | None) -> torch.device:
    """A device that is there; the GPU if there is one and none is asked for.

    Raises:
        ValueError: it is no CPU and no GPU of this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a device of torch, such as 'cpu' or 'cuda:0', got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} is not supported; give 'cpu' or 'cuda'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r} is not there; this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return target


def supported_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """A dtype that models can have on a device.

    Raises:
        ValueError: they cannot have this one.
    """
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    allowed = [torch.float32, torch.bfloat16, torch.float64]
    if device.type == "cuda":
        allowed.append(torch.float16)
        if not torch.cuda.is_bf16_supported():
            allowed.remove(torch.bfloat16)
    if chosen not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"dtype: {dtype} is not supported on {device.type}; give one of {names}")
    return chosen

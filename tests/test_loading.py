"""Checkpoints: every layout that is read, every fault that is named, and the memory that reading takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.kernels import _check
from fastdllm_triton.ops import _resolved, resolve

SOURCE = GOLDEN / "llada-gqa"
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SOURCE / name, tmp_path / name)
    return tmp_path


def _edit_config(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.update(fields)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _shard(folder: Path, count: int = 3) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return fdt.load(SOURCE).logits(IDS)


def test_shards_with_an_index(folder: Path, expected: Tensor) -> None:
    _shard(folder)
    assert torch.equal(fdt.load(folder).logits(IDS), expected)


def test_a_path_as_a_string(folder: Path, expected: Tensor) -> None:
    assert torch.equal(fdt.load(str(folder)).logits(IDS), expected)


def test_rows_beyond_the_vocabulary_are_never_predicted(folder: Path, expected: Tensor) -> None:
    def pad(tensors: dict[str, Tensor]) -> None:
        for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
            tensors[name] = torch.cat((tensors[name], torch.full((64, 64), 9.0)))

    _edit_config(folder, embedding_size=384)
    _edit_tensors(folder, pad)
    lm = fdt.load(folder)
    assert torch.equal(lm.logits(IDS), expected)
    assert int(lm.generate([[1, 2]], gen_length=8, block_length=8).sequences.max()) < 320


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_the_embedding(folder: Path, stored: bool) -> None:
    head = "model.transformer.ff_out.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[head] = tensors["model.transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    untied = fdt.load(folder).logits(IDS)
    if not stored:
        _edit_tensors(folder, lambda t: t.pop(head))
    _edit_config(folder, weight_tying=True)
    lm = fdt.load(folder)
    assert torch.equal(lm.logits(IDS), untied)
    assert lm.network.weights.head is lm.network.weights.embedding


def test_the_dtype_is_the_checkpoints_unless_one_is_given(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert fdt.load(folder).dtype == torch.bfloat16
    assert fdt.load(folder, dtype="float32").dtype == torch.float32
    assert fdt.load(folder, dtype=torch.float64).logits(IDS).dtype == torch.float64


def test_fused_projections_stack_the_checkpoints_rows() -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    layer = fdt.load(SOURCE).network.weights.layers[1]
    block = "model.transformer.blocks.1"
    assert torch.equal(layer.qkv.weight, torch.cat([tensors[f"{block}.{p}_proj.weight"] for p in "qkv"]))
    assert torch.equal(layer.gate_up.weight, torch.cat([tensors[f"{block}.{p}_proj.weight"] for p in ("ff", "up")]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not known; supported: llada, dream"),
        ({"model_type": "absent"}, r"model_type None is not known"),
        ({"d_model": "absent"}, r"the field 'd_model' is missing"),
        ({"mask_token_id": "absent"}, r"the field 'mask_token_id' is missing"),
        ({"n_heads": 5}, r"n_heads = 5 does not divide d_model = 64"),
        ({"n_kv_heads": 3}, r"3 KV heads do not divide 4 query heads"),
        ({"n_layers": 0}, r"layers must be a positive integer, got 0"),
        ({"mask_token_id": 400}, r"token id 400 is outside the vocabulary \[0, 320\)"),
        ({"embedding_size": 300}, r"embedding_size 300 is below vocab_size 320"),
        ({"activation_type": "gelu"}, r"activation_type = 'gelu' is not supported, only 'silu'"),
        ({"alibi": True}, r"alibi = True is not supported, only False; use the code that the model was released with"),
        ({"attention_layer_norm": True}, r"attention_layer_norm = True is not supported"),
        ({"rope_full_precision": False}, r"rope_full_precision = False is not supported, only True"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, r"rope_scaling of type 'dynamic' is not supported.*; set it to null"),
        ({"n_layers": 4}, r"the tensor model.transformer.blocks.3.attn_norm.weight is missing"),
        ({"n_layers": 2}, r"tensors that the model has no place for, such as model.transformer.blocks.2"),
        ({"mlp_hidden_size": 128}, r"ff_proj.weight has shape \(160, 64\), config.json asks for \(128, 64\)"),
    ],
)
def test_configs_that_do_not_fit(folder: Path, fields: dict[str, Any], message: str) -> None:
    _edit_config(folder, **fields)
    with pytest.raises(fdt.CheckpointError, match=message):
        fdt.load(folder)


def test_a_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(fdt.CheckpointError, match=r"config.json is missing"):
        fdt.load(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, found list")])
def test_a_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(fdt.CheckpointError, match=message):
        fdt.load(folder)


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(fdt.CheckpointError, match=r"found pytorch_model.bin\); only safetensors are read"):
        fdt.load(folder)


def test_a_missing_shard(folder: Path) -> None:
    file = sorted(set(_shard(folder).values()))[1]
    (folder / file).unlink()
    with pytest.raises(fdt.CheckpointError, match=rf"shard .*{file} is missing"):
        fdt.load(folder)


def test_an_index_that_names_the_wrong_file(folder: Path) -> None:
    files = _shard(folder)
    name = sorted(files)[0]
    files[name] = next(file for file in files.values() if file != files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ghost": files[name], **files}}))
    with pytest.raises(fdt.CheckpointError, match=r"names ghost in .*, which does not hold it"):
        fdt.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 4000, -100])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(fdt.CheckpointError, match=r"model.safetensors is truncated or not a safetensors file"):
        fdt.load(folder)


def test_a_truncated_shard(folder: Path) -> None:
    file = folder / sorted(set(_shard(folder).values()))[2]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(fdt.CheckpointError, match=rf"{file.name} is truncated"):
        fdt.load(folder)


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    name = "model.transformer.blocks.0.attn_out.weight"
    _edit_tensors(folder, lambda t: t.update({name: torch.zeros(64, 63)}))
    with pytest.raises(fdt.CheckpointError, match=r"attn_out.weight has shape \(64, 63\), config.json asks for \(64, 64\)"):
        fdt.load(folder)


def test_a_dtype_that_is_not_read(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in t.items()}))
    with pytest.raises(fdt.CheckpointError, match=r"stores its tensors in a dtype that is not read"):
        fdt.load(folder)


def test_code_beside_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "modeling_llada.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    _edit_config(folder, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    fdt.load(folder).generate([[1, 2]], gen_length=8, block_length=8)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int8}, r"dtype: torch.int8 is not supported on cpu; give one of float32, bfloat16, float64"),
        ({"dtype": "float16"}, r"dtype: float16 is not supported on cpu"),
        ({"dtype": "half-precision"}, r"dtype: half-precision is not supported on cpu"),
        ({"device": "tpu"}, r"device: 'tpu' is not"),
        ({"device": "meta"}, r"device: 'meta' is not supported; give 'cpu' or 'cuda'"),
        ({"device": "cuda:99"}, r"device: 'cuda:99' is not there; this machine has \d+ GPUs"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, reference, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdt.load(SOURCE, **{"device": "cpu", **arguments})


@pytest.mark.parametrize("path", ["no/such/folder/here", "./nothing", "/nothing/here", "nothing", Path("a/b")])
def test_a_folder_that_is_not_there(path: str | Path) -> None:
    with pytest.raises(fdt.CheckpointError, match=r"there is no folder '.*'; give a folder with config.json and safetensors"):
        fdt.load(path)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        fdt.CheckpointError, match=r"'some/model' is no local folder and could not be fetched from the hub: no network"
    ):
        fdt.load("some/model")


def test_a_hub_id_fetches_data_only(monkeypatch: pytest.MonkeyPatch, expected: Tensor) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or str(SOURCE))
    assert torch.equal(fdt.load("some/model").logits(IDS), expected)
    assert asked["name"] == "some/model"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])


def test_the_backend_is_chosen_once_and_says_why() -> None:
    ops = resolve("auto", torch.device("cpu"))
    assert (ops.name, fdt.load(SOURCE, device="cpu").network.ops) == ("reference", ops)
    assert "cpu" in ops.reason
    assert resolve("reference", torch.device("cpu")).reason == "asked for"


def test_asking_for_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "INTERPRETED", False)  # On a CPU, kernels run in Triton's interpreter alone.
    _resolved.cache_clear()
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: the device is cpu"):
        fdt.load(SOURCE, device="cpu", backend="triton")


_MEASURE = """
import re, sys
import torch, fastdllm_triton

def peak():  # Not getrusage: its figure is inherited from the parent process.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

fastdllm_triton.load("tiny", device="cpu")
before = peak()
fastdllm_triton.load(sys.argv[1], device="cpu")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
@pytest.mark.parametrize(("width", "layers", "shards"), [(512, 12, 1), (1536, 26, 9)], ids=["one-file", "shards-of-2GB"])
def test_reading_takes_little_more_memory_than_the_checkpoint(tmp_path: Path, width: int, layers: int, shards: int) -> None:
    mlp, vocabulary = 4 * width, 16 * width
    raw = json.loads((SOURCE / "config.json").read_text())
    raw |= {"d_model": width, "mlp_hidden_size": mlp, "n_layers": layers, "vocab_size": vocabulary, "embedding_size": vocabulary}
    raw |= {"n_heads": 8, "n_kv_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "ln_f": (width,), "ff_out": (vocabulary, width)}
    for i in range(layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.{name}": (width,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"{block}.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{block}.{name}": (mlp, width) for name in ("ff_proj", "up_proj")} | {f"{block}.ff_out": (width, mlp)}
    files: dict[str, str] = {}
    for shard, names in enumerate(_slices(list(shapes), shards)):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"model.transformer.{name}.weight": torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        save_file(tensors, tmp_path / file)
        files |= dict.fromkeys(tensors, file)
    if shards > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 2e9 or shards == 1
    grown = int(subprocess.run([sys.executable, "-c", _MEASURE, tmp_path], check=True, capture_output=True, text=True).stdout)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of its last runs
    assert 0.9 * size < grown < 1.2 * size


def _slices(items: list[str], count: int) -> list[list[str]]:
    """The items in that many parts of about one length."""
    length = -(-len(items) // count)
    return [items[i : i + length] for i in range(0, len(items), length)]

"""Checkpoints: every layout that is read, every fault that is named, and the memory that reading takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
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
from fastdllm_triton.ops import resolve
from fastdllm_triton.ops.backends import _resolved

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
        ({"model_type": "absent"}, r"the field 'model_type' is missing"),
        ({"model_type": ["llada"]}, r"config.json: model_type must be a string, got \['llada'\]"),
        ({"d_model": "absent"}, r"the field 'd_model' is missing"),
        ({"mask_token_id": "absent"}, r"the field 'mask_token_id' is missing"),
        ({"n_heads": 5}, r"n_heads = 5 does not divide d_model = 64"),
        ({"n_kv_heads": 3}, r"3 KV heads do not divide 4 query heads"),
        ({"n_layers": 0}, r"config.json: n_layers must be an integer of 1 or more, got 0"),
        ({"n_heads": "x"}, r"config.json: n_heads must be an integer of 1 or more, got 'x'"),
        ({"n_heads": None}, r"config.json: n_heads must be an integer of 1 or more, got None"),
        ({"mlp_hidden_size": True}, r"config.json: mlp_hidden_size must be an integer of 1 or more, got True"),
        ({"d_model": 10**30}, r"config.json: d_model must be an integer from 1 to 2147483647, got 10{30}"),
        ({"rms_norm_eps": True}, r"config.json: rms_norm_eps must be a number above 0 and at most 1, got True"),
        ({"rms_norm_eps": 1e9}, r"config.json: rms_norm_eps must be a number above 0 and at most 1, got 1000000000.0"),
        ({"rope_theta": 0}, r"config.json: rope_theta must be a number above 0 and at most 1e\+12, got 0"),
        ({"rope_theta": []}, r"config.json: rope_theta must be a number above 0 and at most 1e\+12, got \[\]"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"config.json: rope_parameters: rope_theta must be a number"),
        ({"weight_tying": "false"}, r"config.json: weight_tying must be true or false, got 'false'"),
        ({"rope": 1}, r"config.json: rope = 1 is not supported, only True"),
        ({"mask_token_id": 400}, r"config.json: mask_token_id must be an integer from 0 to 319, got 400"),
        ({"mask_token_id": 316}, r"the mask token and an end-of-text token are the same, 316"),
        (
            {"eos_token_id": [316, 320]},
            r"eos_token_id must be token ids in the vocabulary \[0, 320\), got \[316, 320\]",
        ),
        ({"eos_token_id": 1.0}, r"config.json: eos_token_id must be token ids in the vocabulary \[0, 320\), got 1.0"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, found list"),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
        (b'{"n_heads": NaN}', "is not valid JSON: NaN is no number of JSON"),
        (b'{"n_heads": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"n_heads": 4, "n_heads": 8}', "is not valid JSON: the field 'n_heads' is there twice"),
        (b"\xff\xfe{}", "is not text in UTF-8"),
        (b" " * (17 << 20), "has more than 16 MiB"),
    ],
    ids=["cut", "list", "deep", "nan", "digits", "twice", "encoding", "size"],
)
def test_a_broken_config(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(fdt.CheckpointError, match=message):
        fdt.load(folder)


def test_a_field_that_is_there_twice_with_one_value(folder: Path, expected: Tensor) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"n_heads": 4,', 1))
    assert torch.equal(fdt.load(folder).logits(IDS), expected)


@pytest.mark.parametrize("layers", [10**7, 10**9])
def test_a_billion_layers_cost_nothing(folder: Path, layers: int) -> None:
    _edit_config(folder, n_layers=layers)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(fdt.CheckpointError, match=r"the tensor model.transformer.blocks.3.attn_norm.weight is missing"):
        fdt.load(folder)
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_weights_that_do_not_fit_are_not_allocated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdllm_triton.loading.available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"the weights take [\d,]+ bytes as torch.float32, cpu has 1,000 left"):
        fdt.load(folder)


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(fdt.CheckpointError, match=r"found pytorch_model.bin\); only safetensors are read"):
        fdt.load(folder)


def test_a_missing_shard(folder: Path) -> None:
    file = sorted(set(_shard(folder).values()))[1]
    (folder / file).unlink()
    with pytest.raises(fdt.CheckpointError, match=rf"{file} is missing"):
        fdt.load(folder)


def _edit_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_the_wrong_file(folder: Path) -> None:
    files = _shard(folder)
    name, last = sorted(files)[0], max(files.values())
    _edit_index(folder, files | {name: last})
    with pytest.raises(fdt.CheckpointError, match=rf"{files[name]} holds {name}, which .*index.json places in {last}"):
        fdt.load(folder)


def test_a_tensor_that_no_shard_holds(folder: Path) -> None:
    files = _shard(folder)
    _edit_index(folder, files | {"ghost": max(files.values())})
    with pytest.raises(fdt.CheckpointError, match=rf"index.json places ghost in {max(files.values())}, which does not hold it"):
        fdt.load(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    files = _shard(folder)
    name, last = sorted(files)[0], max(files.values())
    tensors = load_file(folder / last)
    save_file(tensors | {name: torch.zeros_like(load_file(folder / files[name])[name])}, folder / last)
    with pytest.raises(fdt.CheckpointError, match=rf"{last} holds {name}, which .*index.json places in {files[name]}"):
        fdt.load(folder)


def test_a_tensor_that_the_index_does_not_list(folder: Path) -> None:
    files = _shard(folder)
    name = sorted(files)[0]
    _edit_index(folder, {other: file for other, file in files.items() if other != name})
    with pytest.raises(fdt.CheckpointError, match=rf"holds {name}, which .*index.json does not list"):
        fdt.load(folder)


@pytest.mark.parametrize(
    "outside", ["../{}", "/{}", "sub/{}", "..\\{}", "C:{}", "{}\n", "{}/", "", ".", "..", None, 5, ["{}"], {}]
)
def test_a_shard_is_a_file_of_the_folder(folder: Path, outside: Any) -> None:
    """Any other file, even if it is there and holds the tensors, is no part of the checkpoint."""
    files = _shard(folder)
    name = sorted(files)[0]
    place = outside.format(files[name]) if isinstance(outside, str) else outside
    (folder / "sub").mkdir()
    shutil.copy(folder / files[name], folder / "sub" / files[name])
    _edit_index(folder, files | {name: place})
    with pytest.raises(fdt.CheckpointError, match=r"which is not the name of a .safetensors file in the same folder"):
        fdt.load(folder)


@pytest.mark.parametrize("weight_map", [[], {}, "x", None, 5, ["model.safetensors"]])
def test_a_weight_map_is_an_object(folder: Path, weight_map: Any) -> None:
    _shard(folder)
    _edit_index(folder, weight_map)
    with pytest.raises(fdt.CheckpointError, match=r"weight_map must be an object of tensors and their files, got"):
        fdt.load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
def test_a_pipe_is_not_waited_for(folder: Path, file: str) -> None:
    _shard(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(fdt.CheckpointError, match=rf"{file} is not a regular file"):
        fdt.load(folder)


def test_files_that_are_links_as_in_the_cache_of_the_hub(folder: Path, expected: Tensor) -> None:
    _shard(folder)
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    for i, path in enumerate(path for path in sorted(folder.iterdir()) if path.is_file()):
        path.rename(folder / "blobs" / str(i))
        (folder / "snapshot" / path.name).symlink_to(f"../blobs/{i}")
    assert torch.equal(fdt.load(folder / "snapshot").logits(IDS), expected)


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_dtype_that_is_not_read(folder: Path, which: str, dtype: torch.dtype) -> None:
    names = sorted(load_file(folder / "model.safetensors"))
    name = names[0 if which == "first" else -1]
    _edit_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(fdt.CheckpointError, match=rf"{name} is stored in the dtype \w+, which is not read; float64, float32"):
        fdt.load(folder)


def test_names_from_a_file_do_not_break_the_line_of_an_error(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({"evil\n\x1b]0;pwn" + 1000 * "x": torch.zeros(1)}))
    with pytest.raises(fdt.CheckpointError) as caught:
        fdt.load(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


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
        ({"device": "tpu"}, r"device must be a device of torch, such as 'cpu' or 'cuda:0', got 'tpu'"),
        ({"device": "meta"}, r"device: 'meta' is not supported; give 'cpu' or 'cuda'"),
        ({"device": "cuda:99"}, r"device: 'cuda:99' is not there; this machine has \d+ GPUs"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, cpu, reference, got 'cuda'"),
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
        raise OSError("no network\nand advice of many lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    told = r"^path_or_hub_id: there is no folder 'some/model', and the hub did not give the repository of that name \(OSError\)$"
    with pytest.raises(fdt.CheckpointError, match=told) as caught:
        fdt.load("some/model")
    assert str(caught.value.__cause__) == "no network\nand advice of many lines"


def test_a_hub_id_fetches_data_only(monkeypatch: pytest.MonkeyPatch, expected: Tensor) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or str(SOURCE))
    assert torch.equal(fdt.load("some/model").logits(IDS), expected)
    assert asked["name"] == "some/model"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])


def test_the_backend_is_chosen_once_and_says_why() -> None:
    ops = resolve("auto", torch.device("cpu"))
    assert (ops.name, fdt.load(SOURCE, device="cpu").network.ops) == ("cpu", ops)
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

next(fastdllm_triton.load("tiny", device="cpu").stream([[5] * 8], gen_length=8, block_length=8))
before = peak()
model = fastdllm_triton.load(sys.argv[1], device="cpu")
loaded = peak() - before
if len(sys.argv) > 2:
    next(model.stream([[5] * 8], gen_length=8, block_length=8))
print(loaded, peak() - before)
"""


def _write_large(folder: Path, width: int, layers: int, shards: int) -> int:
    """A checkpoint in bfloat16, whose bytes are returned."""
    mlp, vocabulary = 4 * width, 16 * width
    raw = json.loads((SOURCE / "config.json").read_text())
    raw |= {"d_model": width, "mlp_hidden_size": mlp, "n_layers": layers, "vocab_size": vocabulary, "embedding_size": vocabulary}
    raw |= {"n_heads": 8, "n_kv_heads": 8}
    (folder / "config.json").write_text(json.dumps(raw))
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
        save_file(tensors, folder / file)
        files |= dict.fromkeys(tensors, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _peaks(folder: Path, *more: str) -> tuple[int, int]:
    """By how many bytes a process grows at most while it loads a checkpoint, and until its first forward is done if asked for."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, folder, *more], check=True, capture_output=True, text=True)
    for file in folder.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of its last runs
    loaded, forward = map(int, done.stdout.split())
    return loaded, forward


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_copying_takes_little_more_memory_than_the_checkpoint(tmp_path: Path) -> None:
    size = _write_large(tmp_path, 512, 12, 1)
    loaded, _ = _peaks(tmp_path)
    assert 0.9 * size < loaded < 1.2 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_a_large_checkpoint_is_not_copied_and_a_forward_takes_little_more_memory_than_it(tmp_path: Path) -> None:
    size = _write_large(tmp_path, 1536, 26, 9)
    assert size > 2e9
    loaded, forward = _peaks(tmp_path, "forward")
    assert loaded < 0.05 * size
    assert 0.9 * size < forward < 1.1 * size


def _slices(items: list[str], count: int) -> list[list[str]]:
    """The items in that many parts of about one length."""
    length = -(-len(items) // count)
    return [items[i : i + length] for i in range(0, len(items), length)]

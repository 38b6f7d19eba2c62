"""``save_pretrained``: what was loaded comes back out, under the names and in the format that the original classes load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_BLOCK_CAUSAL, GOLDEN_DREAM, GOLDEN_MODELS
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import fastdllm_triton as fdt
from fastdllm_triton import tiny
from fastdllm_triton.models import saving

ALL = (*GOLDEN_MODELS, GOLDEN_DREAM, *GOLDEN_BLOCK_CAUSAL)
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318]])
SMALL = 100_000  # bytes; the checkpoints have some 700,000


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("size", ["5GB", "100KB", SMALL])
def test_a_round_trip_keeps_tensors_names_and_config(model: str, size: int | str, tmp_path: Path) -> None:
    lm = fdt.load(GOLDEN / model, device="cpu")
    lm.save_pretrained(tmp_path / "copy", max_shard_size=size)
    source, saved = load_file(GOLDEN / model / "model.safetensors"), _tensors(tmp_path / "copy")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name]) for name in source)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == json.loads((GOLDEN / model / "config.json").read_text())
    again = fdt.load(tmp_path / "copy", device="cpu")
    assert again.config == lm.config
    assert torch.equal(again.logits(IDS), lm.logits(IDS))


def test_shards_have_an_index_and_the_size_that_is_asked_for(tmp_path: Path) -> None:
    fdt.load(GOLDEN / "llada-mha", device="cpu").save_pretrained(tmp_path, max_shard_size=SMALL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    source = load_file(GOLDEN / "llada-mha" / "model.safetensors")
    assert index["weight_map"].keys() == source.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.values())
    shards = set(index["weight_map"].values())
    assert len(shards) > 5
    assert set(_files(tmp_path)) == shards | {"config.json", "model.safetensors.index.json"}
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            names = list(file.keys())
            assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
            assert sum(source[name].nbytes for name in names) <= SMALL
            assert all(index["weight_map"][name] == shard for name in names)


def test_a_checkpoint_of_one_file_has_no_index(tmp_path: Path) -> None:
    fdt.load(GOLDEN / "llada-mha", device="cpu").save_pretrained(str(tmp_path / "a" / "b"))
    assert _files(tmp_path / "a" / "b") == ["config.json", "model.safetensors"]


def test_tokenizer_and_defaults_come_along(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(_files(tmp_path)) == expected  # and none of the package's own modules, which lie in the same folder
    prompt = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
    assert fdt.load(tmp_path, device="cpu").generate(prompt).texts == tiny.generate(prompt).texts


def test_another_dtype_is_written_down(tmp_path: Path) -> None:
    fdt.load(GOLDEN / "llada-gqa", device="cpu", dtype="bfloat16").save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in _tensors(tmp_path).values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("torch_dtype") == "bfloat16"
    source = json.loads((GOLDEN / "llada-gqa" / "config.json").read_text())
    assert config == {name: value for name, value in source.items() if name != "torch_dtype"}


def test_changed_weights_are_written(llada: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    llada.network.weights.layers[0].qkv.weight.mul_(2)
    llada.save_pretrained(tmp_path)
    source, saved = load_file(GOLDEN / "llada-gqa" / "model.safetensors"), _tensors(tmp_path)
    changed = {name for name in source if not torch.equal(source[name], saved[name])}
    assert changed == {f"model.transformer.blocks.0.{p}_proj.weight" for p in "qkv"}


def test_a_tied_head_is_not_written_twice(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / GOLDEN_DREAM / "model.safetensors")
    del tensors["lm_head.weight"]
    (tmp_path / "tied").mkdir()
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    raw = json.loads((GOLDEN / GOLDEN_DREAM / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(raw))
    fdt.load(tmp_path / "tied", device="cpu").save_pretrained(tmp_path / "copy")
    assert _tensors(tmp_path / "copy").keys() == tensors.keys()


AUTO_MAP = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "other/repo--modeling_llada.LLaDAModelLM"}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_llada.LLaDATokenizer", None]}}


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A checkpoint whose configs name classes of its repository."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(GOLDEN / "llada-gqa" / "model.safetensors", folder)
    raw = json.loads((GOLDEN / "llada-gqa" / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    return folder


def _auto_maps(folder: Path) -> tuple[Any, Any]:
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    return config["auto_map"], tokenizer["auto_map"]["AutoTokenizer"]


def test_the_original_code_beside_a_checkpoint_is_copied(with_code: Path, tmp_path: Path) -> None:
    (with_code / "configuration_llada.py").write_text("raise SystemExit")
    fdt.load(with_code, device="cpu").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "configuration_llada.py").read_text() == "raise SystemExit"
    assert _auto_maps(tmp_path / "copy") == (AUTO_MAP, TOKENIZER["auto_map"]["AutoTokenizer"])


def test_code_that_stayed_on_the_hub_is_named_with_its_repository(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(with_code))
    fdt.load("some/model", device="cpu").save_pretrained(tmp_path / "copy")
    config, tokenizer = _auto_maps(tmp_path / "copy")
    assert config == AUTO_MAP | {"AutoConfig": "some/model--configuration_llada.LLaDAConfig"}
    assert tokenizer == ["some/model--tokenization_llada.LLaDATokenizer", None]


@pytest.mark.parametrize(
    ("failing", "fault"), [("save_file", OSError), ("save_file", SafetensorError), ("shutil.copyfile", OSError)]
)
def test_an_error_leaves_nothing_half_written(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, fault: type[Exception]
) -> None:
    name, calls = failing.split(".")[-1], iter(range(100))
    owner = saving.shutil if "." in failing else saving
    write = getattr(owner, name)

    def fail_the_second_time(*args: Any) -> Any:
        if next(calls) == 1:
            raise fault("no space left on device")
        return write(*args)

    monkeypatch.setattr(owner, name, fail_the_second_time)
    target = tmp_path / "a" / "copy"
    with pytest.raises(OSError, match=f"^folder: {target} cannot be written: no space left"):
        tiny.save_pretrained(target, max_shard_size="1MB")
    assert _files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    llada: fdt.MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "save_file", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^folder: .* cannot be written: "):
        llada.save_pretrained(tmp_path / "file" / "copy")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), {}, r"folder must be new or an empty folder"),
        (lambda folder: (folder.rmdir(), folder.write_text("a file")), {}, r"folder must be new or an empty folder"),
        (lambda folder: None, {"max_shard_size": "big"}, r"max_shard_size must be bytes or a string such as '5GB', got 'big'"),
        (lambda folder: None, {"max_shard_size": 0}, r"max_shard_size must be 1 byte or more, got 0"),
    ],
)
def test_bad_arguments(llada: fdt.MaskedDiffusionLM, tmp_path: Path, prepare: Any, options: Any, message: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    prepare(target)
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=message):
        llada.save_pretrained(target, **options)
    assert _files(tmp_path) == before


def test_a_model_without_a_folder_has_no_config_to_write(llada: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint folder to take its config from; use the module's own save_pretrained"):
        fdt.MaskedDiffusionLM(llada.network, None).save_pretrained(tmp_path / "copy")


def test_the_built_in_model_is_not_from_the_hub() -> None:
    assert fdt.load("tiny").hub_id is None
    assert fdt.load(str(tiny.PATH)).hub_id is None

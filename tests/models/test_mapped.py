"""Weights that stay in the files of a checkpoint, as those of a large one do on a CPU."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM
from safetensors.torch import load_file, save_file

import fastdllm_triton as fdt
from fastdllm_triton import loading
from fastdllm_triton.engine import memory
from fastdllm_triton.models.registry import ARCHITECTURES
from fastdllm_triton.models.transformer import Linear, Stacked

MODELS = ["llada-gqa", "llada-mha", GOLDEN_DREAM]
IDS = [[5, 6, 7, 8, 9]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be written to."""
    return Path(shutil.copytree(GOLDEN / "llada-gqa", tmp_path / "model"))


def _mapped(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> fdt.MaskedDiffusionLM:
    """A model as it is loaded where its checkpoint is large."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "LEAST_MAPPED", 0)
        return fdt.load(path, device="cpu", backend="cpu", **options)


def _copied(path: Path, **options: Any) -> fdt.MaskedDiffusionLM:
    model = fdt.load(path, device="cpu", backend="cpu", **options)
    assert model.network.weights.mapped == 0
    return model


def _named(model: fdt.MaskedDiffusionLM) -> dict[str, torch.Tensor]:
    return dict(model.network.weights.named(model.config, ARCHITECTURES[model.config.architecture].NAMES))


@pytest.mark.parametrize("name", MODELS)
def test_a_mapped_model_gives_what_a_copied_one_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, copied = _mapped(GOLDEN / name, monkeypatch), _copied(GOLDEN / name)
    layer = mapped.network.weights.layers[0]
    assert isinstance(layer.qkv, Stacked)
    assert isinstance(layer.gate_up, Stacked)
    assert type(layer.down) is Linear
    assert torch.equal(layer.qkv.weight, copied.network.weights.layers[0].qkv.weight)
    assert mapped.network.weights.mapped == sum(tensor.nbytes for tensor in _named(mapped).values())
    torch.testing.assert_close(mapped.logits(IDS), copied.logits(IDS))
    for cache in ("none", "prefix", "dual"):
        outs = [model.generate(IDS * 2, gen_length=16, block_length=8, cache=cache) for model in (mapped, copied)]
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        assert outs[0].nfe == outs[1].nfe


def test_only_what_is_large_and_multiplied_on_the_cpu_in_its_own_dtype_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GOLDEN / "llada-gqa"
    _copied(source)
    for options in ({"backend": "reference"}, {"dtype": "bfloat16"}):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "LEAST_MAPPED", 0)
            assert fdt.load(source, device="cpu", **options).network.weights.mapped == 0  # type: ignore[arg-type]


def test_writing_to_a_weight_does_not_write_to_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, untouched = _mapped(folder, monkeypatch), _mapped(folder, monkeypatch)
    expected = untouched.logits(IDS)
    for tensor in _named(model).values():
        tensor.mul_(2)
    assert not torch.equal(model.logits(IDS), expected)
    assert torch.equal(untouched.logits(IDS), expected)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_file_that_is_replaced_or_removed_stays_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = _mapped(folder, monkeypatch), _copied(folder).logits(IDS)
    other = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(model.logits(IDS), expected)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_has_memory_of_its_own_and_no_more_than_it_needs(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mapped(GOLDEN / "llada-gqa", monkeypatch)
    twin, expected = make(model), model.logits(IDS)
    assert (twin.network.weights.mapped, model.network.weights.mapped > 0) == (0, True)
    assert len(pickle.dumps(model)) < 1.5 * model.network.weights.mapped
    for tensor in _named(model).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
    assert torch.equal(twin.logits(IDS), expected)


def test_it_is_saved_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mapped(GOLDEN / "llada-gqa", monkeypatch)
    model.network.weights.final_norm.mul_(0.5)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(_copied(tmp_path / "saved").logits(IDS), model.logits(IDS))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in _named(model).items())


def test_a_tensor_at_an_odd_address_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    model = _mapped(folder, monkeypatch)
    assert model.network.weights.mapped == 0
    torch.testing.assert_close(model.logits(IDS), _copied(folder).logits(IDS))


def test_mapped_weights_are_not_counted_as_memory_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mapped(GOLDEN / "llada-gqa", monkeypatch)
    need = memory.Memory.of(model.config, 1, 13, 4)
    room = need.cache + need.workspace
    monkeypatch.setattr(memory, "available_bytes", lambda device: room + model.network.weights.mapped)
    model.generate(IDS, gen_length=8, block_length=8)
    monkeypatch.setattr(memory, "available_bytes", lambda device: room + model.network.weights.mapped - 1)
    with pytest.raises(MemoryError, match=f"{room - 1:,} are available"):
        model.generate(IDS, gen_length=8, block_length=8)

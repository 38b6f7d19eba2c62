"""``info``: what a generation needs in memory, from the config alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli import info as command
from fastdllm_triton.cli.app import app
from fastdllm_triton.engine import memory
from fastdllm_triton.engine.buckets import rows_bucket
from fastdllm_triton.loading import read_config

LLADA_8B = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12_288, "vocab_size": 126_464,
    "max_sequence_length": 4096, "mask_token_id": 126_336, "eos_token_id": 126_081, "weight_tying": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def _info(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["info", *arguments])


def _told(*arguments: str) -> dict[str, str]:
    """The last column of each row of the table."""
    result = _info(*arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    return {line[0].rstrip(","): line[-1] for line in lines}


def test_the_bytes_are_those_that_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**7)
    told = _told("--model", str(GOLDEN / "llada-gqa"), "--prompt-length", "30", "--gen-length", "10", "--batch-size", "3")
    cache = lm.network.new_cache(torch.zeros(3, dtype=torch.int32), 40)
    assert told["cache"] == f"{cache.k.nbytes + cache.v.nbytes:,}"
    one = memory.Memory.of(lm.config, 1, 40, 4)
    assert told["weights"] == f"{one.weights:,}"
    assert told["all"] == f"{one.weights + 3 * (one.cache + one.workspace):,}"
    assert told["available"] == "10,000,000"
    assert told["largest"] == f"{(10**7 - one.weights) // (one.cache + one.workspace):,}"


def test_a_head_dim_of_its_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDAR's queries are twice as wide as the model here."""
    told = _told("--model", str(GOLDEN / "sdar"), "--prompt-length", "30", "--gen-length", "10", "--batch-size", "3")
    stored = load_file(GOLDEN / "sdar" / "model.safetensors")
    assert told["weights"] == f"{sum(tensor.nbytes for tensor in stored.values()):,}"
    assert told["cache"] == f"{2 * 3 * 2 * 32 * 40 * 3 * 4:,}"


def test_the_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    for model in (tmp_path, tmp_path / "config.json"):
        told = _told("--model", str(model))
        # 32 layers of 218,103,808 and 8,192 of norms, embedding and head of 126,464 x 4096, a last norm; two bytes each.
        assert told["weights"] == f"{2 * (32 * (218_103_808 + 8192) + 2 * 126_464 * 4096 + 4096):,}" == "16,031,162,368"
        assert told["cache"] == f"{2 * 32 * 32 * 128 * 1256 * 2:,}"
    assert _told("--model", str(tmp_path), "--dtype", "float32")["weights"] == "32,062,324,736"


def test_sizes_that_are_not_given_are_those_that_the_model_has_room_for() -> None:
    assert "tiny: 1 x (256 + 256) slots, 32 bits an element" in _info("--model", "tiny").stdout


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 12 * 10**9)  # less than the weights
    assert _told("--model", str(tmp_path))["largest"] == "none"
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    told = _told("--model", str(tmp_path))
    assert told["available"] == "unknown"
    assert "largest" not in told


def test_rows_are_allocated_in_buckets_and_the_largest_batch_minds_it() -> None:
    config, _ = read_config("tiny")
    one = memory.Memory.of(config, 1, 64, 4)
    room = 5 * (one.cache + one.workspace)
    assert memory.largest_batch(config, 64, 4, room, int) == 5
    assert rows_bucket(5) == 6
    assert memory.largest_batch(config, 64, 4, room, rows_bucket) == 4
    assert memory.largest_batch(config, 64, 4, 0, rows_bucket) == 0


@pytest.mark.parametrize("model", ["tiny", *(str(GOLDEN / name) for name in ("llada-mha", "dream-gqa", "fast-dllm-v2", "sdar"))])
def test_the_shape_is_that_of_the_loaded_model(model: str, tmp_path: Path) -> None:
    assert read_config(model)[0] == fdt.load(model, device="cpu").config


def test_dream_writes_its_name_with_a_capital_and_transformers_5_another_dtype_field(tmp_path: Path) -> None:
    raw = json.loads((GOLDEN / "dream-gqa" / "config.json").read_text()) | {"model_type": "Dream", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == (read_config(GOLDEN / "dream-gqa")[0], "bfloat16")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (16_031_162_368, "16 GB")]
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert command.human(size) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "model: there is no folder or file './nowhere'"),
        (["--model", "tiny", "--prompt-length", "500"], "at most the model's 512 slots, got 500 + 256"),
        (["--batch-size", "4", "--dtype", "float32"], "--batch-size and --dtype need --model"),
        (["--model", "tiny", "--gen-length", "512"], "at most the model's 512 slots, got 1 + 512"),
        (["--model", "tiny", "--dtype", "int8", "--prompt-length", "8"], "dtype must be float32, bfloat16, float16 or float64"),
        (["--model", "tiny", "--dtype", "complex64", "--prompt-length", "8"], "dtype must be float32"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = _info(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_config_that_does_not_name_its_dtype_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLADA_8B.items() if k != "torch_dtype"}))
    result = _info("--model", str(tmp_path))
    assert result.exit_code == 2
    assert "give --dtype" in result.stderr
    shutil.copy(GOLDEN / "llada-gqa" / "model.safetensors", tmp_path / "config.json")
    assert "is not text in UTF-8" in " ".join(_info("--model", str(tmp_path)).stderr.split())


def test_the_switches_are_listed_with_what_they_are_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDLLM_GRAPHS", "0")
    told = CliRunner().invoke(app, ["info"]).stdout
    assert re.search(r"FASTDLLM_GRAPHS +0: 0 runs every forward without CUDA graphs; one of 1, 0", told)
    assert "FASTDLLM_BACKEND" in told and "FASTDLLM_PDL" in told
    monkeypatch.setenv("FASTDLLM_PDL", "off")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 2
    assert result.stderr == "error: FASTDLLM_PDL must be one of 1, 0, got 'off'\n"

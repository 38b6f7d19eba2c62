"""What a user gets who installs the package rather than the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # From a copy, since setuptools leaves a build folder beside its sources.
    ignored = ("--exclude=./.*", "--exclude=./build", "--exclude=*.egg-info")
    source.mkdir()
    archive = subprocess.run(["tar", "-C", ROOT, *ignored, "-cf", "-", "."], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-C", source, "-xf", "-"], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_kernels_reference_and_the_built_in_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "reference", "bench"):
        for file in (ROOT / folder).glob("*.py"):
            assert f"fastdllm_triton/{folder}/{file.name}" in names
    for file in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "MODEL_CARD.md",
    ):
        assert f"fastdllm_triton/tiny/{file}" in names
    for file in ("model.safetensors", "config.json", "cases.jsonl"):
        for model in ("llada-gqa", "fast-dllm-v2", "sdar"):
            assert f"fastdllm_triton/verify/golden/{model}/{file}" in names
    assert {f"fastdllm_triton/{file}" for file in ("py.typed", "engine/trace.html", "bench/page.html")} <= names
    assert not any(name.startswith("fastdllm_triton/bench/results/") for name in names)
    assert not any(name.split("/")[0] in ("kernels", "reference", "tests", "bench", "training") for name in names)


def test_the_installed_package_verifies_and_benches_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    program = (
        "import fastdllm_triton.cli.app as cli, fastdllm_triton.verify.models as models\n"
        f"assert cli.__file__.startswith({str(tmp_path)!r}) and len(models.golden_cases()) == 336\n"
        "assert [len(list(models._block_causal(models.Setup(models.torch.device('cpu'), True))))] == [2]\n"
        "cli.app(['bench', 'ops', '--op', 'rms_norm', '--quick', '--device', 'cpu', '--html', 'page.html'])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=tmp_path, env=environment)
    assert "<html" in (tmp_path / "page.html").read_text()


def test_the_installed_package_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fastdllm_triton as fdt\n"
        f"assert fdt.__file__.startswith({str(tmp_path)!r}), fdt.__file__\n"
        "print(fdt.load('tiny').generate('Tom has 51 coins. Tom finds 27. Tom sells 19. How many?').texts[0])\n"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "####" in printed

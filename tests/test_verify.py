"""``verify``: what it tries, that it fails where a kernel is wrong, and what it prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _support import DEVICE
from typer.testing import CliRunner

import fastdllm_triton.kernels.commit_tokens
import fastdllm_triton.kernels.rms_norm
import fastdllm_triton.kernels.swiglu
from fastdllm_triton import ops
from fastdllm_triton.cli import app
from fastdllm_triton.files import write_json
from fastdllm_triton.verify import models
from fastdllm_triton.verify.grids import GRIDS, Random
from fastdllm_triton.verify.ops import try_case, verify_op
from fastdllm_triton.verify.tolerance import Judgement, as_close_as_torch, bitwise, identical

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_every_op_has_a_grid() -> None:
    assert set(GRIDS) == set(ops.NAMES)


@pytest.mark.parametrize("op", GRIDS)
def test_grids_name_their_cases_and_are_quick_in_part(op: str) -> None:
    cases = GRIDS[op].cases
    assert len({case.why for case in cases}) == len(cases)
    assert {case.where for case in cases} == {"quick", "full", "gpu"}


@pytest.mark.parametrize("op", ["rms_norm", "window_attention", "swiglu", "token_statistics", "commit_tokens"])
def test_the_kernels_hold_on_the_quick_grid(op: str) -> None:
    records = list(verify_op(op, DEVICE, quick=True))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in GRIDS[op].dtypes]
    assert [record.dtype for record in records] == [dtype for dtype in dtypes if DEVICE.type == "cuda" or dtype != "bfloat16"]
    for record in records:
        assert record.ok, record
        assert record.tried == sum(case.where == "quick" for case in GRIDS[op].cases)


@pytest.mark.gpu
@pytest.mark.parametrize("op", GRIDS)
def test_the_kernels_hold_on_the_whole_grid(op: str) -> None:
    assert [record for record in verify_op(op, DEVICE) if not record.ok] == []


def slightly_wrong(kernel: Any) -> Any:
    """A percent too much in one element."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = kernel(*args, **kwargs)
        found.view(-1)[-1] *= 1.01
        return found

    return wrong


def test_a_wrong_kernel_fails_with_its_name_and_a_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = fastdllm_triton.kernels.swiglu
    monkeypatch.setattr(module, "swiglu", slightly_wrong(module.swiglu))
    found = run("--op", "swiglu", "--op", "rms_norm", "--quick", "--json", str(tmp_path / "v.json"))
    assert found.exit_code == 1
    assert "did not hold: swiglu float32, swiglu float16" in " ".join(found.stderr.split())
    assert "NO" in found.stdout
    written = json.loads((tmp_path / "v.json").read_text())
    assert not written["ok"]
    assert {record["check"] for record in written["records"] if not record["ok"]} == {"swiglu"}
    assert {record["check"] for record in written["records"] if record["ok"]} == {"rms_norm"}


def test_a_kernel_that_differs_from_run_to_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module, kernel, calls = fastdllm_triton.kernels.rms_norm, fastdllm_triton.kernels.rms_norm.rms_norm, []

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = kernel(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first[0, 0] = torch.nextafter(first[0, 0], first.new_tensor((len(calls) % 2 - 0.5) * 1e5))
        return found

    monkeypatch.setattr(module, "rms_norm", unsteady)
    record = next(verify_op("rms_norm", DEVICE, quick=True))
    assert {case.note for case in record.cases} == {"a second run gives other bits"}


def test_a_wrong_id_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastdllm_triton.kernels.commit_tokens
    kernel = module.commit_tokens

    def wrong(x: torch.Tensor, *args: Any) -> None:
        kernel(x, *args)
        x[0, 0] += 1

    monkeypatch.setattr(module, "commit_tokens", wrong)
    grid = GRIDS["commit_tokens"]
    worst, wrong_outputs, same = try_case(grid, grid.cases[0], DEVICE, torch.float32)
    assert (worst.error, worst.bound, wrong_outputs, same) == (1, 0, ["x"], True)


def test_a_kernel_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(fastdllm_triton.kernels.swiglu, "swiglu", broken)
    found = run("--op", "swiglu", "--quick")
    assert found.exit_code == 1
    assert "RuntimeError: no such instruction" in " ".join(found.stdout.replace("│", " ").split())


def test_a_case_too_large_for_the_memory_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fastdllm_triton.kernels.swiglu, "swiglu", huge)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = run("--op", "swiglu", "--quick")
    assert found.exit_code == 0
    text = " ".join(found.stdout.replace("│", " ").split())
    assert "too little GPU memory: 1.0 of 8.0 GiB free" in text
    assert "yes" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "op: got softmax, needs names among window_inputs, rms_norm"),
        (["--device", "tpu"], "device"),
        (["--json", "/nowhere/at/all.json"], "--json: /nowhere/at/all.json cannot be written"),
        pytest.param(
            ["--device", "cuda"], "torch sees no GPU here", marks=pytest.mark.skipif(DEVICE.type == "cuda", reason="there is one")
        ),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}


# --- whole models ---------------------------------------------------------------------------------------------------------


def test_recorded_trajectories_are_part_of_the_package_and_one_of_each_kind_is_short() -> None:
    assert len(models.golden_cases()) == 336
    chosen = models._chosen(models.Setup(torch.device("cpu"), quick=False))
    assert len({(case["cache"], case["strategy"]) for case in chosen}) == len(chosen) == 9
    assert {case["cache"] for case in models._chosen(models.Setup(torch.device("cpu"), quick=True))} == {"none", "prefix", "dual"}
    assert len(models._chosen(models.Setup(torch.device("cuda"), quick=False))) == 336


@pytest.fixture
def reference_setup(monkeypatch: pytest.MonkeyPatch) -> models.Setup:
    """Checks of models with PyTorch in the kernels' place, which is quick; the kernels have tests of their own."""
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args, **options: load(*args, **options | {"backend": "reference"}))
    return models.Setup(torch.device("cpu"), quick=False)


@pytest.mark.parametrize("check", models.MODEL_CHECKS, ids=lambda check: check.name)
def test_each_check_of_models_holds(check: models.ModelCheck, reference_setup: models.Setup) -> None:
    cases = list(check.run(reference_setup))
    assert cases and all(case.ok for case in cases), cases


def test_a_model_that_decodes_otherwise_fails_every_check(reference_setup: models.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = models.MaskedDiffusionLM.generate, []

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = generate(self, *args, **kwargs)
        calls.append(1)
        out.sequences[0, -1] = len(calls) % 100
        return out

    monkeypatch.setattr(models.MaskedDiffusionLM, "generate", wrong)
    monkeypatch.setattr(models.Setup, "interpreted", False)  # as on a GPU, where no case is skipped
    for check in models.MODEL_CHECKS:
        cases = list(check.run(reference_setup))
        assert any(not case.ok for case in cases) or all(case.skipped for case in cases), check.name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs no interpreter")
def test_without_a_gpu_the_command_interprets_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fastdllm_triton.cli", "verify", "--quick", "--op", "rms_norm", "--json", "v.json"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "nothing about speed" in " ".join(found.stdout.split())
    written = json.loads((tmp_path / "v.json").read_text())
    assert written["ok"] and written["machine"]["gpu"] is None and written["machine"]["torch"] == torch.__version__


# --- the rule -------------------------------------------------------------------------------------------------------------


def test_the_rule_allows_twice_torch_s_error_and_two_roundings() -> None:
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    half = exact.half() + 0.5
    found = as_close_as_torch(exact.half(), exact, half)
    assert found.error == 0
    assert found.bound == pytest.approx(2 * 0.5 + 2 * 100 * torch.finfo(torch.float16).eps)
    assert not as_close_as_torch((exact + 1.5).half(), exact, half).ok


def test_the_rule_asks_for_the_same_dtype_shape_and_infinities() -> None:
    exact = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    plain = exact.float()
    assert as_close_as_torch(plain, exact, plain).ok
    for wrong in (plain.half(), plain[:1], torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, torch.inf])):
        assert not as_close_as_torch(wrong, exact, plain).ok
    assert as_close_as_torch(plain[:0], exact[:0], plain[:0]) == Judgement(0.0, 0.0)


def test_ids_are_counted_and_bits_are_compared() -> None:
    assert identical(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4])) == Judgement(2.0, 0.0)
    assert not identical(torch.tensor([1]), torch.tensor([1], dtype=torch.int32)).ok
    nan = torch.tensor([torch.nan, 0.0])
    assert bitwise(nan, nan.clone()) and not bitwise(nan, torch.tensor([torch.nan, -0.0]))
    assert bitwise(torch.tensor(1.0), torch.tensor(1.0))


def test_inputs_are_the_same_every_time() -> None:
    first, second = (Random(DEVICE, torch.float16)(3, 4) for _ in range(2))
    assert torch.equal(first, second)

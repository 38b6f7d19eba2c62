"""``verify``: what it tries, that it fails where a kernel is wrong, and what it prints and writes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _support import DEVICE
from typer.testing import CliRunner

import fastdllm_triton.kernels.commit_tokens
import fastdllm_triton.kernels.rms_norm
import fastdllm_triton.kernels.swiglu
from fastdllm_triton import ops, verify
from fastdllm_triton.cli.app import app
from fastdllm_triton.utils.files import write_json
from fastdllm_triton.verify import models, parts
from fastdllm_triton.verify.cases import OPS, Random
from fastdllm_triton.verify.ledger import Ledger, proven
from fastdllm_triton.verify.ops import dtypes_of, try_case, verify_op, wanted
from fastdllm_triton.verify.parts import Part, parts_of, unproven
from fastdllm_triton.verify.records import CaseRecord, Record
from fastdllm_triton.verify.tolerance import Judgement, as_close_as_torch, bitwise, identical

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> Any:
    """In this process, so that a kernel can be put in another's place."""
    return CliRunner().invoke(app, ["verify", "--jobs", "1", *arguments])


def test_every_op_has_cases() -> None:
    assert set(OPS) == set(ops.NAMES)


@pytest.mark.parametrize("op", OPS)
def test_cases_have_names_and_are_quick_in_part(op: str) -> None:
    cases = OPS[op].cases
    assert len({case.why for case in cases}) == len(cases)
    assert {case.where for case in cases} >= {"quick", "full", "key"}


@pytest.mark.parametrize("op", ["swiglu", "commit_tokens"])
def test_a_record_is_of_a_dtype_and_all_its_cases(op: str) -> None:
    records = [verify_op(op, dtype, DEVICE, quick=True) for dtype in dtypes_of(op)]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in OPS[op].dtypes]
    assert [record.dtype for record in records] == [dtype for dtype in dtypes if DEVICE.type == "cuda" or dtype != "bfloat16"]
    for record in records:
        assert record.ok, record
        assert record.tried == len(wanted(OPS[op], DEVICE, quick=True))


@pytest.fixture(autouse=True)
def ops_of_this_test_alone() -> Iterator[None]:
    """A kernel that a test replaced is neither missed because its op was kept before, nor kept for the tests after it."""
    ops.backends._resolved.cache_clear()
    yield
    ops.backends._resolved.cache_clear()


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
    found = run("--op", "swiglu", "--op", "rms_norm", "--quick", "--out", str(tmp_path / "v.json"))
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
    record = verify_op("rms_norm", "float32", DEVICE, quick=True)
    assert {case.note for case in record.cases} == {"a second run gives other bits"}


def test_a_wrong_id_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastdllm_triton.kernels.commit_tokens
    kernel = module.commit_tokens

    def wrong(x: torch.Tensor, **others: Any) -> None:
        kernel(x, **others)
        x[0, 0] += 1

    monkeypatch.setattr(module, "commit_tokens", wrong)
    op = OPS["commit_tokens"]
    worst, wrong_outputs, same = try_case(op, op.cases[0], DEVICE, torch.float32)
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
        (["--op", "softmax"], "--op: got softmax, needs names among window_inputs, rms_norm"),
        (["--device", "tpu"], "--device must be a device of torch, such as 'cpu' or 'cuda:0', got 'tpu'"),
        (["--out", "/nowhere/at/all.json"], "--out: /nowhere/at/all.json cannot be written"),
        (["--resume"], "--resume: needs --out FILE"),
        (["--jobs", "0"], "--jobs"),
        pytest.param(
            ["--device", "cuda"],
            "this machine has 0 GPUs",
            marks=pytest.mark.skipif(DEVICE.type == "cuda", reason="there is one"),
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


# --- in steps, and in several processes -------------------------------------------------------------------------------------

MACHINE = {"device": "cpu", "commit": "0123", "torch": torch.__version__, "triton": "3.6.0"}


def test_every_record_is_on_disk_when_it_is_there_and_a_run_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "v.json", []
    add = Ledger.add

    def spy(ledger: Ledger, record: Record) -> None:
        add(ledger, record)
        seen.append([(found["check"], found["dtype"]) for found in json.loads(file.read_text())["records"]])
        if len(seen) == 1:
            raise KeyboardInterrupt  # as where the time is up

    monkeypatch.setattr(Ledger, "add", spy)
    arguments = ["--op", "swiglu", "--op", "rms_norm", "--quick", "--out", str(file)]
    assert run(*arguments).exit_code != 0
    assert seen == [[("rms_norm", "float32")]]
    again = run(*arguments, "--resume")
    assert again.exit_code == 0, again.stderr
    expected = [(op, dtype) for op in ("rms_norm", "swiglu") for dtype in ("float32", "float16")]
    assert seen[1:] == [expected[: count + 1] for count in range(1, len(expected))]
    assert "yes" in again.stdout and again.stdout.count("swiglu") == 2


def test_a_full_run_takes_nothing_over_from_a_quick_one_nor_from_another_machine(tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    earlier = Ledger(MACHINE, quick=True, path=file)
    earlier.add(Record("swiglu", "float32"))
    for quick, count in ((True, 1), (False, 0)):
        ledger = Ledger(MACHINE, quick, file)
        ledger.resume()
        assert len(ledger.records) == count
    with pytest.raises(ValueError, match=r"--resume: .*v\.json was made with commit = 0123, here it is 4567"):
        Ledger(MACHINE | {"commit": "4567"}, True, file).resume()
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no verification"):
        Ledger(MACHINE, True, file).resume()


def test_of_several_files_the_last_word_counts(tmp_path: Path) -> None:
    failed = CaseRecord("a case", 1.0, 0.5, ok=False)
    for name, cases in (("quick.json", []), ("all.json", [failed])):
        Ledger(MACHINE, quick=True, path=tmp_path / name).add(Record("swiglu", "float32", cases))
    (record,) = proven([tmp_path / "quick.json", tmp_path / "all.json"], MACHINE)
    assert not record.ok


def test_what_was_not_tried_is_not_proven() -> None:
    held = [Record(*part.key) for part in parts_of(["swiglu", "models"])]
    assert unproven(["swiglu", "models"], held) == []
    assert unproven(["swiglu", "rms_norm"], held) == ["rms_norm"]
    assert unproven(["swiglu", "models"], held[1:]) == ["swiglu"]
    failed = replace(held[-1], cases=[CaseRecord("a case", 1.0, 0.5, ok=False)])
    assert unproven(["swiglu", "models"], [*held[:-1], failed]) == ["models"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/test_verify.py runs in the interpreter")
def test_processes_give_the_records_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    part = Part("swiglu", "float16")
    (record,) = parts.in_processes([part], DEVICE, quick=True, jobs=2)
    again = part.run(DEVICE, quick=True)
    assert (record.check, record.dtype, record.cases) == (again.check, again.dtype, again.cases)


@pytest.mark.parametrize(
    ("program", "note"),
    [
        (
            "import os, sys; print('a kernel wrote where it must not', file=sys.stderr); os.abort()",
            "ended with status -6: a kernel wrote",
        ),
        ("import time; time.sleep(60)", "no end after 1 s"),
    ],
)
def test_a_part_that_dies_or_never_ends_takes_no_other_with_it(
    program: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.dumps(Record("rms_norm", "float32").as_json())
    python = tmp_path / "python"  # in the interpreter's place
    python.write_text(
        f"#!/bin/sh\ncase $3 in swiglu) exec {sys.executable} -c {shlex.quote(program)};; esac\necho {shlex.quote(record)}\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(parts, "MOST_SECONDS", 1)
    tried = [Part("swiglu", "float32"), Part("rms_norm", "float32")]
    records = {found.check: found for found in parts.in_processes(tried, DEVICE, quick=True, jobs=2)}
    assert records["rms_norm"].ok
    (case,) = records["swiglu"].cases
    assert not case.ok and note in case.note


def test_processes_fit_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for gibibytes, count in ((140, 14), (24, 2), (8, 1), (500, 16)):
        memory = gibibytes * 2**30
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, memory=memory: SimpleNamespace(total_memory=memory)
        )
        assert verify.jobs_for(torch.device("cuda")) == count
    assert verify.jobs_for(torch.device("cpu")) == 1


def test_on_a_gpu_a_quick_run_tries_the_key_sizes_and_a_full_one_everything() -> None:
    gpu = torch.device("cuda")
    for op in OPS.values():
        quick = {case.where for case in wanted(op, gpu, quick=True)}
        assert quick == {"quick", "key"}
        assert wanted(op, gpu, quick=False) == list(op.cases)
        assert {case.where for case in wanted(op, torch.device("cpu"), quick=False)} == {"quick", "full"}


# --- whole models ---------------------------------------------------------------------------------------------------------


def test_recorded_trajectories_are_part_of_the_package_and_one_of_each_kind_is_short() -> None:
    assert len(models.golden_cases()) == 336
    chosen = models._chosen(models.Setup(torch.device("cpu"), quick=False))
    assert len({(case["cache"], case["strategy"]) for case in chosen}) == len(chosen) == 9
    assert {case["cache"] for case in models._chosen(models.Setup(torch.device("cpu"), quick=True))} == {"none", "prefix", "dual"}
    assert len(models._chosen(models.Setup(torch.device("cuda"), quick=False))) == 336
    for name, kinds in ((models.FAST_DLLM_V2, 2), (models.SDAR, 3)):
        counts = [
            len(models._chosen_causal(models.Setup(torch.device(device), quick=quick), name))
            for device, quick in (("cpu", False), ("cpu", True), ("cuda", False))
        ]
        assert counts == [kinds, 1, 96]


@pytest.fixture
def reference_setup(monkeypatch: pytest.MonkeyPatch) -> models.Setup:
    """Checks of models with PyTorch in the kernels' place, which is quick; the kernels have tests of their own."""
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args, **options: load(*args, **options | {"backend": "reference"}))
    return models.Setup(torch.device("cpu"), quick=False)


@pytest.mark.parametrize("check", models.MODEL_CHECKS)
def test_each_check_of_models_holds(check: str, reference_setup: models.Setup) -> None:
    cases = list(models.MODEL_CHECKS[check](reference_setup))
    assert cases and all(case.ok for case in cases), cases


def test_a_model_that_decodes_otherwise_fails_every_check(reference_setup: models.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = models.MaskedDiffusionLM.generate, []

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = generate(self, *args, **kwargs)
        calls.append(1)
        out.sequences[0, -out.gen_length :] = len(calls) % 100
        return out

    monkeypatch.setattr(models.MaskedDiffusionLM, "generate", wrong)
    monkeypatch.setattr(models.Setup, "interpreted", False)  # as on a GPU, where no case is skipped
    for name, check in models.MODEL_CHECKS.items():
        cases = list(check(replace(reference_setup, quick=True)))
        assert any(not case.ok for case in cases) or all(case.skipped for case in cases), name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs no interpreter")
def test_without_a_gpu_the_command_interprets_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fastdllm_triton", "verify", "--quick", "--op", "rms_norm", "--out", "v.json"]
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

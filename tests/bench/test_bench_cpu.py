"""The bench of whole generations on a CPU: equal work and tokens on both sides, what is measured, and what must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from fastdllm_triton.bench import bench_cpu, readme_table
from fastdllm_triton.bench._models import MODELS, config_of
from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._session import Session, label
from fastdllm_triton.cli.app import app
from fastdllm_triton.models.transformer import Weights

CPU = torch.device("cpu")
LLADA, _, DREAM, DREAM_DUAL = bench_cpu.QUICK


def rows_of(shape: Any, **options: Any) -> dict[str, Any]:
    (rows,) = bench_cpu.BENCH.rows_of(shape, Session(CPU, **options))
    return {row["provider"]: row for row in rows}


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "peak_bytes", lambda shape, side: 100 if side == "cpu" else 250)


@pytest.mark.parametrize(("model", "millions"), [("llada-134m", 134), ("dream-139m", 139)])
def test_the_models_have_the_sizes_of_their_names(model: str, millions: int) -> None:
    config = config_of(model)
    assert (config.layers, config.width, config.heads, config.vocab_size) == (12, 768, 12, 32_000)
    weights = Weights.allocate(config, torch.device("meta"), torch.float32)
    tensors = [weights.embedding, weights.head, weights.final_norm]
    for layer in weights.layers:
        tensors += [layer.attn_norm, layer.mlp_norm, *([] if layer.qkv_bias is None else [layer.qkv_bias])]
        tensors += [m.weight for m in (layer.qkv, layer.attn_out, layer.gate_up, layer.down)]
    assert round(sum(tensor.numel() for tensor in tensors) / 1e6) == millions


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("model", ["tiny llada", "tiny dream"])
def test_both_sides_give_the_same_tokens_in_as_many_forwards(model: str, cache: str, batch: int) -> None:
    runs = bench_cpu.sides({"model": model, "dtype": "float32", "cache": cache, "batch": batch})
    tokens, forwards = runs["cpu"]()
    assert forwards == bench_cpu.FORWARDS * bench_cpu.GENERATED // bench_cpu.BLOCK
    assert (tokens != MODELS[model].mask_id).all()
    if (model, cache, batch) == ("tiny dream", "dual", 2):
        with pytest.raises(RuntimeError, match="shape mismatch"):  # as the official code does
            runs["official"]()
    else:
        theirs, count = runs["official"]()
        assert count == forwards and torch.equal(tokens, theirs)


@pytest.mark.usefixtures("no_memory")
def test_a_case_has_both_clocks_and_the_ratio_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def in_turns(runs: Any, turns: int = 5) -> Any:
        order.extend(reversed(runs))
        factor = {"cpu": 1.0, "official": 3.0}
        return {
            name: {"cpu": [factor[name] * ms for ms in (9, 1, 2, 3, 0.1)], "wall": [ms * 4.0 for ms in range(5)]} for name in runs
        }

    monkeypatch.setattr(bench_cpu, "time_in_turns", in_turns)
    threads = torch.get_num_threads()
    rows = rows_of(LLADA)
    assert torch.get_num_threads() == threads and order == ["official", "cpu"]
    ours, theirs = rows["cpu"], rows["official"]
    assert (ours["median_ms"], theirs["median_ms"], theirs["times_triton"], theirs["times_wall"]) == (2, 6, 3, 1)
    assert (ours["clock"], ours["cpu_ms"], ours["wall_ms"], ours["turns"]) == ("cpu", 2, 8, 5)
    assert ours["agreement"] == 1 and ours["peak_bytes"] == 100
    assert 0 < ours["products"] < 1
    json.dumps(rows)
    monkeypatch.setattr(bench_cpu, "shares", lambda run: {})
    assert rows_of(LLADA | {"threads": 2})["official"]["times_triton"] == 1  # by the wall


def test_the_sides_take_turns() -> None:
    order: list[str] = []
    times = bench_cpu.time_in_turns({name: lambda name=name: order.append(name) for name in ("cpu", "official")}, 3)
    assert order == ["official", "cpu"] * 3
    assert all(len(times[name][clock]) == 3 for name in times for clock in ("wall", "cpu"))


@pytest.mark.usefixtures("no_memory")
def test_where_the_official_code_cannot_ours_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "shares", lambda run: {})
    rows = rows_of(DREAM_DUAL)
    assert "shape mismatch" in rows["official"]["missing"] and "median_ms" not in rows["official"]
    assert rows["cpu"]["median_ms"] > 0 and "agreement" not in rows["cpu"]


@pytest.mark.usefixtures("no_memory")
def test_other_tokens_in_float32_are_refused_and_in_bfloat16_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    official = bench_cpu.official_generate

    def other(*args: Any, **kwargs: Any) -> Any:
        tokens, forwards = official(*args, **kwargs)
        tokens[:, -16:] += 1
        return tokens, forwards

    monkeypatch.setattr(bench_cpu, "official_generate", other)
    monkeypatch.setattr(bench_cpu, "shares", lambda run: {})
    refused = rows_of(DREAM)
    assert all(row["refused"] and "75.0% of the tokens" in row["missing"] for row in refused.values())
    assert all("75.0%" in row["wrong"] and row["median_ms"] for row in rows_of(DREAM, unverified=True).values())
    assert rows_of(LLADA | {"dtype": "bfloat16"})["cpu"]["agreement"] <= 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_time_of_products_and_attention_is_found(dtype: torch.dtype) -> None:
    x, bias = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, dtype=dtype)
    weight, heads = torch.ones(1024, 1024, dtype=dtype), torch.ones(1, 8, 512, 64, dtype=dtype)
    products = {
        "linear": lambda: F.linear(x, weight),
        "with a bias": lambda: F.linear(x[None], weight, bias),
        "transposed": lambda: torch.mm(weight, x.t()),
    }
    with torch.no_grad():
        for name, run in products.items():
            run()
            found = bench_cpu.shares(lambda run=run: [run() for _ in range(8)])  # type: ignore[misc]
            assert found["products"] > 0.5 > found["attention"], (name, found)
        found = bench_cpu.shares(lambda: [F.scaled_dot_product_attention(heads, heads, heads) for _ in range(8)])
        assert found["attention"] > 0.5, found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's numbers")
def test_peak_memory_is_what_a_run_takes_above_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.ones(2**23)

    def sides(shape: Any) -> Any:
        return {"cpu": lambda: torch.ones(2**24).sum(), "official": lambda: (torch.ones(2**24) + kept[0]).sum()}

    monkeypatch.setattr(bench_cpu, "sides", sides)
    ours, theirs = (bench_cpu._peak_here(LLADA, side) for side in ("cpu", "official"))
    assert 2**26 * 0.9 < ours < 2**26 * 1.3
    assert 2**27 * 0.9 < theirs < 2**27 * 1.3


def made_up(gain: float, products: float = 0.9, memory: int = 50) -> list[dict[str, Any]]:
    rows = []
    for shape in bench_cpu.SHAPES:
        base = {"bench": "cpu", "op": "cpu", "shape": shape, "axis": "batch"}
        timed = {
            "median_ms": 1.0,
            "p20_ms": 1.0,
            "p80_ms": 1.0,
            "clock": "cpu",
            "products": products,
            "attention": 0.0,
            "peak_bytes": memory,
        }
        rows.append(base | timed | {"provider": "cpu", "times_triton": 1.0})
        official = timed | {"times_triton": gain, "median_ms": gain, "peak_bytes": 100}
        if shape["model"].startswith("dream") and shape["cache"] == "dual" and shape["batch"] > 1:
            official = {"missing": "RuntimeError: shape mismatch"}
        rows.append(base | official | {"provider": "official"})
    return rows


def test_what_must_hold_is_judged_by_the_worst_case() -> None:
    assert [claim.holds for claim in bench_cpu.claims(made_up(1.6))] == [True] * 5
    assert [claim.holds for claim in bench_cpu.claims(made_up(1.4, products=0.7))] == [True, True, False, False, True]
    assert [claim.holds for claim in bench_cpu.claims(made_up(0.9, memory=101))] == [False, False, False, True, False]
    rows = made_up(1.6)
    slow = next(row for row in rows if row["provider"] == "official" and row["shape"]["cache"] == "none")
    slow["times_triton"] = 0.95
    first, *others = bench_cpu.claims(rows)
    assert not first.holds and first.worst == 0.95 and first.where == label(slow["shape"])
    assert all(claim.holds for claim in others)
    tiny = [row | {"shape": row["shape"] | {"model": "tiny llada"}} for row in rows]
    assert bench_cpu.claims(tiny) == []


def test_the_readme_has_the_newest_run(tmp_path: Path) -> None:
    for date, gain in (("2026-11-20", 1.1), ("2026-11-21", 1.625)):
        machine = {"device": "Made-up CPU", "commit": "0123456789abcdef", "torch": "2.13.0", "date": date}
        report, folder = Report(machine, rows=made_up(gain)), tmp_path / "cpu" / f"{date}-0123456789"
        folder.mkdir(parents=True)
        report.write_machine(folder)
        report.write_rows(folder, "cpu")
    text = readme_table.results_table(tmp_path, tmp_path)
    assert text.startswith(readme_table.NOTHING) and "**Made-up CPU**" in text and "(cpu/2026-11-21-0123456789)" in text
    assert "not LLaDA-8B or Dream-7B" in text and "1.10" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| dream-139m, bfloat16, dual |"))
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["1.62", "raises", "raises"]
    assert "over the official one: 0.50 (0.50 to 0.50)" in text and "90 (90 to 90)" in text


@pytest.mark.usefixtures("no_memory")
def test_the_command_measures_without_a_gpu_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, run = tmp_path / "out", CliRunner().invoke
    chosen = ["bench", "cpu", "--quick", "--case", "model=tiny dream", "--case", "cache=none"]
    found = run(app, [*chosen, "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in out.glob("[!.]*")) == ["cpu.json", "machine.json", "verify.json"]
    rows = json.loads((out / "cpu.json").read_text())
    assert [row["provider"] for row in rows] == ["cpu", "official"] and all(row["median_ms"] for row in rows)
    assert {row["shape"]["cache"] for row in rows} == {"none"}
    monkeypatch.setattr(bench_cpu, "sides", None)  # nothing is run again
    again = run(app, [*chosen, "--out", str(out), "--resume", "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["rows"] == rows
    for case, message in (("width=3", "needs KEY=VALUE with a key among batch, cache"), ("batch=3", "needs names among batch=1")):
        wrong = run(app, [*chosen, "--case", case])
        assert wrong.exit_code == 2 or isinstance(wrong.exception, ValueError)
        assert message in wrong.output + str(wrong.exception)

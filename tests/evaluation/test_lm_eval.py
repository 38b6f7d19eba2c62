"""The model class of lm-evaluation-harness, on local task files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastdllm_triton as fdt
from fastdllm_triton.evaluation.scoring import builtin_requests

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fastdllm-triton[eval]'")
if lm_eval:
    from lm_eval.tasks import TaskManager

    from fastdllm_triton.evaluation import lm_eval as harness

FIRST = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
SECOND = "Ann has 20 books. Ann buys 30. Ann loses 12. Ann gets 25. How many?"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A generation task and a multiple-choice task over local files."""
    requests = builtin_requests(12, 3)
    lines = [{"question": r.prompt, "answer": r.answer, "choices": [r.answer, "100"]} for r in requests]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/problems.jsonl\ntest_split: test\n"
    (tmp_path / "problems.yaml").write_text(
        "task: local_problems\n"
        + head
        + "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['<never>']\n  do_sample: false\n  max_gen_toks: 48\n"
        "filter_list:\n  - name: final\n    filter:\n      - function: regex\n        regex_pattern: '#### (\\d+)'\n"
        "      - function: take_first\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "choice.yaml").write_text(
        "task: local_choice\n" + head + "output_type: multiple_choice\ndoc_to_text: '{{question}} ####'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return tmp_path


def _evaluate(tasks: Path, task: str, model_args: str, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="fastdllm", model_args=f"pretrained=tiny,device=cpu,{model_args}", tasks=[task], task_manager=manager, **options
    )
    assert found is not None
    return dict(found)


def test_a_generation_task_scores_what_generate_gives(tiny: fdt.MaskedDiffusionLM, tasks: Path) -> None:
    found = _evaluate(tasks, "local_problems", "cache=dual,threshold=0.9,gen_length=48,block_length=16", batch_size=5)
    requests = builtin_requests(12, 3)
    outputs = [tiny.generate(r.prompt, cache="dual", strategy=fdt.Threshold(0.9)) for r in requests]
    right = [out.texts[0].endswith(f"#### {r.answer}") for r, out in zip(requests, outputs, strict=True)]
    assert found["results"]["local_problems"]["exact_match,final"] == pytest.approx(sum(right) / 12)
    assert sum(right) > 6
    samples = sorted(found["samples"]["local_problems"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [out.texts[0] for out in outputs]
    speed = found["config"]["fastdllm"]
    assert speed["requests"] == 12
    assert speed["nfe"] == pytest.approx(sum(out.nfe for out in outputs) / 12, abs=1e-4)
    assert speed["tokens_per_forward"] == pytest.approx(sum(o.committed for o in outputs) / sum(o.nfe for o in outputs), abs=1e-4)
    assert speed["tokens_per_second"] > speed["answer_tokens_per_second"] > 0


def test_a_choice_task_by_likelihood(tasks: Path) -> None:
    found = _evaluate(tasks, "local_choice", "mc_num=4")
    assert found["results"]["local_choice"]["acc,none"] > 0.7  # " 59" against " 100", three tokens against two


class _Request:
    """As much of an instance as a model sees."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_stop_strings_are_each_request_s_own(tiny: fdt.MaskedDiffusionLM) -> None:
    model = harness.FastDLLM(batch_size=4, gen_length=48)
    wishes = ({"until": ["."]}, {"until": " ####"}, {"until": ["never", "####", " That"]}, {})
    texts = model.generate_until([_Request(FIRST, wish) for wish in wishes], disable_tqdm=True)
    full = tiny.generate(FIRST).texts[0]
    assert full.count(".") == 2
    assert texts == [full.partition(".")[0], full.partition(" ####")[0], full[: min(full.find("####"), full.find(" That"))], full]


def test_ragged_batches_give_what_each_request_gives_alone() -> None:
    requests = [
        _Request(prompt, {"until": [], "max_gen_toks": length}) for prompt in (FIRST, SECOND, "Tom") for length in (40, 16)
    ]
    alone = harness.FastDLLM(batch_size=1).generate_until(requests, disable_tqdm=True)
    together = harness.FastDLLM(batch_size=4).generate_until(requests, disable_tqdm=True)
    assert together == alone
    assert len(set(alone)) > 3


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [_Request(r.prompt, {"until": []}) for r in builtin_requests(6, 4)]
    requests.append(requests[0])  # Asked for twice: answered twice.
    straight = harness.FastDLLM(batch_size=2, gen_length=48)
    expected = straight.generate_until(requests, disable_tqdm=True)

    model = harness.FastDLLM(batch_size=2, gen_length=48, save_dir=str(tmp_path))
    generate, calls = model.lm.generate, []

    def interrupted(prompts: Any, *args: Any, **options: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return generate(prompts, *args, **options)

    monkeypatch.setattr(model.lm, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(requests, disable_tqdm=True)
    assert len((tmp_path / "finished.jsonl").read_text().splitlines()) == 4

    again = harness.FastDLLM(batch_size=2, gen_length=48, save_dir=str(tmp_path))
    rest, generate_again = [], again.lm.generate
    monkeypatch.setattr(again.lm, "generate", lambda p, *a, **o: rest.append(len(p)) or generate_again(p, *a, **o))
    assert again.generate_until(requests, disable_tqdm=True) == expected
    assert sum(rest) == 3
    counted = ("requests", "tokens", "answer_tokens", "forwards", "nfe", "tokens_per_forward")
    info, whole = again.get_model_info()["fastdllm"], straight.get_model_info()["fastdllm"]
    assert [info[name] for name in counted] == [whole[name] for name in counted]

    other = harness.FastDLLM(batch_size=2, gen_length=48, threshold=0.5, save_dir=str(tmp_path))
    fresh: list[int] = []
    generate_other = other.lm.generate
    monkeypatch.setattr(other.lm, "generate", lambda p, *a, **o: fresh.append(len(p)) or generate_other(p, *a, **o))
    other.generate_until(requests, disable_tqdm=True)
    assert sum(fresh) == 7  # Other options, other results.


def test_likelihoods_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness.FastDLLM(mc_num=4, save_dir=str(tmp_path), is_check_greedy=True)
    first = model.loglikelihood([_Request(FIRST, " Tom now has 51+27=78."), _Request("", "Tom has")], disable_tqdm=True)
    again = harness.FastDLLM(mc_num=4, save_dir=str(tmp_path), is_check_greedy=True)
    monkeypatch.setattr(again.lm, "logits", None)
    assert again.loglikelihood([_Request(FIRST, " Tom now has 51+27=78."), _Request("", "Tom has")], disable_tqdm=True) == first
    assert all(value < 0 and isinstance(greedy, bool) for value, greedy in first)


def test_rolling_likelihood_covers_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness.FastDLLM(mc_num=1)
    seen: list[int] = []
    monkeypatch.setattr(model, "_score", lambda context, continuation: (seen.extend(continuation), (-1.0, False))[1])
    text = FIRST * 40
    values = model.loglikelihood_rolling([_Request(text)], disable_tqdm=True)
    assert seen == model.tok_encode(text)
    assert values == [-2.0]


def test_chat_templates_are_applied_and_begin_once(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in Path(fdt.load("tiny").folder).glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    config["bos_token"] = "<|unknown|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = harness.FastDLLM(pretrained=str(folder))
    text = model.apply_chat_template([{"role": "user", "content": FIRST}])
    assert text == "<|unknown|>" + FIRST
    assert model.tok_encode(text).count(model.tokenizer.bos_token_id) == 1
    assert "bos_token" in str(model.chat_template(True))
    with pytest.raises(ValueError, match="has no chat template"):
        harness.FastDLLM().apply_chat_template([{"role": "user", "content": FIRST}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be an integer of 1 or more, got 'auto'"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor exclude each other"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"cache": "full"}, "cache must be one of none, prefix, dual"),
        ({"gen_length": 50}, "gen_length must be a multiple of block_length"),
        ({"mc_num": 5, "mc_batch": 2}, "mc_num must be a multiple of mc_batch"),
    ],
)
def test_bad_model_args(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.FastDLLM(**arguments)


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ({}, fdt.Threshold(0.9)),
        ({"steps": 24, "score": "margin"}, fdt.FixedSteps(24, score="margin")),
        ({"strategy": "fixed:4"}, fdt.FixedSteps(12)),
        ({"entropy_budget": 0.1, "score": ""}, fdt.EntropyBudget(0.1)),
    ],
)
def test_a_strategy_is_asked_for_as_on_the_command_line(arguments: dict[str, Any], strategy: fdt.Strategy) -> None:
    model = harness.FastDLLM("tiny", gen_length=48, **arguments)
    assert model._config(48, 0.0).strategy == strategy


def test_the_command_line_of_the_harness(tasks: Path) -> None:
    command = [sys.executable, "-m", "fastdllm_triton", "lm-eval", "--model", "fastdllm", "--include_path", str(tasks)]
    command += ["--model_args", "pretrained=tiny,cache=dual,threshold=0.9,gen_length=48,block_length=16"]
    command += ["--tasks", "local_problems", "--limit", "4", "--batch_size", "4", "--output_path", str(tasks / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_problems|" in done.stdout
    (results,) = (tasks / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["fastdllm"]["requests"] == 4

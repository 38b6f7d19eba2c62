"""The command line, as a shell would call it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton import tiny as tiny_model
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.generate import Prompt, read_prompts
from fastdllm_triton.cli.live import AnswerView, LiveView, TokenRenderer
from fastdllm_triton.engine import memory
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.evaluation.scoring import read_requests

FIRST = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
SECOND = "Ann has 20 books. Ann buys 30. Ann loses 12. Ann gets 25. How many?"


def _run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def _json(*arguments: str, stdin: str | None = None) -> Any:
    result = _run("generate", "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_prints_the_text_and_what_it_took(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run("generate", "--model", "tiny", "--prompt", FIRST)
    assert result.exit_code == 0
    assert tiny.generate(FIRST).texts[0] in result.stdout.replace("\n", "")
    assert "tokens per forward" in result.stdout.replace("\n", " ")


def test_json_is_the_result_of_the_python_call(tiny: fdt.MaskedDiffusionLM) -> None:
    told = _json("--prompt", FIRST, "--prompt", SECOND, "--cache", "prefix", "--factor", "1.0", "--block-length", "24")
    out = tiny.generate([FIRST, SECOND], cache="prefix", strategy=fdt.Factor(1.0), block_length=24)
    assert [r["text"] for r in told["results"]] == out.texts
    assert [r["prompt"] for r in told["results"]] == [FIRST, SECOND]
    assert [r["ids"] for r in told["results"]] == [out.ids(0), out.ids(1)]
    assert [r["step_map"] for r in told["results"]] == out.step_map.tolist()
    assert [r["forwards"] for r in told["results"]] == out.row_forwards.tolist()
    assert (told["nfe"], told["refreshes"], told["steps"]) == (out.nfe, out.refreshes, out.steps)
    assert told["tokens_per_forward"] == pytest.approx(out.tokens_per_forward, abs=1e-3)
    assert told["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ([], fdt.Threshold(0.9)),
        (["--threshold", "0.5"], fdt.Threshold(0.5)),
        (["--steps", "12"], fdt.FixedSteps(12)),
        (["--steps", "12", "--score", "margin"], fdt.FixedSteps(12, score="margin")),
        (["--entropy-budget", "0.3"], fdt.EntropyBudget(0.3)),
    ],
)
def test_each_strategy_can_be_asked_for(tiny: fdt.MaskedDiffusionLM, arguments: list[str], strategy: fdt.Strategy) -> None:
    told = _json("--prompt", FIRST, *arguments)
    out = tiny.generate(FIRST, strategy=strategy)
    assert (told["results"][0]["text"], told["nfe"]) == (out.texts[0], out.nfe)


def test_the_other_options_reach_the_engine(tiny: fdt.MaskedDiffusionLM) -> None:
    arguments = (
        "--gen-length 32 --block-length 8 --temperature 1.5 --seed 7 --no-stop-at-eos --forbid 20 --forbid 21 --refresh-every 2"
    )
    told = _json("--prompt", FIRST, "--dtype", "float64", "--backend", "reference", "--device", "cpu", *arguments.split())
    options: dict[str, Any] = {"gen_length": 32, "block_length": 8, "temperature": 1.5, "seed": 7, "stop_at_eos": False}
    lm = fdt.load("tiny", dtype="float64")
    out = lm.generate(FIRST, forbidden=(20, 21), refresh_every=2, **options)
    assert told["results"][0]["step_map"] == out.step_map[0].tolist()
    assert told["results"][0]["ids"] == out.ids(0)
    assert told["committed"] == 32


def test_prompts_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    expected = _json("--prompt", FIRST, "--prompt", SECOND)["results"]
    (tmp_path / "prompts.txt").write_text(f"{FIRST}\n\n{SECOND}\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (FIRST, SECOND)))
    assert _json("--prompt-file", str(tmp_path / "prompts.txt"))["results"] == expected
    assert _json("--prompt-file", str(tmp_path / "prompts.jsonl"))["results"] == expected
    assert _json("--prompt-file", "-", stdin=f"{FIRST}\n{SECOND}\n")["results"] == expected
    assert _json(stdin=f"{FIRST}\n{SECOND}\n")["results"] == expected


def test_live_ends_with_the_text(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run("generate", "--prompt", FIRST, "--live")
    assert result.exit_code == 0
    assert "masks left" in result.stdout
    assert tiny.generate(FIRST).texts[0] in result.stdout.replace("\n", "")


def test_a_live_frame_shows_masks_new_tokens_and_the_block(tiny: fdt.MaskedDiffusionLM) -> None:
    console = Console(record=True, width=100, force_terminal=True, color_system="standard", file=StringIO())
    view = LiveView(tiny, 48, console)
    frames: list[Any] = []
    tiny.generate(FIRST, strategy=fdt.FixedSteps(24), callback=lambda forward: frames.append(view.render(forward)))
    console.print(frames[2])
    shown = console.export_text(styles=True)
    plain = console_text(frames[2])
    assert plain.count("░") == 48 - 6
    assert "forward 3 (step)   block 1   42 masks left" in plain
    assert "\x1b[1;4;32m" in shown  # bold, underlined, green: committed by this forward, in the block
    assert "¶" in console_text(frames[-1])


def test_an_answer_is_drawn_up_to_the_end_of_its_block_and_its_last_lines_where_it_is_long(tiny: fdt.MaskedDiffusionLM) -> None:
    console = Console(width=20, height=4, file=StringIO())
    view = AnswerView(tiny, 48, console)
    frames: list[Any] = []
    tiny.generate(FIRST, strategy=fdt.FixedSteps(48), callback=lambda forward: frames.append(view.render(forward)))
    assert console_text(frames[0]).count("░") == 15
    last = [line.rstrip() for line in console_text(frames[-1]).splitlines()]
    assert len(last) == 1 + 2  # the head, and what the terminal has room for
    assert "#### 59" in " ".join(last)


def test_a_character_of_several_tokens_is_drawn_whole(tiny: fdt.MaskedDiffusionLM) -> None:
    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    class Model:
        tokenizer, config = Bytes(), tiny.config

    mask, end = 999, tiny.config.eos_ids[0]
    renderer = TokenRenderer(Model(), mask)  # type: ignore[arg-type]
    euro = list("€".encode())
    assert renderer.render([*euro, mask, mask, end]).plain == "€░░¶"
    assert renderer.render(euro, [True, False, False]).plain.count("\ufffd") > 0  # until all of it is of one age


def console_text(frame: Any) -> str:
    console = Console(record=True, width=100, file=StringIO())
    console.print(frame)
    return console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--threshold", "1.5"], "--threshold must be in (0, 1], got 1.5"),
        (["--prompt", "x", "--threshold", "0.9", "--factor", "1"], "--threshold and --factor exclude each other"),
        (["--prompt", "x", "--model", "./nowhere"], "--model: there is no folder './nowhere'"),
        (["--prompt", "x", "--gen-length", "50"], "--gen-length must be a multiple of --block-length = 16, got 50"),
        (["--prompt", "x", "--score", "best"], "--score must be one of"),
        (["--prompt", "x", "--live", "--json"], "--live and --json exclude each other"),
        (["--prompt", "x", "--prompt-file", "y"], "--prompt and --prompt-file exclude each other"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: No such file"),
        (["--prompt", "x", "--chat"], "--chat: the tokenizer"),
        (["--prompt", "x", "--model", str(GOLDEN / "llada-gqa")], "has no tokenizer files"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--prompt", "x", "--backend", "triton", "--dtype", "float64"], "the Triton kernels have no float64"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments: list[str], message: str) -> None:
    result = _run("generate", *arguments)
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_no_prompt_at_all() -> None:
    result = _run("generate", stdin="\n")
    assert result.exit_code == 2
    assert "standard input holds no prompt" in result.stderr


def test_a_prompt_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n')
    result = _run("generate", "--prompt-file", str(tmp_path / "p.jsonl"))
    assert result.exit_code == 2
    assert "p.jsonl: line 1: has no 'prompt'; it has 'text'" in " ".join(result.stderr.split())


def test_windows_and_lockstep_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: fdt.MaskedDiffusionLM, rows: Any, config: fdt.GenerationConfig, **options: Any) -> Any:
        asked.append(config)
        return original(self, rows, config, **options)

    asked: list[fdt.GenerationConfig] = []
    original = fdt.MaskedDiffusionLM.generate
    monkeypatch.setattr(fdt.MaskedDiffusionLM, "generate", generate)
    _json("--prompt", FIRST)
    default = asked.pop()
    arguments = "--suffix-window 8 --look-back 4 --look-ahead 3 --prompt-refresh 2 --lockstep"
    told = _json("--prompt", FIRST, "--prompt", SECOND, *arguments.split())
    expected = replace(default, suffix_window=8, look_back=4, look_ahead=3, prompt_refresh=2, lockstep=True)
    assert asked == [expected]
    assert told["nfe"] == original(fdt.load("tiny"), [FIRST, SECOND], expected).nfe


@pytest.fixture
def _interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the sixth forward."""

    def sync_flags(self: ModelRunner, rows: int, mask_ids: Any = ()) -> Any:
        reads.append(rows)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return original(self, rows, mask_ids)

    reads: list[int] = []
    original = ModelRunner.sync_flags
    monkeypatch.setattr(ModelRunner, "sync_flags", sync_flags)


@pytest.mark.usefixtures("_interrupted")
def test_ctrl_c_prints_the_text_so_far_and_shades_what_is_masked(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run("generate", "--prompt", FIRST, "--steps", "48")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == FIRST
    assert 0 < lines[1].count("░") <= 42
    assert "6 forwards (1 refreshes, 5 steps), 1.00 tokens per forward" in " ".join(lines[2:])


@pytest.mark.usefixtures("_interrupted")
def test_ctrl_c_with_json_is_an_object_all_the_same(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run("generate", "--prompt", FIRST, "--steps", "48", "--json")
    assert result.exit_code == 130
    told = json.loads(result.stdout)
    assert told["interrupted"]
    assert told["nfe"] == told["committed"] == 6
    assert sum(step >= 0 for step in told["results"][0]["step_map"]) == 6


def test_ctrl_c_outside_a_generation_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdllm_triton.loading.load", stop)
    result = _run("generate", "--prompt", FIRST)
    assert result.exit_code == 130
    assert result.stdout == ""


def test_a_bad_strategy_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdllm_triton.loading.load", None)
    result = _run("generate", "--prompt", FIRST, "--threshold", "1.5")
    assert result.exit_code == 2
    assert "--threshold must be in (0, 1]" in result.stderr


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    result = _run("generate", "--prompt", FIRST)
    assert result.exit_code == 2
    assert "not even one row fits" in " ".join(result.stderr.split())


def test_info_names_the_backend_and_the_reason() -> None:
    result = _run("info")
    assert result.exit_code == 0
    for word in ("torch", "triton", "device", "backend"):
        assert word in result.stdout


def test_demo_compares_every_way() -> None:
    result = _run("demo", "--count", "1")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.rstrip().endswith("x")]
    assert [line[0] for line in lines] == ["none", "prefix", "dual"] * 2
    assert lines[0][-1] == "1.0x"
    assert "How many?" in result.stdout


def _nan_model(folder: Path) -> Path:
    for file in tiny_model.PATH.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_weights_that_are_nan_are_one_line(tmp_path: Path) -> None:
    model = str(_nan_model(tmp_path))
    for command in (["generate", "--prompt", FIRST], ["evaluate", "--problems", "1", "--out", str(tmp_path / "out")]):
        result = _run(*command, "--model", model)
        assert result.exit_code == 2
        assert "logits that are NaN" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.output


def test_what_was_decoded_is_printed_when_something_fails_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: fdt.MaskedDiffusionLM, *args: Any, **options: Any) -> Any:
        error = OSError("trace: no space left on device")
        error.output = original(self, *args, **options)  # type: ignore[attr-defined]
        raise error

    original = fdt.MaskedDiffusionLM.generate
    expected = _json("--prompt", FIRST)["results"][0]["text"]
    monkeypatch.setattr(fdt.MaskedDiffusionLM, "generate", generate)
    result = _run("generate", "--prompt", FIRST)
    assert (result.exit_code, result.stderr) == (2, "error: --trace: no space left on device\n")
    assert expected in result.stdout
    result = _run("generate", "--prompt", FIRST, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["results"][0]["text"] == expected


#: What Unicode calls a line or a page break, beside the line feed.
BREAKS = "a\u2028b\u2029c\x85d\x0be\x0cf\rg"


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_only_a_line_feed_ends_a_line_of_a_prompt_file(tmp_path: Path, bom: str) -> None:
    text, data = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes(f"{bom}{BREAKS}\r\n \n{FIRST}".encode())
    lines = [json.dumps({"prompt": prompt, "answer": 1}, ensure_ascii=False) for prompt in (BREAKS, FIRST)]
    data.write_bytes(f"{bom}{lines[0]}\n\n{lines[1]}\r\n".encode())
    for prompts in (read_prompts(None, text, False), read_prompts(None, data, False), read_requests(data)):
        assert [prompt.text if isinstance(prompt, Prompt) else prompt.prompt for prompt in prompts] == [BREAKS, FIRST]
    sources = [prompt.source for prompt in read_prompts(None, text, False)]
    assert sources == [f"--prompt-file {text}: line 1", f"--prompt-file {text}: line 3"]
    assert [request.source for request in read_requests(data)] == [f"{data}: line 1", f"{data}: line 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": 5}', "'prompt' must be text and not empty, got 5"),
        (b'{"prompt": null}', "'prompt' must be text and not empty, got null"),
        (b'{"prompt": ""}', "'prompt' must be text and not empty, got \"\""),
        (b'{"prompt": [{"role": "user", "content": "x"}]}', "messages of a conversation need generate --chat"),
        (b'{"prompt": ["x"]}', "'prompt' must be text and not empty, got"),
        (b'{"text": "x"}', "has no 'prompt'; it has 'text'"),
        (b"[1]", "must be an object with a 'prompt', got list"),
        (b"{broken", "not JSON: Expecting property name"),
        (b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "\xe9"}', "not UTF-8 text: byte 0xe9"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_its_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "x", "answer": "1"}\n\n' + content + b"\n")
    for option, command in (("--prompt-file", ["generate"]), ("--data", ["evaluate", "--out", str(tmp_path / "o")])):
        result = _run(*command, option, str(file))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {option} {file}: line 3: ") and message in result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_prompt_file_may_hold_conversations_where_chat_is_asked_for(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": messages}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    conversation, text = read_prompts(None, file, True)
    assert conversation.text == messages and str(conversation) == "system: Be brief.\nuser: Hi"
    assert text.text == str(text) == "Hi"
    file.write_text(json.dumps({"prompt": [{"role": "user"}]}) + "\n")
    with pytest.raises(ValueError, match="or a list of messages with a role and a content"):
        read_prompts(None, file, True)


def test_a_prompt_that_does_not_fit_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text(f"{FIRST}\n\n{'1' * 500}\n")
    result = _run("generate", "--prompt-file", str(file))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --prompt-file {file}: line 3 has 500 tokens; with --gen-length = 48 the model takes")
    result = _run("generate", "--prompt", FIRST, "--prompt", "1" * 500)
    assert result.stderr.startswith("error: --prompt 2 has 500 tokens")


def test_a_lookup_on_the_hub_is_announced_and_a_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for command in (["generate", "--prompt", "x"], ["chat"], ["info"]):
        result = _run(*command, "--model", "nosuch/model")
        assert result.exit_code == 2
        first, second = result.stderr.splitlines()
        assert first == "looking on the hub for nosuch/model"
        assert second.startswith("error: --model: there is no folder 'nosuch/model', and the hub did not give")
    assert "looking on the hub" not in _run("info", "--model", "tiny").stderr

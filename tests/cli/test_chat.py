"""Conversations: what the model is asked, what is kept, what is counted; and the command, as a terminal would drive it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli import _terminal
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.conversation import Conversation
from fastdllm_triton.engine.runner import ModelRunner

FIRST = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
SECOND = "Ann has 20 books. Ann buys 30. Ann loses 12. How many?"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def talker() -> fdt.MaskedDiffusionLM:
    """The built-in model with a chat template."""
    lm = fdt.load("tiny", device="cpu")
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def _ask(conversation: Conversation, question: str) -> str:
    answer = conversation.ask(question)
    for _ in answer:
        pass
    return conversation.keep(answer)


def _decoded(conversation: Conversation, question: str) -> str:
    tokenizer: Any = conversation.model.tokenizer
    return str(tokenizer.decode(conversation.prompt(question)))


def test_a_turn_is_asked_with_the_whole_history_in_the_template(talker: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(talker, system="Be brief.")
    said = _ask(conversation, FIRST)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FIRST}]
    assert said == talker.generate([talker.encode(messages)]).texts[0].strip()
    assert _decoded(conversation, SECOND) == f"system: Be brief.\nuser: {FIRST}\nassistant: {said}\nuser: {SECOND}\nassistant: "
    conversation.reset()
    assert _decoded(conversation, SECOND) == f"system: Be brief.\nuser: {SECOND}\nassistant: "


def test_one_message_is_what_chat_wraps(talker: fdt.MaskedDiffusionLM) -> None:
    assert talker.encode([{"role": "user", "content": FIRST}]) == talker.encode(FIRST, chat=True) != talker.encode(FIRST)


def test_without_a_template_each_question_is_a_prompt_of_its_own(tiny: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(tiny)
    assert not conversation.remembers
    assert _ask(conversation, FIRST) == tiny.generate(FIRST).texts[0].strip()
    assert conversation.prompt(SECOND) == tiny.encode(SECOND)
    assert conversation.messages == []
    with pytest.raises(ValueError, match="system: the model's tokenizer has no chat template"):
        Conversation(tiny, system="Be brief.")
    with pytest.raises(ValueError, match="has no chat template"):
        tiny.encode([{"role": "user", "content": FIRST}])


def test_an_answer_that_was_left_is_kept_up_to_its_first_mask(talker: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(talker, replace(talker.defaults, strategy=fdt.FixedSteps(48)))
    answer = conversation.ask(FIRST)
    for forward in answer:
        if forward.index == 20:
            break
    said = conversation.keep(answer)
    assert not answer.complete
    slots = forward.x[0, -48:].tolist()
    contiguous = slots[: slots.index(forward.mask_id)]
    assert 0 < len(contiguous) <= 21
    tokenizer: Any = talker.tokenizer
    assert said == tokenizer.decode(contiguous, skip_special_tokens=True).strip()
    assert [message["content"] for message in conversation.messages] == [FIRST, said]
    assert (conversation.last.forwards, conversation.last.tokens) == (21, 21)
    _ask(conversation, SECOND)  # the model goes on
    assert len(conversation.messages) == 4


def test_an_answer_that_said_nothing_leaves_no_trace_in_the_history(talker: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(talker)
    assert conversation.keep(conversation.ask(FIRST)) == ""
    assert conversation.messages == []


def test_usage_adds_up(talker: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(talker)
    assert (conversation.total.tokens_per_forward, conversation.total.tokens_per_second) == (0, 0)
    _ask(conversation, FIRST)
    first = conversation.last
    out = talker.generate([talker.encode(FIRST, chat=True)])
    assert (first.turns, first.tokens, first.forwards, first.refreshes) == (1, out.committed, out.nfe, out.refreshes)
    assert first.tokens_per_forward == out.tokens_per_forward
    assert first.prompt_tokens == len(talker.encode(FIRST, chat=True))
    conversation.reset()
    _ask(conversation, SECOND)
    total = conversation.total
    assert (total.turns, total.tokens) == (2, first.tokens + conversation.last.tokens)
    assert total.seconds == pytest.approx(first.seconds + conversation.last.seconds)
    assert total.tokens_per_second > 0


def test_a_conversation_that_is_too_long_says_what_to_do_and_loses_nothing(talker: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(talker)
    talker.network.config = replace(talker.config, max_length=160)
    _ask(conversation, FIRST)
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens; .* at most 112: /reset begins anew, /set gen_length"):
        conversation.ask(SECOND * 3)
    assert conversation.messages == before
    conversation.reset()
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; .* at most 112: /set gen_length"):
        conversation.ask(SECOND * 6)
    assert _ask(conversation, SECOND)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("threshold", "1.5"), r"threshold must be in \(0, 1\], got 1.5"),
        (("treshold", "0.5"), r"did you mean threshold\?"),
        (("cache", "prefix", "gen_length", "50"), "gen_length must be a multiple of block_length = 16, got 50"),
        (("cache", "both"), "cache must be one of none, prefix, dual"),
        (("threshold",), "give settings and their values in turn"),
        ((), "give settings and their values in turn"),
        (("gen_length", "512"), "gen_length must be below the model's 512 slots"),
        (("seed", str(2**63)), "seed must be in"),
    ],
)
def test_a_bad_setting_leaves_the_conversation_as_it_was(
    tiny: fdt.MaskedDiffusionLM, words: tuple[str, ...], message: str
) -> None:
    conversation = Conversation(tiny)
    before = conversation.config
    with pytest.raises(ValueError, match=message):
        conversation.set(*words)
    assert conversation.config is before


def test_a_setting_reaches_the_engine(tiny: fdt.MaskedDiffusionLM) -> None:
    conversation = Conversation(tiny)
    conversation.set("steps", "12", "cache", "none", "gen_length", "24", "block_length", "8")
    assert (
        _ask(conversation, FIRST)
        == tiny.generate(FIRST, strategy=fdt.FixedSteps(12), cache="none", gen_length=24, block_length=8).texts[0].strip()
    )
    assert conversation.last.forwards == 12


def test_a_model_without_a_tokenizer_cannot_talk(llada: fdt.MaskedDiffusionLM) -> None:
    with pytest.raises(ValueError, match="has no tokenizer, and a conversation needs one"):
        Conversation(llada)


def _run(lines: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["chat", *arguments], input=lines)


def test_a_script_gets_plain_answers(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run(f"{FIRST}\n\n/set cache none threshold 0.5\n{SECOND}\n", "--gen-length", "32")
    assert result.exit_code == 0
    answers = [
        tiny.generate(FIRST, gen_length=32).texts[0].strip(),
        tiny.generate(SECOND, gen_length=32, cache="none", strategy=fdt.Threshold(0.5)).texts[0].strip(),
    ]
    assert result.stdout.splitlines() == answers
    assert "each line is a problem of its own" in " ".join(result.stderr.split())


def test_commands_of_a_script() -> None:
    result = _run(f"{FIRST}\n/stats\n/set\n/help\n/reset\n/quit\n{SECOND}\n")
    assert result.exit_code == 0
    assert re.search(r"tokens per forward +\d\.\d\d +\d\.\d\d", result.stdout)
    assert re.search(r"block_length +16 *\n", result.stdout)
    assert re.search(r"stop_at_eos +on *\n", result.stdout)
    assert "/reset" in result.stdout
    assert result.stdout.count("####") == 1  # nothing after /quit


def test_lines_may_go_on_and_may_begin_with_a_slash(tiny: fdt.MaskedDiffusionLM) -> None:
    result = _run("Tom has\\\n51\n//set\nlast\\")
    assert result.exit_code == 0
    texts = [tiny.generate(text).texts[0].strip() for text in ("Tom has\n51", "/set", "last")]
    assert result.stdout.splitlines() == "\n".join(texts).splitlines()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set treshold 0.8", "did you mean threshold?"),
        ("/set threshold 2", "threshold must be in (0, 1], got 2.0"),
        ("/rest", "'/rest' is no command; /help lists them"),
        ("/reset now", "'/reset now' is no command"),
        ("1 " * 300, "the prompt has 599 tokens; with gen_length = 48 the model takes at most 464"),
    ],
)
def test_a_line_that_fails_is_told_and_the_session_goes_on(line: str, message: str) -> None:
    result = _run(f"{line}\n{FIRST}\n")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "####" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "2"), "threshold must be in (0, 1], got 2.0"),
        (("--threshold", "0.5", "--steps", "48"), "--steps and --threshold exclude each other"),
        (("--gen-length", "50"), "--gen-length must be a multiple of --block-length = 16, got 50"),
        (("--system", "x"), "has no chat template"),
        (("--model", str(GOLDEN / "llada-gqa")), "has no tokenizer, and a conversation needs one"),
    ],
)
def test_bad_options_end_before_the_first_line(arguments: tuple[str, ...], message: str) -> None:
    result = _run(f"{FIRST}\n", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_ctrl_c_in_a_script_ends_it_with_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 6:
            raise KeyboardInterrupt

    calls: list[float] = []
    monkeypatch.setattr(_terminal.time, "sleep", interrupt)
    result = _run(f"{FIRST}\n{SECOND}\n")
    assert result.exit_code == 130
    assert result.stdout.startswith("That makes it 51")
    assert "what was said so far is kept" in result.stderr
    assert len(calls) == 6


def test_a_forward_that_fails_ends_the_answer_and_not_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync_flags(self: ModelRunner, rows: int, mask_ids: Any = ()) -> Any:
        reads.append(rows)
        if len(reads) == 2:
            raise FloatingPointError("forward 1 gave logits that are NaN or nowhere finite in row 0")
        return original(self, rows, mask_ids)

    reads: list[int] = []
    original = ModelRunner.sync_flags
    monkeypatch.setattr(ModelRunner, "sync_flags", sync_flags)
    result = _run(f"{FIRST}\n{FIRST}\n")
    assert result.exit_code == 2
    assert "error: forward 1 gave logits that are NaN" in " ".join(result.stderr.split())
    assert result.stdout.count("####") == 1


class Session:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.fd, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-m", "fastdllm_triton", "chat", *arguments]
        root = Path(__file__).parents[2]
        # A session of its own, with the terminal as its controlling one: Ctrl-C is then a signal, as for a user.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *call],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=root,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def expect(self, what: str, seconds: float = 60) -> str:
        """Reads until a pattern appears; gives what came up to its end, and forgets it."""
        end = time.monotonic() + seconds
        while not (found := re.search(what, self.seen)):
            if time.monotonic() > end or (not select.select([self.fd], [], [], 1)[0] and self.process.poll() is not None):
                raise AssertionError(f"{what!r} did not come; the terminal shows {self.seen!r}")
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_ctrl_c_at_the_prompt(self, what: str) -> None:
        """Again, if nothing comes of it: one that falls between the prompt and the wait for keys is seen with the next key."""
        for attempt in range(5):
            time.sleep(0.3 * (attempt + 1))
            self.type("\x03")
            try:
                self.expect(what, 5)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{what!r} did not come of Ctrl-C; the terminal shows {self.seen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.fd)


_IN_TERMINAL = """
import fcntl, subprocess, sys, termios, signal
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background of a script inherits as ignored
child = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGINT, signal.SIG_IGN)
status = child.wait()
print("the session is over", flush=True)
sys.exit(status)
"""


def test_in_a_terminal_blocks_denoise_and_ctrl_c_stops_the_answer_then_the_session() -> None:
    session = Session("--pause", "0.2", "--steps", "48")
    try:
        session.expect("each line is a problem of its own")
        session.expect("> ")
        session.type(f"{FIRST}\n")
        shown = session.expect(r"forward 9 \(step\)   block 1   39 masks left")
        assert "forward 1 (refresh)   block 1   47 masks left" in shown
        assert "░" in shown
        session.type("\x03")
        session.expect("what was said so far is kept|before anything was said")
        session.expect("> ")
        session.type("/set threshold 0.9\n")
        session.expect("threshold +0.9")
        session.expect("> ")
        session.type(f"{FIRST}\n")
        session.expect("#### 59\r\n")  # the model goes on
        session.expect("> ")
        session.type("/stats\n")
        session.expect(r"answers +1 +2")
        session.expect("> ")
        session.press_ctrl_c_at_the_prompt("Ctrl-C again leaves")
        session.expect("> ")
        session.type(f"{FIRST}\n")
        session.expect("forward 2 ")
        session.type("\x03")
        session.expect("kept|before anything was said")
        session.expect("> ")
        session.press_ctrl_c_at_the_prompt("the session is over")  # the second one
        assert session.process.wait(30) == 0
    finally:
        session.close()

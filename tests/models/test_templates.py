"""Chat templates: the text is that of transformers, to the letter, and none can take the machine's time or memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import fastdllm_triton as fdt
from fastdllm_triton import tiny
from fastdllm_triton.models import templates
from fastdllm_triton.models.templates import render_chat

# Each of a style that released models have.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLADA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- messages[0]['content'] }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(seen=0) %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- ns.seen }}
"""
BLOCKS = """
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
  {{ message | tojson }} {{ messages | tojson(indent=2) }}
    {% generation %}
    {{ message.content | upper }}{{ eos_token }}
    {% endgeneration %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% endfor %}
"""
MACROS = (
    "{% macro turn(m, last=false) %}[{{ m.role }}] {{ m.content | replace('\n', ' ') | indent }}{{ '!' if last }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m, loop.last) }}{% endfor %}{{ dict(a=1)['a'] }}{{ 'a b c' | wordwrap(3) | title }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ {'k': [1, 2.5, none, true]} | pprint }}{{ 'ünïcode é' | e }}"
)
STYLES = {"chatml": CHATML, "llada": LLADA, "qwen2": QWEN2, "llama3": LLAMA3, "blocks": BLOCKS, "macros": MACROS}

CHATS: dict[str, list[dict[str, str]]] = {
    "one": [{"role": "user", "content": "hello"}],
    "system": [{"role": "system", "content": " be kind "}, {"role": "user", "content": "<b>&'\"\n</b> 你好 😀 \u2028"}],
    "turns": [{"role": ("user", "assistant")[i % 2], "content": f" turn {i}\n"} for i in range(6)],
}
HELLO = CHATS["one"]


def _tokenizer(template: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.PATH)
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|unknown|>"
    return tokenizer


def _render(template: str, messages: list[dict[str, str]] = HELLO) -> str:
    return render_chat(template, {"bos_token": "<s>"}, messages)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", STYLES)
def test_the_text_is_that_of_transformers(style: str, chat: str) -> None:
    tokenizer = _tokenizer(STYLES[style])
    theirs = tokenizer.apply_chat_template(CHATS[chat], add_generation_prompt=True, tokenize=False)
    assert render_chat(STYLES[style], tokenizer.special_tokens_map, CHATS[chat]) == theirs


@pytest.mark.parametrize("style", ["chatml", "llada", "qwen2"])
def test_a_message_that_is_continued_is_left_open_as_in_transformers(style: str) -> None:
    tokenizer = _tokenizer(STYLES[style])
    chat = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    theirs = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert render_chat(STYLES[style], tokenizer.special_tokens_map, chat, next_turn=False) == theirs


@pytest.mark.parametrize(("style", "end"), [("chatml", "two\nlines \n"), ("qwen2", "two\nlines \n"), ("llada", "two\nlines")])
def test_a_message_that_is_continued_ends_as_the_template_writes_it(style: str, end: str) -> None:
    """With its last space, or trimmed; versions of transformers differ in this."""
    chat = [*HELLO, {"role": "assistant", "content": "two\nlines \n"}]
    assert render_chat(STYLES[style], {"bos_token": ""}, chat, next_turn=False).endswith(end)


def test_a_template_that_leaves_out_the_message_to_be_continued() -> None:
    with pytest.raises(ValueError, match="it leaves out the message that is to be continued"):
        render_chat("{{ messages[0].content }}", {}, [*HELLO, {"role": "assistant", "content": "x"}], next_turn=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the built-in model, for a template."""
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.PATH / file, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", r"System role not supported"),
        ("{{ raise_exception('two\nlines') }}", r"two lines"),
        ("{% if", r"TemplateSyntaxError: unexpected 'end of template'"),
        ("{{ nothing.there }}", r"UndefinedError: 'nothing' is undefined"),
        ("{{ ''.__class__.mro() }}", r"SecurityError: access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ messages[0] + 1 }}", r"TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", r"ZeroDivisionError: division by zero"),
        ("{{ 10.0 ** 400 }}", r"OverflowError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"RecursionError: maximum recursion depth exceeded"),
        ("{{ '%1000000000d' | format(1) }}", r"it takes too much memory"),
        ("{{ 'x' * 5000000 }}", r"it makes 5000000 characters, more than 4000000"),
        ("{% include '/etc/passwd' %}", r"TypeError: no loader for this environment specified"),
        (["a list"], r"it must be text, got list"),
    ],
)
def test_a_template_that_fails_is_an_error_that_names_the_folder(folder: Path, template: Any, message: str) -> None:
    lm = fdt.load(folder, device="cpu")
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"^chat: the template of {folder} failed: {message}"):
        lm.encode("hello", chat=True)
    lm.tokenizer.chat_template = CHATML  # The next one is not affected.
    assert lm.encode("hello", chat=True)


def test_a_template_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    templates._stop()
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^it takes more than 0.5 seconds$"):
        _render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert time.perf_counter() - began < 5
    assert _render(CHATML).startswith("<|im_start|>user\nhello")
    templates._stop()


def test_out_of_the_sandbox_no_file_can_be_opened() -> None:
    """Should jinja's sandbox have a hole: the process behind it reads and writes nothing."""
    code = f"""
import runpy
runpy.run_path({str(templates._WORKER)!r})["limit"](500_000_000)
for attempt in ("open('/etc/hostname')", "open('/tmp/ran', 'w')", "__import__('os').pipe()"):
    try:
        eval(attempt)
    except OSError as error:
        print(error.errno)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["24"] * 3  # EMFILE


def test_a_template_is_rendered_by_one_process_that_is_kept() -> None:
    _render(CHATML)
    process = templates._process
    for i in range(50):
        assert _render("{{ messages[0].content }}", [{"role": "user", "content": f"{i}"}]) == f"{i}"
    assert templates._process is process


def test_a_process_that_was_killed_is_replaced() -> None:
    _render(CHATML)
    assert templates._process is not None
    templates._process.kill()
    templates._process.wait()
    assert _render("{{ messages[0].content }}") == "hello"


def test_threads_get_their_own_answers() -> None:
    def ask(i: int) -> list[str]:
        return [_render("{{ messages[0].content }}", [{"role": "user", "content": f"{i} {j}"}]) for j in range(20)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [[f"{i} {j}" for j in range(20)] for i in range(8)]


def _ask_in_child(queue: Any) -> None:
    queue.put((os.getpid(), _render("{{ messages[0].content }}"), templates._process is not None))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    _render(CHATML)
    kept = templates._process
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ask_in_child, args=(queue,))
    child.start()
    pid, text, _ = queue.get(timeout=60)
    child.join()
    assert (pid != os.getpid(), text) == (True, "hello")
    assert templates._process is kept and _render("{{ messages[0].role }}") == "user"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals cannot be sent to a thread")
def test_an_interrupt_does_not_mix_up_answers() -> None:
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores interrupts.
    try:
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            _render("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}an answer to nobody")
    finally:
        signal.signal(signal.SIGINT, before)
    assert _render("{{ messages[0].content }}") == "hello"


def test_a_program_from_stdin_can_chat(folder: Path) -> None:
    """Where there is no main module to import again, as in an interactive session; and nothing is left behind at the end."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    code = f"""
import fastdllm_triton as fdt
from fastdllm_triton.models import templates
lm = fdt.load({str(folder)!r}, device="cpu")
print(len(lm.encode("hello", chat=True)) > 5, templates._process.pid)
"""
    result = subprocess.run(
        [sys.executable], input=code, capture_output=True, text=True, check=True, cwd=folder, env=_environment()
    )
    told, pid = result.stdout.split()
    assert told == "True" and not Path(f"/proc/{pid}").exists()


def _environment() -> dict[str, str]:
    root = str(Path(fdt.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}

"""Checkpoints and modules made to do harm, and a program that loads and uses them one after the other.

``python _hostile.py GROUP N ...`` tries every Nth case of each group, and prints a line of JSON before and after each. It is a
process of its own because a case that goes wrong may hang, eat the memory or end the interpreter.
"""

from __future__ import annotations

import base64
import copy
import faulthandler
import functools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).parent
SECONDS, MEGABYTES = 10, 700

#: What evil code would write. It lies beside the folders of the cases.
MARKER = "PWNED"

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@dataclass
class Case:
    """One attack.

    Attributes:
        name: what it tries.
        attempt: does it, in an empty folder.
        refused: whether it must end in an error; otherwise it may as well do no harm.
    """

    name: str
    attempt: Callable[[Path], None]
    refused: bool = True


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint to begin with, and its use.


FOLDERS = {"llada": "llada-gqa", "dream": "dream-gqa", "fast_dllm_qwen": "fast-dllm-v2", "sdar": "sdar"}


@functools.cache
def base(architecture: str, shards: int = 1) -> dict[str, bytes]:
    """The files of a checkpoint that works, tokenizer and template included."""
    from fastdllm_triton import tiny

    model = tiny.PATH if architecture == "llada" else TESTS / "golden" / FOLDERS[architecture]
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    files["tokenizer.json"] = (tiny.PATH / "tokenizer.json").read_bytes()
    config = json.loads((tiny.PATH / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    if (model / "added_tokens.json").exists():
        files["added_tokens.json"] = (model / "added_tokens.json").read_bytes()
    if shards > 1:
        tensors, names = load_file(model / "model.safetensors"), {}
        del files["model.safetensors"]
        with tempfile.TemporaryDirectory() as folder:
            for i in range(shards):
                file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
                part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
                names |= dict.fromkeys(part, file)
                save_file(part, Path(folder) / file)
                files[file] = (Path(folder) / file).read_bytes()
        files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    return files


def use(folder: Path) -> None:
    """What a user does with a checkpoint."""
    import fastdllm_triton as fdt

    lm = fdt.load(folder, device="cpu")
    lm.encode("12+3 is")
    if lm.tokenizer is not None and lm.tokenizer.chat_template:
        lm.encode("hello", chat=True)
    output = lm.generate("What is 12+3?", gen_length=8, block_length=8)
    assert output.texts is not None


def checkpoint(architecture: str, edit: Callable[[Path], None], shards: int = 1) -> Callable[[Path], None]:
    """Uses a checkpoint whose folder was edited."""

    def attempt(folder: Path) -> None:
        for name, content in base(architecture, shards).items():
            (folder / name).write_bytes(content)
        edit(folder)
        use(folder)

    return attempt


def write(file: str, content: bytes | str) -> Callable[[Path], None]:
    """Puts a file in place of the one that is there."""

    def edit(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes an object in place, or replaces it by what the change gives."""

    def edit(folder: Path) -> None:
        raw = json.loads((folder / file).read_text())
        changed = change(raw)
        (folder / file).write_text(json.dumps(raw if changed is None else changed))

    return edit


def fields(file: str, **values: Any) -> Callable[[Path], None]:
    """Sets fields of a JSON file."""
    return edit_json(file, lambda raw: raw.update(values))


# ----------------------------------------------------------------------------------------------------------------------
# Fields of config.json: of every type, each with what is not of it.

_NEVER = ["x", "", [], [4], {}, {"a": 1}, math.nan, math.inf, -math.inf, -1, 10**30, -(10**30), 2**31, "8" * 10**5]
WRONG: dict[str, list[Any]] = {
    "size": [*_NEVER, None, True, False, 0, 1.5, 1e30],
    "optional size": [*_NEVER, True, False, 0, 1.5, 1e30],
    "number": ["x", "", [], [4], {}, math.nan, math.inf, -math.inf, -1, 10**30, None, True, False, 0, "1e-5"],
    "flag": [*_NEVER, None, 0, 1, 1.5, "false", "true"],
    "token": [*_NEVER, None, True, False, 1.5, 10**6],
    "tokens": [*(v for v in _NEVER if v not in ([], [4])), True, 1.5, 10**6, [True], [None], [[0]], [-1], ["0"]],
    "object": ["x", "", [], [4], -1, True, 1.5, {"rope_type": "yarn"}, {"rope_type": ["default"]}, {"type": 5}],
    "text": [v for v in [*_NEVER, None, True, 5] if v != "llada"],
}
TYPES = {
    "llada": {
        "size": ["d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length"],
        "optional size": ["n_kv_heads", "mlp_hidden_size", "embedding_size"],
        "number": ["rms_norm_eps", "rope_theta"],
        "flag": ["weight_tying"],
        "token": ["mask_token_id"],
        "tokens": ["eos_token_id"],
        "object": ["rope_scaling", "rope_parameters"],
        "text": ["model_type"],
    },
    "dream": {
        "size": ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"],
        "optional size": ["num_key_value_heads"],
        "number": ["rms_norm_eps", "rope_theta"],
        "flag": ["tie_word_embeddings"],
        "token": ["mask_token_id"],
        "tokens": ["eos_token_id"],
        "object": ["rope_scaling", "rope_parameters"],
        "text": ["model_type"],
    },
}
#: Sizes that the configs of block-causal families have besides Dream's fields.
BLOCK_CAUSAL = {"fast_dllm_qwen": ["bd_size"], "sdar": ["block_size", "head_dim"]}


def config_cases() -> Iterator[Case]:
    """Each field with each value that is not of its type; layers and sizes that would fill any memory; broken files."""
    for architecture, types in TYPES.items():
        for kind, names in types.items():
            for name in names:
                for value in WRONG[kind]:
                    edit = fields("config.json", **{name: value})
                    yield Case(f"{architecture} {name} = {value!r:.40}", checkpoint(architecture, edit))
        layers = "n_layers" if architecture == "llada" else "num_hidden_layers"
        for count in (4096, 10**7, 10**9, 2**31 - 1):
            yield Case(f"{architecture} {count} layers", checkpoint(architecture, fields("config.json", **{layers: count})))
        both = fields("config.json", mask_token_id=0, eos_token_id=[3, 0])
        yield Case(f"{architecture} the mask ends texts", checkpoint(architecture, both))
        quiet = fields("config.json", eos_token_id=None)
        yield Case(f"{architecture} no end", checkpoint(architecture, quiet), refused=False)
    yield from block_causal_cases()
    for name, content in BROKEN_JSON.items():
        yield Case(f"config.json: {name}", checkpoint("llada", write("config.json", content)))
    yield Case(
        "config.json is a folder", checkpoint("llada", lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()))
    )
    yield Case("config.json is a pipe", checkpoint("llada", pipe("config.json")))
    yield Case("config.json is a device without end", checkpoint("llada", link("config.json", "/dev/zero")))
    yield Case("config.json is a link to itself", checkpoint("llada", link("config.json", "config.json")))


def block_causal_cases() -> Iterator[Case]:
    """Fields that these families alone have, and the files that have the special tokens which their configs lack."""
    for architecture, sizes in BLOCK_CAUSAL.items():
        for name in sizes:
            for value in WRONG["size"]:
                edit = fields("config.json", **{name: value})
                yield Case(f"{architecture} {name} = {value!r:.40}", checkpoint(architecture, edit))
        kinds: list[Any] = [
            "full_attention",
            [],
            [4],
            [None],
            ["x"],
            [["full_attention"]],
            {},
            -1,
            True,
            "8" * 10**5,
            ["\x1b[2J"],
        ]
        for value in [*kinds, ["full_attention", "sliding_attention"]]:
            edit = fields("config.json", layer_types=value)
            yield Case(f"{architecture} layer_types = {value!r:.40}", checkpoint(architecture, edit))
    for value in WRONG["token"]:
        edit = write("added_tokens.json", json.dumps({"|<MASK>|": value}))
        yield Case(f"added_tokens.json: the mask is {value!r:.40}", checkpoint("fast_dllm_qwen", edit))
    for value in WRONG["tokens"]:
        edit = write("generation_config.json", json.dumps({"eos_token_id": value}))
        yield Case(f"generation_config.json: the end is {value!r:.40}", checkpoint("sdar", edit))
    for name, content in BROKEN_JSON.items():
        yield Case(f"no mask, as added_tokens.json is {name}", checkpoint("fast_dllm_qwen", write("added_tokens.json", content)))
        if name != "lone surrogates":  # They are in a field that nobody reads.
            yield Case(f"generation_config.json: {name}", checkpoint("sdar", write("generation_config.json", content)))


BROKEN_JSON: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "llada", ',
    "a list": b"[]",
    "a string": b'"llada"',
    "null": b"null",
    "a number": b"5",
    "deep lists": b"[" * 10**5,
    "deep objects": b'{"a":' * 10**5,
    "deep and whole": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "digits": b'{"n_layers": ' + b"9" * 10**5 + b"}",
    "NaN": b'{"n_layers": NaN}',
    "-Infinity": b'{"n_layers": -Infinity}',
    "two values of a name": b'{"model_type": "dream", "model_type": "llada"}',
    "UTF-16": '{"model_type": "llada"}'.encode("utf-16"),
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "a byte order mark": b'\xef\xbb\xbf{"model_type": "llada"}',
    "NULs": b"\0" * 100,
    "lone surrogates": b'{"model_type": "\\ud800"}',
    "17 MB": b'{"a": "' + b" " * (17 << 20) + b'"}',
    "objects without end": b"[" + b"{}," * (5 << 19) + b"{}]",
    "pickle": pickle.dumps({"model_type": "llada"}),
}


def pipe(file: str) -> Callable[[Path], None]:
    """A named pipe that nobody writes to."""

    def edit(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return edit


def link(file: str, target: str) -> Callable[[Path], None]:
    """A link to elsewhere."""

    def edit(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return edit


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors, made by hand.


def packed(header: bytes | Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, as its format says or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@functools.cache
def parts() -> tuple[str, bytes]:
    """Header and data of the weights of the base checkpoint."""
    content = base("llada")["model.safetensors"]
    size = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + size].decode(), content[8 + size :]


def altered(change: Callable[[dict[str, Any], str], Any]) -> bytes:
    """The weights with the header's first tensor changed; the change gets the header and that name."""
    text, data = parts()
    header = json.loads(text)
    first = min(header, key=lambda name: header[name]["data_offsets"][0] if name != "__metadata__" else math.inf)
    change(header, first)
    return packed(header, data)


def entry(**values: Any) -> bytes:
    """The weights with fields of the first tensor's entry replaced; ``...`` removes one."""

    def change(header: dict[str, Any], name: str) -> None:
        header[name].update(values)
        header[name] = {field: value for field, value in header[name].items() if value is not ...}

    return altered(change)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def safetensors_files() -> Iterator[tuple[str, bytes, bool]]:
    """What it tries, the file, and whether it must be refused."""
    text, data = parts()
    raw = text.encode()
    header = json.loads(text)
    begin, end = next(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    yield "an empty file", b"", True
    yield "seven bytes", b"\0" * 7, True
    for length in (0, 1, len(raw) - 1, len(raw) + 1, 10**8 + 1, 2**31, 2**62, 2**63, 2**64 - 1):
        yield f"a header of {length} bytes", packed(raw, data, length), True
    for name, content in BROKEN_JSON.items():
        yield f"a header: {name}", packed(content, data), True
    yield "spaces before the header", packed(b"   " + raw, data), False
    yield "spaces behind the header", packed(raw + b" " * 8, data), False
    yield "data that is cut", packed(raw, data[:-1]), True
    yield "data that goes on", packed(raw, data + b"x"), True
    yield "no data", packed(raw), True
    for value in ("X", "f32", "", 5, None, [], ..., "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4"):
        yield f"dtype {value!r}", entry(dtype=value), True
    for value in ("x", None, {}, [-1, 5], [1.5], ["a"], [2**63], [2**32, 2**32], [10**30], [True], [[1]], [], [0], ...):
        yield f"shape {value!r}", entry(shape=value), True
    offsets: list[Any] = [
        "x",
        None,
        [begin],
        [begin, end, end],
        [end, begin],
        [-4, end],
        [begin, 10**18],
        [begin, 2**64],
        ["0", "4"],
    ]
    for value in [*offsets, [begin, end - 1], [begin, end + 4], [end, end], [begin + 4, end + 4], [1.0, 2.0], ...]:
        yield f"offsets {value!r}", entry(data_offsets=value), True
    yield "an entry more", entry(code="import os"), False
    yield "an entry that is null", altered(lambda h, n: h.update({n: None})), True
    yield "an entry that is a list", altered(lambda h, n: h.update({n: []})), True
    yield "two tensors in one place", altered(lambda h, n: h.update({"again": h[n]})), True
    yield "a tensor without a name", altered(lambda h, n: h.update({"": h.pop(n)})), True
    yield "a name of a megabyte", altered(lambda h, n: h.update({"x" * 10**6: h.pop(n)})), True
    yield "a name that a terminal acts on", altered(lambda h, n: h.update({"\x1b]0;pwn\x07\n": h.pop(n)})), True
    yield "metadata that is a list", altered(lambda h, n: h.update(__metadata__=[])), True
    yield "metadata of numbers", altered(lambda h, n: h.update(__metadata__={"a": 5})), True
    yield "metadata that names code", altered(lambda h, n: h.update(__metadata__={"format": "os.system"})), False
    yield "metadata alone", packed({"__metadata__": {}}), True
    yield "the name of the metadata", altered(lambda h, n: h.update(__metadata__=h.pop(n))), True
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    yield "too many tensors", packed(many), True
    yield "a name twice", packed(raw[:-1] + b"," + raw[1:], data), True
    yield "random bytes", random.Random(0).randbytes(10_000), True
    yield "a zip", b"PK\x03\x04" + bytes(1000), True


def safetensors_cases() -> Iterator[Case]:
    """Weights that are none."""
    for name, content, refused in safetensors_files():
        yield Case(f"safetensors: {name}", checkpoint("llada", write("model.safetensors", content)), refused)
    yield Case("safetensors is a pipe", checkpoint("llada", pipe("model.safetensors")))
    yield Case("safetensors is a device", checkpoint("llada", link("model.safetensors", "/dev/zero")))
    yield Case("safetensors is a terminal", checkpoint("llada", link("model.safetensors", "/dev/tty")))
    yield Case("safetensors is nowhere", checkpoint("llada", link("model.safetensors", "nowhere")))
    for value in (math.nan, math.inf, 1e38):
        for architecture in ("llada", "dream"):

            def fill(folder: Path, value: float = value) -> None:
                tensors = load_file(folder / "model.safetensors")
                save_file({name: torch.full_like(t, value) for name, t in tensors.items()}, folder / "model.safetensors")

            yield Case(f"{architecture} weights of {value}", checkpoint(architecture, fill), refused=value != 1e38)


# ----------------------------------------------------------------------------------------------------------------------
# Indices.

_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index_cases() -> Iterator[Case]:
    """Shards elsewhere, of other types, and tensors in two places."""
    index = "model.safetensors.index.json"
    places: list[Any] = [
        "../x/{}",
        "/tmp/{}",
        "/etc/shadow",
        "/etc/passwd",
        "./{}",
        "sub/../{}",
        "",
        ".",
        "..",
        "~/{}",
        "{}\0",
        "{}\n",
    ]
    places += [
        "..\\{}",
        "C:\\{}",
        "file:///{}",
        "https://example.com/{}",
        "x.bin",
        "x.pt",
        "config.json",
        5,
        None,
        True,
        1.5,
        ["{}"],
        {},
    ]
    for place in places:
        value = place.format(_FIRST) if isinstance(place, str) else place

        def move(raw: dict[str, Any], value: Any = value) -> None:
            raw["weight_map"][min(raw["weight_map"])] = value

        yield Case(f"a shard {place!r}", checkpoint("llada", edit_json(index, move), 2))
        yield Case(f"all shards {place!r}", checkpoint("dream", edit_json(index, lambda raw, v=value: all_to(raw, v)), 2))
    for wrong in ([], {}, "x", None, 5, True, 1.5, [["a", "b"]], {"": ""}, {"a": None}, math.nan):
        yield Case(f"weight_map {wrong!r}", checkpoint("llada", fields(index, weight_map=wrong), 2))
    yield Case("no weight_map", checkpoint("llada", edit_json(index, lambda raw: {"metadata": {}}), 2))
    for name, content in BROKEN_JSON.items():
        yield Case(f"index: {name}", checkpoint("llada", write(index, content), 2))
    yield Case("a shard that is a pipe", checkpoint("llada", pipe(_FIRST), 2))
    yield Case("a shard that is a device", checkpoint("llada", link(_SECOND, "/dev/zero"), 2))
    yield Case("an index that is a pipe", checkpoint("llada", pipe(index), 2))
    yield Case("a shard in place of another", checkpoint("llada", lambda f: shutil.copy(f / _FIRST, f / _SECOND), 2))
    swapped = edit_json(
        index, lambda raw: {"weight_map": {k: _FIRST if v == _SECOND else _SECOND for k, v in raw["weight_map"].items()}}
    )
    yield Case("shards the other way round", checkpoint("llada", swapped, 2))

    def twice(folder: Path) -> None:
        tensors = load_file(folder / _FIRST)
        name = min(tensors)
        save_file(load_file(folder / _SECOND) | {name: torch.zeros_like(tensors[name])}, folder / _SECOND)

    yield Case("a tensor in two shards", checkpoint("llada", twice, 2))


def all_to(raw: dict[str, Any], value: Any) -> None:
    """Places every tensor in one file."""
    raw["weight_map"] = dict.fromkeys(raw["weight_map"], value)


# ----------------------------------------------------------------------------------------------------------------------
# Code, and templates.

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace(__class__=1).__class__ }}{{ namespace.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(strftime_now) }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{% extends '/etc/passwd' %}",
    "{{ ([1] * 10**8) | length }}{{ [messages] * 10**9 }}",
    "{{ 'x' * 10**10 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 99999999 }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "{{ [" * 5000 + "1" + "]" * 5000 + " }}",
    "{% if " + "not " * 50_000 + "1 %}{% endif %}",
    "{{ lipsum(10**6) }}",
    "{{ raise_exception('no system prompts, please') }}",
    "{{ raise_exception('\x1b]0;pwn\x07' * 1000) }}",
    "{{ messages[0].nothing.there }}",
    "{{ 1 / 0 }}",
    "{% if",
    "{{ 'x' | nofilter }}",
]

CODE = "import os\nos.system('touch MARKER')\n"


def code_cases() -> Iterator[Case]:
    """Everything that a checkpoint could bring to be executed."""

    def marked(text: str, folder: Path) -> str:
        return text.replace("MARKER", str(folder.parent / MARKER))

    def pickled(file: str, architecture: str = "llada") -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            (folder / file).write_bytes(pickle.dumps(Evil(folder.parent / MARKER)))

        return checkpoint(architecture, edit)

    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        yield Case(f"a pickle in place of {file}", pickled(file))
    for file in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl", "tokenizer.pkl", "vocab.bin"):
        yield Case(f"a pickle beside it: {file}", pickled(file), refused=False)

    def only_pickle(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"w": torch.zeros(1), "evil": Evil(folder.parent / MARKER)}, folder / "pytorch_model.bin")

    yield Case("weights as a pickle", checkpoint("llada", only_pickle))
    names = (
        "modeling_llada.py",
        "configuration_llada.py",
        "tokenization_llada.py",
        "__init__.py",
        "setup.py",
        "sitecustomize.py",
    )
    for name in (*names, "json.py", "torch.py", "jinja2.py", "fastdllm_triton.py", "conftest.py"):

        def bring(folder: Path, name: str = name) -> None:
            (folder / name).write_text(marked(CODE, folder))
            stem = name.removesuffix(".py")
            fields("config.json", auto_map={"AutoModel": f"{stem}.M", "AutoConfig": f"{stem}.C"}, trust_remote_code=True)(folder)
            classes = {
                "auto_map": {"AutoTokenizer": [f"{stem}.T", f"{stem}.T"]},
                "trust_remote_code": True,
                "tokenizer_class": "T",
            }
            fields("tokenizer_config.json", **classes)(folder)

        yield Case(f"code in {name}", checkpoint("llada", bring), refused=False)
    for value in ("os.system", "subprocess.Popen", "builtins.eval", "__import__('os')", "../../evil.T", 5, None, [], {"a": 1}):
        edit = fields("tokenizer_config.json", tokenizer_class=value)
        yield Case(f"tokenizer_class {value!r}", checkpoint("llada", edit), refused=False)
        edit = fields("config.json", architectures=[value], tokenizer_class=value, auto_map={"AutoTokenizer": [value, value]})
        yield Case(f"config.json names {value!r}", checkpoint("llada", edit), refused=False)
    for template in ESCAPES:

        def inline(folder: Path, template: str = template) -> None:
            fields("tokenizer_config.json", chat_template=marked(template, folder))(folder)

        yield Case(f"template {template:.60}", checkpoint("llada", inline), refused=False)
    for number, template in enumerate(ESCAPES[:6]):

        def beside(folder: Path, template: str = template) -> None:
            (folder / "chat_template.jinja").write_text(marked(template, folder))

        def as_json(folder: Path, template: str = template) -> None:
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": marked(template, folder)}))

        yield Case(f"chat_template.jinja {number}", checkpoint("llada", beside), refused=False)
        yield Case(f"chat_template.json {number}", checkpoint("llada", as_json), refused=False)
    for value in (5, [], [5], ["x"], {"default": 5}, {"a": "b"}, [{"name": "default", "template": 5}], [{"name": "a"}], True):
        yield Case(
            f"a template {value!r}", checkpoint("llada", fields("tokenizer_config.json", chat_template=value)), refused=False
        )
    yield Case("templates elsewhere", checkpoint("llada", link("additional_chat_templates", "/etc")), refused=False)
    yield Case("a template that is a pipe", checkpoint("llada", pipe("chat_template.jinja")))
    yield Case("a template that is a device", checkpoint("llada", link("chat_template.jinja", "/dev/zero")))
    yield Case("a template of no text", checkpoint("llada", write("chat_template.jinja", b"\xff\xfe")))
    encoded = base64.b64encode(pickle.dumps(Evil(Path("/tmp") / MARKER))).decode()
    yield Case(
        "a pickle in a field",
        checkpoint("llada", fields("config.json", quantizer=encoded, _pre_quantization_dtype=encoded)),
        False,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer files.


def tokenizer_cases() -> Iterator[Case]:
    """Fields of wrong types, files that are none, and tokenizers that fail over text."""
    wrong: list[Any] = ["x", 5, None, [], {}, True, -1, 1e300, 10**30, {"content": 5}, [["a"]], "\0", "\x1b[2J"]
    names = ["model_max_length", "padding_side", "eos_token", "pad_token", "mask_token", "unk_token", "added_tokens_decoder"]
    names += ["extra_special_tokens", "additional_special_tokens", "clean_up_tokenization_spaces", "model_input_names"]
    names += [
        "init_inputs",
        "auto_map",
        "backend",
        "tokenizer_file",
        "fast_tokenizer_files",
        "name_or_path",
        "split_special_tokens",
    ]
    for name in names:
        for value in wrong:
            edit = fields("tokenizer_config.json", **{name: value})
            yield Case(f"{name} = {value!r}", checkpoint("llada", edit), refused=False)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for name, content in BROKEN_JSON.items():
            yield Case(f"{file}: {name}", checkpoint("llada", write(file, content)), refused=False)
        yield Case(f"{file} is a pipe", checkpoint("llada", pipe(file)))
        yield Case(f"{file} is a device", checkpoint("llada", link(file, "/dev/zero")))
    split = {"type": "Split", "pattern": {"Regex": "([a-z ]+[a-z ]+)+\\?"}, "behavior": "Isolated", "invert": False}
    for part in ("pre_tokenizer", "normalizer", "post_processor", "decoder", "model", "added_tokens", "truncation", "padding"):
        for value in ("x", 5, [], {}, {"type": "Sequence"}, {"type": "nothing"}, {"type": 5}, split):
            yield Case(f"{part} = {value!r:.40}", checkpoint("llada", fields("tokenizer.json", **{part: value})), refused=False)
    evil = {"content": "a", "\x1b]0;pwn\x07": True}
    for name, value in {
        "added_tokens_decoder": {"0": evil},
        "eos_token": evil | {"__type": "AddedToken"},
        "x": [[evil | {"__type": ""}]],
    }.items():
        yield Case(
            f"a name in {name} that a terminal acts on", checkpoint("llada", fields("tokenizer_config.json", **{name: value}))
        )
    yield Case(
        "the same in special_tokens_map.json", checkpoint("llada", write("special_tokens_map.json", json.dumps({"x": evil})))
    )
    yield Case("the same in tokenizer.json", checkpoint("llada", fields("tokenizer.json", added_tokens=[evil])))
    for name in ("tokenizer_class", "transformers_version", "eos_token", "chat_template", "backend", "\x1b[2J"):
        edit = fields("tokenizer_config.json", **{name: "\x1b]0;pwn\x07"})
        yield Case(f"{name!r} that a terminal acts on", checkpoint("llada", edit), refused=False)
    for token in (10**9, 2**31, 2**32 - 1):
        added = [
            {
                "id": token,
                "content": "What",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ]
        yield Case(f"a token {token}", checkpoint("llada", fields("tokenizer.json", added_tokens=added)), refused=False)


# ----------------------------------------------------------------------------------------------------------------------
# Mutations.

NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "\0",
    "../x",
]
NASTY += ["9" * 5000, [], [[]], {}, {"a": []}, [1, "a", None], "\ud800", "\u202e", "F32", "llada", "Dream", "model.safetensors"]


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """A value of JSON with some of its nodes replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        nodes = [node for node in walk(tree) if isinstance(node, (dict, list)) and node]
        if not nodes:
            return rng.choice(NASTY)
        node = rng.choice(nodes)
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        match rng.randrange(5):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(["x", "", f"{key}x", rng.choice(keys)])] = node.pop(key)
            case 2:
                node[key] = copy.deepcopy(node[rng.choice(keys)])
            case 3 if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
                node[key] = rng.choice(
                    [node[key] + 1, node[key] * 2, -node[key], node[key] // 2, 10 * node[key], float(node[key])]
                )
            case _:
                node[key] = rng.choice(NASTY)
    return tree


def walk(tree: Any) -> Iterator[Any]:
    """A tree's nodes."""
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from walk(child)


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, put in, taken out or doubled."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 50)]
            case _:
                del data[at:]
        if not data:
            break
    return bytes(data)


def mutation(kind: str, number: int) -> Case:
    """A checkpoint with one file changed at random, the same for the same number."""
    rng = random.Random(f"{kind} {number}")
    architecture = tuple(FOLDERS)[number % len(FOLDERS)]
    shards = 2 if kind == "index" else 1
    file = {
        "config": "config.json",
        "header": "model.safetensors",
        "index": "model.safetensors.index.json",
        "tokenizer config": "tokenizer_config.json",
        "tokenizer": "tokenizer.json",
    }[kind]

    def edit(folder: Path) -> None:
        content = (folder / file).read_bytes()
        data, length = b"", 0
        if kind == "header":
            length = struct.unpack("<Q", content[:8])[0]
            content, data = content[8 : 8 + length], content[8 + length :]
        if rng.random() < 0.5:
            changed = mutated_bytes(rng, content)
        else:
            changed = json.dumps(mutated_tree(rng, json.loads(content))).encode()
        if kind == "header":
            changed = packed(changed, data, length if rng.random() < 0.1 else None)
        (folder / file).write_bytes(changed)

    return Case(f"{kind} {number}", checkpoint(architecture, edit, shards), refused=False)


# ----------------------------------------------------------------------------------------------------------------------
# Loaded modules.


class Raises:
    """An object of which nothing can be asked."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("two\nlines")

    def __repr__(self) -> str:
        raise RuntimeError("two\nlines")

    def __bool__(self) -> bool:
        raise RuntimeError("two\nlines")


def accelerated(architecture: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Accelerates a module that was changed, and generates with it."""

    def attempt(folder: Path) -> None:
        from _modules import load_module

        import fastdllm_triton as fdt

        module: Any = load_module(TESTS / "golden" / FOLDERS[architecture])
        change(module)
        fdt.accelerate(module)
        module.generate([[1, 2, 3]], gen_length=8, block_length=8)

    return attempt


def module_cases() -> Iterator[Case]:
    """Configs of modules with fields of any type, and parameters that are not what they seem."""
    odd = [torch.ones(3), Raises(), object, b"x", 10**5000, "x" * 10**6]
    for architecture, types in TYPES.items():
        for kind, names in types.items():
            for name in names:
                for value in [*WRONG[kind], *odd]:
                    change = functools.partial(set_field, name=name, value=value)
                    what = "an odd object" if any(value is o for o in odd) else f"{value!r:.40}"
                    yield Case(f"{architecture} module.config.{name} = {what}", accelerated(architecture, change))
        for name in ("rope", "quantization_config", "attention_dropout", "_name_or_path", "hidden_act", "unknown"):
            for value in odd:
                change = functools.partial(set_field, name=name, value=value)
                yield Case(
                    f"{architecture} module.config.{name} of an odd type", accelerated(architecture, change), refused=False
                )
        for config in (5, "x", [], {}, None, object(), Raises(), torch.ones(2), {1: 2}):
            change = functools.partial(setattr_of, name="config", value=config)
            yield Case(f"{architecture} module.config is a {type(config).__name__}", accelerated(architecture, change))
        layers = "n_layers" if architecture == "llada" else "num_hidden_layers"
        change = functools.partial(set_field, name=layers, value=10**9)
        yield Case(f"{architecture} a module of a billion layers", accelerated(architecture, change))
        for what, make in PARAMETERS.items():
            change = functools.partial(set_parameter, make=make)
            yield Case(
                f"{architecture} a parameter that is {what}", accelerated(architecture, change), refused=what not in HARMLESS
            )
        yield Case(f"{architecture} a hook that raises", accelerated(architecture, raise_in_hook), refused=False)
        yield Case(f"{architecture} a parameter more", accelerated(architecture, add_parameter))


def set_field(module: Any, name: str, value: Any) -> None:
    """A field of the module's config."""
    setattr(module.config, name, value)


def setattr_of(module: Any, name: str, value: Any) -> None:
    """An attribute of the module."""
    setattr(module, name, value)


def raise_in_hook(module: Any) -> None:
    """A hook that generation would not survive, if it ran it."""
    for part in module.modules():
        part.register_forward_hook(lambda *_: 1 / 0)


def add_parameter(module: Any) -> None:
    """A parameter that a model has no place for."""
    module.register_parameter("evil\n\x1b[2J" + "x" * 5000, torch.nn.Parameter(torch.zeros(1)))


def set_parameter(module: Any, make: Callable[[torch.Tensor], Any]) -> None:
    """One of the parameters made anew."""
    owner = next(part for name, part in module.named_modules() if name.endswith("q_proj"))
    owner._parameters["weight"] = make(owner.weight.data)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of any dtype."""
    return torch.nn.Parameter(tensor, requires_grad=False)


PARAMETERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "none": lambda w: None,
    "a number": lambda w: parameter(torch.tensor(1.0)),
    "empty": lambda w: parameter(w[:0]),
    "of one dimension": lambda w: parameter(w.flatten()),
    "of five": lambda w: parameter(w[None, None, None]),
    "a row short": lambda w: parameter(w[:-1]),
    "sparse": lambda w: parameter(w.to_sparse()),
    "compressed": lambda w: parameter(w.to_sparse_csr()),
    "not there": lambda w: parameter(w.to("meta")),
    "not made yet": lambda w: torch.nn.UninitializedParameter(),
    "complex": lambda w: parameter(w.to(torch.complex64)),
    "integers": lambda w: parameter(w.long()),
    "bytes": lambda w: parameter(w.to(torch.float8_e4m3fn)),
    "one row, seen often": lambda w: parameter(w[:1].expand(w.shape)),
    "transposed": lambda w: parameter(w.t()),
    "of two dtypes": lambda w: parameter(w.double()),
    "NaN": lambda w: parameter(w * math.nan),
    "infinite": lambda w: parameter(w + math.inf),
    "seen through a sign": lambda w: parameter(torch._neg_view(w)),
}
HARMLESS = ("seen through a sign",)

GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "config": config_cases,
    "safetensors": safetensors_cases,
    "index": index_cases,
    "code": code_cases,
    "tokenizer": tokenizer_cases,
    "module": module_cases,
}
#: Kinds of mutations, and how many there are of each.
MUTATIONS = {"config": 350, "header": 350, "index": 150, "tokenizer config": 150, "tokenizer": 150}


def cases(group: str) -> list[Case]:
    """The cases of a group, ``mutations`` included."""
    if group == "mutations":
        return [mutation(kind, number) for kind, count in MUTATIONS.items() for number in range(count)]
    return list(GROUPS[group]())


# ----------------------------------------------------------------------------------------------------------------------
# The program.


def outcome(case: Case, folder: Path) -> str:
    """``loaded``, ``refused: ...`` or ``bad: ...``."""
    try:
        case.attempt(folder)
    except (ValueError, MemoryError, FloatingPointError) as error:  # What the documentation says.
        message = str(error)
        if not message.isprintable() or not 0 < len(message) < 1500:
            return f"bad: a message of {len(message)} characters and {len(message.splitlines())} lines: {message[:200]}"
        return f"refused: {type(error).__name__}: {message}"
    except BaseException as error:
        return f"bad: {type(error).__name__}: {str(error)[:300]}"
    return "bad: it was accepted" if case.refused else "loaded"


def peak() -> int:
    """The most memory that this process had, in megabytes."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) // 1024 if match else 0


def main(groups: dict[str, int]) -> None:
    """Tries every so many cases of each group."""
    from fastdllm_triton.models import templates

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    templates.SECONDS = 2.0
    selected = [case for group, step in groups.items() for case in cases(group)[::step]]
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("llada", "dream"):  # Imports, caches and compiled code are no case's memory.
            (Path(scratch) / name).mkdir()
            checkpoint(name, lambda folder: None)(Path(scratch) / name)
        before = peak()
        for number, case in enumerate(selected):
            print(json.dumps({"case": case.name}), flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            folder = Path(scratch) / f"{number}"
            folder.mkdir()
            result = outcome(case, folder)
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(folder)
            if (Path(scratch) / MARKER).exists():
                result = "bad: code was executed"
            if (grown := peak() - before) > MEGABYTES:
                result = f"bad: {grown} MB were taken"
                before += grown
            print(json.dumps({"case": case.name, "result": result}), flush=True)


if __name__ == "__main__":
    main(dict(zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True)))

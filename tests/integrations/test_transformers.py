"""What is read through transformers, with whatever version is installed: tokenizers, chat templates, configs, its own modules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from _modules import GENERATION_FIELDS, Dream, LLaDA, mixin, put_mixin
from conftest import GOLDEN, GOLDEN_DREAM
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import fastdllm_triton as fdt
from fastdllm_triton import compat
from fastdllm_triton.models.tokenizer import read_tokenizer

LLADA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLADA_SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"]
LLADA_CHAT = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>"
LLADA_CHAT += "<|start_header_id|>assistant<|end_header_id|>\n\n"

DREAM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DREAM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
DREAM_CHAT = "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"

TEXT = "hello there, the  cat is\nhere: 1234 <|mask|> café"


def _bpe() -> Tokenizer:
    """A tiny byte-level BPE, as LLaDA's and Dream's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello there, the cat is here; hello the other cat"] * 3, trainer)
    return tokenizer


def _added(special: list[str], first: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(first + i): {"content": token, **flags} for i, token in enumerate(special)}


@pytest.fixture
def llada_folder(tmp_path: Path) -> Path:
    """Tokenizer files as LLaDA's repositories have them."""
    tokenizer = _bpe()
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(LLADA_SPECIAL)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "added_tokens_decoder": _added(LLADA_SPECIAL, first),
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": LLADA_TEMPLATE,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def dream_folder(tmp_path: Path) -> Path:
    """Tokenizer files as Dream's repositories have them: no ``tokenizer.json``, and a class that is remote code."""
    tokenizer = _bpe()
    tokenizer.model.save(str(tmp_path))
    first = tokenizer.get_vocab_size()
    config = {
        "added_tokens_decoder": _added(DREAM_SPECIAL, first),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "chat_template": DREAM_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: first + i for i, token in enumerate(DREAM_SPECIAL)}))
    (tmp_path / "tokenization_dream.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return tmp_path


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def _chat(tokenizer: Any) -> str:
    turns = [{"role": "user", "content": "hello there"}]
    rendered: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return rendered


def _check_round_trip(tokenizer: Any, special: list[str]) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    first = min(tokenizer.convert_tokens_to_ids(special))
    for i, token in enumerate(special):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [first + i]


def test_lladas_tokenizer_and_chat_template(llada_folder: Path) -> None:
    tokenizer: Any = read_tokenizer(llada_folder)
    assert _chat(tokenizer) == LLADA_CHAT
    _check_round_trip(tokenizer, LLADA_SPECIAL)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("name", ["DreamTokenizer", "absent"])
def test_dreams_tokenizer_without_its_remote_class(dream_folder: Path, name: str) -> None:
    _edit(dream_folder, tokenizer_class=name)
    # Where no tokenizer class is named, transformers looks at the config, which names remote classes too.
    raw = {"model_type": "Dream", "auto_map": {"AutoConfig": "tokenization_dream.DreamConfig"}}
    (dream_folder / "config.json").write_text(json.dumps(raw))
    tokenizer: Any = read_tokenizer(dream_folder)
    assert _chat(tokenizer) == DREAM_CHAT
    _check_round_trip(tokenizer, DREAM_SPECIAL)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token) == ("<|beginoftext|>", "<|endoftext|>", "<|mask|>")
    assert not (dream_folder / "ran").exists()


def test_dreams_tokenizer_splits_as_qwen2_does(dream_folder: Path) -> None:
    """Digits one by one, words with the space before them; what a plain byte-level BPE does not do."""
    tokenizer: Any = read_tokenizer(dream_folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("hello there 1234")["input_ids"])
    assert tokens[-4:] == ["1", "2", "3", "4"]
    assert "".join(tokens) == "helloĠthereĠ1234"


@pytest.mark.parametrize("inline", ["absent", "another template"])
def test_a_template_in_a_file_of_its_own(llada_folder: Path, inline: str) -> None:
    _edit(llada_folder, chat_template=inline)
    (llada_folder / "chat_template.jinja").write_text(LLADA_TEMPLATE)
    assert _chat(read_tokenizer(llada_folder)) == LLADA_CHAT


def _add_model(folder: Path, **fields: Any) -> None:
    """Weights and a config to the tokenizer files of a folder."""
    (folder / "model.safetensors").write_bytes((GOLDEN / GOLDEN_DREAM / "model.safetensors").read_bytes())
    raw = json.loads((GOLDEN / GOLDEN_DREAM / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(raw))


def test_prompts_and_chats_of_a_loaded_model(dream_folder: Path) -> None:
    tokenizer: Any = read_tokenizer(dream_folder)
    _add_model(dream_folder, mask_token_id=tokenizer.mask_token_id)
    lm = fdt.load(dream_folder, device="cpu")
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode(lm.encode("hello there")) == "hello there"
    assert lm.tokenizer.decode(lm.encode("hello there", chat=True)) == DREAM_CHAT
    assert isinstance(lm.generate("hello there", gen_length=8, block_length=8).texts[0], str)
    lm.save_pretrained(dream_folder / "copy")
    again: Any = read_tokenizer(dream_folder / "copy")
    assert again(TEXT)["input_ids"] == lm.tokenizer(TEXT)["input_ids"]


def test_no_files_no_tokenizer(dream_folder: Path) -> None:
    (dream_folder / "merges.txt").unlink()
    assert read_tokenizer(dream_folder) is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 5}}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"init_inputs": 5}'),
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", '{"<a>": NaN}'),
    ],
)
def test_damaged_files_are_named(llada_folder: Path, file: str, text: str) -> None:
    (llada_folder / file).write_text(text)
    with pytest.raises(fdt.CheckpointError, match=rf"tokenizer files in {llada_folder} cannot be read|{llada_folder / file} "):
        read_tokenizer(llada_folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"])
def test_a_pipe_among_the_tokenizer_files_is_not_waited_for(llada_folder: Path, file: str) -> None:
    (llada_folder / file).unlink(missing_ok=True)
    os.mkfifo(llada_folder / file)
    with pytest.raises(fdt.CheckpointError, match=rf"{file} is not a regular file"):
        read_tokenizer(llada_folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_with_fields_that_tokens_do_not_have(llada_folder: Path, file: str) -> None:
    """The tokenizers library would print the field's name, to stdout and as it is."""
    token = {"content": "<|endoftext|>", "\x1b]0;pwn\x07": 1}
    places = {"tokenizer.json": {"added_tokens": [token]}, "tokenizer_config.json": {"added_tokens_decoder": {"0": token}}}
    raw = json.loads((llada_folder / file).read_text()) if (llada_folder / file).exists() else {}
    (llada_folder / file).write_text(json.dumps(raw | places.get(file, {"eos_token": token})))
    with pytest.raises(
        fdt.CheckpointError, match=rf"{file}: a token has the field '\\x1b\]0;pwn\\x07', which tokens do not have"
    ):
        read_tokenizer(llada_folder)


def test_class_names_of_a_checkpoint_are_not_printed(llada_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _edit(llada_folder, tokenizer_class="\x1b]0;pwn\x07")
    assert read_tokenizer(llada_folder) is not None
    assert "pwn" not in "".join(capfd.readouterr())


def _edit_tokenizer(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_a_panic_of_the_tokenizer_is_an_error_of_the_prompt(llada_folder: Path) -> None:
    """The library in Rust gives up on the regular expression with a panic, which is no ``Exception`` to Python."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    _edit_tokenizer(llada_folder, pre_tokenizer=split)
    _add_model(llada_folder)
    lm = fdt.load(llada_folder, device="cpu")
    assert lm.encode("hello")
    with pytest.raises(ValueError, match=rf"^prompts: the tokenizer in {llada_folder} failed: .*retry-limit-in-match over"):
        lm.generate("x" * 2000, gen_length=8, block_length=8)


def test_text_that_is_none_is_an_error_of_the_prompt(llada_folder: Path) -> None:
    _add_model(llada_folder)
    with pytest.raises(ValueError, match=r"^prompts: the tokenizer in .* failed: .*surrogates not allowed$"):
        fdt.load(llada_folder, device="cpu").encode("half of a pair: \ud800")


def test_tokens_that_the_model_does_not_have(llada_folder: Path) -> None:
    raw = json.loads((llada_folder / "tokenizer.json").read_text())
    last = {"content": "<beyond>", "id": 320, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = [{"content": f"<{i}>", "id": i} for i in range(len(raw["model"]["vocab"]) + len(LLADA_SPECIAL), 320)]
    _edit_tokenizer(
        llada_folder, added_tokens=[*raw["added_tokens"], *({**last, "special": True} | token for token in [*added, last])]
    )
    _add_model(llada_folder)
    lm = fdt.load(llada_folder, device="cpu")
    assert lm.encode("<319>") == [319]
    told = rf"^prompts: the tokenizer in {llada_folder} gives token 320, the model's vocabulary ends at 319$"
    with pytest.raises(ValueError, match=told):
        lm.encode("<beyond>")


def test_a_tokenizer_that_calls_another_token_its_mask(dream_folder: Path) -> None:
    _add_model(dream_folder)
    lm = fdt.load(dream_folder, device="cpu")
    with pytest.warns(
        UserWarning, match=r"calls token 2\d\d its mask; config.json says 318, which is what generation begins with"
    ):
        assert lm.encode("hello")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gen_length": "x"}', r"generation_config.json: gen_length must be an integer of 1 or more, got 'x'"),
        ('{"block_length": true}', r"generation_config.json: block_length must be an integer of 1 or more, got True"),
        ('{"gen_length": 30, "block_length": 16}', r"generation_config.json: .*block_length"),
        ("[]", r"generation_config.json must hold a JSON object"),
    ],
)
def test_lengths_of_a_generation_config(llada_folder: Path, text: str, message: str) -> None:
    _add_model(llada_folder)
    (llada_folder / "generation_config.json").write_text(text)
    with pytest.raises(fdt.CheckpointError, match=message):
        fdt.load(llada_folder, device="cpu").generate([[1, 2]])


# ----------------------------------------------------------------------------------------------------------------------
# Modules of transformers' own kind, as trust_remote_code gives them.


class LLaDAConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "llada"

    def __init__(self, **fields: Any) -> None:
        own = {name: fields.pop(name) for name in list(fields) if name in _OWN}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**fields)


class DreamConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "Dream"

    def __init__(self, rope_theta: float = 1e6, rope_scaling: Any = None, **fields: Any) -> None:
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        super().__init__(**fields)


_OWN = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size", "rope_theta")


PLAIN, BLOCK = mixin("generation_utils"), mixin("generation_utils_block")


def _pretrained(model: str) -> PreTrainedModel:
    """A checkpoint in a subclass of transformers' module class, around the same parts as the plain ones.

    The config is as the hub has it: what generates is in it only where this version of transformers puts it there.
    """
    raw = json.loads((GOLDEN / model / "config.json").read_text())
    config_type, plain = (DreamConfig, Dream) if model == GOLDEN_DREAM else (LLaDAConfig, LLaDA)
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map", "transformers_version")}
    fields = {name: value for name, value in fields.items() if name not in GENERATION_FIELDS}
    config = config_type(**fields)

    class Pretrained(*([PLAIN] if plain is Dream else []), PreTrainedModel):  # type: ignore[misc]
        config_class = config_type

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name, child in plain(config).named_children():
                self.add_module(name, child)

        forward = plain.forward

    module = Pretrained(config)
    module.load_state_dict(load_file(GOLDEN / model / "model.safetensors"))
    return module.eval()


@pytest.mark.parametrize("model", ["llada-gqa", GOLDEN_DREAM])
def test_a_module_with_a_config_of_transformers(model: str) -> None:
    module: nn.Module = _pretrained(model)
    fdt.accelerate(module)
    expected = fdt.load(GOLDEN / model, device="cpu")
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    assert torch.equal(module.generate([[1, 2, 3]], **options).sequences, expected.generate([[1, 2, 3]], **options).sequences)


@pytest.mark.parametrize("model", ["llada-gqa", GOLDEN_DREAM])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_its_own_save_pretrained_works_on(model: str, size: str, tmp_path: Path) -> None:
    module = _pretrained(model)
    fdt.accelerate(module)
    module.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
    saved = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    source = load_file(GOLDEN / model / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name]) for name in source)
    ids = torch.tensor([[3, 1, 4, 318, 318]])
    assert torch.equal(fdt.load(tmp_path, device="cpu").logits(ids), module.fast_forward(ids))


def test_dreams_defaults_are_the_same_with_every_version() -> None:
    """Versions before 5 put ``top_k=50`` and ``temperature=1.0`` into every config, later ones nothing."""
    module, inputs = _pretrained(GOLDEN_DREAM), torch.tensor([[3, 1, 4]])
    options: dict[str, Any] = {"steps": 8, "alg": "entropy", "seed": 5}
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_new_tokens": 20}
    expected = compat.diffusion_generate(fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu"), inputs, **given, **options)
    assert torch.equal(compat.diffusion_generate(module, inputs, **options), expected)
    module.config.top_k = 2
    assert not torch.equal(compat.diffusion_generate(module, inputs, **options), expected)
    assert torch.equal(compat.diffusion_generate(module, inputs, **{**options, **given}), expected)


def test_a_mixin_on_a_module_of_transformers() -> None:
    module, inputs = _pretrained(GOLDEN_DREAM), torch.tensor([[3, 1, 4]])
    options: dict[str, Any] = {"max_new_tokens": 16, "steps": 8, "alg": "entropy", "temperature": 0.0, "block_length": 8}
    lm = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")
    by_cache = {cache: compat.diffusion_generate(lm, inputs, cache=cache, top_k=50, **options) for cache in ("none", "prefix")}
    assert torch.equal(compat.diffusion_generate(module, inputs, **options), by_cache["none"])
    put_mixin(module, BLOCK)
    with pytest.warns(UserWarning, match="was replaced after accelerate"):
        assert module.diffusion_generate(inputs) == "prepared by generation_utils, decoded by generation_utils_block"
    fdt.accelerate(module)
    assert torch.equal(module.diffusion_generate(inputs, **options), by_cache["prefix"])


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id", "do_sample", "num_beams", "repetition_penalty"])
def test_every_version_knows_the_arguments_that_decide_nothing(name: str) -> None:
    lm, inputs = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu"), torch.tensor([[3, 1, 4]])
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 2, "alg": "entropy", "temperature": 0.0}
    assert torch.equal(compat.diffusion_generate(lm, inputs, **{name: None}, **options), lm.diffusion_generate(inputs, **options))

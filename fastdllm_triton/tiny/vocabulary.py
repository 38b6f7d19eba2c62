"""Builds the tokenizer of the built-in model: one token a word of the task, one a digit, printable ASCII as the fallback."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .problems import GAINS, ITEMS, LOSSES, NAMES

EOS, MASK, UNKNOWN = "<|endoftext|>", "<|mdm_mask|>", "<|unknown|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as ``transformers`` reads and writes it.

    Words keep the space before them, so decoding is concatenation. Text outside the task is split into characters;
    what is not printable ASCII becomes ``<|unknown|>``.
    """
    words = [*NAMES, *(f" {name}" for name in NAMES), *(f" {word}" for word in (*ITEMS, *GAINS, *LOSSES))]
    words += [" has", " How", " many", " now", " That", " makes", " it", " ####"]
    tokens = [EOS, MASK, UNKNOWN, "\n", *(chr(code) for code in range(32, 127)), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}

    # Longest match first, over pieces that are a word with its space or one other character.
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?(?:[A-Za-z]+|####)|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )

"""Tokens that are in place before decoding begins: constraints on an answer, and texts with masks in them.

Both become the same thing: for each row what its last ``gen_length`` tokens are at the start, ``[MASK]`` where they are to be
decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..utils.checks import is_int, require, to_int

#: What a position of the answer holds: a text, which may be several tokens, a token id, or several.
Fixed = str | int | Sequence[int]
#: One for every row, or one a row.
Constraints = Mapping[int, Fixed] | Sequence[Mapping[int, Fixed]]

#: Stands for one masked token in a text that is to be filled in.
PLACEHOLDER = "[MASK]"


def constrained_answers(
    constraints: Constraints, rows: int, gen_length: int, mask_id: int, vocab_size: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """What each row's answer is at the start.

    Args:
        constraints: position, from 0 within the answer, to what stands there and after it.
        rows: sequences in the batch.
        gen_length: tokens of an answer.
        mask_id: of ``[MASK]``.
        vocab_size: ids are below it.
        encode: token ids of a text.

    Returns:
        ``rows`` lists of ``gen_length`` ids.

    Raises:
        TypeError: something is of another type.
        ValueError: a position or an id is out of range, an id is ``[MASK]``, two constraints overlap, or the maps do not match
            the rows.
    """
    if isinstance(constraints, Mapping):
        answer = _answer("constraints", constraints, gen_length, mask_id, vocab_size, encode)
        return [list(answer) for _ in range(rows)]
    if isinstance(constraints, str) or not isinstance(constraints, Sequence):
        raise TypeError(f"constraints must be a dict of positions, or a list of one a row, got {type(constraints).__name__}")
    if len(constraints) != rows:
        raise ValueError(f"constraints must be one dict, or one for each of {rows} rows, got {len(constraints)}")
    return [
        _answer(f"constraints: row {row}", of_row, gen_length, mask_id, vocab_size, encode)
        for row, of_row in enumerate(constraints)
    ]


def _answer(
    name: str,
    constraints: Mapping[int, Fixed],
    gen_length: int,
    mask_id: int,
    vocab_size: int,
    encode: Callable[[str], list[int]],
) -> list[int]:
    if not isinstance(constraints, Mapping):
        raise TypeError(f"{name} must be a dict of positions, got {type(constraints).__name__}")
    answer = [mask_id] * gen_length
    for position, value in constraints.items():
        require(f"{name}: a position", position, f"in [0, {gen_length})", is_int(position) and 0 <= position < gen_length)
        first, where = to_int(position), f"{name}: position {position}"
        if isinstance(value, str):
            tokens = encode(value)
        elif is_int(value):
            tokens = [to_int(value)]
        elif isinstance(value, Sequence) and all(map(is_int, value)):
            tokens = [to_int(token) for token in value]
        else:
            raise TypeError(f"{where} must hold a text, a token id or a list of them, got {value!r}")
        require(where, value, "one token or more", bool(tokens))
        for token in tokens:
            require(where, token, f"in the vocabulary [0, {vocab_size})", 0 <= token < vocab_size)
            require(where, token, "another token than [MASK]", token != mask_id)
        last = first + len(tokens)
        if last > gen_length:
            room = f"gen_length = {gen_length} leaves {gen_length - first}"
            raise ValueError(f"{where} holds {len(tokens)} tokens ({value!r}), and {room}")
        if any(token != mask_id for token in answer[first:last]):
            raise ValueError(f"{where} holds {len(tokens)} tokens ({value!r}), which overlap those of another position")
        answer[first:last] = tokens
    return answer


def masked_length(rows: Sequence[Sequence[int]], block_length: int, mask_id: int) -> int:
    """How many tokens at the end of sequences with masks in them are decoded: from the first mask of any row on, in whole blocks.

    Since blocks are counted from the end of a row, a row is divided the same in every batch.

    Args:
        rows: token ids of each sequence.
        block_length: what the result is a multiple of.
        mask_id: of ``[MASK]``.

    Raises:
        ValueError: a row has no mask, or ``block_length`` is no length.
    """
    require("block_length", block_length, "an integer of 1 or more", is_int(block_length) and block_length >= 1)
    for row, ids in enumerate(rows):
        if mask_id not in ids:
            advice = f"write {PLACEHOLDER} for each token of a text, or the id {mask_id}"
            raise ValueError(f"prompts: row {row} has no mask to fill in; {advice}")
    longest = max((len(ids) - ids.index(mask_id) for ids in rows), default=1)
    return -(-longest // block_length) * block_length

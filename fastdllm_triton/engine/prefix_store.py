"""Keys and values of finished blocks, kept for requests that begin with the same tokens: block-causal models only."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.transformer import Transformer, Weights
from ..utils.checks import is_int, require

#: A block is told by the block before it (0: none), its length and its tokens.
_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class _Block:
    """Keys and values ``[layers, Hkv, N, D]`` of a block, under a number of its own."""

    number: int
    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class PrefixStore:
    """What requests that have ended leave for those that begin with the same blocks (prefix caching, cf. SGLang's RadixAttention,
    arXiv 2312.07104).

    In block-causal models a finished block's keys and values depend on nothing behind it, so that taking them over changes no
    token. One store serves one model; it lies on the model's device. Whoever changes weights in place must :meth:`clear` it.

    >>> import fastdllm_triton as fdt
    >>> store = fdt.PrefixStore(max_bytes=2**28)

    Attributes:
        max_bytes: of keys and values; what was not used for longest goes first.
        reused_tokens: positions that requests did not have to compute, since the store was made.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        require("max_bytes", max_bytes, "an integer of 1 or more", is_int(max_bytes) and max_bytes >= 1)
        self.max_bytes, self.reused_tokens, self.nbytes = max_bytes, 0, 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._numbers = 0
        self._owner: weakref.ref[Weights] | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Forgets everything; the store may then serve another model."""
        self._blocks.clear()
        self._owner, self.nbytes = None, 0

    def check(self, network: Transformer) -> None:
        """Checks that it can serve a model.

        Raises:
            ValueError: the model's attention is bidirectional, so that nothing of it is final, or the store serves another one.
        """
        if not network.config.block_causal:
            raise ValueError(
                f"reuse must be None for {network.config.architecture}: its attention is bidirectional, so no keys are final"
            )
        if self._owner is None or (self._owner() is None and not self._blocks):
            self._owner = weakref.ref(network.weights)
        elif self._owner() is not network.weights:
            raise ValueError("reuse: this store serves another model; give each model one of its own")

    def find(self, tokens: Sequence[int], length: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[layers, Hkv, T, D]`` of the longest run of kept blocks that tokens begin with, if there is one.

        Args:
            tokens: of which whole blocks count.
            length: of a block.
        """
        blocks = self._run(tokens, length)
        if not blocks:
            return None
        self.reused_tokens += length * len(blocks)
        return torch.cat([block.k for block in blocks], dim=2), torch.cat([block.v for block in blocks], dim=2)

    def count(self, tokens: Sequence[int], length: int) -> int:
        """How many of the tokens are in kept blocks, from the first one on."""
        return length * len(self._run(tokens, length))

    def put(self, tokens: Sequence[int], length: int, k: Tensor, v: Tensor) -> None:
        """Keeps blocks behind those that are kept already.

        Args:
            tokens: of all blocks, from the first of the row on.
            length: of a block.
            k, v: ``[layers, Hkv, T, D]`` of all tokens. What is kept is copied.
        """
        known = self._run(tokens, length)
        number = known[-1].number if known else 0
        for start in range(length * len(known), len(tokens) // length * length, length):
            part = slice(start, start + length)
            # Memory of its own: a view would hold on to all of the cache.
            self._numbers += 1
            block = _Block(self._numbers, k[:, :, part].clone(), v[:, :, part].clone())
            self._blocks[number, tuple(tokens[part])] = block
            self.nbytes += block.nbytes
            number = block.number
        self._run(tokens, length)
        while self.nbytes > self.max_bytes:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.nbytes

    def _run(self, tokens: Sequence[int], length: int) -> list[_Block]:
        """The kept blocks that tokens begin with. The first of them counts as used last: none outlives those before it."""
        run: list[tuple[_Key, _Block]] = []
        for start in range(0, len(tokens) // length * length, length):
            key = (run[-1][1].number if run else 0, tuple(tokens[start : start + length]))
            if key not in self._blocks:
                break
            run.append((key, self._blocks[key]))
        for key, _ in reversed(run):
            self._blocks.move_to_end(key)
        return [block for _, block in run]

"""The log-likelihood of a masked-diffusion model, by LLaDA's Monte-Carlo estimate (arXiv 2502.09992, appendix A.2 and B.5).

Of the ``n`` tokens of a continuation ``l`` are masked, ``l`` uniform in 1 to ``n`` and the masked ones uniform among all sets
of that size. The bound is ``-E[n / l * sum of the log-probabilities of the masked tokens]``: the form of the official code,
whose variance is far below that of masking each token independently. Within a batch the ``l`` are spread evenly over 1 to
``n``, as there.

A block-causal model predicts the tokens of a block from those of its own block and of finished ones, so its likelihood is the
product over blocks, and each block that a continuation has a part in is estimated by itself, with everything before it known
and nothing behind it. The first token of a block is no exception in a Fast-dLLM v2: the last token of the block before predicts
it. (The official script of that model masks the first token of a continuation alone and puts an end token behind its last.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import MaskedDiffusionLM
from ..models.config import ModelConfig
from ..utils.checks import is_int, is_number, require


@dataclass(frozen=True)
class MonteCarlo:
    """How to estimate.

    Attributes:
        mc_num: samples. LLaDA takes 128; a continuation of one token needs, and gets, one.
        mc_batch: samples a forward; divides ``mc_num``.
        cfg: scale of the classifier-free guidance that is unsupervised in LLaDA: ``(1 + cfg) * logits - cfg * logits without
            the context``; 0 for none.
        seed: with the tokens it decides the masks: the estimate depends neither on order nor on batches.
    """

    mc_num: int = 128
    mc_batch: int = 32
    cfg: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("mc_num", self.mc_num), ("mc_batch", self.mc_batch)):
            require(name, value, "an integer of 1 or more", is_int(value) and value >= 1)
        require("mc_num", self.mc_num, f"a multiple of mc_batch = {self.mc_batch}", self.mc_num % self.mc_batch == 0)
        require("cfg", self.cfg, "0 or more", is_number(self.cfg) and self.cfg >= 0)

    def log_likelihood(self, model: MaskedDiffusionLM, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Estimates ``log p(continuation | context)`` in nats, a lower bound of it.

        Args:
            model: the model.
            context: token ids; may be empty.
            continuation: token ids, one at least, none of them the mask.

        Raises:
            ValueError: the continuation is empty or holds the mask, both together are too long, or the model takes no ``cfg``.
        """
        tokens = self._tokens(model, context, continuation)
        generator = torch.Generator().manual_seed(self._seed(context, continuation))
        return sum(self._estimate(model, tokens[:end], start, generator) for start, end in _parts(model, tokens, len(context)))

    def _estimate(self, model: MaskedDiffusionLM, tokens: Tensor, start: int, generator: torch.Generator) -> float:
        """Of the tokens from ``start`` on, given those before."""
        n = len(tokens) - start
        batch = 1 if n == 1 else self.mc_batch
        samples = 1 if n == 1 else self.mc_num
        total = 0.0
        for _ in range(samples // batch):
            masked, share = sample_masks(batch, n, generator)  # [b, n], [b]
            rows = tokens.repeat(batch, 1)
            hidden = torch.cat((torch.zeros(batch, start, dtype=torch.bool), masked), dim=1).to(rows.device)
            logits = self._logits(model, rows.masked_fill(hidden, model.config.mask_id), start)[hidden].float()
            loss = F.cross_entropy(logits, rows[hidden], reduction="none").double()
            weight = share[:, None].expand(batch, n)[masked].to(loss.device)
            total -= float((loss / weight).sum())
        return total / samples

    def is_greedy(self, model: MaskedDiffusionLM, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether decoding one token a forward, the most confident first, gives the continuation. Takes a forward per token.
        Block-causal models finish one block after the other.

        Raises:
            ValueError: as :meth:`log_likelihood`.
        """
        wanted = self._tokens(model, context, continuation)
        return all(self._is_greedy(model, wanted[:end], start) for start, end in _parts(model, wanted, len(context)))

    def _is_greedy(self, model: MaskedDiffusionLM, wanted: Tensor, start: int) -> bool:
        mask = model.config.mask_id
        x = wanted.clone()
        x[start:] = mask
        for _ in range(len(wanted) - start):
            logits = self._logits(model, x[None], start)[0].float()
            logits[:, mask] = -torch.inf
            best, token = torch.where((x == mask)[:, None], logits, -torch.inf).softmax(-1).nan_to_num(-1).max(-1)
            slot = best.argmax()
            x[slot] = token[slot]
            if x[slot] != wanted[slot]:
                return False
        return True

    def _logits(self, model: MaskedDiffusionLM, rows: Tensor, start: int) -> Tensor:
        """``[b, L, V]``: those at a position predict it. Guided if asked for."""

        def predictions(rows: Tensor) -> Tensor:
            logits = model.logits(rows)
            return torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if model.config.shift else logits

        if not self.cfg:
            return predictions(rows)
        blind = rows.clone()
        blind[:, :start] = model.config.mask_id
        logits, without = predictions(torch.cat((rows, blind))).chunk(2)
        return without + (self.cfg + 1) * (logits - without)

    def check_fits(self, model: ModelConfig) -> None:
        """Raises ``ValueError`` for what a model does not take."""
        if model.block_causal:
            require("cfg", self.cfg, f"0 for {model.architecture}, whose attention is block-causal", self.cfg == 0)

    def _tokens(self, model: MaskedDiffusionLM, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
        self.check_fits(model.config)
        tokens = [*context, *continuation]
        if not continuation:
            raise ValueError("continuation must hold at least one token")
        if model.config.mask_id in tokens:
            raise ValueError(f"context and continuation must not hold the mask, token {model.config.mask_id}")
        if len(tokens) > model.config.max_length:
            raise ValueError(f"context and continuation have {len(tokens)} tokens, the model takes {model.config.max_length}")
        return torch.tensor(tokens, device=model.device)

    def _seed(self, context: Sequence[int], continuation: Sequence[int]) -> int:
        text = json.dumps([self.seed, list(context), list(continuation)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _parts(model: MaskedDiffusionLM, tokens: Tensor, start: int) -> list[tuple[int, int]]:
    """The positions ``[start, end)`` that are estimated together: all, or those of each block of a block-causal model."""
    length = model.config.block_length or len(tokens)
    cuts = [start, *range((start // length + 1) * length, len(tokens), length), len(tokens)]
    return list(pairwise(cuts))


def sample_masks(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks of ``n`` tokens: ``[batch, n]`` bool, and the masked share of each row, ``[batch]`` float64.

    The first row masks a uniform number of tokens, the others go on from it in even strides, around again at ``n``. Strides are
    rounded down, which leaves every number as likely in every row; the official code rounds halves to even, which does not.
    """
    first = torch.randint(1, n + 1, (), generator=generator)
    counts = first + torch.arange(batch) * n // batch
    counts = (counts - 1) % n + 1
    order = torch.rand(batch, n, generator=generator).argsort(1).argsort(1)  # A random rank for each token.
    return order < counts[:, None], counts.double() / n

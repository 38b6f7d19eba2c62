"""Dream's decoding over windows: the whole sequence along a schedule of timesteps, or block by block over the cache.

Predictions of a shifted model are read from the row before: rows are chosen, logits are neither copied nor kept. Of a step's
hidden states only those that predict a masked slot pass the final norm and the head. The host reads two numbers a forward.
Hooks see logits, so with one, all of them are made in every forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...decoding.config import GenerationConfig
from ...decoding.strategies import Strategy
from ...kernels._limits import MAX_BLOCK
from ...models.transformer import Transformer
from ...ops.filtering import filtered_statistics
from ...types import TokenStatistics
from ...utils.checks import is_int, require
from ..engine import HasNetwork
from ..generation import Forward, Generation
from ..modes import decoding_modes
from .config import DiffusionConfig, DiffusionOutput, Hooks, described
from .rules import Candidates, Rule, block_rule, check_kernel_limits, check_steps, whole_sequence_rule


def diffuse(
    model: HasNetwork,
    inputs: Tensor,
    kv_start: Tensor,
    config: DiffusionConfig,
    mask_id: int | None = None,
    hooks: Hooks | None = None,
) -> DiffusionOutput:
    """Decodes a batch of left-padded prompts.

    Args:
        model: the model.
        inputs: ``[B, P]`` int64 on the model's device.
        kv_start: ``[B]`` int32, first slot of each prompt; what is before it is neither attended nor counted as positions.
        config: the options.
        mask_id: the token that marks what is to be generated; the model's if not given.
        hooks: functions to call in every forward; without a cache alone.

    Raises:
        ValueError: an option does not fit the model or the prompts; raised before any forward. Or a hook returned something
            else than it must.
        FloatingPointError: a forward gave a row logits that are NaN or nowhere finite.
    """
    with decoding_modes(model.network):
        return _diffuse(model, inputs, kv_start, config, mask_id, hooks)


def _diffuse(
    model: HasNetwork, inputs: Tensor, kv_start: Tensor, config: DiffusionConfig, mask_id: int | None, hooks: Hooks | None
) -> DiffusionOutput:
    network = model.network
    c = network.config
    mask_id = c.mask_id if mask_id is None else mask_id
    require("mask_token_id", mask_id, f"in the vocabulary [0, {c.vocab_size})", is_int(mask_id) and 0 <= mask_id < c.vocab_size)
    longest = inputs.shape[1] - int(kv_start.min())
    if longest + config.max_new_tokens > c.max_length:
        raise ValueError(
            f"max_new_tokens: the model takes {c.max_length} tokens, which leaves {c.max_length - longest} after a prompt of "
            f"{longest}, got {config.max_new_tokens}"
        )
    check_kernel_limits(network.ops, len(inputs), config)
    masks_in_prompts = config.cache == "none" and bool(((inputs == mask_id) & _after(kv_start, inputs)).any())
    strategy = None if hooks or masks_in_prompts else config.strategy
    if strategy is not None:
        check_steps(config, [config.max_new_tokens])
    if strategy is not None and (network.ops.name != "triton" or config.engine_block_length <= MAX_BLOCK):
        return _by_engine(model, inputs, kv_start, config, strategy, mask_id)
    loop = _Run(network, inputs, kv_start, config, mask_id, hooks)
    if config.cache == "none":
        loop.whole_sequence()
    else:
        loop.blocks()
    return DiffusionOutput(loop.x, tuple(loop.history) if config.history else None, loop.nfe)


def _by_engine(
    model: HasNetwork, inputs: Tensor, kv_start: Tensor, config: DiffusionConfig, strategy: Strategy, mask_id: int
) -> DiffusionOutput:
    """Decodes with the engine's captured forwards."""
    options = GenerationConfig(
        gen_length=config.max_new_tokens,
        block_length=config.engine_block_length,
        cache=config.cache,
        strategy=strategy,
        temperature=config.temperature,
        tempered=True,
        seed=_seed(config),
        refresh_commits="rule" if config.cache == "none" else "first",
        stop_at_eos=False,
        lockstep=True,
        mask_id=mask_id,
        logits_dtype=config.logits_dtype,
    )
    prompts = [ids[start:] for ids, start in zip(inputs.tolist(), kv_start.tolist(), strict=True)]
    history: list[Tensor] = []

    def remember(forward: Forward) -> None:
        history.append(torch.cat((inputs, forward.x[:, -config.max_new_tokens :]), dim=1))

    output = Generation(model, prompts, options).run(remember if config.history else None)
    sequences = torch.cat((inputs, output.generated), dim=1)
    return DiffusionOutput(sequences, tuple(history) if config.history else None, output.nfe)


def _after(kv_start: Tensor, inputs: Tensor) -> Tensor:
    """``[B, P]`` bool: the slots that are not padding."""
    return torch.arange(inputs.shape[1], device=inputs.device) >= kv_start[:, None]


def _seed(config: DiffusionConfig) -> int:
    """The seed of the first row."""
    if config.seed is not None:
        return config.seed
    return int(torch.randint(2**62, ())) if config.random else 0


class _Run:
    """The buffers of one generation, and the forward that advances them."""

    def __init__(
        self,
        network: Transformer,
        inputs: Tensor,
        kv_start: Tensor,
        config: DiffusionConfig,
        mask_id: int,
        hooks: Hooks | None,
    ) -> None:
        rows, device = len(inputs), network.device
        self.hooks = hooks
        self.network, self.config, self.mask_id, self.kv_start = network, config, mask_id, kv_start
        self.x = torch.cat((inputs, inputs.new_full((rows, config.max_new_tokens), mask_id)), dim=1)
        self.cache = network.new_cache(kv_start, self.x.shape[1])
        self.seed = _seed(config) + torch.arange(rows, device=device)
        self.slot = torch.arange(self.x.shape[1], device=device).expand_as(self.x)
        self.forbidden = torch.tensor([mask_id], device=device)
        self.nfe = 0
        self.history: list[Tensor] = []

    def whole_sequence(self) -> None:
        """Every forward recomputes everything and chooses among all masked slots, those of the prompt included.

        A hook sees all steps, also after the last mask is gone: it may put new ones.
        """
        self.hook_tokens(None, None)
        masks: list[int] = self.masked().sum(1).tolist()
        rule = whole_sequence_rule(self.config, masks, self.seed)
        left, step = max(masks), 0
        while rule.open(step) and (left or (self.hooks and step < self.config.steps)):
            # The masked slots of each row in order; where a row has fewer than another, some that are not masked follow.
            slots = self.masked().int().argsort(dim=1, descending=True, stable=True)[:, :left]
            left = self.forward(0, self.x.shape[1], slots, rule, step)
            step += 1

    def blocks(self) -> None:
        """For each block a refresh, which commits the block's first token alone, then steps until nothing in it is masked.

        The row that predicts the first token lies before the block, where no step's window reaches.
        """
        length, slots = self.config.block_length, self.x.shape[1]
        rule = block_rule(self.config, self.network.ops, self.x, self.kv_start, self.seed, self.mask_id)
        for start in range(slots - self.config.max_new_tokens, slots, length):
            end = start + length
            block = self.slot[:, start:end]
            self.forward(0, slots, block[:, :1], rule, step=0)
            left, step = length - 1, 1
            while left:
                left = self.forward(start, end if self.config.cache == "dual" else slots, block, rule, step)
                step += 1

    def masked(self) -> Tensor:
        """``[B, L]`` bool."""
        return (self.x == self.mask_id) & (self.slot >= self.kv_start[:, None])

    def forward(self, first: int, last: int, slots: Tensor, rule: Rule, step: int) -> int:
        """Recomputes the window ``[first, last)`` and commits tokens of some slots.

        Args:
            first, last: the window.
            slots: ``[B, K]``, what the rule may choose from, where it is masked.
            rule: what chooses.
            step: of the rule, from 0; key of the random numbers.

        Returns:
            The most masks that a row has left among the slots.
        """
        hidden = self.network.forward(self.x[:, first:last], torch.full_like(self.kv_start, first), self.cache)
        masked = self.masked().gather(1, slots)
        position = slots - self.kv_start[:, None]
        logits = self.hooked_logits(hidden, step) if self.hooks else None
        statistics = self.statistics(hidden, first, slots, masked, position, step, logits)
        remaining, invalid = rule.commit(self.x, Candidates(slots, masked, position, statistics), step)
        left, broken = torch.stack((remaining.max(), invalid.any())).tolist()
        if broken:
            rows = ", ".join(map(str, invalid.nonzero()[:, 0].tolist()))
            raise FloatingPointError(f"forward {self.nfe} gave logits that are NaN or nowhere finite in row {rows}")
        self.nfe += 1
        if self.hooks:
            self.hook_tokens(step, logits)
            left = int(self.masked().sum(1).max())
        if self.config.history:
            self.history.append(self.x.clone())
        return int(left)

    def hook_tokens(self, step: int | None, logits: Tensor | None) -> None:
        """Lets the tokens' hook replace the sequences."""
        if self.hooks is None or self.hooks.tokens is None:
            return
        x, vocabulary = self.hooks.tokens(step, self.x, logits), self.network.config.vocab_size
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (self.x.shape, self.x.dtype, self.x.device):
            raise ValueError(
                f"generation_tokens_hook_func must return a tensor like its x, {described(self.x)}, got {described(x)}"
            )
        outside = x[(x < 0) | (x >= vocabulary)]
        if len(outside):
            raise ValueError(
                f"generation_tokens_hook_func returned token id {int(outside[0])}, outside the vocabulary [0, {vocabulary})"
            )
        self.x = x

    def hooked_logits(self, hidden: Tensor, step: int) -> Tensor:
        """``[B, L, V]`` logits of a forward over everything, those that predict each slot, as the logits' hook leaves them."""
        network = self.network
        logits = F.linear(self.predicting(hidden, 0, self.slot), network.head)
        if self.hooks is None or self.hooks.logits is None:
            return logits
        changed, like = self.hooks.logits(step, self.x, logits), (logits.shape, logits.device)
        if not isinstance(changed, Tensor) or not changed.is_floating_point() or (changed.shape, changed.device) != like:
            raise ValueError(
                f"generation_logits_hook_func must return a tensor like its logits, {described(logits)}, got {described(changed)}"
            )
        return changed

    def predicting(self, hidden: Tensor, first: int, slots: Tensor) -> Tensor:
        """``[B, K, E]``, after the final norm: of the states ``[B, W, E]`` from slot ``first`` on, those that predict ``slots``.

        A slot is predicted from the one before; position 0, and a window's first slot, from their own.
        """
        source = torch.maximum(slots - 1, self.kv_start[:, None].clamp(min=first)) - first
        return self.network.final_norm(hidden.gather(1, source[:, :, None].expand(-1, -1, hidden.shape[2])))

    def statistics(
        self,
        hidden: Tensor,
        first: int,
        slots: Tensor,
        masked: Tensor,
        position: Tensor,
        step: int,
        logits: Tensor | None = None,
    ) -> TokenStatistics:
        """Statistics ``[B, K]`` of the predictions for the slots that are masked.

        At a temperature they are those of ``softmax(logits / temperature)``, as Dream's confidence is. The hidden states are
        divided by it instead of the logits: one more rounding like the norm's own, and the logits need not be in memory.

        Args:
            hidden: ``[B, W, E]``, of the window from slot ``first`` on.
            slots, masked, position: as in :class:`~fastdllm_triton.engine.dream.rules.Candidates`.
            step: key of the random numbers.
            logits: ``[B, L, V]``, where a hook has seen them; those of the hidden states if not given.
        """
        network, config = self.network, self.config
        options: dict[str, Any] = {
            "rows": torch.where(masked.flatten(), torch.arange(masked.numel(), device=masked.device), -1),
            "seed": self.seed.repeat_interleave(slots.shape[1]),
            "position": position.flatten(),
            "step": step,
            "forbidden": self.forbidden,
            "logits_dtype": config.logits_dtype,
        }

        def scaled(values: Tensor) -> Tensor:
            return values / config.temperature if config.temperature > 0 else values

        if logits is None:
            states = scaled(self.predicting(hidden, first, slots).flatten(0, 1))

        def logits_of(rows: Tensor) -> Tensor:
            """``[r, V]`` of indices into the slots."""
            if logits is None:
                return F.linear(states[rows], network.head)
            return scaled(logits[rows // slots.shape[1], slots.flatten()[rows]])

        def take(temperature: float) -> TokenStatistics:
            statistics: TokenStatistics
            if logits is not None or config.filtered:
                filters: dict[str, Any] = {"top_p": config.top_p, "top_k": config.top_k, "temperature": temperature}
                dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
                statistics = filtered_statistics(network.ops, logits_of, dtype=dtype, **filters, **options)
            else:
                statistics = network.ops.head_statistics(states, network.head, temperature=temperature, **options)
            return statistics.view(*slots.shape)

        if config.temperature == 0:
            return take(0.0)
        if config.alg == "topk_margin" and config.cache == "none":
            # Dream's margin is that of the two likeliest tokens, whichever is sampled.
            return replace(take(0.0), token=take(1.0).token)
        return take(1.0)

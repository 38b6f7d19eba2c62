"""Block-wise decoding of a masked-diffusion model: Algorithm 1 of Fast-dLLM (arXiv 2505.22618) over windows.

A forward recomputes a window of slots in place. The paper's three caches are three choices of the window of a step; the
first forward of a block, a refresh, always covers everything and is also the block's first decoding step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding import GenerationConfig, GenerationOutput, Resolved
from .kernels._limits import MAX_BLOCK, MAX_EOS, MAX_FORBIDDEN, MAX_ROWS
from .models.transformer import Transformer
from .types import PolicyState


@dataclass(frozen=True)
class Forward:
    """What a callback is told after each forward.

    Attributes:
        index: of the forward, from 0.
        refresh: whether it rebuilt the cache.
        block: the block being decoded, from 0.
        x: ``[B, L]`` the sequences so far, masks included. The live buffer: read it, do not write it.
        state: the records so far, ``step_map`` and ``confidence`` among them.
    """

    index: int
    refresh: bool
    block: int
    x: Tensor
    state: PolicyState


@torch.no_grad()
def generate(
    network: Transformer,
    prompts: list[list[int]],
    config: GenerationConfig,
    callback: Callable[[Forward], None] | None = None,
) -> GenerationOutput:
    """Decodes a batch of prompts.

    Prompts are left padded to one length. Padding is neither attended nor counted as positions, so each row gets the
    tokens it would get alone.

    Args:
        network: the model.
        prompts: token ids of each row, of any lengths. A ``[MASK]`` in a prompt stays one.
        config: the options.
        callback: called after each forward.

    Returns:
        The sequences and the record of how they came about.

    Raises:
        ValueError: a prompt is empty, too long, or holds an id outside the vocabulary; or an option does not fit the model.
        FloatingPointError: a forward gave a row logits that are NaN or nowhere finite.
    """
    check_prompts(prompts, config, network)
    ids = config.resolve(network.config, len(prompts))
    if network.ops.name == "triton":
        check_kernel_limits(len(prompts), config.block_length, ids)
    run = _Run(network, prompts, config, ids)
    start_time = _now(network.device)
    for block in range(config.blocks):
        run.begin(block)
        run.forward(refresh=True, callback=callback)
        while not run.block_is_done():
            run.forward(refresh=run.refresh_is_due(), callback=callback)
        if run.all_ended:
            break
    return run.output(_now(network.device) - start_time)


class _Run:
    """The buffers of one generation, and the forward that advances them."""

    def __init__(self, network: Transformer, prompts: list[list[int]], config: GenerationConfig, ids: Resolved) -> None:
        device = network.device
        longest = max(map(len, prompts))
        slots = longest + config.gen_length

        self.network, self.config, self.ids = network, config, ids
        padding = ids.eos_ids[0] if ids.eos_ids else 0
        rows = [[padding] * (longest - len(prompt)) + prompt + [ids.mask_id] * config.gen_length for prompt in prompts]
        self.x = torch.tensor(rows, device=device)
        kv_start = torch.tensor([longest - len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
        self.cache = network.new_cache(kv_start, slots)
        self.state = PolicyState.create(
            config.strategy.score,
            config.strategy.rule,
            value=config.strategy.value,
            steps=config.strategy.steps_per_block(config.blocks),
            mask_id=ids.mask_id,
            kv_start=kv_start,
            eos_ids=ids.eos_ids if config.stop_at_eos else (),
            seed=torch.tensor(ids.seeds, device=device),
            slots=slots,
        )
        self.forbidden = torch.tensor(ids.forbidden, device=device)
        self.refreshes = self.steps = self.block = self.forwards_of_block = 0
        self.row_forwards = torch.zeros_like(kv_start)
        self.all_ended = False  # whether no row has anything left to decode after this block

    def begin(self, block: int) -> None:
        """Moves on to a block."""
        self.block, self.forwards_of_block = block, 0
        self.start = self.x.shape[1] - self.config.gen_length + block * self.config.block_length
        self.end = self.start + self.config.block_length
        self.block_start = torch.full_like(self.cache.kv_start, self.start)
        self.row_forwards += self.state.step
        self.state.step.zero_()

    def window(self, refresh: bool) -> tuple[int, int]:
        """The slots that a forward recomputes."""
        if refresh or self.config.cache == "none":
            return 0, self.x.shape[1]
        return self.start, self.end if self.config.cache == "dual" else self.x.shape[1]

    def refresh_is_due(self) -> bool:
        """Whether the next forward of the block rebuilds the cache."""
        return self.config.refresh_every is not None and self.forwards_of_block % self.config.refresh_every == 0

    def forward(self, refresh: bool, callback: Callable[[Forward], None] | None) -> None:
        """Recomputes a window, takes the statistics of the block's masked rows, and commits."""
        network, ops, state, block_length = self.network, self.network.ops, self.state, self.config.block_length
        first, last = self.window(refresh)
        hidden = network.forward(self.x[:, first:last], torch.full_like(self.block_start, first), self.cache)

        # Only the block's rows pass the final norm, only the masked ones of them the head.
        block = network.final_norm(hidden[:, self.start - first : self.end - first])  # [B, N, E]
        rows = torch.arange(block.shape[0] * block_length, device=block.device)
        masked = (self.x[:, self.start : self.end] == state.mask_id).flatten()
        position = torch.arange(self.start, self.end, device=block.device) - state.kv_start[:, None]
        statistics = ops.head_statistics(
            block.flatten(0, 1),
            network.head,
            rows=torch.where(masked, rows, -1),
            temperature=self.config.temperature,
            seed=state.seed.repeat_interleave(block_length),
            position=position.flatten(),
            step=state.step.repeat_interleave(block_length),
            forbidden=self.forbidden,
            logits_dtype=self.config.logits_dtype,
        )
        ops.commit_tokens(self.x, statistics.view(-1, block_length), self.block_start, state)

        self.refreshes += refresh
        self.steps += not refresh
        self.forwards_of_block += 1
        if callback is not None:
            callback(Forward(self.refreshes + self.steps - 1, refresh, self.block, self.x, state))

    def block_is_done(self) -> bool:
        """Whether every row's block is complete. The one place that reads the device."""
        state = self.state
        done, self.all_ended, invalid = torch.stack((state.done.all(), state.ended.all(), state.invalid.any())).tolist()
        if invalid:
            rows = ", ".join(map(str, state.invalid.nonzero()[:, 0].tolist()))
            forward = self.refreshes + self.steps - 1
            raise FloatingPointError(f"forward {forward} gave logits that are NaN or nowhere finite in row {rows}")
        return bool(done)

    def output(self, seconds: float) -> GenerationOutput:
        """The result."""
        length = self.config.gen_length
        return GenerationOutput(
            sequences=self.x,
            gen_length=length,
            refreshes=self.refreshes,
            steps=self.steps,
            row_forwards=self.row_forwards + self.state.step,
            step_map=self.state.step_map[:, -length:],
            confidence=self.state.confidence[:, -length:],
            seconds=seconds,
            eos_ids=self.ids.eos_ids,
        )


def check_prompts(prompts: list[list[int]], config: GenerationConfig, network: Transformer) -> None:
    """Raises ``ValueError`` for prompts that a model cannot continue."""
    c = network.config
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts: row {row} is empty; every prompt needs at least one token")
        if len(prompt) + config.gen_length > c.max_length:
            raise ValueError(
                f"prompts: row {row} has {len(prompt)} tokens; with gen_length = {config.gen_length} "
                f"the model takes at most {c.max_length - config.gen_length}"
            )
        if (low := min(prompt)) < 0 or (high := max(prompt)) >= c.vocab_size:
            token = low if low < 0 else high
            raise ValueError(f"prompts: row {row} holds token id {token}, outside the vocabulary [0, {c.vocab_size})")


def check_kernel_limits(rows: int, block_length: int, ids: Resolved) -> None:
    """Raises ``ValueError`` for what is valid but more than the selection kernels take."""
    for name, count, most in (
        ("prompts", rows, MAX_ROWS),
        ("block_length", block_length, MAX_BLOCK),
        ("forbidden", len(ids.forbidden), MAX_FORBIDDEN),
        ("eos_ids", len(ids.eos_ids), MAX_EOS),
    ):
        if count > most:
            raise ValueError(f"{name}: the Triton kernels take at most {most}, got {count} (forbidden counts [MASK])")


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

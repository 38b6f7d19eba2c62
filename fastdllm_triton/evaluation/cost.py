"""What a request costs by the roofline model, from the windows that its forwards recomputed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..decoding.cache_policy import BlockState, decoded_blocks
from ..decoding.config import GenerationConfig
from ..engine.generation import Forward
from ..models.config import ModelConfig
from ..tools.roofline import Cost, forward_cost


class Meter:
    """A callback that notes the forwards of each block of each row; :meth:`cost` is what those of a row cost.

    Args:
        model: whose matrices are multiplied.
        config: the options of the generation.
    """

    def __init__(self, model: ModelConfig, config: GenerationConfig) -> None:
        self.model, self.config = model, config
        self.forwards: dict[tuple[int, int], list[tuple[int, bool, int]]] = defaultdict(list)

    def __call__(self, forward: Forward) -> None:
        for row, block, (first, end) in zip(forward.rows, forward.blocks, forward.windows, strict=True):
            self.forwards[row, block].append((forward.index, forward.refresh, end - first))

    def cost(self, row: int, prompt_length: int, step_map: Sequence[int]) -> Cost:
        """What a row would cost by itself: each of its forwards reads all weights.

        Args:
            row: which one.
            prompt_length: tokens of its prompt.
            step_map: for each slot that it generated the forward that committed it, ``-1`` where none did.
        """
        config, model = self.config, self.model
        policy = config.cache_policy(shift=model.shift, block_causal=model.block_causal)
        causal = config.block_length if model.block_causal else 0
        total = Cost(0, 0)
        for block, bounds in enumerate(decoded_blocks(prompt_length, config.gen_length, config.decoded_length, causal)):
            state = BlockState(prompt_length, prompt_length + config.gen_length, *bounds, causal=causal)
            start, end = (max(bound - prompt_length, 0) for bound in bounds)
            for index, is_refresh, window in self.forwards[row, block]:
                keys = (policy.refresh(state) if is_refresh else policy.step(state)).attend_end
                masked = sum(step >= index for step in step_map[start:end])
                if is_refresh and causal and policy.refresh_commits != "rule":
                    masked = int(policy.refresh_commits == "first" and prompt_length <= state.causal_start and masked > 0)
                total += forward_cost(model, 1, window, keys, min(masked, window))
        return total

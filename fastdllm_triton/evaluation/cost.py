"""What a request costs by the roofline model, from the windows that its forwards recomputed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..decoding.cache_policy import play
from ..decoding.config import GenerationConfig
from ..engine.generation import Forward
from ..models.config import ModelConfig
from ..tools.roofline import Cost, forward_cost


class Meter:
    """A callback that notes which forwards decode each block of each row; :meth:`cost` is what those of a row cost.

    Args:
        model: whose matrices are multiplied.
        config: the options of the generation.
    """

    def __init__(self, model: ModelConfig, config: GenerationConfig) -> None:
        self.model, self.config = model, config
        self.forwards: dict[tuple[int, int], list[int]] = defaultdict(list)

    def __call__(self, forward: Forward) -> None:
        for row, block in zip(forward.rows, forward.blocks, strict=True):
            self.forwards[row, block].append(forward.index)

    def cost(self, row: int, prompt_length: int, step_map: Sequence[int]) -> Cost:
        """What a row would cost by itself: each of its forwards reads all weights.

        Args:
            row: which one.
            prompt_length: tokens of its prompt.
            step_map: for each slot that it generated the forward that committed it, ``-1`` where none did.
        """
        config, length = self.config, self.config.block_length
        forwards = [self.forwards[row, block] for block in range(config.blocks)]
        policy = config.cache_policy(shift=self.model.shift)
        windows = play(policy, prompt_length, config.gen_length, length, [len(of_block) for of_block in forwards])
        masked = [
            sum(step >= now for step in step_map[block * length : (block + 1) * length])
            for block, of_block in enumerate(forwards)
            for now in of_block
        ]
        costs = (forward_cost(self.model, 1, len(w), w.attend_end, rows) for w, rows in zip(windows, masked, strict=True))
        return sum(costs, Cost(0, 0))

"""What a generation costs by the roofline model, from the windows that its forwards recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..decoding.cache_policy import BlockState
from ..decoding.config import GenerationConfig
from ..engine.generation import Forward
from ..engine.outputs import GenerationOutput
from ..tools.roofline import Cost, Shape, forward_cost


@dataclass
class Meter:
    """A callback that records each forward's windows; :meth:`costs` gives what they cost when the generation is done.

    Each row costs what it would cost alone: every one of its forwards reads all weights. Sums over rows are therefore those
    of batches of one.

    Attributes:
        shape: of the model whose matrices are multiplied.
        prompts: tokens of each row's prompt.
        config: the options.
    """

    shape: Shape
    prompts: list[int]
    config: GenerationConfig
    _windows: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def __call__(self, forward: Forward) -> None:
        for row, block, (first, end) in zip(forward.rows, forward.blocks, forward.windows, strict=True):
            self._windows.append((forward.index, row, block, first, end))

    def forwards(self, output: GenerationOutput) -> list[list[tuple[int, int, int]]]:
        """For each row its forwards: slots recomputed, slots attended, and slots that were masked in its block."""
        length, policy = self.config.block_length, self.config.cache_policy()
        generated = output.sequences.shape[1] - output.gen_length
        steps = output.step_map.tolist()
        forwards: list[list[tuple[int, int, int]]] = [[] for _ in self.prompts]
        for index, row, block, first, end in self._windows:
            prompt = self.prompts[row]
            start = prompt + block * length
            attended = policy.attend_end(BlockState(prompt, prompt + output.gen_length, start, start + length))
            masked = sum(step >= index for step in steps[row][block * length : (block + 1) * length])
            forwards[row].append((end - max(first, generated - prompt), attended, masked))  # without the padding
        return forwards

    def costs(self, output: GenerationOutput) -> list[Cost]:
        rows = self.forwards(output)
        return [sum((forward_cost(self.shape, 1, *sizes) for sizes in row), Cost(0, 0)) for row in rows]

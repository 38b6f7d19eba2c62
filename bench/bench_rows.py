"""What it gives that the rows of a batch stand at blocks of their own, on the built-in model's problems.

python bench/bench_rows.py [--quick] [--out DIR]

Random weights have no rows of their own pace, so this is the one bench on a trained model; its steps are so small that launches
are most of them. Providers: ``triton``, each row begins a block when it can; ``lockstep``, as in the official code, all begin
together. The tokens are the same. ``forwards``, ``refreshes`` and ``steps`` are counts and hold on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fastdllm_triton.bench._session import ModelBench, Row, Session, Shape, main
from fastdllm_triton.bench.bench_generate import seconds_of
from fastdllm_triton.decoding.config import GenerationConfig
from fastdllm_triton.decoding.strategies import Threshold
from fastdllm_triton.engine.outputs import GenerationOutput
from fastdllm_triton.loading import load
from fastdllm_triton.tiny.problems import MAX_ANSWER_TOKENS, problems


class RowsBench(ModelBench):
    """Batches of problems, decoded with rows of their own and in lockstep."""

    op, suite = "rows", "generate"
    shapes = tuple({"model": "tiny", "block_length": 8, "batch": batch} for batch in (1, 2, 4, 8, 16, 32))
    quick = shapes[1:3]

    def rows_of(self, shape: Shape, session: Session) -> Iterator[list[Row]]:
        model = load("tiny", device=session.device, backend="auto" if session.timer else "reference")
        prompts = [model.encode(problem.prompt) for problem in islice(problems(0, test=True), shape["batch"])]
        base: Row = {"bench": self.op, "op": self.op, "shape": dict(shape), "axis": "batch"}
        rows: list[Row] = []
        for provider, lockstep in (("triton", False), ("lockstep", True)):
            if not session.wants(provider):
                continue
            config = GenerationConfig(
                gen_length=MAX_ANSWER_TOKENS, block_length=shape["block_length"], strategy=Threshold(0.9), lockstep=lockstep
            )
            output = model.generate(prompts, config)
            row = base | {"provider": provider, **_counts(output)}
            if session.timer is None:
                rows.append(row | {"missing": "ran; not timed without a GPU"})
                continue
            seconds = seconds_of(lambda config=config: model.generate(prompts, config), session.device, repeat=5)  # type: ignore[misc]
            milliseconds = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), seconds * 1e3)
            rows.append(row | milliseconds | {"tokens_per_s": output.committed / seconds})
            rows[-1]["times_triton"] = seconds * 1e3 / rows[0]["median_ms"]
        yield rows


def _counts(output: GenerationOutput) -> dict[str, Any]:
    return {
        "forwards": output.nfe,
        "refreshes": output.refreshes,
        "steps": output.steps,
        "tokens_per_forward": output.tokens_per_forward,
    }


BENCH = RowsBench()


if __name__ == "__main__":
    main(BENCH.op)

"""Scores a checkpoint of the built-in task: the table of its model card.

    python training/score_tiny.py --model tiny --problems 500

Prints exact match, whole answers right and tokens per forward for each strategy, without a cache and with both, on problems
that are never trained on.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch

import fastdllm_triton as fdt
from fastdllm_triton.tiny.problems import MAX_ANSWER_TOKENS, problems, score

STRATEGIES = {
    "one per forward": fdt.FixedSteps(48),
    "fixed 2": fdt.FixedSteps(24),
    "fixed 3": fdt.FixedSteps(18),  # 16 slots in 6 forwards, 48 in 18: 2.7 a forward
    "fixed 4": fdt.FixedSteps(12),
    "fixed 8": fdt.FixedSteps(6),
    "threshold 0.99": fdt.Threshold(0.99),
    "threshold 0.9": fdt.Threshold(0.9),
    "threshold 0.7": fdt.Threshold(0.7),
    "threshold 0.5": fdt.Threshold(0.5),
    "factor 1": fdt.Factor(1.0),
    "factor 2": fdt.Factor(2.0),
    "entropy budget 0.3": fdt.EntropyBudget(0.3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--block-length", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--cache", nargs="+", default=["none", "prefix", "dual"])
    arguments = parser.parse_args()
    model = fdt.load(arguments.model)
    asked = list(islice(problems(arguments.seed, test=True), arguments.problems))
    prompts = [model.encode(problem.prompt) for problem in asked]
    print(f"{model!r}, torch {torch.__version__}, {len(asked)} test problems of seed {arguments.seed}")
    print("| block | cache | strategy | exact match | whole | tokens/forward |\n|---|---|---|---|---|---|")
    for block_length in arguments.block_length:
        for cache in arguments.cache:
            for name, strategy in STRATEGIES.items():
                lengths = {"gen_length": MAX_ANSWER_TOKENS, "block_length": block_length}
                out = model.generate(prompts, cache=cache, strategy=strategy, **lengths)
                exact, whole = (sum(s) / len(asked) for s in zip(*map(score, asked, out.texts), strict=True))
                row = (block_length, cache, name, f"{exact:.3f}", f"{whole:.3f}", f"{out.tokens_per_forward:.2f}")
                print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()

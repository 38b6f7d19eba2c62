"""What the options of a cache save of a generation of LLaDA-8B, by the roofline model: FLOPs, bytes, and the floor on an H200.

    python bench/cache_options.py [--gen-length 1024]

Prompt 1000, blocks of 32, 4 tokens a forward, batch 1. Nothing is timed and nothing is decoded: the windows are those that the
cache's policy asks for, priced with the model's sizes.
"""

import typer

from fastdllm_triton.decoding.cache_policy import cache_policy, play
from fastdllm_triton.tools.roofline import GPUS, SHAPES, Cost, forward_cost

PROMPT, BLOCK, TOKENS_PER_FORWARD = 1000, 32, 4
CACHES = (
    "none",
    "prefix",
    "prefix+suffix_window=64",
    "dual",
    "dual+suffix_window=64",
    "dual+suffix_window=0",
    "dual+prompt_refresh=2",
    "dual+prompt_refresh=4",
    "dual+suffix_window=64+prompt_refresh=4",
    "dual+look_back=16+look_ahead=16",
    "dual+refresh_every=4",
)


def main(gen_length: int = 256) -> None:
    shape, gpu, blocks = SHAPES["llada-8b"], GPUS["h200"], gen_length // BLOCK
    masked = list(range(BLOCK, 0, -TOKENS_PER_FORWARD))  # slots of a block, before each of its forwards
    costs: dict[str, list[Cost]] = {}
    for name in CACHES:
        cache, *options = name.split("+")
        policy = cache_policy(cache, **{option: int(value) for option, value in (text.split("=") for text in options)})  # type: ignore[arg-type]
        windows = play(policy, PROMPT, gen_length, BLOCK, [len(masked)] * blocks)
        costs[name] = [
            forward_cost(shape, 1, len(window), window.attend_end, head_rows)
            for window, head_rows in zip(windows, masked * blocks, strict=True)
        ]
    totals = {name: sum(forwards, Cost(0, 0)) for name, forwards in costs.items()}
    dual = totals["dual"]
    print("| cache | TFLOP | of dual's | TB | of dual's | floor, s |\n|---|---|---|---|---|---|")
    for name, cost in totals.items():
        seconds = sum(forward.seconds(gpu) for forward in costs[name])
        row = f"{cost.flops / 1e12:.1f} | {cost.flops / dual.flops:.2f} | {cost.bytes / 1e12:.3f} | {cost.bytes / dual.bytes:.2f}"
        print(f"| {name} | {row} | {seconds:.3f} |")


if __name__ == "__main__":
    typer.run(main)

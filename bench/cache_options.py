"""What the options of a cache save of a generation of LLaDA-8B, by the roofline model: FLOPs, bytes, and the floor on a GPU.

    python bench/cache_options.py --prompt 1000 --gen-length 256 --block-length 32 --tokens-per-forward 4 --gpu h200

Nothing is timed and nothing is decoded: the windows are those that the cache's policy asks for, priced with the model's sizes.
"""

from __future__ import annotations

import argparse

from fastdllm_triton.decoding.cache_policy import cache_policy, play
from fastdllm_triton.tools.roofline import GPUS, SHAPES, Cost, forward_cost

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-8b", choices=SHAPES)
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--tokens-per-forward", type=int, default=4)
    arguments = parser.parse_args()
    shape, gpu, length, block = SHAPES[arguments.model], GPUS[arguments.gpu], arguments.gen_length, arguments.block_length
    count = -(-block // arguments.tokens_per_forward)  # forwards of a block
    # What is still masked before each: the first forwards commit one more where the count does not divide the block.
    masked = [block - done * (block // count) - min(done, block % count) for done in range(count)] * (length // block)

    print(f"{shape.name}, prompt {arguments.prompt}, {length} tokens in blocks of {block}, ", end="")
    print(f"{arguments.tokens_per_forward} tokens a forward, batch 1; floor on {gpu.name}\n")
    print("| cache | TFLOP | of dual's | TB | of dual's | floor, s |\n|---|---|---|---|---|---|")
    found: dict[str, tuple[Cost, float]] = {}
    for name in CACHES:
        cache, *options = name.split("+")
        values = {option: int(value) for option, value in (text.split("=") for text in options)}
        policy = cache_policy(cache, **values)  # type: ignore[arg-type]
        windows = play(policy, arguments.prompt, length, block, [count] * (length // block))
        costs = [forward_cost(shape, 1, len(w), w.attend_end, rows) for w, rows in zip(windows, masked, strict=True)]
        found[name] = sum(costs, Cost(0, 0)), sum(cost.seconds(gpu) for cost in costs)
    base = found["dual"][0]
    for name, (cost, seconds) in found.items():
        row = (name, f"{cost.flops / 1e12:.1f}", f"{cost.flops / base.flops:.2f}", f"{cost.bytes / 1e12:.3f}")
        print("|", " | ".join((*row, f"{cost.bytes / base.bytes:.2f}", f"{seconds:.3f}")), "|")


if __name__ == "__main__":
    main()

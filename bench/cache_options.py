"""What the options of a cache save of a generation of LLaDA-8B, by the roofline model: FLOPs, bytes, and the floor on a GPU.

    python bench/cache_options.py --prompt 1000 --gen-length 256 --block-length 32 --tokens-per-forward 4 --gpu h200

Nothing is timed. The windows are those that the engine recomputes: it decodes with the built-in model, which is small, at the
lengths asked for; each forward is then priced with LLaDA-8B's sizes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import fastdllm_triton as fdt
from fastdllm_triton.evaluation.cost import Meter
from fastdllm_triton.evaluation.grid import CacheSpec
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
    torch.set_num_threads(1)
    lm, shape, gpu = fdt.load("tiny", device="cpu"), SHAPES[arguments.model], GPUS[arguments.gpu]
    length = arguments.gen_length
    lm.network.config = replace(lm.config, max_length=arguments.prompt + length)
    steps = length // arguments.tokens_per_forward
    prompt = [5] * arguments.prompt

    print(f"{shape.name}, prompt {arguments.prompt}, {length} tokens in blocks of {arguments.block_length}, ", end="")
    print(f"{arguments.tokens_per_forward} tokens a forward, batch 1; floor on {gpu.name}\n")
    print("| cache | TFLOP | of dual's | TB | of dual's | floor, s |\n|---|---|---|---|---|---|")
    found: dict[str, tuple[Cost, float]] = {}
    for name in CACHES:
        spec = CacheSpec.parse(name)
        config = fdt.GenerationConfig(
            gen_length=length,
            block_length=arguments.block_length,
            cache=spec.name,
            strategy=fdt.FixedSteps(steps),
            stop_at_eos=False,
            **dict(spec.options),  # type: ignore[arg-type]
        )
        meter = Meter(shape, [arguments.prompt], config)
        output = lm.generate([prompt], config, callback=meter)
        forwards = meter.forwards(output)
        cost = sum((forward_cost(shape, 1, *sizes) for sizes in forwards[0]), Cost(0, 0))
        found[name] = cost, sum(forward_cost(shape, 1, *sizes).seconds(gpu) for sizes in forwards[0])
    base = found["dual"][0]
    for name, (cost, seconds) in found.items():
        row = (name, f"{cost.flops / 1e12:.1f}", f"{cost.flops / base.flops:.2f}", f"{cost.bytes / 1e12:.3f}")
        print("|", " | ".join((*row, f"{cost.bytes / base.bytes:.2f}", f"{seconds:.3f}")), "|")


if __name__ == "__main__":
    main()

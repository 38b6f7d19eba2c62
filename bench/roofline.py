"""The floor of a step and of a generation from a model's shape, for a GPU described by two numbers. Needs no GPU.

python bench/roofline.py --model llada-8b --gpu h200 --prompt 1000 --gen 256 --tpf 3.25
"""

import typer

from fastdllm_triton.commands.roofline import roofline

if __name__ == "__main__":
    typer.run(roofline)

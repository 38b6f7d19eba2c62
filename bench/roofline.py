"""The floor of a step and of a generation from a model's shape, for a GPU described by two numbers. Needs no GPU.

python bench/roofline.py --model llada-8b --gpu h200 --prompt-length 1000 --gen-length 256 --tokens-per-forward 3.25
"""

from fastdllm_triton.bench._session import run_command

if __name__ == "__main__":
    run_command("roofline")

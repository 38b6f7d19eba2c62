"""Packaging. The package's ``kernels``, ``reference`` and ``bench`` are links to the folders of the same names beside it."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

#: The repository on the web, given when a release is built. A package index shows the README without the files beside it.
URL = os.environ.get("PROJECT_URL", "").rstrip("/")


def long_description() -> str:
    """The README with absolute links and pictures; without a URL, with the words of relative ones alone."""

    def absolute(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        return f"{picture}[{words}]({URL}/{'raw' if picture else 'blob'}/main/{target})" if URL else words

    return re.sub(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)", absolute, Path("README.md").read_text(encoding="utf-8"))


BENCH = ["jinja2>=3.1", "matplotlib>=3.8"]
TEST = ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.5", *BENCH]
LINT = ["import-linter>=2.1", "mypy>=1.11", "ruff>=0.6"]

setup(
    name="fastdllm-triton",
    version="0.1.0",
    description="Fast-dLLM decoding of masked-diffusion language models (LLaDA, Dream, SDAR) with fused Triton kernels",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=URL or None,
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fastdllm_triton*"]),
    package_data={
        "fastdllm_triton": ["py.typed"],
        "fastdllm_triton.bench": ["page.html"],
        "fastdllm_triton.engine": ["trace.html"],
        "fastdllm_triton.kernels": ["tuned/*.json"],
        "fastdllm_triton.tiny": ["*.json", "*.safetensors", "*.md"],
        # A link to tests/golden; its logits are for the tests alone.
        "fastdllm_triton.verify": [
            f"golden/{model}/{file}"
            for model in ("llada-gqa", "fast-dllm-v2", "sdar")
            for file in ("config.json", "added_tokens.json", "model.safetensors", "cases.jsonl")
        ],
    },
    entry_points={"console_scripts": ["fastdllm-triton=fastdllm_triton.__main__:main"]},
    install_requires=[
        # Each CUDA build of torch pins the triton it was made with: 2.11 takes 3.6.0.
        "torch>=2.11,<2.15",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=4.46",
        "tokenizers>=0.20",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.26",
        "einops>=0.8",
        "numpy>=1.26",
        "typer>=0.12",
        "rich>=13",
    ],
    extras_require={
        "test": TEST,
        "lint": LINT,
        "dev": TEST + LINT,
        "bench": BENCH,
        "eval": ["lm_eval>=0.4.8", "matplotlib>=3.8"],
    },
)
